"""Configurations, vocabularies and towers that do not belong to their weights, and checkpoints of other models."""

import json

import pytest
import torch
from bad_checkpoints import edit, refusal, rewrite
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import LlamaTokenizerFast

from published import (
    TINY,
    clip_shapes,
    drawn,
    llava_settings,
    llava_shapes,
    projector_shapes,
    write_checkpoint,
    write_clip,
    write_tokenizer,
)
from routing_experts.errors import CheckpointError
from routing_experts.models.published.reading import import_published
from routing_experts.models.published.sources import Sources


def test_another_width_is_no_other_vocabulary(place):
    """Guards the likely cause: the rows are as many, they are of another length."""
    edit(place.folder, hidden_size=64)
    message = refusal(place.folder, place.sources)
    assert f"model.embed_tokens.weight [{TINY.vocabulary}, 32], where [{TINY.vocabulary}, 64] is due" in message
    assert "vocabulary is another one's" not in message


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


def test_more_layers_than_tensors(place):
    """Guards memory: a number in a file of settings must not make an outline of a million layers."""
    edit(place.folder, num_hidden_layers=10**9)
    assert "says 1000000000 layers, and all of its files hold" in refusal(place.folder, place.sources)


def test_a_tower_of_another_width_than_the_configuration_says(place):
    edit(place.folder, mm_hidden_size=999)
    assert "mm_hidden_size is 999, and the tower is 16 wide" in refusal(place.folder, place.sources)


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
        ("tokenizer.json", '{"version": "1.0", '),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{"),
        ("tokenizer.model", "no pieces"),
    ],
)
def test_a_broken_tokenizer(place, name, text):
    (place.folder / name).write_text(text)
    if name == "tokenizer.json":  # what a library that is written in another language raises has no class of its own
        (place.folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {}}))
    assert "its tokenizer cannot be read" in refusal(place.folder, place.sources)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("embeddings.position_embedding.weight", (8, 16)),
        ("embeddings.position_embedding.weight", None),
        ("embeddings.patch_embedding.weight", (16,)),
        ("encoder.layers.0.mlp.fc1.weight", (1,)),
    ],
)
def test_a_tower_without_a_square_of_patches(place, name, shape):
    path = place.root / "clip" / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"vision_model.{name}"]
    save_file(tensors | ({f"vision_model.{name}": torch.ones(shape)} if shape else {}), path)
    message = refusal(place.folder, place.sources)
    assert "are no CLIP tower's" in message or "where a CLIP tower is due" in message


@pytest.mark.parametrize("text", ["{", "[]", '{"vision_config": 3}'])
def test_a_towers_broken_configuration(place, text):
    (place.root / "clip" / "config.json").write_text(text)
    assert "config.json" in refusal(place.folder, place.sources)


def test_a_tokenizer_that_says_nothing_of_beginnings_and_ends(place):
    """Guards answers that would never end: one file alone does not say which token ends them."""
    tokenizer = LlamaTokenizerFast.from_pretrained(place.folder, legacy=False)
    for path in place.folder.glob("*token*"):
        path.unlink()
    tokenizer.backend_tokenizer.save(str(place.folder / "tokenizer.json"))
    assert "does not say which tokens begin and end a text" in refusal(place.folder, place.sources)


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
    for path in place.folder.glob("model*"):
        path.unlink()
    assert "holds no weights" in refusal(place.folder, sources)  # what it is cannot be told


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
    assert "mm_hidden_size is 16, and the tower is 24 wide" in message
    edit(place.folder, mm_hidden_size=...)
    message = refusal(place.folder, Sources(vision_tower=str(place.root / "wide")))
    assert "model.mm_projector.0.weight [32, 16], where [32, 24] is due" in message


def test_a_tower_that_is_neither_here_nor_known(place, monkeypatch):
    """Guards what is opened: a checkpoint may name the stock towers, and no other folder or repository."""

    def nowhere(*_, **__):
        raise LocalEntryNotFoundError("nothing in the cache, and nobody to ask")

    monkeypatch.setattr("huggingface_hub.snapshot_download", nowhere)
    assert "cannot be fetched from the hub (LocalEntryNotFoundError" in refusal(place.folder, Sources())
    gone = Sources(vision_tower="/somebody/elses/clip")
    assert "/somebody/elses/clip is no folder here and no hub name" in refusal(place.folder, gone)
    for named in (None, str(place.root / "clip"), "someone/clip"):
        edit(place.folder, mm_vision_tower=named)
        message = refusal(place.folder, Sources())
        assert f"names {named!r} (mm_vision_tower)" in message
        assert "name it yourself (--vision-tower)" in message
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
