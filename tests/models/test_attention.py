"""Attention of ordinary and routing tokens: split, it is what one extended mask gives, and cheaper."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from routing_experts.models import attention
from routing_experts.models.attention import SplitMask, extended_mask

HEADS, HEAD_SIZE, ROUTING = 4, 8, 2


def states(batch: int, length: int, groups: int) -> list[torch.Tensor]:
    """Queries of all heads, keys and values of one head a group."""
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(batch, heads, length, HEAD_SIZE, dtype=torch.float64, generator=generator)
        for heads in (HEADS, HEADS // groups, HEADS // groups)
    ]


@given(st.integers(1, 3), st.integers(1, 9), st.sampled_from([1, 2]), st.booleans(), st.integers(0, 99))
@settings(max_examples=30)
def test_split_attention_is_attention_under_one_mask(batch, length, groups, padded, seed):
    """Guards the split against padding, spans and grouped heads."""
    query, key, value = states(batch, length + ROUTING, groups)
    generator = torch.Generator().manual_seed(seed)
    span_mask = torch.rand(batch, 1, ROUTING, length + ROUTING, generator=generator) < 0.5
    span_mask[..., length:] = torch.eye(ROUTING, dtype=torch.bool)
    base_mask = None
    if padded:
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        real = torch.arange(length) >= torch.randint(0, length, (batch, 1, 1, 1), generator=generator)
        base_mask = (causal & real) | torch.eye(length, dtype=torch.bool)
    expected = scaled_dot_product_attention(
        query, key, value, attn_mask=extended_mask(base_mask, span_mask), enable_gqa=groups > 1
    )
    split: Any = SplitMask(base_mask, span_mask)
    found = scaled_dot_product_attention(query, key, value, attn_mask=split, enable_gqa=groups > 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_ordinary_tokens_keep_plainly_causal_attention(monkeypatch):
    """Guards the gain: without padding, the call of ordinary tokens is given no mask, which fast kernels need."""
    calls = []

    def noted(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((query.shape[2], kwargs.get("attn_mask") is None, kwargs.get("is_causal", False)))
        return scaled_dot_product_attention(query, *args, **kwargs)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", noted)
    span_mask = torch.ones(1, 1, ROUTING, 7 + ROUTING, dtype=torch.bool)
    SplitMask(None, span_mask).attend(*states(1, 7 + ROUTING, 1))
    assert calls == [(7, True, True), (ROUTING, False, False)]


def test_a_split_mask_serves_attention_alone():
    """Guards against an attention that would read the mask as a tensor."""
    split: Any = SplitMask(None, torch.ones(1, 1, ROUTING, 3 + ROUTING, dtype=torch.bool))
    with pytest.raises(AssertionError, match="SplitMask"):
        torch.softmax(split, -1)
