"""The routed cache: keys and values of each layer for the rows that run it, and the route that says which.

Each of the base's cache layers is wrapped, not replaced, so that sliding windows, masks and reordering stay the
base's. A wrapped layer owns its length: it counts tokens whether or not anyone ran the layer, because transformers
asks layer 0 how long the past is, and layer 0 may have been skipped by all rows.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from routing_experts.errors import RouteError
from routing_experts.models.options import RoutingOptions


class RoutedCacheLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, for its kept rows only.

    Attributes:
        inner: the base's cache layer, which holds ``[kept rows, heads, tokens, head size]``.
        length: tokens seen, run or skipped.
        keep: bool [B] on the host: which rows run the layer; None before the route is known (every row runs).
        stores_skipped: whether tokens that skip the layer leave keys and values behind all the same.
    """

    is_croppable = False
    stores_skipped = False

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.length = 0
        self.set_keep(None)

    def set_keep(self, keep: Tensor | None) -> None:
        """Fixes which rows run this layer, and where they stand; asked once a prefill, never in decoding."""
        self.keep = keep
        self.all_keep = keep is None or bool(keep.all())
        self.any_keep = keep is None or bool(keep.any())
        if keep is not None and not self.all_keep:
            self.kept_rows, self.skipped_rows = keep.nonzero()[:, 0], (~keep).nonzero()[:, 0]

    @property
    def is_sliding(self) -> bool:
        """Whether the inner layer forgets tokens outside a window."""
        return bool(self.inner.is_sliding)

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether there is a past; masks of some families depend on it."""
        return self.length > 0

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Keys of the kept rows."""
        return self.inner.keys

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Values of the kept rows."""
        return self.inner.values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Left to the inner layer, which does it when keys first arrive."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends the kept rows' keys and values; returns all of theirs."""
        self.length += key_states.shape[-2]
        return self.inner.update(key_states, value_states, *args, **kwargs)

    def skip(self, num_tokens: int) -> None:
        """Counts tokens that no row ran; a sliding layer's mask depends on its own counter too."""
        self.length += num_tokens
        if self.is_sliding:
            self.inner.cumulative_length += num_tokens

    def step(self, function: Callable[..., Tensor], hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Runs a layer's decoding step, ``function(hidden, kwargs)``; caches that record such calls replay them."""
        return function(hidden, kwargs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask must cover."""
        if self.is_sliding:
            return self.inner.get_mask_sizes(query_length)
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, run or skipped."""
        return self.length

    def get_max_length(self) -> int:
        """The inner layer's bound."""
        return self.inner.get_max_length()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i becomes what row ``indices[i]`` was: its decision, and its keys and values if it has any."""
        source = indices
        if self.keep is not None:
            picked = indices.cpu()
            slot_of_row = self.keep.cumsum(0) - 1
            source = slot_of_row[picked[self.keep[picked]]].to(indices.device)
            self.set_keep(self.keep[picked])
        if self.inner.is_initialized and self.inner.keys is not None and self.inner.values is not None:
            self.inner.keys = self.inner.keys.index_select(0, source.to(self.inner.keys.device))
            self.inner.values = self.inner.values.index_select(0, source.to(self.inner.values.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follows the beams."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row."""
        rows = self._num_rows()
        if rows:
            self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: assisted decoding would have to undo routing decisions."""
        raise RouteError(
            f"crop({tokens_to_remove}) on a routed cache: it is asked for by assisted decoding, which routed models do "
            "not support. Generate without assistant_model and prompt_lookup_num_tokens."
        )

    def reset(self) -> None:
        """Forgets everything, the route included."""
        self.inner.reset()
        self.length = 0
        self.set_keep(None)

    def offload(self) -> None:
        """As the inner layer does it."""
        self.inner.offload()

    def prefetch(self) -> None:
        """As the inner layer does it."""
        self.inner.prefetch()

    def _num_rows(self) -> int:
        if self.keep is not None:
            return len(self.keep)
        return 0 if self.inner.keys is None else len(self.inner.keys)


class RoutedCache(DynamicCache):
    """Keys, values and route of a batch of requests. Decided at prefill; decoding follows.

    Args:
        config: the model's.
        options: how the route is chosen.
    """

    def __init__(self, config: Any, options: RoutingOptions | None = None) -> None:
        super().__init__(config=config.get_text_config(decoder=True))
        self.layers: list[RoutedCacheLayer] = [RoutedCacheLayer(layer) for layer in self.layers]  # type: ignore[assignment]
        self.options = options or RoutingOptions()

    @property
    def route(self) -> Tensor | None:
        """Keep flags bool [B, L] on the host, or None before the prefill; unrouted layers count as kept."""
        rows = [len(layer.keep) for layer in self.layers if layer.keep is not None]
        if not rows:
            return None
        kept = [torch.ones(rows[0], dtype=torch.bool) if layer.keep is None else layer.keep for layer in self.layers]
        return torch.stack(kept, dim=1)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values held; skipped layers hold none for the rows that skip them."""
        return cache_bytes(self)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache of whatever kind holds."""
    return tensor_bytes(states for layer in cache.layers for states in (layer.keys, layer.values))


def tensor_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of those that are there."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


class KeyValueTap:
    """Stands in for the cache inside one layer's call and notes the keys and values that pass through.

    Args:
        cache: what stores them; None for nothing.
        num_hidden_last: this many last tokens (fused routing tokens) are never stored.
    """

    def __init__(self, cache: Any = None, num_hidden_last: int = 0) -> None:
        self.cache, self.num_hidden_last = cache, num_hidden_last

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What attention sees: what the cache held before, and this call's own."""
        last = self.num_hidden_last
        self.keys, self.values = keys, values
        if self.cache is None:
            return keys, values
        stored = keys.shape[-2] - last
        held = self.cache.update(keys[:, :, :stored], values[:, :, :stored], layer_idx, *args, **kwargs)
        if held[0].shape[-2] > stored:  # behind a past
            ends = zip(held, (keys, values), strict=True)
            self.keys, self.values = (torch.cat([old, new[:, :, stored:]], dim=-2) for old, new in ends)
        return self.keys, self.values


class BehindTap:
    """The routing tokens' "cache": the keys and values that a tap noted, then their own; nothing is stored."""

    def __init__(self, tap: KeyValueTap) -> None:
        self.tap = tap

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What the routing tokens see."""
        return torch.cat([self.tap.keys, keys], dim=-2), torch.cat([self.tap.values, values], dim=-2)
