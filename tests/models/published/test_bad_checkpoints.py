"""What is no whole checkpoint of its configuration: said before any weight is used, by every name that is wrong."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from published import (
    TINY,
    clip_shapes,
    drawn,
    llava_hr_settings,
    llava_hr_shapes,
    llava_settings,
    llava_shapes,
    projector_shapes,
    write_checkpoint,
    write_clip,
    write_tokenizer,
)
from routing_experts.errors import CheckpointError
from routing_experts.models.published import blueprint
from routing_experts.models.published.reading import import_published
from routing_experts.models.published.sources import Sources


@pytest.fixture
def place(tmp_path, monkeypatch) -> Any:
    """A good checkpoint of three shards, and a model that must not be built."""

    def never(self: Any, wanted: Any) -> Any:
        raise AssertionError("weights were used")

    monkeypatch.setattr(blueprint.Blueprint, "build", never)
    folder = write_checkpoint(tmp_path / "llava", drawn(llava_shapes(TINY, tower=False)), llava_settings(TINY), 3)
    write_tokenizer(folder)
    write_clip(tmp_path / "clip", TINY)
    return SimpleNamespace(folder=folder, root=tmp_path, sources=Sources(vision_tower=str(tmp_path / "clip")))


def refusal(folder: Path | str, sources: Sources) -> str:
    with pytest.raises(CheckpointError) as told:
        import_published(folder, sources)
    return str(told.value)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not ...}))


def rewrite(folder: Path, change: Any, shard: int = 1) -> None:
    """Changes one shard's tensors, and the index with it."""
    path = folder / f"model-{shard:05d}-of-00003.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    index = folder / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    kept = {name: file for name, file in told["weight_map"].items() if file != path.name}
    index.write_text(json.dumps({"weight_map": kept | dict.fromkeys(tensors, path.name)}))


def test_a_good_one_gets_as_far_as_its_weights(place):
    """Guards the tests below: what they break is all that keeps this one from being built."""
    with pytest.raises(AssertionError, match="weights were used"):
        import_published(place.folder, place.sources)


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
    assert "model.language_model.layers.*.mlp.up_proj.weight (3 of them)" in message
    assert "model.language_model.norm.weight" in message
    assert "A shard is missing, or the configuration is of a larger model" in message


def test_a_wrong_vocabulary(place):
    edit(place.folder, vocab_size=TINY.vocabulary + 3)
    message = refusal(place.folder, place.sources)
    assert f"model.embed_tokens.weight [{TINY.vocabulary}, 32], where [{TINY.vocabulary + 3}, 32] is due" in message
    assert "vocabulary is another one's" in message


@pytest.mark.parametrize("more", [-2, 3])
def test_a_tokenizer_of_another_vocabulary(place, more):
    """Guards against a tokenizer that was exchanged: too many tokens, or rows that no token stands for."""
    rows = TINY.vocabulary + more
    changes = drawn(llava_shapes(TINY, False))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        changes[name] = torch.ones(rows, TINY.hidden)
    folder = write_checkpoint(place.root / "other", changes, llava_settings(TINY, vocab_size=rows))
    write_tokenizer(folder)
    assert f"a tokenizer of {TINY.vocabulary} tokens, embeddings of {rows}" in refusal(folder, place.sources)


def test_a_checkpoint_without_tokenizer(place):
    for path in place.folder.glob("tokenizer*"):
        path.unlink()
    assert "neither tokenizer.model nor tokenizer.json" in refusal(place.folder, place.sources)


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


