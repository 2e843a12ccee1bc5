"""The routed decoder layer: the base layer's own class, subclassed on the fly and swapped in.

Base weights keep their names, and the swapped class its base's names, because key conversion, wrapping and device
maps match on them. One layer serves training, prefill and decoding; all it knows about a call comes with the call, in
the routing context or in the cache.

Two layouts, one result. *Two-call*: ordinary tokens go through the base's ``forward`` untouched (hence bitwise the
base when all layers are kept), then the routing tokens as extra queries over the first call's keys and values.
*Fused*: both in one call under an extended mask, which reads the weights once.

Shapes: B examples, T tokens, R routing tokens, D hidden.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from routing_experts.errors import RouteError
from routing_experts.models.attention import SplitMask
from routing_experts.models.cache import BehindTap, KeyValueTap, RoutedCache, RoutedCacheLayer
from routing_experts.models.context import RoutingContext
from routing_experts.models.dialogue import store_keys
from routing_experts.models.disguise import disguise
from routing_experts.models.mixing import merge_rows, mix
from routing_experts.nn.adapter import skip_path
from routing_experts.nn.router import keeps, router_logits

BY_ROW = ("attention_mask", "position_ids", "position_embeddings")  # what a layer is called with, a row an example


@functools.cache
def routed_layer_class(base: type) -> type:
    """The routed subclass of a decoder layer's class; one a class, so that equal layers stay of one class."""
    run = base.forward  # type: ignore[attr-defined]

    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        *args: Any,
        routing: RoutingContext | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        assert not args, "transformers calls decoder layers by keyword"
        trains = routing is not None and routing.gate is not None
        call = _LayerCall(self, run, routing, None if trains else past_key_values, kwargs)  # a mix fills no cache
        if trains:
            _refuse_reentrant_checkpointing(self)
            if not call.is_routed:
                return call.run_all(hidden_states)
            return mix(call, hidden_states)
        if routing is not None:
            return call.prefill(hidden_states)
        return call.follow(hidden_states)

    return disguise(base, {"forward": forward, "is_routing_experts_layer": True})


