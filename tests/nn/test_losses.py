"""The training objective, against values computed by hand."""

import math

import pytest
import torch

from routing_experts.nn.losses import (
    cross_entropy_per_example,
    distillation_per_example,
    roe_loss,
    skip_rate_per_example,
    sparsity_pressure,
)

LOGITS = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0], [5.0, 1.0]], [[0.0, math.log(4)], [1.0, 1.0], [0.0, 0.0]]])


def test_cross_entropy_by_hand():
    """Guards the shift by one and the mean over an example's own answer tokens."""
    labels = torch.tensor([[-100, 0, 1], [0, 1, -100]])
    got = cross_entropy_per_example(LOGITS, labels)
    first = (math.log(2) + math.log(4)) / 2  # ½ and ¼ were given to tokens 1 and 2
    second = math.log(5 / 4)  # the first label is never predicted
    assert got.tolist() == pytest.approx([first, second])


@pytest.mark.parametrize("labels", [[[-100] * 3, [0, 1, 1]], [[-100] * 3, [1, -100, -100]]])
def test_an_example_without_labels_is_finite(labels):
    """Guards the batch: an all-ignored example once made the whole batch's loss NaN; here it counts 0."""
    logits = LOGITS.clone().requires_grad_()
    entropy = cross_entropy_per_example(logits, torch.tensor(labels))
    loss = roe_loss(entropy, torch.tensor([0.1, 0.1]), 0.3).mean()
    loss.backward()
    assert entropy[0] == 0
    assert bool(loss.isfinite())
    assert bool(logits.grad.isfinite().all())
    assert not bool(logits.grad[0].any())


def test_skip_rate_by_hand():
    """Guards s_i: the mean over valid turns, then over layers; turns that do not exist count nothing."""
    skips = torch.tensor([[[1.0, 0.0, 9.0], [0.5, 9.0, 9.0]], [[1.0, 1.0, 9.0], [0.1, 9.0, 9.0]]])
    valid = torch.tensor([[True, True, False], [True, False, False]])
    assert skip_rate_per_example(skips, valid).tolist() == pytest.approx([0.75, 0.3])


def test_loss_by_hand():
    """Guards CE + c · exp(−α · CE) · max(0, ρ − s): below the target, above it, and an example answered badly."""
    entropy, rate = torch.tensor([0.0, 0.1, 4.0]), torch.tensor([0.1, 0.9, 0.0])
    got = roe_loss(entropy, rate, 0.3, coef=2.0, sharpness=5.0)
    assert got.tolist() == pytest.approx([0.4, 0.1, 4.0 + 0.6 * math.exp(-20.0)])


def test_the_confidence_factor_has_no_gradient():
    """Guards stopgrad: otherwise the model would gain by answering badly."""
    entropy, rate = torch.tensor([0.2], requires_grad=True), torch.tensor([0.1], requires_grad=True)
    roe_loss(entropy, rate, 0.3).sum().backward()
    assert entropy.grad.item() == pytest.approx(1.0)
    assert rate.grad.item() == pytest.approx(-math.exp(-1.0))


def test_loss_is_a_mean_of_examples_whatever_the_split():
    """Guards accumulation: long and short answers weigh the same, and micro-batches add up to the batch."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 9, 11, generator=generator)
    labels = torch.randint(0, 11, (4, 9), generator=generator)
    labels[0, 2:] = -100
    labels[1, :7] = -100
    rates = torch.rand(4, generator=generator)
    whole = roe_loss(cross_entropy_per_example(logits, labels), rates, 0.3).mean()
    for rows in ([[0], [1, 2, 3]], [[2, 0], [3, 1]]):
        parts = [roe_loss(cross_entropy_per_example(logits[r], labels[r]), rates[r], 0.3).sum() / 4 for r in rows]
        assert torch.allclose(torch.stack(parts).sum(), whole, atol=1e-6)
    padded = torch.cat([logits, torch.randn(4, 3, 11)], dim=1), torch.cat([labels, torch.full((4, 3), -100)], dim=1)
    again = roe_loss(cross_entropy_per_example(*padded), rates, 0.3).mean()
    assert torch.allclose(again, whole, atol=1e-6)


def test_the_pressure_falls_from_one_to_nothing_as_the_mean_nears_the_target():
    """Guards the mean's target: full push well below it, half of it half way through the band, none from it on."""
    wanted = {0.0: 1.0, 0.25: 1.0, 0.275: 0.5, 0.3: 0.0, 0.6: 0.0}
    assert {rate: sparsity_pressure(rate, 0.3) for rate in wanted} == pytest.approx(wanted)


def test_under_pressure_an_example_is_paid_for_skipping_beyond_the_target():
    """Guards what the hinge forbids: above the target the gradient is the same as below, and scales with p."""
    cross_entropy = torch.tensor([0.2, 0.2])
    for pressure, pushed in ((None, [-1.0, 0.0]), (1.0, [-1.0, -1.0]), (0.25, [-0.25, -0.25])):
        skipped = torch.tensor([0.1, 0.5], requires_grad=True)
        roe_loss(cross_entropy, skipped, 0.3, pressure=pressure).sum().backward()
        torch.testing.assert_close(skipped.grad, torch.tensor(pushed) * torch.exp(torch.tensor(-1.0)))


def test_distillation_by_hand():
    """Guards KL(dense ‖ routed) over scored tokens alone, the shift by one, and that dense answers get no gradient."""
    routed = LOGITS.clone().requires_grad_()
    dense = torch.zeros_like(LOGITS).requires_grad_()
    labels = torch.tensor([[-100, 0, 1], [0, -100, -100]])
    got = distillation_per_example(routed, dense, labels)
    second = math.log(0.5) - (math.log(3 / 4) + math.log(1 / 4)) / 2  # the first token's predictions agree
    assert got.tolist() == pytest.approx([second / 2, 0.0])
    got.sum().backward()
    assert dense.grad is None
    assert bool(routed.grad[0, 1].any())
    assert distillation_per_example(LOGITS, LOGITS, labels).tolist() == pytest.approx([0.0, 0.0])
