"""How much layers matter: one that does nothing comes first, by what it turns and by what its loss costs."""

import pytest
import torch

from routing_experts.api import convert
from routing_experts.config import RoEConfig
from routing_experts.evaluation.importance import layer_importance, least_harmful, least_important
from routing_experts.evaluation.questions import digits_questions
from routing_experts.models.load import load_base, load_processor

IDLE, NEEDED = 5, (4, 6)  # the base answers little without these


@pytest.fixture(scope="module")
def base():
    model = load_base("pocket")
    layer = model.model.language_model.layers[IDLE]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    return model


@pytest.fixture(scope="module")
def asked():
    return load_processor("pocket"), digits_questions(48, 7, split="train")


def test_a_layer_that_turns_nothing_has_no_importance(base, asked):
    scores = layer_importance(base, *asked)
    assert scores[IDLE] == pytest.approx(0, abs=1e-9)
    assert all(score > 1e-4 for layer, score in enumerate(scores) if layer != IDLE)
    assert least_important(scores, range(1, 12))[0] == IDLE
    assert least_important(scores, NEEDED) == sorted(NEEDED, key=scores.__getitem__)


def test_a_layer_that_does_nothing_harms_least(base, asked):
    """The first dropped costs no answer, each other one costs some."""
    routed = (NEEDED[0], IDLE, NEEDED[1])
    dropping = convert(base, RoEConfig(routed_layers=routed, adapter_init="zero"), asked[0])
    assert least_harmful(dropping, *asked, 1, routed) == [IDLE]
    assert sorted(least_harmful(dropping, *asked, 3, routed)) == sorted(routed)