class _LayerCall:
    """One call of one layer, with what it was given."""

    def __init__(
        self, layer: Any, run: Any, routing: RoutingContext | None, cache: Any, kwargs: dict[str, Any]
    ) -> None:
        self.layer, self.run, self.routing, self.cache, self.kwargs = layer, run, routing, cache, kwargs
        self.index: int = layer.self_attn.layer_idx
        self.is_routed = "skip_down" in layer._modules
        self.slot: RoutedCacheLayer | None = cache.layers[self.index] if isinstance(cache, RoutedCache) else None

    def routing_tokens(self, hidden: Tensor) -> Tensor | None:
        """Those that enter this layer, in the precision of its hidden states: what trains may be kept in more."""
        assert self.routing is not None
        tokens = self.routing.tokens.get(self.index)
        return None if tokens is None else tokens.to(hidden.dtype)

    def router_input(self, hidden: Tensor) -> Tensor:
        """What this layer's router reads, [B, R, D]: normalised routing tokens, or means of ordinary tokens."""
        assert self.routing is not None
        if self.routing.pooled:
            return self.routing.pool(self.layer.input_layernorm(hidden))
        tokens = self.routing_tokens(hidden)
        assert tokens is not None
        return self.layer.input_layernorm(tokens)

    def follow(self, hidden: Tensor) -> Tensor:
        """A decoding step: the route that the prefill chose and the cache holds."""
        if self.slot is None:
            return self.run(self.layer, hidden, past_key_values=self.cache, **self.kwargs)
        return self.slot.step(self._follow, hidden, self.kwargs)

    def _follow(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        slot = self.slot
        assert slot is not None
        if slot.all_keep:
            return self.run(self.layer, hidden, past_key_values=self.cache, **kwargs)
        if not slot.any_keep:
            return self.pass_over(hidden)
        kept, skipped = slot.kept_rows.to(hidden.device), slot.skipped_rows.to(hidden.device)
        ran = self.run(self.layer, hidden[kept], past_key_values=self.cache, **_rows(kwargs, kept, len(hidden)))
        return merge_rows(hidden, kept, ran, skipped, self.adapt(hidden[skipped]))

    def prefill(self, hidden: Tensor) -> Tensor:
        """Decides for each row, then runs the layer on the rows that keep it, the adapter on the others."""
        assert self.routing is not None
        routing = self.routing
        tokens = self.routing_tokens(hidden)
        if not self.is_routed:
            return self.run_all(hidden)
        keep = self._decide(hidden)
        routing.keep[self.index] = keep
        if self.slot is not None:
            self.slot.set_keep(keep)
        if bool(keep.all()):
            return self.run_all(hidden)
        carries = tokens is not None and routing.carries_after(self.index)
        if not bool(keep.any()):
            if carries and tokens is not None:
                routing.tokens[self.index + 1] = self.adapt(tokens)
            return self.pass_over(hidden)
        kept, skipped = keep.nonzero()[:, 0].to(hidden.device), (~keep).nonzero()[:, 0].to(hidden.device)
        if not carries:
            ran = self.run_rows(hidden, kept)
            return merge_rows(hidden, kept, ran, skipped, self.adapt(hidden[skipped]))
        assert tokens is not None
        ran, ran_tokens = self.run_both(hidden[kept], tokens[kept], kept)
        routing.tokens[self.index + 1] = merge_rows(tokens, kept, ran_tokens, skipped, self.adapt(tokens[skipped]))
        return merge_rows(hidden, kept, ran, skipped, self.adapt(hidden[skipped]))

    def run_rows(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """The base layer on all of a batch's rows, or on those that ``rows`` says."""
        if rows is None:
            return self.run(self.layer, hidden, past_key_values=self.cache, **self.kwargs)
        return self.run(self.layer, hidden[rows], past_key_values=self.cache, **_rows(self.kwargs, rows, len(hidden)))

    def run_both(self, hidden: Tensor, tokens: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The base layer on ordinary and routing tokens [B, T, D], [B, R, D]; ``rows`` says which of the batch."""
        routing = self.routing
        assert routing is not None
        kwargs = self.kwargs if rows is None else _rows(self.kwargs, rows, len(routing.first_real_B))
        additive = self.layer.self_attn.config._attn_implementation == "eager"
        if routing.layout == "fused":
            return self._run_fused(hidden, tokens, rows, kwargs, additive)
        tap = KeyValueTap(self.cache)
        ran = self.run(self.layer, hidden, past_key_values=tap, **kwargs)
        rotary = routing.routing_rotary(self.kwargs["position_embeddings"])
        mask = routing.span_mask(hidden.dtype, additive)
        if rows is not None:
            rotary, mask = tuple(c[rows] for c in rotary), mask[rows]
        beside = kwargs | {"attention_mask": mask, "position_embeddings": rotary, "position_ids": None}
        return ran, self.run(self.layer, tokens, past_key_values=BehindTap(tap), **beside)

    def pass_over(self, hidden: Tensor) -> Tensor:
        """Every row skips: the cache counts the tokens, or holds their keys and values for turns to come."""
        if self.slot is not None and self.slot.stores_skipped:
            store_keys(self.layer, self.run, hidden, self.cache, **self.kwargs)
        elif self.slot is not None:
            self.slot.skip(hidden.shape[1])
        return self.adapt(hidden)

    def adapt(self, hidden: Tensor, normed: Tensor | None = None) -> Tensor:
        """The skip path."""
        normed = self.layer.input_layernorm(hidden) if normed is None else normed
        return skip_path(hidden, normed, self.layer.skip_down, self.layer.skip_up)

    def _decide(self, hidden: Tensor) -> Tensor:
        """Bool [B] on the host: the one synchronisation of a routed layer, at prefill only."""
        routing = self.routing
        assert routing is not None
        if routing.route_BL is not None:
            return routing.route_BL[:, self.index]
        logits = router_logits(self.router_input(hidden), self.layer.router)
        routing.logits.setdefault(self.index, logits)
        # Compared on the host, whose double precision gives a row's bias the same effect in any batch and dtype.
        return keeps(logits[:, -1].cpu(), routing.keep_bias)

    def run_all(self, hidden: Tensor) -> Tensor:
        """Every row runs; routing tokens come along while a later layer needs them."""
        assert self.routing is not None
        tokens = self.routing_tokens(hidden)
        if tokens is None or not self.routing.carries_after(self.index):
            return self.run_rows(hidden)
        ran, ran_tokens = self.run_both(hidden, tokens)
        self.routing.tokens.setdefault(self.index + 1, ran_tokens)
        return ran

    def _run_fused(
        self, hidden: Tensor, tokens: Tensor, rows: Tensor | None, kwargs: dict[str, Any], additive: bool
    ) -> tuple[Tensor, Tensor]:
        """One call of T + R tokens; the cache stores the first T."""
        routing, num_routing = self.routing, tokens.shape[1]
        assert routing is not None
        rotary = routing.fused_rotary(self.kwargs["position_embeddings"])
        if rows is not None:
            rotary = tuple(c[rows] for c in rotary)
        together = kwargs | {
            "attention_mask": self._fused_mask(hidden.dtype, rows, kwargs, additive),
            "position_embeddings": rotary,
            "position_ids": None,
        }
        tap = KeyValueTap(self.cache, num_hidden_last=num_routing)
        out = self.run(self.layer, torch.cat([hidden, tokens], dim=1), past_key_values=tap, **together)
        return out[:, :-num_routing], out[:, -num_routing:]

    def _fused_mask(
        self, dtype: torch.dtype, rows: Tensor | None, kwargs: dict[str, Any], additive: bool
    ) -> Tensor | SplitMask:
        """For some rows of the batch, whose own mask is in ``kwargs``."""
        routing = self.routing
        assert routing is not None
        if additive:
            mask = routing.fused_mask(self.kwargs.get("attention_mask"), dtype, additive)
            return mask if rows is None else mask[rows]
        spans = routing.span_mask(dtype, additive)
        return SplitMask(kwargs.get("attention_mask"), spans if rows is None else spans[rows])


def _refuse_reentrant_checkpointing(layer: Any) -> None:
    """Reentrant checkpointing runs a layer without a graph, so what it writes to the context gets no gradient."""
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        settings = getattr(layer._gradient_checkpointing_func, "keywords", {})
        if settings.get("use_reentrant", False):
            raise RouteError(
                "gradient checkpointing with use_reentrant=True: it loses the routing tokens' gradients without an "
                "error. Enable it with gradient_checkpointing_kwargs={'use_reentrant': False}."
            )


def _rows(kwargs: dict[str, Any], rows: Tensor, batch: int) -> dict[str, Any]:
    """The keywords of some rows: masks, positions and rotary tables that have a row an example."""

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape[0] == batch:
            return value[rows]
        return tuple(pick(v) for v in value) if isinstance(value, tuple) else value

    return kwargs | {name: pick(kwargs[name]) for name in BY_ROW if kwargs.get(name) is not None}
