"""Stages, temperature, bias and learning rate as pure functions; the paper's numbers; frozen groups by name."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing_experts.errors import ConfigError
from routing_experts.training.parameters import group_of
from routing_experts.training.recipe import recipe_from_dict
from routing_experts.training.run import stage_end
from routing_experts.training.schedule import (
    DENSE_STAGE,
    LR_SCHEDULES,
    PARAMETER_GROUPS,
    PRETRAINING_STAGE,
    THREE_STAGES,
    Annealing,
    Stage,
    check_stages,
    lr_factor,
    stage_at,
    warmup_bias,
)

PAPER = Annealing(temperature=10.0, temperature_decay=0.95)
shares = st.floats(0, 1)


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 10.0), (0.29, 10.0), (0.5, 1.285), (1.0, 0.0076)])
def test_temperature_is_the_paper_s(progress, expected):
    """Guards the schedule of the soft gate: 10, cooled by 5 % at every half per cent of the run after the warm-up."""
    assert PAPER.temperature_at(progress) == pytest.approx(expected, rel=2e-3)


@given(earlier=shares, later=shares)
def test_temperature_and_bias_never_rise(earlier, later):
    """Guards annealing: routing only hardens, and the push to keep only fades."""
    earlier, later = sorted((earlier, later))
    assert PAPER.temperature_at(earlier) >= PAPER.temperature_at(later) >= PAPER.temperature_floor
    assert Annealing().bias_at(earlier, 0.3) >= Annealing().bias_at(later, 0.3) >= 0


def test_temperature_stops_at_its_floor():
    """Guards against a division by zero at the end of a long decay."""
    assert Annealing(temperature=10.0, temperature_decay=0.5).temperature_at(1.0) == 1e-3
    assert Annealing().temperature_at(0.7) == 1.0


def test_ticks_count_from_the_start_of_annealing():
    """Guards rounding: 0.305 − 0.3 is not quite 0.005 in binary, and is one tick all the same."""
    for tick in range(1, 141):
        expected = 10 * 0.95**tick
        assert PAPER.temperature_at(0.3 + tick * 0.005) == pytest.approx(expected)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
def test_warmup_bias_skips_the_target_share(ratio):
    """Guards b = 1 − √(2ρ): with it, the larger of two uniform draws is the skip draw with probability ρ."""
    keep, skip = np.random.default_rng(0).random((2, 200_000))
    assert np.mean(skip > keep + warmup_bias(ratio)) == pytest.approx(ratio, abs=4e-3)


def test_bias_decays_from_its_warmup_value():
    """Guards the second stage's start: it begins where the random warm-up was, and fades by 15 % a tick."""
    annealing = Annealing()
    assert annealing.bias_at(0.3, 0.3) == pytest.approx(1 - math.sqrt(0.6))
    assert annealing.bias_at(0.305, 0.3) == pytest.approx(0.85 * (1 - math.sqrt(0.6)))
    assert annealing.bias_at(0.5, 0.3) < 1e-3


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
@given(progress=shares)
def test_learning_rate_stays_between_nought_and_its_peak(schedule, progress):
    """Guards both schedules over the whole run."""
    assert 0 <= lr_factor(schedule, 0.05, progress) <= 1


def test_learning_rate_at_known_moments():
    """Guards the shapes: linear up to the warm-up's end, then half a cosine, or half flat and half a line."""
    assert lr_factor("cosine", 0.1, 0.05) == pytest.approx(0.5)
    assert lr_factor("cosine", 0.1, 0.1) == 1.0
    assert lr_factor("cosine", 0.1, 0.55) == pytest.approx(0.5)
    assert lr_factor("cosine", 0.1, 1.0) == pytest.approx(0)
    assert lr_factor("cosine", 0.0, 0.0) == 1.0
    assert lr_factor("constant_then_linear", 0.0, 0.4) == 1.0
    assert lr_factor("constant_then_linear", 0.0, 0.75) == pytest.approx(0.5)
    assert lr_factor("constant_then_linear", 0.0, 1.0) == 0.0


