"""What is asked of the hub, and what is said of what it gives."""

import json
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
from bad_checkpoints import edit, refusal
from safetensors.torch import save_file

from published import (
    TINY,
    drawn,
    llava_settings,
    llava_shapes,
    write_checkpoint,
    write_tokenizer,
)
from routing_experts.models.published.reading import import_published
from routing_experts.models.published.sources import Sources


class TestHub:
    """What is asked of the hub, and what is said of what it gives."""

    @pytest.fixture
    def hub(self, place, monkeypatch):
        """A hub that has two repositories, and gives what its patterns ask for."""
        import huggingface_hub

        held = {"someone/llava": place.folder, "openai/clip": place.root / "clip"}

        asked = []

        def download(name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
            asked.append((name, revision))
            target = place.root / "cache" / name
            target.mkdir(parents=True, exist_ok=True)
            for path in held[name].rglob("*"):
                inside = str(path.relative_to(held[name]))
                if any(fnmatch(inside, pattern) for pattern in ignore_patterns) or not path.is_file():
                    continue
                if any(fnmatch(inside, pattern) for pattern in allow_patterns):
                    (target / path.name).write_bytes(path.read_bytes())
            return str(target)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return SimpleNamespace(place=place, cache=place.root / "cache", asked=asked)

    def test_weights_and_texts_are_fetched_and_nothing_else(self, hub):
        (hub.place.folder / "checkpoint-1").mkdir()
        for name in ("training_args.bin", "optimizer.pt", "flax_model.msgpack", "checkpoint-1/config.json"):
            (hub.place.folder / name).write_text("large")
        with pytest.raises(AssertionError, match="weights were used"):
            import_published("someone/llava@1f2e3d", Sources(vision_tower="openai/clip", unpickle=True))
        assert hub.asked == [
            ("someone/llava", "1f2e3d"),
            ("openai/clip", None),
        ]  # a commit is asked for where one is named
        fetched = {path.name for path in (hub.cache / "someone/llava").iterdir()}
        assert {"config.json", "tokenizer.model", "model-00001-of-00003.safetensors"} <= fetched
        assert not fetched & {"training_args.bin", "optimizer.pt", "flax_model.msgpack"}
        assert json.loads((hub.cache / "someone/llava" / "config.json").read_text())["model_type"] == "llava"

    def test_pickles_alone_are_told_as_such(self, hub):
        for path in hub.place.folder.glob("model*"):
            path.unlink()
        write_checkpoint(hub.place.folder, drawn(llava_shapes(TINY, False)), llava_settings(TINY), 2, pickled=True)
        message = refusal("someone/llava", Sources(vision_tower="openai/clip"))
        assert "is a pickle" in message
        assert "--unpickle" in message
        (hub.place.root / "clip" / "model.safetensors").rename(hub.place.root / "clip" / "pytorch_model.bin")
        save_file(drawn(llava_shapes(TINY, False)), hub.place.folder / "model.safetensors")
        assert "allow those with --unpickle" in refusal(hub.place.folder, Sources(vision_tower="openai/clip"))

    def test_a_fetched_tower_says_how_many_heads_it_has(self, hub):
        edit(hub.place.folder, mm_vision_tower="/data/of/somebody/clip")
        with pytest.raises(AssertionError, match="weights were used"):
            import_published(hub.place.folder, Sources(vision_tower="openai/clip@refs/pr/8"))
        assert hub.asked[-1] == ("openai/clip", "refs/pr/8")
        inside = drawn(llava_shapes(TINY, tower=True))
        folder = write_checkpoint(hub.place.root / "own", inside, llava_settings(TINY, mm_vision_tower="/data/clip"))
        write_tokenizer(folder)
        with pytest.raises(AssertionError, match="weights were used"):
            import_published(folder, Sources(vision_tower="openai/clip"))
