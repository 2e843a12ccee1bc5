"""What a caller may ask of routed inference, and what becomes of it for one model and one batch.

Shapes: B rows, L decoder layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from routing_experts.config import CONTROL_GATES, RoEConfig
from routing_experts.errors import RouteError


@dataclass(frozen=True)
class RoutingOptions:
    """How a request's route is chosen: by one of route, keep bias and skip ratio, or as the config says.

    Attributes:
        route: keep flags to follow instead of the routers: bool [L] for all rows, or [B, L] a row. Layers that are
            not routed must be kept.
        keep_bias: added to every keep logit, for all rows or, as a tensor [B], a row; +inf keeps all layers, -inf skips
            all routed ones. None for the config's.
        layout: "two_call" or "fused"; None for the config's.
        skip_ratio: the share of all decoder layers that a request skips on average, within the model's calibrated
            budget; 0 is the dense model.

    Raises:
        RouteError: if more than one of route, keep bias and skip ratio is given.
    """

    route: Tensor | None = None
    keep_bias: float | Tensor | None = None
    layout: str | None = None
    skip_ratio: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("route", "keep_bias", "skip_ratio") if getattr(self, name) is not None]
        if len(given) > 1:
            raise RouteError(f"{' and '.join(given)} together: each says which layers to skip. Give one of them.")


KEEP_ALL = RoutingOptions(keep_bias=float("inf"))
SKIP_ALL = RoutingOptions(keep_bias=float("-inf"))


def settle(options: RoutingOptions, config: RoEConfig, num_layers: int) -> RoutingOptions:
    """What the options come to for a model: a layout, and a route or a keep bias.

    Raises:
        RouteError: if the model cannot be asked so: a ratio outside its budget, a bias where routers were not trained.
    """
    settled = RoutingOptions(layout=options.layout or config.layout)
    if options.route is not None:
        if config.stripped:
            raise _gone(config)
        return replace(settled, route=options.route)
    bias = options.keep_bias if options.skip_ratio is None else config.keep_bias_for(options.skip_ratio)
    if config.gate not in CONTROL_GATES:
        return replace(settled, keep_bias=config.keep_bias if bias is None else bias)
    if config.stripped and bias not in (None, float("-inf")):
        raise _gone(config)
    if bias is None and config.gate == "static":
        bias = float("-inf")
    if bias is None:
        raise RouteError(
            "a model trained on random routes, called without a route: its routers were never trained. Pass "
            "RoutingOptions(route=...), or RoutingOptions(keep_bias=inf) to run all layers."
        )
    route = route_of_bias(bias, num_layers, config.layers_to_route(num_layers))
    if route is None:
        raise RouteError(
            f"keep_bias={bias} on a model with gate {config.gate!r}: a bias moves what routers decide, and its were "
            "never trained. Leave it out, or give a route."
        )
    return replace(settled, route=route)


def _gone(config: RoEConfig) -> RouteError:
    return RouteError(
        f"routing options for a static model: its layers {list(config.routed_layers or ())} are gone for everyone, and "
        "all others always run. Leave them out, or give the routed model that it was made from."
    )


def refuse_for_dense(options: RoutingOptions | None) -> None:
    """Raises ``RouteError`` for options that a model without routes would have to ignore."""
    if options is not None and any(v is not None for v in (options.route, options.keep_bias, options.skip_ratio)):
        raise RouteError(
            "routing options for a model that is not routed: it runs all its layers for everyone. Leave them out, or "
            "give a routed model."
        )


def route_of_bias(bias: float | Tensor, num_layers: int, routed_layers: Sequence[int]) -> Tensor | None:
    """Keep flags [L] or [B, L] where the bias alone decides, being infinite in every row; None where routers do."""
    bias_B = torch.as_tensor(bias, dtype=torch.float64)
    if not bool(bias_B.isinf().all()):
        return None
    route = torch.ones(*bias_B.shape, num_layers, dtype=torch.bool)
    route[..., list(routed_layers)] = (bias_B > 0).cpu()[..., None]
    return route


def bias_rows(bias: float | Tensor, batch_size: int) -> Tensor:
    """Keep biases as float64 [B] on the host, repeated for beams and returned sequences.

    Raises:
        RouteError: if their shape does not fit, or one is not a number.
    """
    rows = torch.as_tensor(bias).detach().to("cpu", torch.float64)
    rows = rows[None] if rows.dim() == 0 else rows
    if rows.dim() != 1 or not len(rows) or batch_size % len(rows):
        raise RouteError(
            f"keep biases of shape {list(rows.shape)}: a batch of {batch_size} rows takes one number, or a tensor "
            f"[{batch_size}]. Reshape it."
        )
    if bool(rows.isnan().any()):
        raise RouteError("a keep bias that is not a number: no layer could be kept or skipped by it. Give numbers.")
    return rows.repeat_interleave(batch_size // len(rows))


def route_rows(route: Tensor, batch_size: int, num_layers: int, routed_layers: tuple[int, ...]) -> Tensor:
    """A forced route as bool [B, L] on the host, repeated for beams and returned sequences.

    Raises:
        RouteError: if its shape does not fit, or it skips a layer that is not routed.
    """
    rows = route.detach().to("cpu", torch.bool)
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2 or rows.shape[1] != num_layers or not len(rows) or batch_size % len(rows):
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
