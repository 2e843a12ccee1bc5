"""LLaVA-1.5 as its authors publish it, against plain arithmetic, SentencePiece's own ids, and every name at full size.

Guards contract: the native model and an imported checkpoint give equal ids, pixels and logits.
"""

import itertools
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import plain
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from published import (
    SIZES_7B,
    SIZES_13B,
    TINY,
    VICUNA_SYSTEM,
    clip_shapes,
    drawn,
    language_shapes,
    llava_settings,
    llava_shapes,
    outline,
    projector_shapes,
    write_checkpoint,
    write_clip,
    write_tokenizer,
)
from routing_experts.data.encode import Encoder
from routing_experts.data.markers import find_markers
from routing_experts.data.prompts import render
from routing_experts.data.records import Record, Turn
from routing_experts.data.templates import chat_template_of
from routing_experts.models.load import load_processor
from routing_experts.models.published.blueprint import shapes_of
from routing_experts.models.published.llava import llava_blueprint
from routing_experts.models.published.reading import import_published
from routing_experts.models.published.sources import Sources
from routing_experts.models.published.writing import write_model


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Any:
    """A checkpoint without vision weights, a stock tower beside it, and both imported."""
    root = tmp_path_factory.mktemp("published")
    tensors = drawn(llava_shapes(TINY, tower=False))
    folder = write_checkpoint(root / "llava", tensors, llava_settings(TINY))
    pieces = write_tokenizer(folder)
    vision = write_clip(root / "clip", TINY)
    model, processor = import_published(folder, Sources(vision_tower=str(root / "clip")))
    processor.chat_template = chat_template_of(processor, "vicuna_v1")
    write_model(model, processor, root / "imported")
    whole = tensors | {
        name.replace("vision_model.", "model.vision_tower.vision_tower.vision_model.", 1): value
        for name, value in vision.items()
    }
    return SimpleNamespace(
        root=root,
        folder=folder,
        tensors=whole,
        pieces=pieces,
        model=model,
        processor=processor,
        loaded=root / "imported",
    )


PICTURES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (h, w, 3), np.uint8))
    for i, (h, w) in enumerate([(30, 18), (20, 20), (11, 40)])
]
DIALOGUES = {
    "no picture": ([], [("How many boats left?", "")]),
    "one picture": ([0], [("<image>\nWhat is it?", "")]),
    "two pictures": ([0, 1], [("<image>\n<image>\nWhich is larger?", "")]),
    "two pictures side by side": ([1, 2], [("<image><image>Which is larger?", "")]),
    "a picture behind words": ([2], [("Look at this <image> and say what it is.", "")]),
    "three turns": (
        [1],
        [("<image>\nWhat is it?", "A kite."), ("Which colour?", "Red, 7 of 9"), ("Why?\nTell me.", "")],
    ),
    "three answered turns": ([2], [("What is it?\n<image>", "A kite."), ("Which colour?", "Red"), ("Why?", "Wind.")]),
}


def by_hand(pieces: Any, turns: list[tuple[str, str]]) -> list[int]:
    """LLaVA's own way: one text, split at its pictures, each piece by SentencePiece on its own; -200 for pictures.

    The end token splits a piece too; Vicuna's tokenizer is not a legacy one, so what follows it gets no space.
    """
    text = VICUNA_SYSTEM + " "
    for question, answer in turns:
        if question.count("<image>") == 1:  # LLaVA's code moves it to the front
            question = "<image>\n" + question.replace("<image>", "").strip()
        text += f"USER: {question} ASSISTANT:" + (f" {answer}</s>" if answer else "")
    ids = [1]
    for number, chunk in enumerate(text.split("<image>")):
        ids += [-200] * bool(number)
        for place, said in enumerate(chunk.split("</s>")):
            ids += [2] * bool(place)
            tokens = pieces.encode(said if not place else f"\x01{said}")
            if place:  # SentencePiece puts a space before every text: it goes, with the letter that held its place
                tokens = tokens[len(pieces.encode("\x01")) :]
            ids += tokens
    return ids


def expanded(ids: list[int], image: int) -> list[int]:
    return list(itertools.chain.from_iterable([image] * TINY.patches if i == -200 else [i] for i in ids))