MALFORMED = {
    "text for a number": {"vocab_size": "many"},
    "heads that do not divide": {"num_attention_heads": 5, "num_key_value_heads": 5},
    "no heads": {"num_attention_heads": 0},
    "a negative width": {"hidden_size": -4},
    "an unknown activation": {"hidden_act": "nope"},
    "an unknown rotation": {"rope_scaling": {"type": "foo", "factor": 2.0}},
    "a rotation that is a list": {"rope_scaling": [1]},
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_settings_that_no_model_can_be_made_of(place, kind):
    edit(place.folder, **MALFORMED[kind])
    message = refusal(place.folder, place.sources)
    assert f"{place.folder}/config.json describes no model" in message


@pytest.mark.parametrize("layer", [None, "last", 5, -6])
def test_a_layer_that_the_tower_lacks(place, layer):
    edit(place.folder, mm_vision_select_layer=layer)
    assert f"mm_vision_select_layer {layer!r} of a tower of 4 layers" in refusal(place.folder, place.sources)


def test_another_language_model(place):
    edit(place.folder, architectures=["LlavaMistralForCausalLM"])
    assert "none around a Llama" in refusal(place.folder, place.sources)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{"),
        ("tokenizer.model", "no pieces"),
    ],
)
def test_a_broken_tokenizer(place, name, text):
    (place.folder / name).write_text(text)
    assert "its tokenizer cannot be read" in refusal(place.folder, place.sources)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("embeddings.position_embedding.weight", (8, 16)),
        ("embeddings.position_embedding.weight", None),
        ("embeddings.patch_embedding.weight", (16,)),
    ],
)
def test_a_tower_without_a_square_of_patches(place, name, shape):
    path = place.root / "clip" / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"vision_model.{name}"]
    save_file(tensors | ({f"vision_model.{name}": torch.ones(shape)} if shape else {}), path)
    assert "are no CLIP tower's" in refusal(place.folder, place.sources)


@pytest.mark.parametrize("text", ["{", "[]", '{"vision_config": 3}'])
def test_a_towers_broken_configuration(place, text):
    (place.root / "clip" / "config.json").write_text(text)
    assert "config.json" in refusal(place.folder, place.sources)


def test_a_first_stages_file_beside_a_whole_model(place):
    """Guards the layout of the released repository, which holds both: the whole model counts."""
    save_file({"model.mm_projector.0.weight": torch.ones(1)}, place.folder / "mm_projector.safetensors")
    with pytest.raises(AssertionError, match="weights were used"):
        import_published(place.folder, place.sources)


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
            for path in held[name].iterdir():
                if any(path.match(pattern) for pattern in allow_patterns):
                    (target / path.name).write_bytes(path.read_bytes())
            return str(target)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return SimpleNamespace(place=place, cache=place.root / "cache", asked=asked)

    def test_weights_and_texts_are_fetched_and_nothing_else(self, hub):
        for name in ("training_args.bin", "optimizer.pt", "flax_model.msgpack"):
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
            import_published(hub.place.folder, Sources(vision_tower="openai/clip"))
        inside = drawn(llava_shapes(TINY, tower=True))
        folder = write_checkpoint(hub.place.root / "own", inside, llava_settings(TINY, mm_vision_tower="/data/clip"))
        write_tokenizer(folder)
        with pytest.raises(AssertionError, match="weights were used"):
            import_published(folder, Sources(vision_tower="openai/clip"))


def test_a_slow_tower_that_would_be_ignored(place):
    sources = Sources(place.sources.vision_tower, slow_tower="/nowhere")
    assert "--slow-tower would be ignored" in refusal(place.folder, sources)


FAMILIES = {
    "transformers": ({"text_config": {}, "vision_config": {}}, "in transformers' own layout.*Use it as it is"),
    "VILA": ({"llm_cfg": {}, "mm_vision_tower": None}, "VILA-1.5"),
    "MoE-LLaVA": ({"moe": {"moe_enable": True}}, "MoE-LLaVA"),
    "a language model": ({"mm_vision_tower": ..., "model_type": "llama"}, "'llama' without mm_vision_tower"),
    "LLaVA-1.0": ({"mm_projector_type": ...}, "mm_projector_type 'linear'"),
    "LLaVA-1.6": ({"image_aspect_ratio": "anyres"}, "'anyres' cuts pictures into tiles"),
    "tokens of its own": ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
    "one path": ({"is_multipath_encoder": False, "vision_tower_slow": "convnext"}, "is_multipath_encoder is off"),
    "no size": ({"hidden_size": ...}, "does not say hidden_size"),
    "a feature of its own": ({"mm_vision_select_feature": "pooled"}, "'pooled' is none of patch, cls_patch"),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_checkpoints_of_other_models(place, kind):
    changes, expected = FAMILIES[kind]
    edit(place.folder, **changes)
    with pytest.raises(CheckpointError, match=expected):
        import_published(place.folder, place.sources)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("model.layers.0.adapter_MHA.conv_A.weight", "name the model that it began from (--base)"),
        ("model.layers.0.mlp.deepspeed_moe.gate.wg.weight", "MoE-LLaVA"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "merge them into their base first"),
        ("model.vision_tower.align_stages.0.fast_proj.weight", "LLaVA-HR, but its configuration lacks"),
    ],
)
def test_names_tell_what_it_is_instead(place, name, cause):
    rewrite(place.folder, lambda tensors: tensors.update({name: torch.ones(1)}))
    message = refusal(place.folder, place.sources)
    assert name in message
    assert cause in message


