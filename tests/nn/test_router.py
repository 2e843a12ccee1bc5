"""The router."""

import torch

from routing_experts.nn.router import keeps, make_router, router_logits, with_context


def test_logits_by_hand():
    """Guards z_q = W_r · [h(r_img); h(r_q)]: image half first, one decision a turn, keep at index 0."""
    router = make_router(2)
    assert router.weight.shape == (2, 4)
    assert router.bias is None
    router.weight.data = torch.tensor([[1.0, 0.0, 10.0, 0.0], [0.0, 1.0, 0.0, 10.0]])
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    assert router_logits(tokens, router).tolist() == [[[31.0, 42.0], [51.0, 62.0]]]


def test_context_is_the_mean_over_valid_turns():
    """Guards shorter dialogues: turns that do not exist stay out of the mean; none at all gives zeros, not NaN."""
    logits = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[9.0, 9.0]] * 3])
    valid = torch.tensor([[True, True, False], [False, False, False]])
    rows = with_context(logits, valid)
    assert rows[:, 0].tolist() == [[2.0, 4.0], [0.0, 0.0]]
    assert torch.equal(rows[:, 1:], logits)


def test_decisions_and_their_bias():
    """Guards the threshold: keep iff z_keep + bias > z_skip, a tie skips, and infinities decide alone."""
    logits = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]]])
    assert keeps(logits).tolist() == [[True, False, False]]
    assert keeps(logits, 0.5).tolist() == [[True, True, False]]
    assert keeps(logits, float("inf")).tolist() == [[True, True, True]]
    assert keeps(logits, float("-inf")).tolist() == [[False, False, False]]
    rows = torch.tensor([float("inf"), 0.0, 1.5], dtype=torch.float64)
    assert keeps(logits[0], rows).tolist() == [True, False, True]
