"""Guards the small LLaVA-HR's beginning: a tower that sees."""

from routing_experts.pocket import build_hr
from routing_experts.pocket.sight import teach_sight


def test_a_tower_is_taught_to_tell_digits_apart():
    """Far above chance, a tenth, after a seventh of its lessons."""
    tower = build_hr.build_model().model.vision_tower.slow_tower
    assert teach_sight(tower, steps=220) > 0.3
