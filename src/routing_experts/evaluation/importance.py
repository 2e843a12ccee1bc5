"""How much a base model's decoder layers matter: controls that drop the same layers for everyone ask this.

Two ways to choose. By score: one minus the mean cosine between what enters a layer and what leaves it ("block
influence", Men et al., "ShortGPT", 2024); a layer that hardly turns the hidden state is thought dispensable. Or by
trial: drop, one after the other, the layer that costs the fewest right answers.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from routing_experts.evaluation.evaluate import ask
from routing_experts.evaluation.questions import BATCH_SIZE, Question, records_of
from routing_experts.inference.generate import prompt_batches, to_model
from routing_experts.models.families import family_of
from routing_experts.models.options import RoutingOptions


class _Turning:
    """Sums one minus cosine over the real tokens that pass each layer."""

    def __init__(self, num_layers: int) -> None:
        self.sums, self.counts = [0.0] * num_layers, [0] * num_layers
        self.real_BT = torch.empty(0)

    def note(self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        entered = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        turned_BT = 1 - torch.cosine_similarity(entered.double(), output.double(), dim=-1)
        self.sums[layer] += float((turned_BT * self.real_BT).sum())
        self.counts[layer] += int(self.real_BT.sum())


@torch.inference_mode()
def layer_importance(
    model: Any, processor: Any, questions: Sequence[Question], batch_size: int = BATCH_SIZE
) -> list[float]:
    """Each decoder layer's score on the questions' prompts; 0 for a layer that changes nothing.

    Args:
        model: a base model, not routed.
        processor: the model's.
        questions: of the training data.
        batch_size: prompts a forward.
    """
    layers = family_of(model).decoder_layers(model)
    turning = _Turning(len(layers))
    hooks = [
        layer.register_forward_hook(partial(turning.note, index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        for batch in prompt_batches(model, processor, records_of(questions), batch_size):
            on_device = to_model(batch, model)
            turning.real_BT = on_device["attention_mask"]
            model(**on_device, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return [total / count for total, count in zip(turning.sums, turning.counts, strict=True)]


def least_important(scores: Sequence[float], routable: Sequence[int]) -> list[int]:
    """Routable layers, the least important first; ties by index."""
    return sorted(routable, key=lambda layer: (scores[layer], layer))


def least_harmful(
    model: Any, processor: Any, questions: Sequence[Question], count: int, routable: Sequence[int]
) -> list[int]:
    """Layers dropped greedily: each time the one without which most questions are still answered right.

    Args:
        model: routed, with adapters that are still identities, so that skipping is dropping.
        processor: the model's.
        questions: of the training data.
        count: how many layers to drop.
        routable: those that may go.
    """
    num_layers = len(family_of(model).decoder_layers(model))
    dropped: list[int] = []

    def accuracy_without(layer: int) -> float:
        route = torch.ones(num_layers, dtype=torch.bool)
        route[[*dropped, layer]] = False
        return ask(model, processor, questions, options=RoutingOptions(route=route)).accuracy

    for _ in range(count):
        left = [layer for layer in routable if layer not in dropped]
        dropped.append(max(left, key=accuracy_without))
    return dropped