@given(progress=shares)
def test_every_moment_has_one_stage(progress):
    """Guards against gaps: the stage found is the first that has not ended."""
    found = stage_at(THREE_STAGES, progress)
    ended = [stage for stage in THREE_STAGES if stage.until <= progress - 1e-6]
    assert found not in ended or found is THREE_STAGES[-1]
    assert THREE_STAGES.index(found) <= len([s for s in THREE_STAGES if s.until <= progress + 1e-6])


def test_a_stage_ends_where_the_next_begins():
    """Guards the boundaries themselves."""
    names = [stage_at(THREE_STAGES, progress).name for progress in (0.0, 0.2999, 0.3, 0.4999, 0.5, 0.99, 1.0)]
    warm, router, tuning = (stage.name for stage in THREE_STAGES)
    assert names == [warm, warm, router, router, tuning, tuning, tuning]


def test_stage_ends_in_steps():
    """Guards 0.3 × 360, which is 107.99… in binary."""
    recipe = recipe_from_dict({"model": "pocket", "output": "x", "data": {"records": 8}, "training": {"steps": 360}})
    assert [stage_end(recipe, stage) for stage in recipe.stages] == [108, 180, 360]


def test_the_three_stages_are_the_paper_s():
    """Guards what trains when: 30 % adapters on random routes, 20 % routers too, then the decoder and projector too."""
    assert [(stage.until, stage.gate, stage.biased) for stage in THREE_STAGES] == [
        (0.3, "random", False),
        (0.5, "learned", True),
        (1.0, "learned", False),
    ]
    assert [set(stage.trains) for stage in THREE_STAGES] == [
        {"adapters"},
        {"adapters", "routers"},
        {"adapters", "routers", "decoder", "projector"},
    ]
    assert all(stage.gate == "none" for stage in DENSE_STAGE + PRETRAINING_STAGE)


@pytest.mark.parametrize("ends", [(0.3, 0.5), (0.5, 0.3, 1.0), (0.5, 0.5, 1.0), ()])
def test_stages_that_do_not_fill_the_run_are_refused(ends):
    """Guards against steps that no stage, or two, would claim."""
    stages = tuple(Stage(f"part {i}", until, ("adapters",), "random") for i, until in enumerate(ends))
    with pytest.raises(ConfigError, match="fill the run"):
        check_stages(stages)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trains": ("adapter",)}, "'adapter'"),
        ({"trains": ()}, "at least one of"),
        ({"gate": "soft"}, "gate 'soft'"),
        ({"until": 0.0}, "until 0.0"),
        ({"until": 1.5}, "until 1.5"),
    ],
)
def test_impossible_stages_are_refused(changes, expected):
    """Guards each field, and that the message names the stage."""
    with pytest.raises(ConfigError, match=expected) as raised:
        replace(THREE_STAGES[0], **changes)
    assert "adapter_warmup" in str(raised.value)


@pytest.mark.parametrize("field", ["temperature", "temperature_floor", "every"])
def test_divisors_of_the_annealing_must_be_positive(field):
    """Guards against a division by zero in mid-run."""
    with pytest.raises(ConfigError, match=f"{field}=0"):
        Annealing(**{field: 0.0})


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.language_model.layers.3.skip_down.weight", "adapters"),
        ("base_model.model.model.language_model.layers.3.skip_up.weight", "adapters"),
        ("model.layers.0.router.weight", "routers"),
        ("routing_tokens", "routers"),
        ("base_model.model.routing_tokens", "routers"),
        ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", "vision"),
        ("model.visual.blocks.0.attn.qkv.weight", "vision"),
        ("model.multi_modal_projector.linear_1.weight", "projector"),
        ("model.visual.merger.mlp.0.weight", "projector"),
        ("model.vision_model.encoder.layers.0.self_attn.q_proj.weight", "vision"),
        ("model.connector.modality_projection.proj.weight", "projector"),
        ("model.text_model.layers.3.mlp.up_proj.weight", "decoder"),
        ("model.language_model.embed_tokens.weight", "decoder"),
        ("lm_head.weight", "decoder"),
        ("base_model.model.model.language_model.layers.3.self_attn.q_proj.lora_A.default.weight", "decoder"),
    ],
)
def test_parameters_belong_to_groups_by_name(name, group):
    """Guards every family's spelling, with and without peft's prefix."""
    assert group_of(name) == group
    assert group in PARAMETER_GROUPS
