"""What is no whole LLaVA-HR."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_checkpoints import refusal

from published import (
    TINY,
    drawn,
    llava_hr_settings,
    llava_hr_shapes,
    projector_shapes,
    write_checkpoint,
    write_clip,
    write_tokenizer,
)
from routing_experts.errors import CheckpointError
from routing_experts.models.published.reading import import_published
from routing_experts.models.published.sources import Sources


@pytest.mark.parametrize(
    ("settings", "dropped", "expected"),
    [
        ({"freeze_vision": True}, (), "freeze_vision says whether"),
        ({}, ("align_stages_latent.2",), "freeze_vision says whether"),
        ({}, ("stages.3.blocks",), "no ConvNeXt of four stages"),
        ({}, ("stages.2.blocks.0.",), "some of its blocks are missing"),
        ({}, ("stages.2.blocks.1.mlp.fc1.weight",), "high-resolution tower"),
        ({"mm_hidden_size": 999}, (), "mm_hidden_size is 999"),
        ({"freeze_vision": ...}, (), "says freeze_vision None"),
        ({"input_image_size": None}, (), "input_image_size None"),
        ({"input_image_size": 1000}, (), "config.json: input_image_size 1000"),
    ],
)
def test_towers_of_a_llava_hr_that_do_not_fit(place, settings, dropped, expected):
    kept = {n: s for n, s in llava_hr_shapes(TINY).items() if not any(part in n for part in dropped)}
    told = {n: v for n, v in llava_hr_settings(TINY, **{"input_image_size": 256} | settings).items() if v is not ...}
    folder = write_checkpoint(place.root / "hr", drawn(kept), told)
    write_tokenizer(folder)
    with pytest.raises(CheckpointError, match=expected):
        import_published(folder, place.sources)


def hr_checkpoint(place: Any, shards: int = 1, more: Any = None, sizes: Any = TINY, **settings: Any) -> Path:
    tensors = drawn(llava_hr_shapes(sizes)) | (more or {})
    told = llava_hr_settings(sizes, input_image_size=256, **settings)
    folder = write_checkpoint(place.root / "hr", tensors, told, shards)
    write_tokenizer(folder)
    return folder


def test_shards_of_a_llava_hr_that_are_missing_or_cut_short(place):
    folder = hr_checkpoint(place, shards=3)
    path = folder / "model-00002-of-00003.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert "is not a readable safetensors file" in refusal(folder, place.sources)
    path.unlink()
    assert "lacks model-00002-of-00003.safetensors" in refusal(folder, place.sources)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.vision_tower.slow_vision_tower.vision_tower.norm_pre.weight", "norm_pre.weight"),
        ("model.vision_tower.slow_vision_tower.vision_tower.stages.3.blocks.999999999.conv_dw.weight", "999999999"),
        ("model.vision_tower.slow_vision_tower.vision_tower.stages.3.blocks.999.conv_dw.weight", "blocks are missing"),
    ],
)
def test_names_that_a_llava_hr_s_towers_lack(place, name, expected):
    """Guards what is dropped, and memory: one name must not make a tower of a thousand million blocks."""
    assert expected in refusal(hr_checkpoint(place, more={name: torch.ones(12, 1, 7, 7)}), place.sources)


def test_a_siglip_for_a_llava_hr_s_clip(place):
    tensors = {name: value for name, value in drawn(llava_hr_shapes(TINY)).items() if "class_embedding" not in name}
    folder = write_checkpoint(place.root / "hr", tensors, llava_hr_settings(TINY, input_image_size=256), 1)
    assert "holds a SigLIP tower where a CLIP tower is due" in refusal(folder, place.sources)


def test_a_clip_whose_layers_make_no_quarters(place):
    three = replace(TINY, clip_layers=3)
    write_clip(place.root / "three", three)
    sources = Sources(vision_tower=str(place.root / "three"))
    assert "a CLIP tower of 3 layers" in refusal(hr_checkpoint(place, sizes=three), sources)


def test_a_convnext_of_another_size_than_its_name_says(place):
    wide = replace(TINY, slow_widths=(4, 6, 8, 1536))
    folder = hr_checkpoint(place, sizes=wide, vision_tower_slow="convnext_xxlarge.clip_laion2b_soup")
    message = refusal(folder, place.sources)
    assert "convnext_xxlarge.clip_laion2b_soup, whose last map has 3072 channels" in message


def test_a_first_stage_of_llava_hr_without_its_slow_tower(place):
    settings = llava_hr_settings(TINY, freeze_vision=True, input_image_size=256)
    folder = write_checkpoint(place.root / "one", drawn(projector_shapes(TINY)), settings, 1, stem="mm_projector")
    sources = Sources(place.sources.vision_tower, language_model=str(place.folder))
    assert "--slow-tower" in refusal(folder, sources)
