"""Gates: what training's weights are, what they differentiate to, and that draws belong to examples."""

import math

import pytest
import torch

from routing_experts.nn.gates import GateSettings, gate_weights, one_hot, uniform

EVERY = ("random", "softmax", "straight_through", "gumbel_straight_through")


def logits_of(batch, turns=2, seed=0, dtype=torch.float64):
    return torch.randn(batch, turns, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weights_of(settings, logits, keys=None, valid=None, layer=0):
    keys = torch.arange(len(logits)) if keys is None else keys
    valid = torch.ones(logits.shape[:2], dtype=torch.bool) if valid is None else valid
    return gate_weights(settings, logits, valid, keys, layer)


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.3, 0.5])
def test_random_gate_skips_at_the_target_ratio(ratio):
    """Guards b = 1 − √(2ρ): the share of skips lies within five standard deviations of ρ."""
    count = 100_000
    settings = GateSettings("random", bias=1 - math.sqrt(2 * ratio), seed=3, step=11)
    skipped = weights_of(settings, torch.zeros(count, 1, 2))[:, 1, 1].mean().item()
    assert abs(skipped - ratio) < 5 * math.sqrt(ratio * (1 - ratio) / count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_gate_does_not_follow_the_logits_dtype(dtype):
    """Guards half precision: draws rounded to bfloat16 would tie, and a tie skips."""
    settings = GateSettings("random", bias=1 - math.sqrt(0.6), seed=3, step=11)
    given, exact = (weights_of(settings, torch.zeros(20_000, 1, 2, dtype=d)) for d in (dtype, torch.float64))
    assert torch.equal(given.double(), exact)


@pytest.mark.parametrize("kind", EVERY)
def test_weights_belong_to_examples_not_to_places(kind):
    """Guards processes and accumulation: in another order, or in parts, each example gets the same weights."""
    settings, logits = GateSettings(kind, temperature=2.0, bias=0.2, seed=1, step=5), logits_of(8)
    keys = torch.tensor([3, 14, 15, 92, 65, 35, 89, 79])
    whole = weights_of(settings, logits, keys, layer=4)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(weights_of(settings, logits[order], keys[order], layer=4), whole[order])
    parts = [weights_of(settings, logits[rows], keys[rows], layer=4) for rows in (slice(0, 3), slice(3, 8))]
    assert torch.equal(torch.cat(parts), whole)


def test_a_turn_s_draws_do_not_depend_on_how_many_turns_the_batch_has():
    """Guards padding turns: a longer dialogue in the batch must not change a shorter one's draws."""
    keys = torch.tensor([5, 6])
    assert torch.equal(uniform(1, 2, keys, 3, 4)[:, :2], uniform(1, 2, keys, 3, 2))


def test_draws_differ_in_every_coordinate():
    """Guards independence: seed, step, example, layer and turn each change the draw; large and odd ones work."""
    keys = torch.tensor([7])
    base = uniform(1, 2, keys, 3, 2)
    others = [
        uniform(2, 2, keys, 3, 2),
        uniform(1, 3, keys, 3, 2),
        uniform(1, 2, keys + 1, 3, 2),
        uniform(1, 2, keys, 4, 2),
        uniform(2**40, 10**9, -keys, 95, 2),
        uniform(2**63 - 1, 0, keys + 2**62, 0, 2),
    ]
    for other in others:
        assert bool((other != base).all())
    assert len(base.unique()) == 4
    assert torch.equal(uniform(1, 2, keys, 3, 2), base)


def test_draws_are_uniform_in_the_open_interval():
    """Guards the hash: mean, variance, bins, and no correlation between neighbouring keys or the two of a pair."""
    draws = uniform(0, 9, torch.arange(50_000), 2, 1)[:, 0].double()
    assert draws.min() > 0
    assert draws.max() < 1
    assert abs(draws.mean().item() - 0.5) < 0.005
    assert abs(draws.var().item() - 1 / 12) < 0.002
    bins = torch.histc(draws, 20, 0, 1) / draws.numel()
    assert (bins - 0.05).abs().max() < 0.004
    for one, other in ((draws[:, 0], draws[:, 1]), (draws[1:, 0], draws[:-1, 0])):
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1].item()) < 0.02


def test_random_gate_reads_no_logits_and_is_one_hot():
    """Guards the adapter warm-up: routes are free of the untrained routers."""
    settings = GateSettings("random", bias=0.2, seed=4, step=1)
    first, second = (weights_of(settings, logits_of(64, seed=seed)) for seed in (0, 1))
    assert torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["straight_through", "gumbel_straight_through"])
def test_straight_through_is_exactly_one_hot_and_differentiates_softly(kind, dtype):
    """Guards the estimator: forward is 0 or 1 to the bit, backward is the softmax's of the same perturbed logits."""
    settings = GateSettings(kind, temperature=1.7, bias=0.3, seed=2, step=3)
    logits = logits_of(200, dtype=dtype).requires_grad_()
    weights = weights_of(settings, logits)
    assert bool(((weights == 0) | (weights == 1)).all())
    direction = torch.randn(weights.shape, generator=torch.Generator().manual_seed(9))
    (hard,) = torch.autograd.grad((weights * direction).sum(), logits)
    noise = torch.zeros(200, 2, 2)
    if kind.startswith("gumbel"):
        noise = -torch.log(-torch.log(uniform(2, 3, torch.arange(200), 0, 2)))
    perturbed = logits.float() + noise + torch.tensor([0.3, 0.0])
    rows = torch.cat([perturbed.mean(1, keepdim=True), perturbed], dim=1)
    (soft,) = torch.autograd.grad((torch.softmax(rows / 1.7, -1) * direction).sum(), logits)
    assert torch.allclose(hard, soft, atol=1e-6 if dtype is torch.float32 else 1e-2)
    assert torch.equal(weights.detach(), one_hot(rows.detach()))


def test_gumbel_choices_follow_the_softmax():
    """Guards the noise: over many draws a choice falls as often as the softmax of its logits says."""
    count = 100_000
    for keep, skip in ((0.0, 0.0), (1.0, -0.5), (-2.0, 0.3)):
        logits = torch.tensor([[[keep, skip]]]).expand(count, -1, -1)
        kept = weights_of(GateSettings("gumbel_straight_through", temperature=0.1, seed=5, step=6), logits)[:, 1, 0]
        expected = 1 / (1 + math.exp(skip - keep))
        assert abs(kept.mean().item() - expected) < 5 * math.sqrt(expected * (1 - expected) / count)


def test_softmax_gate_by_hand():
    """Guards bias and temperature: softmax((z + b · keep) / τ), the context by the mean of the valid logits."""
    logits = torch.tensor([[[1.0, 0.0], [0.0, 3.0], [50.0, 0.0]]])
    valid = torch.tensor([[True, True, False]])
    weights = weights_of(GateSettings("softmax", temperature=2.0, bias=0.5), logits, valid=valid)

    def keep(margin):
        return 1 / (1 + math.exp(-margin / 2))

    expected = [keep((1.0 - 3.0) / 2 + 0.5), keep(1.5), keep(-2.5), keep(50.5)]
    assert weights[0, :, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.allclose(weights.sum(-1), torch.ones(1, 4))


def test_a_tie_skips():
    """Guards agreement with inference, where z_keep must exceed z_skip."""
    assert one_hot(torch.tensor([[[2.0, 2.0], [2.1, 2.0]]])).tolist() == [[[0.0, 1.0], [1.0, 0.0]]]
