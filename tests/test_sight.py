"""Guards the small LLaVA-HR's beginning: a tower that sees."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from routing_experts.models.llava_hr.configuration import SLOW_STRIDE
from routing_experts.pocket import build_hr, sight
from routing_experts.pocket.sight import Lesson, teach, teach_sight


def test_a_tower_is_taught_to_tell_digits_apart():
    """Far above chance, a tenth, after some seconds; the lesson is shorter and steeper than those of the model."""
    tower = build_hr.build_model().model.vision_tower.slow_tower
    assert teach_sight(tower, (Lesson(250, 128, 4e-3, columns=1, cell=SLOW_STRIDE),)) > 0.25


def shades(digits, columns, split, draw, cell):
    """A picture whose cells tell their digits by their brightness, in rows."""
    grid = (np.asarray(digits).reshape(-1, columns) * 25).astype(np.uint8)
    return Image.fromarray(grid.repeat(cell, 0).repeat(cell, 1)).convert("RGB")


@pytest.mark.parametrize("places", [2, 4])
def test_each_place_learns_the_digit_of_its_cell(places, monkeypatch):
    """Four digits that changed places with one another could be learned by half at most."""
    monkeypatch.setattr(sight, "draw_picture", shades)
    lesson = Lesson(200, 32, 3e-2, columns=2, cell=8)
    torch.manual_seed(0)
    tower = nn.Sequential(nn.AvgPool2d(16 // places), nn.Conv2d(3, 64, 1), nn.GELU())
    rights = teach(tower, nn.Linear(64, 10), lesson, np.random.default_rng(0))
    assert np.mean(rights[-20:]) > 0.9


def test_blurred_pictures_are_as_large_and_show_less():
    lesson, seen = Lesson(1, 4, 1e-3, columns=2, cell=SLOW_STRIDE), []

    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = nn.Conv2d(3, 8, SLOW_STRIDE, SLOW_STRIDE)

        def forward(self, pixels):
            seen.append(pixels)
            return self.pool(pixels)

    for blur in (1, 8):
        teach(Tower(), nn.Linear(8, 10), lesson, np.random.default_rng(0), blur)
    sharp, blurred = seen
    assert sharp.shape == blurred.shape == (4, 3, 64, 64)
    assert (sharp - blurred).abs().max() > 0.5
    assert blurred.std() < sharp.std()
    assert (sharp.mean((1, 2, 3)) - blurred.mean((1, 2, 3))).abs().max() < 0.02  # the same pictures


@pytest.mark.parametrize("sees", [False, True])
def test_a_model_is_written_with_or_without_sight(sees, tmp_path, monkeypatch):
    taught = []
    monkeypatch.setattr(build_hr, "teach_sight", lambda tower, blur: taught.append((type(tower).__name__, blur)) or 0.5)
    assert build_hr.main(tmp_path, sees=sees, blur=2) == (0.5 if sees else None)
    assert taught == ([("SlowTower", 2)] if sees else [])
    assert (tmp_path / "model.safetensors").is_file()
    assert (tmp_path / "processor_config.json").is_file()