def record_of(pictures: list[int], turns: list[tuple[str, str]]) -> Record:
    return Record("r", tuple(Turn(*turn) for turn in turns), tuple(PICTURES[i] for i in pictures))


def pixels_by_hand(picture: Image.Image) -> torch.Tensor:
    """Padded in the mean colour, scaled, normalised; as LLaVA's code pads and CLIP's processor scales."""
    side = max(picture.size)
    canvas = Image.new("RGB", (side, side), (122, 116, 104))
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    values = np.asarray(canvas.resize((TINY.image, TINY.image), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return torch.from_numpy(((values - mean) / std).transpose(2, 0, 1))


@pytest.mark.parametrize("name", DIALOGUES)
def test_ids_pixels_and_logits_are_those_of_the_original(published, name):
    """Guards the whole path: the processor's ids and pixels, and the model's logits, beside a reference of its own."""
    pictures, turns = DIALOGUES[name]
    encoded = Encoder(published.processor, "vicuna_v1")(record_of(pictures, turns))
    ids = by_hand(published.pieces, turns)
    assert encoded.input_ids.tolist() == expanded(ids, published.model.config.image_token_id)
    expected = [pixels_by_hand(PICTURES[i]) for i in pictures]
    for got, want in zip(encoded.vision.get("pixel_values", ()), expected, strict=True):
        assert (got - want).abs().max() < 1e-6
    t = {name: value.double() for name, value in published.tensors.items()}
    features = [plain.projected(t, plain.clip_features(t, picture, TINY)) for picture in expected]
    spliced = torch.cat([plain.spliced(t, [i], [f]) if i != -200 else f for i, f in _in_order(ids, features)])
    want = plain.llama_logits(t, spliced, TINY)
    model = LlavaForConditionalGeneration.from_pretrained(published.loaded, dtype=torch.float64)
    pixels = {"pixel_values": torch.stack(expected)} if expected else {}
    with torch.no_grad():
        got = model(input_ids=encoded.input_ids[None], **pixels).logits[0]
    assert (got[:, : TINY.vocabulary] - want).abs().max() < 1e-5 * want.abs().max()


def _in_order(ids: list[int], features: list[torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
    left = list(features)
    return [(i, left.pop(0) if i == -200 else torch.empty(0)) for i in ids]


@pytest.mark.parametrize("name", DIALOGUES)
def test_the_chat_template_writes_what_the_format_writes(published, name):
    """Guards the saved processor: whoever asks through the template asks as the model was trained."""
    pictures, turns = DIALOGUES[name]
    record = record_of(pictures, turns)
    if "<image><image>" in record.turns[0].question:
        pytest.skip("a template puts a line break behind every picture")
    loaded = load_processor(published.loaded)
    template = render(loaded, record.turns, "", "chat_template")
    assert template == render(loaded, record.turns, "", "vicuna_v1")
    named = render(loaded, record.turns, "Be brief.", "chat_template")
    assert named == render(loaded, record.turns, "Be brief.", "vicuna_v1")
    assert Encoder(loaded)(record).input_ids.tolist() == expanded(by_hand(published.pieces, turns), TINY.vocabulary)


def test_turns_are_found_again_in_the_ids(published):
    """Guards markers of an imported model: routing tokens see the question that they should."""
    for prompt_format in ("vicuna_v1", "chat_template"):
        markers = find_markers(published.processor, prompt_format)
        assert markers is not None
        opening = published.processor.tokenizer.convert_ids_to_tokens(list(markers.user_prompt))
        assert "".join(opening) == "▁USER:"


def test_the_vocabulary_grows_as_transformers_own_conversion_grows_it(published):
    """Guards ids of the two new tokens and what their rows hold: finite, and those of old tokens untouched."""
    tokenizer, model = published.processor.tokenizer, published.model
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [TINY.vocabulary, TINY.vocabulary + 1]
    assert model.config.image_token_id == TINY.vocabulary
    assert model.config.text_config.pad_token_id == tokenizer.pad_token_id == TINY.vocabulary + 1
    for grown, name in ((model.get_input_embeddings(), "model.embed_tokens"), (model.lm_head, "lm_head")):
        assert len(grown.weight) % 64 == 0
        assert torch.equal(grown.weight[: TINY.vocabulary], published.tensors[f"{name}.weight"])
        assert grown.weight.isfinite().all()
        assert (grown.weight[TINY.vocabulary] - grown.weight[: TINY.vocabulary].mean(0)).abs().max() < 0.1
    again, _ = import_published(published.folder, Sources(vision_tower=str(published.root / "clip")))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_what_is_saved_is_a_native_llava(published):
    """Guards the result: transformers loads it on its own, in the checkpoint's precision, nothing missing."""
    model, told = LlavaForConditionalGeneration.from_pretrained(published.loaded, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), published.model.state_dict().values(), strict=True)
    )
    assert type(AutoModelForImageTextToText.from_pretrained(published.loaded)) is LlavaForConditionalGeneration


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_towers_inside_and_files_of_any_kind_give_one_model(published, tmp_path, pickled, shards):
    """Guards checkpoints of one's own training, which hold the tower, and both kinds of file, in half precision."""
    half = {name: value.half() for name, value in published.tensors.items()}
    folder = write_checkpoint(tmp_path / "own", half, llava_settings(TINY), shards, pickled)
    write_tokenizer(folder)
    sources = Sources(vision_tower=str(published.root / "clip"), unpickle=pickled)
    model, _ = import_published(folder, sources)
    assert model.dtype == torch.float16
    tower = model.model.vision_tower.state_dict()
    assert torch.equal(tower["pre_layrnorm.weight"], published.model.model.vision_tower.pre_layrnorm.weight.half())
    for name, value in published.model.state_dict().items():
        if not name.endswith(("embed_tokens.weight", "lm_head.weight")):
            assert torch.equal(model.state_dict()[name], value.half()), name


@pytest.mark.parametrize("sizes", [SIZES_7B, SIZES_13B], ids=["7B", "13B"])
@pytest.mark.parametrize("inside", [False, True], ids=["stock tower", "tower inside"])
def test_every_name_and_shape_of_the_published_sizes_is_covered(sizes, inside, tmp_path, monkeypatch):
    """Guards the real models: no tensor without a place, none of the model's left empty; nothing has any memory."""
    shapes = llava_shapes(sizes, inside) | {"model.layers.0.self_attn.rotary_emb.inv_freq": (64,)}
    stock = clip_shapes(sizes, "vision_model.") | {"text_model.embeddings.position_ids": (1, 77), "logit_scale": ()}
    monkeypatch.setattr(Sources, "open_checkpoint", lambda self, folder: (outline(folder, shapes), ()))
    monkeypatch.setattr(Sources, "open_tower", lambda self, raw: outline(tmp_path, stock))
    blueprint = llava_blueprint(llava_settings(sizes), tmp_path, Sources())
    places = blueprint.places(shapes_of(blueprint.model_class, blueprint.config))
    assert len(places) == len(language_shapes(sizes) | projector_shapes(sizes) | clip_shapes(sizes, ""))
    own, native = blueprint.config.vision_config.to_dict(), LlavaConfig().vision_config.to_dict()
    assert {name: own[name] for name in native if name not in ("projection_dim", "vocab_size")} == {
        name: value for name, value in native.items() if name not in ("projection_dim", "vocab_size")
    }
    assert (blueprint.config.image_seq_length, blueprint.pictures.size, blueprint.pictures.pads) == (576, 336, True)


def test_ids_that_generation_needs_are_the_tokenizers(published):
    """Guards configurations: where answers begin and end, and what padding is."""
    for config in (published.model.config.text_config, published.model.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (1, 2)
        assert config.pad_token_id == TINY.vocabulary + 1
    assert published.model.name_or_path == str(published.folder)


def test_what_shapes_do_not_tell_is_read_from_the_tower_s_configuration(published, tmp_path):
    """Guards other CLIPs than OpenAI's: activation, epsilon and heads."""
    write_clip(tmp_path / "clip", TINY)
    path = tmp_path / "clip" / "config.json"
    told = json.loads(path.read_text())
    told["vision_config"] |= {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "num_attention_heads": 4}
    path.write_text(json.dumps(told))
    model, _ = import_published(published.folder, Sources(vision_tower=str(tmp_path / "clip")))
    vision = model.config.vision_config
    assert (vision.hidden_act, vision.layer_norm_eps, vision.num_attention_heads) == ("gelu", 1e-3, 4)
    assert model.model.vision_tower.pre_layrnorm.eps == 1e-3


@pytest.mark.parametrize("has_head", [False, True])
def test_a_tied_head_is_tied_and_one_of_its_own_is_kept(published, tmp_path, has_head):
    tensors = {name: published.tensors[name] for name in llava_shapes(TINY, tower=False)}
    if not has_head:
        del tensors["lm_head.weight"]
    folder = write_checkpoint(tmp_path / "tied", tensors, llava_settings(TINY, tie_word_embeddings=True))
    write_tokenizer(folder)
    model, processor = import_published(folder, Sources(vision_tower=str(published.root / "clip")))
    write_model(model, processor, tmp_path / "imported")
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "imported")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    old = tensors["lm_head.weight" if has_head else "model.embed_tokens.weight"]
    assert torch.equal(loaded.lm_head.weight[: TINY.vocabulary], old)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == (not has_head)


@pytest.mark.parametrize("prefix", ["model.", ""], ids=["with prefix", "without"])
def test_a_first_stage_is_put_together_with_what_it_was_trained_beside(published, tmp_path, prefix):
    """Guards ``mm_projector.bin``: with its language model and its tower it is the whole model."""
    language = {name: published.tensors[name] for name in language_shapes(TINY)}
    vicuna = write_checkpoint(tmp_path / "vicuna", language, llava_settings(TINY), shards=2)
    write_tokenizer(vicuna)
    named = {prefix + name.removeprefix("model."): name for name in projector_shapes(TINY)}
    projector = {new: published.tensors[name] for new, name in named.items()}
    folder = write_checkpoint(tmp_path / "one", projector, llava_settings(TINY), 1, pickled=True, stem="mm_projector")
    sources = Sources(str(published.root / "clip"), None, str(vicuna), unpickle=True)
    model, processor = import_published(folder, sources)
    assert len(processor.tokenizer) == TINY.vocabulary + 2
    for name, value in published.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_settings_reach_the_processor(published, tmp_path):
    """Guards fields that differ between checkpoints: padding, layer and feature."""
    changes = {"image_aspect_ratio": None, "mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": -1}
    tensors = {name: published.tensors[name] for name in llava_shapes(TINY, tower=True)}
    folder = write_checkpoint(tmp_path / "other", tensors, llava_settings(TINY, **changes))
    write_tokenizer(folder)
    model, processor = import_published(folder, Sources(vision_tower=str(published.root / "clip")))
    assert not processor.image_processor.do_pad
    assert model.config.vision_feature_layer == -1
    text = processor(text=["<image>"], images=[PICTURES[0]])["input_ids"][0]
    assert text.count(model.config.image_token_id) == TINY.patches + 1
    pixels = torch.from_numpy(np.asarray(processor.image_processor(PICTURES[0])["pixel_values"]))
    assert len(model.get_image_features(pixel_values=pixels).pooler_output[0]) == TINY.patches + 1


def test_the_tokenizer_that_is_legacy_gets_no_second_space(published, tmp_path):
    """Guards the gap behind pictures: it is written only where the tokenizer would leave it out."""
    folder = write_checkpoint(tmp_path / "legacy", drawn(llava_shapes(TINY, tower=False)), llava_settings(TINY))
    write_tokenizer(folder, legacy=True)
    _, processor = import_published(folder, Sources(vision_tower=str(published.root / "clip")))
    turns = DIALOGUES["one picture"][1]
    ids = Encoder(processor, "vicuna_v1")(record_of([0], turns)).input_ids.tolist()
    assert ids == expanded(by_hand(published.pieces, turns), TINY.vocabulary)
    assert json.loads((folder / "tokenizer_config.json").read_text())["legacy"] is True
