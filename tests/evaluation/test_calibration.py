"""Calibration: the wanted skip rate is met, on other questions too, and lands in the folder that is served."""

import json
from dataclasses import replace

import pytest
import torch

from routing_experts import RoEConfig, convert, from_pretrained, load_pocket, save_pretrained
from routing_experts.errors import ConfigError
from routing_experts.evaluation.calibration import RateMeter, find_bias, with_bias
from routing_experts.evaluation.evaluate import ask
from routing_experts.evaluation.questions import digits_questions


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


def test_the_verb_writes_the_bias_and_both_rates(routed, tmp_path, capsys):
    """Guards `roe calibrate`: config and record, raw and calibrated, on training data and held-out questions."""
    from routing_experts.cli.calibrate import calibrate

    model, processor = routed
    save_pretrained(model, tmp_path, processor)
    calibrate(str(tmp_path), 0.2, "digits", None, None, 64, "cpu", True)
    out = capsys.readouterr().out
    printed = json.loads(out[out.index("{") :])  # called as a function, libraries print beside it
    assert printed == json.loads((tmp_path / "calibration.json").read_text())
    assert from_pretrained(tmp_path).roe_config.keep_bias == printed["keep_bias"] != 0
    assert printed["skip_rate"] == pytest.approx(0.2, abs=0.02)
    assert printed["raw_skip_rate"] != printed["skip_rate"]
    assert {"heldout_raw_skip_rate", "heldout_skip_rate", "questions", "wanted"} <= printed.keys()
