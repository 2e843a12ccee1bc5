"""The routing context: everything about routing that belongs to one call of the model, and to nothing else.

Routing tokens travel beside the sequence. Layer l reads ``tokens[l]`` and writes ``tokens[l + 1]`` and its logits by
index, once, so that recomputation under gradient checkpointing changes nothing. A plain class on purpose: FSDP2
rebuilds dataclasses, dicts and tuples among a layer's keywords, and writes to them would be lost.

Shapes: B examples, T tokens, Q turns, R = Q + 1 routing tokens (image side first), D hidden, L layers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from routing_experts.models.attention import attention_form, extended_mask
from routing_experts.models.spans import PADDING, question_segment, turns_of
from routing_experts.nn.gates import GateSettings


class RoutingContext:
    """Made for one forward of the model.

    Args:
        visible_BRK: what each routing token sees, bool over K = T ordinary tokens (behind those that a cache holds,
            if it does) and then R routing tokens.
        turns_BT: whose weights a token follows: 0 context, q = 1 … Q a turn.
        valid_BQ: which turns exist.
        first_real_B: index of each row's first token that is no padding; routing tokens share its position.
        gate: training's gate; None decides hard.
        route_BL: a forced route on the host; the routers are not asked then.
        keep_bias: added to keep logits of hard decisions; one for all rows, or [B] on the host.
        layout: "two_call" or "fused".
        keys_B: integers that identify examples for random draws.
        last_routed: the last routed layer; routing tokens travel no further.
        rotary: cos and sin of the routing tokens [B, R, head size], instead of the first real token's.
        pooled: routers read means over the spans of ordinary tokens; no routing tokens travel.
        same_calls: every process has to call the same modules, whatever its examples skip: weights are shared out.

    Attributes:
        tokens: layer → routing tokens that enter it [B, R, D]; filled from 0 by the model.
        logits: layer → router logits [B, Q, 2].
        weights: layer → gate weights [B, R, 2] (training).
        keep: layer → bool [B] on the host (hard decisions).
    """

    def __init__(
        self,
        visible_BRK: Tensor,
        turns_BT: Tensor,
        valid_BQ: Tensor,
        first_real_B: Tensor,
        *,
        gate: GateSettings | None = None,
        route_BL: Tensor | None = None,
        keep_bias: float | Tensor = 0.0,
        layout: str = "two_call",
        keys_B: Tensor | None = None,
        last_routed: int = 10**9,
        rotary: tuple[Tensor, Tensor] | None = None,
        pooled: bool = False,
        same_calls: bool = False,
    ) -> None:
        self.visible_BRK, self.turns_BT, self.valid_BQ = visible_BRK, turns_BT, valid_BQ
        self.first_real_B = first_real_B
        self.gate, self.route_BL, self.keep_bias, self.layout = gate, route_BL, keep_bias, layout
        self.keys_B = torch.arange(len(turns_BT), device=turns_BT.device) if keys_B is None else keys_B
        self.last_routed, self.rotary, self.same_calls, self.pooled = last_routed, rotary, same_calls, pooled
        self.tokens: dict[int, Tensor] = {}
        self.logits: dict[int, Tensor] = {}
        self.weights: dict[int, Tensor] = {}
        self.keep: dict[int, Tensor] = {}
        self._made: dict[tuple[str, int], tuple[Tensor | None, Any]] = {}

    @classmethod
    def from_segments(cls, segment_ids_BT: Tensor, past: int = 0, **settings: Any) -> "RoutingContext":
        """Builds the context from segment ids (see ``models.spans``): routing token q sees question q and itself.

        Args:
            segment_ids_BT: of ordinary tokens, those that a cache holds included.
            past: how many of them it holds; the call brings the others.
            **settings: the constructor's keywords.
        """
        turns_BT = turns_of(segment_ids_BT)
        num_turns = max(1, int(turns_BT.max()))
        spans = [segment_ids_BT == 0]
        spans += [segment_ids_BT == question_segment(turn) for turn in range(1, num_turns + 1)]
        span_BRT = torch.stack(spans, dim=1)
        itself = torch.eye(num_turns + 1, dtype=torch.bool, device=segment_ids_BT.device)
        return cls(
            torch.cat([span_BRT, itself.expand(len(segment_ids_BT), -1, -1)], dim=-1),
            turns_BT[:, past:].clamp_min(0),
            span_BRT[:, 1:].any(-1),
            (segment_ids_BT != PADDING).int().argmax(1),
            **settings,
        )

    @property
    def num_tokens(self) -> int:
        """R."""
        return self.visible_BRK.shape[1]

    @property
    def carries_tokens(self) -> bool:
        """Whether routing tokens travel at all: forced, random, static and pooled routes read none."""
        if self.pooled or self.route_BL is not None:
            return False
        return self.gate is None or self.gate.asks_router

    @property
    def on_host(self) -> tuple[Tensor, Tensor, Tensor]:
        """valid_BQ, keys_B and turns_BT where draws are decided; fetched once."""
        return self._once("on host", None, lambda: (self.valid_BQ.cpu(), self.keys_B.cpu(), self.turns_BT.cpu()))

    def carries_after(self, layer: int) -> bool:
        """Whether a later layer's router reads what routing tokens become in this one."""
        return layer < self.last_routed

    def start(self, routing_tokens_2D: Tensor) -> None:
        """Lays the learned embeddings in front of layer 0: the image side's, then the text side's once a turn."""
        index = torch.tensor([0] + [1] * (self.num_tokens - 1), device=routing_tokens_2D.device)
        self.tokens[0] = routing_tokens_2D[index].expand(len(self.turns_BT), -1, -1)

    def pool(self, hidden_BTD: Tensor) -> Tensor:
        """Means over the spans that routing tokens would see, [B, R, D]; a span without tokens gives 0."""
        spans_BRT = self.visible_BRK[..., : hidden_BTD.shape[1]].to(hidden_BTD.dtype)
        return spans_BRT @ hidden_BTD / spans_BRT.sum(-1, keepdim=True).clamp_min(1)

    def routing_rotary(self, position_embeddings: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """cos and sin for the routing tokens, [B, 1, head size] or given: those of each row's first real token."""
        if self.rotary is not None:
            return self.rotary
        return self._once("rotary", position_embeddings[0], lambda: self._first_real(position_embeddings))

    def fused_rotary(self, position_embeddings: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """cos and sin for ordinary and then routing tokens, [B, T + R, head size]."""
        return self._once("fused rotary", position_embeddings[0], lambda: self._behind(position_embeddings))

    def _first_real(self, position_embeddings: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = torch.arange(len(self.first_real_B), device=self.first_real_B.device)
        return tuple(c.expand(len(rows), -1, -1)[rows, self.first_real_B][:, None] for c in position_embeddings)

    def _behind(self, position_embeddings: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        batch, routing = len(self.first_real_B), self.routing_rotary(position_embeddings)
        pairs = zip(position_embeddings, routing, strict=True)
        return tuple(torch.cat([c.expand(batch, -1, -1), r.expand(-1, self.num_tokens, -1)], dim=1) for c, r in pairs)

    def _once(self, name: str, source: Tensor | None, make: Callable[[], Any]) -> Any:
        """Layers of one kind share the model's masks and rotary tables: what is derived from them is made once.

        The source is held as long as the context, so that its identity stays its own.
        """
        key = (name, id(source))
        if key not in self._made:
            self._made[key] = (source, make())
        return self._made[key][1]

    def span_mask(self, dtype: torch.dtype, additive: bool) -> Tensor:
        """What routing tokens see, [B, 1, R, K]: boolean, or additive for eager attention."""
        visible = self.visible_BRK[:, None]
        return self._once(f"span {dtype} {additive}", None, lambda: attention_form(visible, dtype, additive))

    def fused_mask(self, base_mask: Tensor | None, dtype: torch.dtype, additive: bool) -> Tensor:
        """What ordinary and routing tokens see in one call, for additive masks: see ``models.attention``."""
        name = f"fused {dtype} {additive}"
        return self._once(name, base_mask, lambda: extended_mask(base_mask, self.span_mask(dtype, additive)))
