"""Calibration: the wanted skip rate is met, on other questions too, and lands in the folder that is served."""

import functools
import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from routing_experts import RoEConfig, RoutingOptions, convert, from_pretrained, load_pocket, save_pretrained
from routing_experts.config import BUDGET_GAP
from routing_experts.errors import ConfigError
from routing_experts.evaluation.calibration import (
    RateMeter,
    check_budget,
    find_bias,
    trace_budget,
    with_bias,
    with_budget,
)
from routing_experts.evaluation.evaluate import ask
from routing_experts.evaluation.questions import digits_questions
from routing_experts.records import BudgetRecord


@pytest.fixture(scope="module")
def routed():
    """The pocket model with untrained routers of large weights: logits spread, rates change smoothly with the bias."""
    model, processor = load_pocket()
    convert(model, RoEConfig(), processor)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in model.get_decoder().layers[1:]:
            layer.router.weight.copy_(torch.randn(layer.router.weight.shape, generator=generator))
    return model, processor


@pytest.mark.parametrize("wanted", [0.1, 0.25, 0.4])
def test_the_wanted_rate_is_met_on_other_questions_too(wanted, routed):
    """Guards the promise of two points, and that the rate is what answering skips."""
    model, processor = routed
    meter = RateMeter(model, processor, digits_questions(300, 1, split="train"))
    found = find_bias(meter, wanted)
    assert found.skip_rate == pytest.approx(wanted, abs=0.01)
    assert meter.rate(0.0) != pytest.approx(wanted, abs=0.01)  # or nothing was shown
    heldout = digits_questions(300, 2)
    assert RateMeter(model, processor, heldout).rate(found.keep_bias) == pytest.approx(wanted, abs=0.04)
    calibrated = with_bias(model, found.keep_bias)
    try:
        asked = ask(calibrated, processor, heldout[:64])
        assert asked.skip_rate == pytest.approx(RateMeter(model, processor, heldout[:64]).rate(found.keep_bias))
    finally:
        with_bias(model, 0.0)


def test_a_higher_bias_skips_less(routed):
    model, processor = routed
    meter = RateMeter(model, processor, digits_questions(64, 3))
    assert meter.rate(float("inf")) == 0
    assert meter.rate(float("-inf")) == pytest.approx(11 / 12)
    assert meter.rate(4.0) < meter.rate(0.0) < meter.rate(-4.0)


@pytest.mark.parametrize("wanted", [0.0, 0.95, 1.0])
def test_a_rate_that_no_bias_gives_is_refused(wanted, routed):
    model, processor = routed
    with pytest.raises(ConfigError, match="layers are routed"):
        find_bias(RateMeter(model, processor, digits_questions(2, 0)), wanted)


def test_controls_have_no_routers_to_calibrate(routed):
    model, processor = routed
    meter = RateMeter(model, processor, digits_questions(2, 0))
    before = model.roe_config
    try:
        model.roe_config = replace(before, gate="static", routed_layers=tuple(range(1, 12)))
        with pytest.raises(ConfigError, match="routers do not decide"):
            find_bias(meter, 0.25)
    finally:
        model.roe_config = before


@pytest.fixture(scope="module")
def traced(routed):
    """The budget of the model above, with the meter that it was traced by."""
    model, processor = routed
    meter = RateMeter(model, processor, digits_questions(64, 1, split="train"))
    return meter, trace_budget(meter)


def test_a_traced_budget_is_a_curve_without_gaps(traced):
    """Guards the trace: from nothing to half of all layers, every pair measured, neighbours within two points."""
    meter, budget = traced
    assert budget[0][0] == 0
    assert 0.5 <= budget[-1][0] <= 0.5 + BUDGET_GAP
    assert all(more - less <= BUDGET_GAP for (less, _), (more, _) in pairwise(budget))
    assert all(meter.rate(bias) == rate for rate, bias in budget)
    assert len(budget) < 80


def test_any_ratio_is_met_within_two_points(traced, routed):
    """Guards the promise for ratios between the pairs, small ones included, on the questions of the trace."""
    meter, budget = traced
    config = replace(routed[0].roe_config, budget=budget)
    for wanted in (0.004, 0.01, 0.037, 0.11, 0.205, 0.333, 0.48):
        assert meter.rate(config.keep_bias_for(wanted)) == pytest.approx(wanted, abs=BUDGET_GAP)


