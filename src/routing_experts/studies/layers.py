"""Which layers a study's fixed controls drop, and what dropping them costs untrained; measured once a study."""

from collections.abc import Sequence
from typing import Any

import torch

from routing_experts.api import convert
from routing_experts.config import RoEConfig
from routing_experts.evaluation.evaluate import ask
from routing_experts.evaluation.importance import layer_importance, least_harmful, least_important
from routing_experts.evaluation.questions import Question
from routing_experts.models.load import load_base
from routing_experts.models.options import RoutingOptions
from routing_experts.records import LayerChoice

TRIAL_QUESTIONS = 300  # of each trial of a layer left out


def layer_choice(
    base: Any,
    processor: Any,
    training_questions: Sequence[Question],
    questions: Sequence[Question],
    rates: Sequence[float],
    deepest: int,
    routable: Sequence[int],
) -> LayerChoice:
    """Makes a study's choice of layers.

    Args:
        base: the base model, and what it is asked with.
        processor: the base's.
        training_questions: the choice is made on these.
        questions: held out; the cost of dropping is measured on these.
        rates: shares of all decoder layers.
        deepest: the most layers that any arm drops by harm.
        routable: the layers that may go.
    """
    num_layers: int = base.config.get_text_config(decoder=True).num_hidden_layers
    by_importance = least_important(layer_importance(base, processor, training_questions), routable)
    identity = RoEConfig(routed_layers=tuple(routable), adapter_init="zero")
    dropping = convert(load_base(base.name_or_path), identity, processor)
    counts = {rate: round(rate * num_layers) for rate in rates}
    few = training_questions[:TRIAL_QUESTIONS]
    by_harm = least_harmful(dropping, processor, few, max(deepest, *counts.values()), routable)
    untrained = {}
    for rate, count in counts.items():
        route = torch.ones(num_layers, dtype=torch.bool)
        route[by_harm[:count]] = False
        untrained[str(rate)] = ask(dropping, processor, questions, options=RoutingOptions(route=route)).accuracy
    return LayerChoice(
        by_importance=by_importance,
        by_harm=by_harm,
        untrained=untrained,
        training_questions=len(training_questions),
        questions=len(questions),
    )
