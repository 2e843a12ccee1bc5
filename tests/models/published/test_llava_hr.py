"""LLaVA-HR against plain arithmetic, and as its authors publish it: both sizes, both stages.

Sizes: S is 256, see ``published``.
"""

import json
import math
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import plain
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from published import HR_SETTINGS as SETTINGS
from published import HR_SIDE as SIDE
from published import HR_SPREAD as SPREAD
from published import (
    SIZES_7B,
    SIZES_13B,
    TINY,
    clip_shapes,
    convnext_shapes,
    drawn,
    fusion_shapes,
    language_shapes,
    llava_hr_settings,
    llava_hr_shapes,
    outline,
    projector_shapes,
    stage_one_shapes,
    write_checkpoint,
    write_clip,
    write_tokenizer,
)
from routing_experts.data.encode import Encoder
from routing_experts.data.records import Record, Turn
from routing_experts.data.templates import chat_template_of
from routing_experts.errors import ConfigError, ModelFamilyError
from routing_experts.models.llava_hr import LlavaHrConfig, LlavaHrVisionConfig
from routing_experts.models.llava_hr.adapters import ResolutionAdapter, aligned
from routing_experts.models.llava_hr.modeling import LlavaHrForConditionalGeneration, LlavaHrVisionModel
from routing_experts.models.load import load_processor
from routing_experts.models.published.blueprint import shapes_of
from routing_experts.models.published.language import LANGUAGE_RULES
from routing_experts.models.published.llava_hr import llava_hr_blueprint
from routing_experts.models.published.reading import import_published
from routing_experts.models.published.renames import Part, left_out
from routing_experts.models.published.sources import Sources
from routing_experts.models.published.writing import write_model


@pytest.fixture(scope="module")
def published(published_hr) -> Any:
    return published_hr


