"""Weights that are no whole checkpoint: said before any is used, by every name that is wrong."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_checkpoints import refusal, rewrite
from safetensors.torch import load_file, save_file

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


def test_a_good_one_gets_as_far_as_its_weights(place):
    """Guards the tests below: what they break is all that keeps this one from being built."""
    with pytest.raises(AssertionError, match="weights were used"):
        import_published(place.folder, place.sources)


@pytest.mark.parametrize("lacking", [1, 2, 3])
def test_a_missing_shard_without_an_index(place, lacking):
    """Guards folders that were copied in part: shards say how many they are."""
    (place.folder / "model.safetensors.index.json").unlink()
    with pytest.raises(AssertionError, match="weights were used"):
        import_published(place.folder, place.sources)
    (place.folder / f"model-{lacking:05d}-of-00003.safetensors").unlink()
    message = refusal(place.folder, place.sources)
    assert f"lacks model-{lacking:05d}-of-00003.safetensors (1 of 3 shards)" in message


def test_a_missing_shard(place):
    (place.folder / "model-00002-of-00003.safetensors").unlink()
    message = refusal(place.folder, place.sources)
    assert "lacks model-00002-of-00003.safetensors (1 of 3 shards" in message
    assert "Download the checkpoint again" in message


@pytest.mark.parametrize("kept", [0, 4, 600, -8])
def test_a_truncated_shard(place, kept):
    path = place.folder / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path} is not a readable safetensors file" in refusal(place.folder, place.sources)


@pytest.mark.parametrize("kept", [0, 100, -200])
def test_a_truncated_pickle(place, tmp_path, kept):
    folder = write_checkpoint(tmp_path / "bin", drawn(llava_shapes(TINY, False)), llava_settings(TINY), 1, pickled=True)
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:kept])
    sources = Sources(place.sources.vision_tower, unpickle=True)
    assert f"{path} cannot be read as tensors" in refusal(folder, sources)


@pytest.mark.parametrize("content", [b".", b"h\x00.", b"}\x85.", b"\x80\x02t."])
def test_bytes_that_lead_the_reader_astray(place, tmp_path, content):
    """Guards against tracebacks: what the reader raises depends on where the bytes lead it."""
    folder = write_checkpoint(tmp_path / "bin", drawn(llava_shapes(TINY, False)), llava_settings(TINY), 1, pickled=True)
    path = folder / "pytorch_model.bin"
    path.write_bytes(content)
    assert f"{path} cannot be read as tensors" in refusal(folder, Sources(place.sources.vision_tower, unpickle=True))


def test_a_shard_of_another_download(place):
    """Guards against shards that were mixed: the index names what the shard does not hold."""
    path = place.folder / "model-00001-of-00003.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    message = refusal(place.folder, place.sources)
    assert f"lacks {name} (1 tensors)" in message
    assert "mixed" in message


def test_an_index_that_leads_elsewhere(place):
    index = place.folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../clip/model.safetensors"}}))
    assert "'../clip/model.safetensors', which is no .safetensors file beside it" in refusal(
        place.folder, place.sources
    )
    for strange in ("..", "", "config.json", "/etc/passwd", "clip/model.safetensors"):
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": strange}}))
        assert "It is not followed" in refusal(place.folder, place.sources)
    for broken in ("{", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'):
        index.write_text(broken)
        assert "Download it again" in refusal(place.folder, place.sources)


def test_pickles_are_read_only_when_allowed_and_never_run(place, tmp_path):
    """Guards the one place where pickles may be read: by leave, and tensors alone."""
    folder = write_checkpoint(tmp_path / "bin", drawn(llava_shapes(TINY, False)), llava_settings(TINY), 2, pickled=True)
    write_tokenizer(folder)
    message = refusal(folder, place.sources)
    assert "pytorch_model-00001-of-00002.bin is a pickle" in message
    assert "--unpickle" in message
    allowed = Sources(place.sources.vision_tower, unpickle=True)
    with pytest.raises(AssertionError, match="weights were used"):
        import_published(folder, allowed)
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (trap,))

    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        write({"lm_head.weight": Trap()}, folder / "pytorch_model-00001-of-00002.bin")
        assert "holds more than tensors, which is never unpickled" in refusal(folder, allowed)
        assert not trap.exists()
    torch.save([torch.ones(2)], folder / "pytorch_model-00001-of-00002.bin")
    assert "holds a list, no tensors by name" in refusal(folder, allowed)


def test_names_that_have_no_place_and_places_without_a_name(place):
    """Guards coverage on both sides: every name is told, those of many layers once."""

    def change(tensors: Any) -> None:
        for name in [name for name in tensors if "mlp.up_proj" in name or name == "model.norm.weight"]:
            del tensors[name]
        tensors["model.layers.1.mlp.new_proj.weight"] = torch.ones(2)
        tensors["model.extra"] = torch.ones(1)

    for shard in (1, 2, 3):
        rewrite(
            place.folder,
            change
            if shard == 1
            else lambda tensors: [
                tensors.pop(name) for name in list(tensors) if "mlp.up_proj" in name or name == "model.norm.weight"
            ],
            shard,
        )
    message = refusal(place.folder, place.sources)
    assert "without a place: model.layers.1.mlp.new_proj.weight, model.extra" in message.replace(
        "model.extra, model.layers.1.mlp.new_proj.weight", "model.layers.1.mlp.new_proj.weight, model.extra"
    )
    assert "model.language_model.layers.{0-2}.mlp.up_proj.weight" in message
    assert "model.language_model.norm.weight" in message
    assert "A shard is missing, or the configuration is of a larger model" in message


def test_weights_that_were_not_gathered(place):
    """Guards against checkpoints that ZeRO-3 wrote without gathering them."""
    rewrite(place.folder, lambda tensors: tensors.update({sorted(tensors)[0]: torch.empty(0)}))
    assert "saved under ZeRO-3 without gathering" in refusal(place.folder, place.sources)


def test_a_quantised_checkpoint(place, monkeypatch):
    monkeypatch.undo()
    for shard in (1, 2, 3):
        rewrite(place.folder, lambda t: t.update({n: v.to(torch.int8) for n, v in t.items() if "embed" in n}), shard)
    assert "is of torch.int8: a quantised checkpoint" in refusal(place.folder, place.sources)


def test_a_name_in_two_files(place):
    """Guards against files of two checkpoints in one folder: neither wins in silence."""
    for path in place.folder.glob("model*"):
        path.unlink()
    tensors = drawn(llava_shapes(TINY, tower=False))
    save_file(tensors, place.folder / "a.safetensors")
    save_file({"lm_head.weight": torch.zeros_like(tensors["lm_head.weight"])}, place.folder / "b.safetensors")
    assert "lm_head.weight (1 tensors) is in another file of the folder too" in refusal(place.folder, place.sources)


def test_an_integer_weight_of_a_quantised_layer(place, monkeypatch):
    monkeypatch.undo()
    for shard in (1, 2, 3):
        rewrite(place.folder, lambda t: t.update({n: v.to(torch.int8) for n, v in t.items() if "up_proj" in n}), shard)
    assert "up_proj.weight is of torch.int8: a quantised checkpoint" in refusal(place.folder, place.sources)


def test_a_first_stages_file_beside_a_whole_model(place):
    """Guards the layout of the released repository, which holds both: the whole model counts."""
    save_file({"model.mm_projector.0.weight": torch.ones(1)}, place.folder / "mm_projector.safetensors")
    with pytest.raises(AssertionError, match="weights were used"):
        import_published(place.folder, place.sources)
    for path in place.folder.glob("model*"):
        path.unlink()
    write_checkpoint(place.folder, drawn(llava_shapes(TINY, False)), llava_settings(TINY), 2, pickled=True)
    with pytest.raises(AssertionError, match="weights were used"):
        import_published(place.folder, replace(place.sources, unpickle=True))
