"""Guards the small LLaVA-HR's beginning: a tower that sees."""

import torch

from routing_experts.models.llava_hr.configuration import SLOW_STRIDE
from routing_experts.pocket import build_hr
from routing_experts.pocket.sight import Lesson, by_place, teach_sight


def test_a_tower_is_taught_to_tell_digits_apart():
    """Far above chance, a tenth, after a part of its first lesson."""
    tower = build_hr.build_model().model.vision_tower.slow_tower
    assert teach_sight(tower, (Lesson(250, 128, 4e-3, columns=1, cell=SLOW_STRIDE),)) > 0.25


def test_each_place_learns_the_digit_of_its_cell():
    digits = torch.tensor([[[1, 2], [3, 4]]])
    assert by_place(digits, 4).tolist() == [[[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]]