def test_a_ratio_is_met_when_questions_are_answered(traced, routed):
    """Guards the whole way on held-out questions: from the option to what answers skip, within sampling error."""
    model, processor = routed
    before = model.roe_config
    try:
        with_budget(model, traced[1])
        asked = [
            ask(model, processor, digits_questions(200, 2), options=RoutingOptions(skip_ratio=ratio), max_new_tokens=1)
            for ratio in (0, 0.1, 0.3)
        ]
    finally:
        model.roe_config = before
    assert asked[0].skip_rate == 0
    assert [one.skip_rate for one in asked[1:]] == pytest.approx([0.1, 0.3], abs=0.05)


class Steps:
    """Stands in for a meter: rates by bias, as a function."""

    def __init__(self, model, rate):
        self.model, self.rate, self.num_questions = model, functools.cache(rate), 1


@pytest.mark.parametrize(
    ("rate", "first", "last"),
    [
        (lambda bias: 0.9 if bias < 0.3 else 0.0, 0.0, 0.9),  # all at once: the pairs are the jump's two sides
        (lambda bias: (1 - math.tanh(bias / 0.008)) / 2, 0.0, 0.51),  # routers whose logits are all small
        (lambda bias: 0.25, 0.25, 0.25),  # a bias moves nothing
        (lambda bias: max(0.0, 0.2 - bias / 100 + 0.02 * math.sin(40 * bias)), 0.0, 0.51),  # not monotone
    ],
    ids=["jump", "steep", "stuck", "wavy"],
)
def test_odd_curves_are_traced_as_far_as_they_go(rate, first, last, routed):
    """Guards the trace's end: no endless halving, rates that rise, and a config that takes the pairs."""
    budget = trace_budget(Steps(routed[0], rate))
    assert budget[0][0] == pytest.approx(first, abs=0.005)
    assert budget[-1][0] == pytest.approx(last, abs=0.02)
    assert RoEConfig(budget=budget).keep_bias_for(budget[-1][0]) == budget[-1][1]


def test_ratios_within_a_jump_stay_unanswered_in_the_record(routed):
    """Guards the record of a model whose routers decide alike: no bias, no rate, and nothing made up."""
    meter = Steps(routed[0], lambda bias: 0.25 if bias < 0.3 else 0.0)
    record = check_budget(RoEConfig(budget=trace_budget(meter)), meter, None)
    answered = [check.wanted for check in record.checks if check.keep_bias is not None]
    assert (len(record.checks), answered) == (5, [0.25])
    assert BudgetRecord.from_dict(record.to_dict()) == record


def printed_json(capsys):
    """What a verb printed; called as a function, libraries print beside it."""
    out = capsys.readouterr().out
    return json.loads(out[out.index("{") :])


def test_the_verb_without_a_rate_writes_the_budget(routed, tmp_path, capsys):
    """Guards `roe calibrate` as the dial: config and record; the model's own bias stays."""
    from routing_experts.cli.calibrate import calibrate

    model, processor = routed
    save_pretrained(model, tmp_path, processor)
    calibrate(str(tmp_path), questions=16, device="cpu", json=True)
    printed = printed_json(capsys)
    assert printed == json.loads((tmp_path / "budget.json").read_text())
    config = from_pretrained(tmp_path).roe_config
    assert [list(pair) for pair in config.budget] == printed["pairs"]
    assert config.keep_bias == model.roe_config.keep_bias
    assert [check["wanted"] for check in printed["checks"]] == pytest.approx([0.05 * step for step in range(1, 11)])
    for check in printed["checks"]:
        assert check["skip_rate"] == pytest.approx(check["wanted"], abs=BUDGET_GAP)
        assert check["heldout_skip_rate"] == pytest.approx(check["wanted"], abs=0.15)  # of 16 questions


def test_the_verb_writes_the_bias_and_both_rates(routed, tmp_path, capsys):
    """Guards `roe calibrate`: config and record, raw and calibrated, on training data and held-out questions."""
    from routing_experts.cli.calibrate import calibrate

    model, processor = routed
    save_pretrained(model, tmp_path, processor)
    calibrate(str(tmp_path), 0.2, questions=64, device="cpu", json=True)
    printed = printed_json(capsys)
    assert printed == json.loads((tmp_path / "calibration.json").read_text())
    assert from_pretrained(tmp_path).roe_config.keep_bias == printed["keep_bias"] != 0
    assert printed["skip_rate"] == pytest.approx(0.2, abs=0.02)
    assert printed["raw_skip_rate"] != printed["skip_rate"]
    assert {"heldout_raw_skip_rate", "heldout_skip_rate", "questions", "wanted"} <= printed.keys()
