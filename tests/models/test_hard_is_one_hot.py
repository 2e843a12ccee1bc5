"""Contract 6: for dialogues of one turn, the training mix with one-hot weights gives the inference result."""

import pytest
import torch

from routing_experts.models.options import RoutingOptions
from routing_experts.nn.gates import GateSettings
from tiny import batch_of, context_of, prompt, real_logits, route_everywhere, segments_of, tiny_llama

TOLERANCE = 1e-10
LAYOUTS = pytest.mark.parametrize("layout", ["two_call", "fused"])
SIDES = pytest.mark.parametrize("side", ["left", "right"])


def dialogues(model, side, answer=3, earlier_turns=0, count=6):
    """Whole dialogues as training sees them, answers included; text-only ones among them."""
    has_images = hasattr(model.config, "image_token_id")
    made = [
        prompt(i, images=i % 3 if has_images else 0, words=2 + i % 4, answer=answer, earlier_turns=earlier_turns)
        for i in range(count)
    ]
    return batch_of(made, side, torch.float64)


def assert_rows_agree(first, second, batch):
    for one, other in zip(real_logits(first, batch), real_logits(second, batch), strict=True):
        assert (one - other).abs().max() <= TOLERANCE


def route_of(context, num_layers=5):
    """The one-hot weights' route; every turn and the context must follow the same one."""
    rows = len(context.turns_BT)
    route = torch.ones(rows, num_layers, dtype=torch.bool)
    for layer, weights in context.weights.items():
        assert torch.equal(weights[:, 0], weights[:, 1])
        assert bool(((weights == 0) | (weights == 1)).all())
        route[:, layer] = weights[:, 0, 0] == 1
    return route


@torch.no_grad()
@SIDES
@LAYOUTS
def test_random_routes(build, layout, side):
    """Guards both paths of a layer: training's mix and inference's selection of rows, on random routes."""
    model = route_everywhere(build(dtype=torch.float64), num_unrouted_layers=0)
    batch = dialogues(model, side)
    seen = []
    for step in range(4):
        gate = GateSettings("random", bias=0.2, step=step)
        training = context_of(model, batch, RoutingOptions(layout=layout), gate=gate)
        mixed = model(**batch, routing=training).logits
        route = route_of(training)
        seen.append(route)
        hard = model(**batch, routing_options=RoutingOptions(route=route, layout=layout)).logits
        assert_rows_agree(mixed, hard, batch)
    assert torch.cat(seen).float().mean() not in (0.0, 1.0)
    assert any(bool((route.any(0) & ~route.all(0)).any()) for route in seen)


@torch.no_grad()
@SIDES
@LAYOUTS
def test_router_decided_routes(build, layout, side):
    """Guards the routing tokens' own journey: the hard gate without noise chooses in training what inference does.

    The answers stand in the sequence both times, and no routing token may see them.
    """
    model = route_everywhere(build(dtype=torch.float64), seed=1)
    batch = dialogues(model, side)
    training = context_of(model, batch, RoutingOptions(layout=layout), gate=GateSettings("straight_through"))
    mixed = model(**batch, routing=training).logits
    inference = context_of(model, batch, RoutingOptions(layout=layout))
    hard = model(**batch, routing=inference).logits
    route = route_of(training)
    assert any(bool(keep.any() and not keep.all()) for keep in inference.keep.values())
    for layer, keep in inference.keep.items():
        assert torch.equal(keep, route[:, layer])
        assert torch.allclose(training.logits[layer], inference.logits[layer], atol=TOLERANCE)
    assert_rows_agree(mixed, hard, batch)


@torch.no_grad()
def test_soft_weights_differ(build):
    """Guards the tests above against a mix that ignores its weights."""
    model = route_everywhere(build(dtype=torch.float64), seed=1)
    batch = dialogues(model, "left")
    outputs = [
        model(**batch, routing=context_of(model, batch, gate=GateSettings(kind, temperature=10.0))).logits
        for kind in ("softmax", "straight_through")
    ]
    assert (outputs[0] - outputs[1]).abs().max() > 0.1


@torch.no_grad()
def test_several_turns_differ_by_nature(build):
    """Records that training and inference part ways for dialogues of several turns.

    In training each turn follows its own route within one sequence, so a turn that keeps a layer attends keys of an
    earlier turn that skipped it. At inference the last question's route holds for the whole prompt: all tokens kept in
    that layer, or none. No choice of masks makes these equal; the difference is measured, not removed.
    """
    model = route_everywhere(build(dtype=torch.float64), seed=1)
    batch = dialogues(model, "left", earlier_turns=2, answer=0)
    assert int(segments_of(model, batch).max()) == 5
    training = context_of(model, batch, gate=GateSettings("straight_through"))
    mixed = model(**batch, routing=training).logits[:, -1]
    hard = model(**batch).logits[:, -1]
    turns_differ = [bool((weights[:, 1:, 0] != weights[:, 1:2, 0]).any()) for weights in training.weights.values()]
    assert any(turns_differ)
    difference = (mixed - hard).abs().max().item()
    assert 1e-3 < difference < float("inf")


@torch.no_grad()
def test_turns_of_one_example_follow_their_own_weights():
    """Guards the gathering of weights by token: context and turns carry different ones, padding harms nothing."""
    model = route_everywhere(tiny_llama(dtype=torch.float64), seed=1)
    batch = batch_of([prompt(0, 0, 3, earlier_turns=2, answer=2), prompt(1, 0, 5, answer=1)], "left", torch.float64)
    together = context_of(model, batch, gate=GateSettings("softmax"))
    logits = real_logits(model(**batch, routing=together).logits, batch)
    for row, one in enumerate((prompt(0, 0, 3, earlier_turns=2, answer=2), prompt(1, 0, 5, answer=1))):
        single = batch_of([one], "left", torch.float64)
        alone = context_of(model, single, gate=GateSettings("softmax"))
        assert (model(**single, routing=alone).logits[0] - logits[row]).abs().max() <= TOLERANCE
        turns = alone.valid_BQ.shape[1]
        for layer, weights in alone.weights.items():
            assert torch.allclose(weights[0], together.weights[layer][row, : turns + 1], atol=TOLERANCE)
