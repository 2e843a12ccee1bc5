"""Masks, in the form in which attention takes them.

Shapes: B examples, H heads, T ordinary tokens, R routing tokens behind them, P tokens of a past.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention_form(visible: Tensor, dtype: torch.dtype, additive: bool) -> Tensor:
    """A mask as attention takes it: boolean, or, for eager attention, added: 0 where seen, else as low as can be."""
    if not additive:
        return visible
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def extended_mask(base_mask: Tensor | None, span_mask: Tensor) -> Tensor:
    """One mask for ordinary and routing tokens, [B, 1, T + R, P + T + R]: ordinary tokens see no routing token.

    Args:
        base_mask: the base's, [B or 1, 1, T, P + T]; None for plainly causal attention, without a past.
        span_mask: what routing tokens see, [B, 1, R, P + T + R], boolean or additive.
    """
    batch, _, num_routing, num_keys = span_mask.shape
    additive = span_mask.dtype != torch.bool
    if base_mask is None:
        length = num_keys - num_routing
        causal = torch.ones(length, length, dtype=torch.bool, device=span_mask.device).tril()
        base_mask = attention_form(causal[None, None], span_mask.dtype, additive)
    ordinary = base_mask.expand(batch, -1, -1, -1)
    blocked = torch.zeros(*ordinary.shape[:-1], num_routing, dtype=torch.bool, device=span_mask.device)
    ordinary = torch.cat([ordinary, attention_form(blocked, span_mask.dtype, additive)], dim=-1)
    return torch.cat([ordinary, span_mask], dim=2)


class AttendingMask(ABC):
    """Stands where SDPA takes its mask: the call becomes the mask's own ``attend``."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Called by torch in place of a function that it is an argument of (torch's override protocol)."""
        given = dict(kwargs or {})
        mask = given.pop("attn_mask", None)
        assert function is scaled_dot_product_attention, f"{function} on a {cls.__name__}"
        assert isinstance(mask, cls)
        return mask.attend(*args, **given)

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, **settings: Any) -> Tensor:
        """SDPA, with its keywords, under this mask."""


class SplitMask(AttendingMask):
    """Splits the call of attention: ordinary tokens under the base's mask, others apart.

    ``extended_mask`` says the same in one tensor, but a kernel that is given a mask computes what plainly causal
    attention leaves out, and a faster kernel may refuse masks altogether.

    Args:
        base_mask: as in ``extended_mask``.
        span_mask: as in ``extended_mask``.
    """

    def __init__(self, base_mask: Tensor | None, span_mask: Tensor) -> None:
        self.base_mask, self.span_mask = base_mask, span_mask

    def attend(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, **settings: Any) -> Tensor:
        """Attention of [B, H, T + R, head size] over [B, H, P + T + R, head size]; SDPA's keywords."""
        assert not is_causal, "masked attention is not causal besides"
        num_routing = self.span_mask.shape[2]
        first, keys, values = (states[:, :, :-num_routing] for states in (query, key, value))
        causal = self.base_mask is None and first.shape[2] > 1
        assert not causal or first.shape[2] == keys.shape[2], "behind a past the base gives a mask"
        ordinary = scaled_dot_product_attention(
            first, keys, values, attn_mask=self.base_mask, is_causal=causal, **settings
        )
        behind = query[:, :, -num_routing:]
        routing = scaled_dot_product_attention(behind, key, value, attn_mask=self.span_mask, **settings)
        # Tokens before heads, as the base goes on with them: put together the other way they would be copied twice.
        return torch.cat([ordinary.transpose(1, 2), routing.transpose(1, 2)], dim=1).transpose(1, 2)