def picture(side: int = SIDE, seed: int = 0) -> torch.Tensor:
    return torch.randn(3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(model: Any, *pictures: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.model.vision_tower(torch.stack(pictures)).last_hidden_state


def in_double(folder: Any) -> Any:
    """Loaded anew: a model that is made double stays as it is for the other tests."""
    return LlavaHrForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)


def test_the_tower_computes_what_its_description_says(published):
    """Guards every step of the forward pass, each picture of a batch by itself."""
    pictures = [picture(seed=i) for i in range(2)]
    got = features(in_double(published.loaded), *pictures)
    for one, mine in zip(pictures, got, strict=True):
        want = plain.llava_hr_features(published.t, one, TINY, eps=1e-6)
        assert mine.shape == (64, TINY.clip)
        assert (mine - want).abs().max() < 1e-5 * want.abs().max()
    assert (got[0] - got[1]).abs().max() > 0.1


def test_logits_are_those_of_the_original(published):
    """Guards projector, splicing and the language model behind the tower, with two pictures and a history."""
    model, record = (
        in_double(published.loaded),
        Record(
            "r",
            (Turn("<image>\n<image>\nWhat is it?", "A kite."), Turn("Which colour?", "")),
            tuple(
                Image.fromarray(np.random.default_rng(i).integers(0, 255, (40 + i, 60, 3), np.uint8)) for i in range(2)
            ),
        ),
    )
    encoded = Encoder(published.processor, "vicuna_v1")(record)
    pixels = encoded.vision["pixel_values"].double()
    assert pixels.shape == (2, 3, SIDE, SIDE)
    ids, image = encoded.input_ids.tolist(), published.model.config.image_token_id
    assert ids.count(image) == 128
    seen = torch.cat(
        [plain.projected(published.t, plain.llava_hr_features(published.t, one, TINY, 1e-6)) for one in pixels]
    )
    rows, table, left = [], published.t["model.embed_tokens.weight"], iter(seen)
    for i in ids:
        rows.append(next(left) if i == image else table[i])
    want = plain.llama_logits(published.t, torch.stack(rows), TINY)
    with torch.no_grad():
        got = model(input_ids=encoded.input_ids[None], pixel_values=pixels).logits[0]
    assert (got[:, : TINY.vocabulary] - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize(("side", "tokens"), [(96, 36), (192, 36), (384, 144)])
def test_other_sizes_of_picture(published, side, tokens):
    """Guards the rule for the low-resolution picture, and a high-resolution map of fewer places, which is stretched."""
    config = LlavaHrVisionConfig(**(published.model.config.vision_config.to_dict() | {"input_image_size": side}))
    model = LlavaHrVisionModel(config).double()
    model.load_state_dict(published.model.model.vision_tower.state_dict())
    with torch.no_grad():
        got = model(picture(side)[None]).last_hidden_state[0]
    want = plain.llava_hr_features(published.t, picture(side), TINY, 1e-6)
    assert len(got) == tokens
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_published_sizes_give_the_published_numbers_of_tokens():
    """Guards 1,024 visual tokens at 1,024 pixels, and the other sizes that the authors trained."""
    low = {384: 336, 768: 336, 1024: 448, 1536: 672}
    for side, expected in low.items():
        config = LlavaHrVisionConfig(input_image_size=side)
        assert (config.low_resolution, config.patches_per_side**2) == (expected, (expected // 14) ** 2)
    assert LlavaHrConfig().image_seq_length == 1024


def test_a_fresh_adapter_is_an_identity():
    """Guards the start of training: zeroed projections leave tokens as they are; and anything else does not."""
    config = LlavaHrVisionConfig(**_vision(published_sizes := TINY))
    adapter = LlavaHrVisionModel(config).adapters[0]
    fast, slow = torch.randn(2, 64, published_sizes.clip), torch.randn(2, 12, 8, 8)
    assert torch.equal(adapter(fast, slow), fast)
    bound = math.sqrt(6 / (12 + 12))  # Xavier's, of a convolution of one place
    assert bound / 2 < adapter.slow_conv.weight.abs().max() <= bound
    assert adapter.gate_values(fast, aligned(slow, 64)[..., :1].expand(-1, -1, published_sizes.clip)).shape == (2, 1, 1)
    torch.nn.init.normal_(adapter.slow_proj.weight)
    assert not torch.equal(adapter(fast, slow), fast)


def test_maps_of_more_places_are_averaged():
    """Guards the alignment that the published sizes never need."""
    maps = torch.randn(2, 5, 8, 8)
    want = torch.stack([plain.tokens_of(one, 16) for one in maps])
    assert torch.allclose(aligned(maps, 16), want, atol=1e-6)
    assert torch.equal(aligned(maps, 64), maps.flatten(2).transpose(1, 2))


def test_gates_are_one_number_a_picture():
    adapter = ResolutionAdapter(16, 12)
    gate = adapter.gate_values(torch.randn(3, 64, 16), torch.randn(3, 64, 16))
    assert gate.shape == (3, 1, 1)
    assert len(gate.unique()) == 3


@pytest.mark.parametrize(("sizes", "eps"), [(SIZES_7B, 1e-6), (SIZES_13B, 1e-5)], ids=["7B", "X-13B"])
def test_every_name_and_shape_of_the_published_sizes_is_covered(sizes, eps, tmp_path, monkeypatch):
    """Guards the real models, on names and shapes alone."""
    shapes = llava_hr_shapes(sizes)
    monkeypatch.setattr(Sources, "open_checkpoint", lambda self, folder: (outline(folder, shapes), ()))
    blueprint = llava_hr_blueprint(llava_hr_settings(sizes), tmp_path, Sources())
    places = blueprint.places(shapes_of(blueprint.model_class, blueprint.config))
    # Left out: class token, normalisation behind the last layer, the ConvNeXt's head.
    assert len(shapes) - len(places) == 1 + 2 + 2
    vision = blueprint.config.vision_config
    assert (
        vision.to_dict()
        == LlavaHrVisionConfig(
            slow_hidden_sizes=sizes.slow_widths, slow_depths=sizes.slow_depths, slow_norm_eps=eps
        ).to_dict()
    )
    assert (blueprint.pictures.size, blueprint.pictures.patch_size, blueprint.pictures.pads) == (1024, 32, True)


def test_the_wide_tower_normalises_with_its_own_epsilon(published, tmp_path):
    """Guards X-13B: told by the tower's name, and heard by every normalisation."""
    settings = llava_hr_settings(TINY, vision_tower_slow="convnext_xxlarge.clip_laion2b_soup", **SETTINGS)
    tensors = {name: value * (1e-3 if ".stem.0." in name else 1) for name, value in published.tensors.items()}
    folder = write_checkpoint(tmp_path / "wide", tensors, settings)
    write_tokenizer(folder)
    model, processor = import_published(folder, published.sources)
    write_model(model, processor, tmp_path / "imported")
    t = {name: value.double() for name, value in tensors.items()}
    got = features(in_double(tmp_path / "imported"), picture())[0]
    want = plain.llava_hr_features(t, picture(), TINY, 1e-5)
    other = plain.llava_hr_features(t, picture(), TINY, 1e-6)
    assert (got - want).abs().max() < 1e-5 * want.abs().max() < (got - other).abs().max()


@pytest.mark.parametrize("prefix", ["model.", ""], ids=["with prefix", "without"])
def test_a_first_stage_is_put_together_with_what_it_was_trained_beside(published, tmp_path, prefix):
    """Guards stage-1 checkpoints: projector and fusion from them, towers stock, no adapters."""
    t = published.tensors
    vicuna = write_checkpoint(tmp_path / "vicuna", {n: t[n] for n in language_shapes(TINY)}, llava_hr_settings(TINY))
    write_tokenizer(vicuna)
    clip = write_clip(tmp_path / "clip", TINY)
    slow = drawn(convnext_shapes(TINY, "", "gamma"), 9, SPREAD)
    timm = write_checkpoint(tmp_path / "timm", slow, {}, shards=1)
    joined = {name.removeprefix("model.") if not prefix else name: t[name] for name in stage_one_shapes(TINY)}
    settings = llava_hr_settings(TINY, freeze_vision=True, **SETTINGS)
    folder = write_checkpoint(tmp_path / "one", joined, settings, 1, pickled=True, stem="mm_projector")
    sources = Sources(str(tmp_path / "clip"), str(timm), str(vicuna), unpickle=True)
    model, processor = import_published(folder, sources)
    assert model.config.vision_config.adapter_layers == []
    assert model.config.vision_config.freeze_vision
    write_model(model, processor, tmp_path / "imported")
    whole = {n: t[n] for n in (*projector_shapes(TINY), *fusion_shapes(TINY))}
    whole |= {plain.FAST_TOWER + name.removeprefix("vision_model."): value for name, value in clip.items()}
    whole |= {plain.SLOW_TOWER + name.replace(".gamma", ".weight"): value for name, value in slow.items()}
    want = plain.llava_hr_features({n: v.double() for n, v in whole.items()}, picture(), TINY, 1e-6, adapters=False)
    got = features(in_double(tmp_path / "imported"), picture())[0]
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("sizes", [SIZES_7B, SIZES_13B], ids=["7B", "X-13B"])
def test_every_name_of_a_first_stage_at_the_published_sizes_is_covered(sizes, tmp_path, monkeypatch):
    """Guards stage-1 checkpoints of the real models: four folders make one model, on names and shapes alone."""
    language = Part("the language model", outline(tmp_path, language_shapes(sizes)), LANGUAGE_RULES)
    monkeypatch.setattr(
        Sources, "open_checkpoint", lambda self, folder: (outline(folder, stage_one_shapes(sizes)), (language,))
    )
    stock = clip_shapes(sizes, "vision_model.") | {"logit_scale": (), "text_projection.weight": (768, 768)}
    monkeypatch.setattr(Sources, "open_tower", lambda self, raw: outline(tmp_path, stock))
    monkeypatch.setattr(
        Sources, "open_slow_tower", lambda self, raw, folder: outline(tmp_path, convnext_shapes(sizes, "", "gamma"))
    )
    blueprint = llava_hr_blueprint(llava_hr_settings(sizes, freeze_vision=True), tmp_path, Sources())
    places = blueprint.places(shapes_of(blueprint.model_class, blueprint.config))
    assert blueprint.config.vision_config.adapter_layers == []
    assert not any("adapters" in name for name in places)
    assert left_out(blueprint.parts)["CLIP's other half"] == 2


def test_pixels_are_those_of_the_original(published):
    """Guards preparation: padded in the mean colour, scaled once, and the low resolution made inside the tower."""
    picture = Image.fromarray(np.random.default_rng(7).integers(0, 255, (40, 60, 3), np.uint8))
    canvas = Image.new("RGB", (60, 60), (122, 116, 104))
    canvas.paste(picture, (0, 10))
    values = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    want = ((values - mean) / std).transpose(2, 0, 1)
    got = np.asarray(published.processor.image_processor(picture)["pixel_values"][0])
    assert np.abs(got - want).max() < 1e-6


def test_a_first_stage_becomes_a_second_with_adapters_that_change_nothing(published):
    """Guards the way that docs show: adapters are named in the configuration, and begin as an identity."""
    model = LlavaHrForConditionalGeneration.from_pretrained(published.loaded)
    model.config.vision_config.adapter_layers = []
    first = LlavaHrForConditionalGeneration(model.config)
    first.load_state_dict(model.state_dict(), strict=False)
    before = features(first, picture().float())
    with TemporaryDirectory() as folder:
        first.save_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        config.vision_config.adapter_layers, config.vision_config.freeze_vision = [0, 1, 2], False
        second = LlavaHrForConditionalGeneration.from_pretrained(folder, config=config)
    assert len(second.model.vision_tower.adapters) == 3
    assert torch.allclose(features(second, picture().float()), before, atol=1e-6)


def test_it_saves_loads_and_is_known_to_transformers(published):
    """Guards registration: configuration and model through transformers' own entrances, nothing missing."""
    assert type(AutoConfig.from_pretrained(published.loaded)) is LlavaHrConfig
    model, told = AutoModelForImageTextToText.from_pretrained(published.loaded, output_loading_info=True)
    assert type(model) is LlavaHrForConditionalGeneration
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = picture().float()
    assert torch.equal(features(model, pixels), features(published.model, pixels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_full(published, dtype):
    """Guards models in the precision that they are published in: pixels come in 32 bits, resizing stays in them."""
    model = LlavaHrForConditionalGeneration.from_pretrained(published.loaded, dtype=dtype)
    got, want = features(model, picture().float()), features(published.model, picture().float())
    assert got.dtype == dtype
    assert (got - want).abs().max() < 0.05 * want.abs().max()
    maps = torch.randn(1, 3, 3, 3)
    assert torch.equal(aligned(maps.to(dtype), 81), aligned(maps.to(dtype).float(), 81).to(dtype))
    embeddings = model.model.vision_tower.embeddings
    stretched = embeddings.positions(torch.device("cpu"))
    assert torch.equal(stretched, embeddings.float().positions(torch.device("cpu")).to(dtype))


def test_weights_may_be_kept_elsewhere(published):
    """Guards offloading, where a module's weights arrive as it is called."""
    from accelerate import cpu_offload

    model, pixels = LlavaHrForConditionalGeneration.from_pretrained(published.loaded), picture().float()
    before = features(model, pixels)
    cpu_offload(model.model.vision_tower, execution_device=torch.device("cpu"))
    assert torch.equal(features(model, pixels), before)


@pytest.mark.parametrize("legacy", [True, False, None], ids=["legacy", "not legacy", "not said"])
def test_ids_survive_saving_and_loading(published, tmp_path, legacy):
    """Guards the saved tokenizer: whoever loads it gives the ids that the import gives."""
    folder = write_checkpoint(tmp_path / "hr", published.tensors, llava_hr_settings(TINY, **SETTINGS))
    write_tokenizer(folder, bool(legacy))
    if legacy is None:
        path = folder / "tokenizer_config.json"
        told = json.loads(path.read_text())
        del told["legacy"]
        path.write_text(json.dumps(told))
    model, processor = import_published(folder, published.sources)
    processor.chat_template = chat_template_of(processor, "vicuna_v1")
    write_model(model, processor, tmp_path / "imported")
    loaded, turns = load_processor(tmp_path / "imported"), (Turn("<image>\nWhat?", "A kite."), Turn("Why?", ""))
    record = Record("r", turns, (Image.new("RGB", (40, 30)),))
    ids = [Encoder(one, "vicuna_v1")(record).input_ids.tolist() for one in (processor, loaded)]
    assert ids[0] == ids[1] == Encoder(loaded)(record).input_ids.tolist()
    pieces = loaded.tokenizer.convert_ids_to_tokens(ids[0])
    behind = pieces[pieces.index("</s>") + 1]
    assert behind.startswith("▁") == (legacy is not False)  # LLaVA's own: a legacy tokenizer puts a space there
    assert loaded.tokenizer.padding_side == "left"


def test_every_parameter_of_the_tower_gets_a_gradient(published):
    """Guards training over several processes, which stops at parameters that nothing reads; positions of the class
    token have none of their own.
    """
    model = LlavaHrForConditionalGeneration.from_pretrained(published.loaded)
    model.model.vision_tower(picture().float()[None]).last_hidden_state.sum().backward()
    without = [name for name, p in model.model.vision_tower.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("size", [(128, 128), (256, 128), (512, 512)])
def test_pictures_of_another_size_are_refused(published, size):
    """Guards against features of something else: both towers would take any size that divides."""
    with pytest.raises(ModelFamilyError, match=r"made for 256 × 256.*Prepare them with its processor"):
        published.model.model.vision_tower(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_image_size": 1000}, "input_image_size 1000.*multiple of 32"),
        ({"input_image_size": 32, "image_size": 335}, "335 pixels is no whole number"),
        ({"input_image_size": 256}, "24 visual tokens along a side: each has to stand for whole pixels"),
        ({"input_image_size": 96, "image_size": 56}, "maps of 4 and 3 places.*one has to divide the other"),
        ({"adapter_layers": [5, 24]}, "24 layers.*counted from 0"),
        ({"adapter_layers": [5, 5, 11]}, "each has one adapter at most"),
        ({"adapter_layers": [11, 5]}, "Name layers in order"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        LlavaHrVisionConfig(**changes)


def _vision(s: Any) -> dict[str, Any]:
    return {
        "hidden_size": s.clip,
        "intermediate_size": s.clip_ffn,
        "num_hidden_layers": s.clip_layers,
        "num_attention_heads": s.clip_heads,
        "image_size": s.image,
        "patch_size": s.patch,
        "input_image_size": SIDE,
        "slow_hidden_sizes": s.slow_widths,
        "slow_depths": s.slow_depths,
        "adapter_layers": [0, 1, 2],
    }
