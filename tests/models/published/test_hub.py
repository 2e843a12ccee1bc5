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
    projector_shapes,
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
        others = ("training_args.bin", "optimizer.pt", "flax_model.msgpack", "pytorch_model-00001-of-00003.bin")
        for name in (*others, "checkpoint-1/config.json"):
            (hub.place.folder / name).write_text("large")
        with pytest.raises(AssertionError, match="weights were used"):
            import_published("someone/llava@1f2e3d", Sources(vision_tower="openai/clip", unpickle=True))
        assert set(hub.asked) == {("someone/llava", "1f2e3d"), ("openai/clip", None)}  # a commit where one is named
        fetched = {path.name for path in (hub.cache / "someone/llava").iterdir()}
        assert {"config.json", "tokenizer.model", "model-00001-of-00003.safetensors"} <= fetched
        assert not fetched & set(others)  # of weights in both formats, safetensors
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

    @pytest.mark.parametrize(
        ("change", "words"),
        [({"image_aspect_ratio": "anyres"}, "anyres"), ({"mm_vision_tower": ..., "text_config": {}}, "own layout")],
    )
    def test_what_is_refused_for_its_settings_is_refused_before_weights_are_fetched(self, hub, change, words):
        """Guards an hour of downloading for a sentence."""
        edit(hub.place.folder, **change)
        assert words in refusal("someone/llava", Sources(vision_tower="openai/clip"))
        assert not list((hub.cache / "someone/llava").glob("*.safetensors"))

    def test_a_first_stage_whose_pickle_was_left_there(self, hub):
        """Guards the order of remedies: which checkpoint it is cannot be told before its files are allowed."""
        for path in hub.place.folder.glob("model*"):
            path.unlink()
        write_checkpoint(hub.place.folder, drawn(projector_shapes(TINY)), llava_settings(TINY), 1, True, "mm_projector")
        sources = Sources(vision_tower="openai/clip", language_model="someone/vicuna")
        assert "allow those with --unpickle" in refusal("someone/llava", sources)

    @pytest.mark.parametrize("error", [Exception("a transfer broke off"), OSError(28, "No space left on device")])
    def test_whatever_a_download_raises_is_told(self, hub, monkeypatch, error):
        def broken(*_, **__):
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
        message = refusal("someone/llava", Sources())
        assert "cannot be fetched from the hub" in message
        assert str(error) in message

    def test_of_a_tower_that_says_how_many_heads_it_has_the_settings_are_enough(self, hub):
        folder = write_checkpoint(
            hub.place.root / "own", drawn(llava_shapes(TINY, True)), llava_settings(TINY, mm_vision_tower="/data/clip")
        )
        write_tokenizer(folder)
        (hub.place.root / "clip" / "model.safetensors").unlink()
        for tower in ("openai/clip", str(hub.place.root / "clip")):
            with pytest.raises(AssertionError, match="weights were used"):
                import_published(folder, Sources(vision_tower=tower))

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
