"""What a caller may ask of routed inference."""

from dataclasses import dataclass

import torch
from torch import Tensor

from routing_experts.errors import RouteError


@dataclass(frozen=True)
class RoutingOptions:
    """How a request's route is chosen.

    Attributes:
        route: keep flags to follow instead of the routers: bool [L] for all rows, or [B, L] a row. Layers that are
            not routed must be kept.
        keep_bias: added to every keep logit; +inf keeps all layers, -inf skips all routed ones. None for the
            config's.
        layout: "two_call" or "fused"; None for the config's.
    """

    route: Tensor | None = None
    keep_bias: float | None = None
    layout: str | None = None


KEEP_ALL = RoutingOptions(keep_bias=float("inf"))
SKIP_ALL = RoutingOptions(keep_bias=float("-inf"))


def route_rows(route: Tensor, batch_size: int, num_layers: int, routed_layers: tuple[int, ...]) -> Tensor:
    """A forced route as bool [B, L] on the host, repeated for beams and returned sequences.

    Raises:
        RouteError: if its shape does not fit, or it skips a layer that is not routed.
    """
    rows = route.detach().to("cpu", torch.bool)
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2 or rows.shape[1] != num_layers or batch_size % len(rows):
        raise RouteError(
            f"a route of shape {list(route.shape)}: a batch of {batch_size} rows through {num_layers} layers needs "
            f"[{num_layers}] or [{batch_size}, {num_layers}] keep flags. Reshape it."
        )
    unrouted = [layer for layer in range(num_layers) if layer not in routed_layers]
    skipped = [layer for layer in unrouted if not bool(rows[:, layer].all())]
    if skipped:
        raise RouteError(
            f"a route that skips layers {skipped}: they have no adapter, only layers {list(routed_layers)} are routed. "
            "Keep them."
        )
    return rows.repeat_interleave(batch_size // len(rows), 0)