def test_a_first_stage_given_as_a_whole_model(place):
    projector = drawn(projector_shapes(TINY))
    for pickled in (True, False):
        folder = place.root / f"one-{pickled}"
        write_checkpoint(folder, projector, llava_settings(TINY), 1, pickled, stem="mm_projector")
        message = refusal(folder, place.sources)
        assert "of the first training stage" in message
        assert "--language-model" in message


def test_a_language_model_beside_a_whole_one(place):
    sources = Sources(place.sources.vision_tower, language_model=str(place.folder))
    assert "is a whole model, with its own language model" in refusal(place.folder, sources)


def test_a_siglip_for_a_clip(place):
    """Guards towers of another family: SigLIP has no class embedding, whatever else has the same names."""
    siglip = {name: value for name, value in drawn(clip_shapes(TINY, "vision_model.")).items() if "class_" not in name}
    siglip |= {"vision_model.head.probe": torch.ones(1, 1, TINY.clip)}
    save_file(siglip, place.root / "clip" / "model.safetensors")
    message = refusal(place.folder, place.sources)
    assert "holds a SigLIP tower where a CLIP tower is due" in message


def test_another_towers_configuration(place):
    config = place.root / "clip" / "config.json"
    told = json.loads(config.read_text())
    told["vision_config"]["num_hidden_layers"] = 5
    config.write_text(json.dumps(told))
    message = refusal(place.folder, place.sources)
    assert "{'num_hidden_layers': 5}" in message
    assert "another tower's configuration" in message


def test_a_tower_of_another_width(place):
    wider = type(TINY)(clip=24, clip_heads=2)
    write_clip(place.root / "wide", wider)
    message = refusal(place.folder, Sources(vision_tower=str(place.root / "wide")))
    assert "model.mm_projector.0.weight [32, 16], where [32, 24] is due" in message


def test_a_tower_that_is_neither_here_nor_known(place, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "on the hub it cannot be reached" in refusal(place.folder, Sources())
    edit(place.folder, mm_vision_tower="/somebody/elses/clip")
    assert "/somebody/elses/clip is no folder here and no hub name" in refusal(place.folder, Sources())
    edit(place.folder, mm_vision_tower=None)
    assert "names none (mm_vision_tower)" in refusal(place.folder, Sources())
    inside = write_checkpoint(
        place.root / "own", drawn(llava_shapes(TINY, True)), llava_settings(TINY, mm_vision_tower="x/y")
    )
    assert "number of attention heads" in refusal(inside, Sources())


def test_a_folder_without_weights_or_configuration(place, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(tmp_path / "empty", place.sources)
    (tmp_path / "empty" / "config.json").write_text("[]")
    assert "holds a list" in refusal(tmp_path / "empty", place.sources)
    (tmp_path / "empty" / "config.json").write_text(json.dumps(llava_settings(TINY)))
    assert "holds no weights" in refusal(tmp_path / "empty", place.sources)
    assert "is no folder here and no hub name" in refusal(tmp_path / "nowhere", place.sources)


@pytest.mark.parametrize(
    ("settings", "dropped", "expected"),
    [
        ({"freeze_vision": True}, (), "freeze_vision says whether"),
        ({}, ("align_stages_latent.2",), "freeze_vision says whether"),
        ({}, ("stages.3.blocks",), "no ConvNeXt of four stages"),
        ({}, ("stages.2.blocks.0.",), "high-resolution tower"),
    ],
)
def test_towers_of_a_llava_hr_that_do_not_fit(place, settings, dropped, expected):
    kept = {n: s for n, s in llava_hr_shapes(TINY).items() if not any(part in n for part in dropped)}
    told = llava_hr_settings(TINY, input_image_size=256, **settings)
    folder = write_checkpoint(place.root / "hr", drawn(kept), told)
    write_tokenizer(folder)
    with pytest.raises(CheckpointError, match=expected):
        import_published(folder, place.sources)


def test_a_first_stage_of_llava_hr_without_its_slow_tower(place):
    settings = llava_hr_settings(TINY, freeze_vision=True, input_image_size=256)
    folder = write_checkpoint(place.root / "one", drawn(projector_shapes(TINY)), settings, 1, stem="mm_projector")
    sources = Sources(place.sources.vision_tower, language_model=str(place.folder))
    assert "--slow-tower" in refusal(folder, sources)
