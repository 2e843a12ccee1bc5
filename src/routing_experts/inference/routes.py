"""Routes as data: recorded in a file, forced again from it, drawn at random.

A file has a JSON object a line: ``{"id": "7", "route": "110111", "model": "a024481d248fd866"}``. The route has a
character a decoder layer, 1 where it ran; the model is the base's fingerprint, and may be left out.

Shapes: N requests, L decoder layers.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from routing_experts.errors import RouteError, shown
from routing_experts.inference.generate import Answer
from routing_experts.models.options import route_rows
from routing_experts.records import as_bits, from_bits, write_text

_EXPECTED = 'expected {"id": "…", "route": "1101…"}, with 1 for each layer that runs and 0 for each that is skipped'


@dataclass(frozen=True)
class RouteLine:
    """The route of one request.

    Attributes:
        id: the request's.
        route: keep flags of the L layers.
        model: fingerprint of the base model that it was recorded on; empty for any.
    """

    id: str
    route: tuple[bool, ...]
    model: str = ""


def recorded(model: Any, answers: Iterable[Answer]) -> list[RouteLine]:
    """The routes that a routed model's answers took."""
    return [RouteLine(answer.id, answer.route, model.roe_config.base.fingerprint) for answer in answers]


def write_routes(path: Path, lines: Sequence[RouteLine]) -> None:
    """Writes the file, whole or not at all.

    Raises:
        RouteError: if ``read_routes`` would refuse it.
    """
    texts = [json.dumps({"id": line.id, "route": as_bits(line.route), "model": line.model}) for line in lines]
    _parse(path, texts)
    write_text(path, "".join(text + "\n" for text in texts))


def read_routes(path: Path) -> list[RouteLine]:
    """Reads and checks a file.

    Raises:
        RouteError: at the first line that does not fit, naming file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RouteError(
            f"{path} cannot be read ({error}). Give a file that `roe generate --record-routes` wrote."
        ) from error
    return _parse(path, text.rstrip("\n").split("\n") if text.strip() else [])


def routes_for(model: Any, lines: Sequence[RouteLine], ids: Sequence[str]) -> Tensor:
    """Keep flags [N, L] of the requests, for ``answer(routes=...)``.

    Raises:
        RouteError: if a request has no line, or its route was recorded on another base model or does not fit this one.
    """
    config, num_layers = model.roe_config, model.config.get_text_config(decoder=True).num_hidden_layers
    by_id = {line.id: line for line in lines}
    rows = []
    for name in ids:
        if name not in by_id:
            shown = ", ".join(list(by_id)[:4]) + (" …" if len(by_id) > 4 else "")
            raise RouteError(f"no route for request {name!r}: there are routes for {shown}. Add a line for it.")
        line = by_id[name]
        if line.model and config.base.fingerprint not in ("", line.model):
            raise RouteError(
                f"the route of request {name!r} was recorded on a base model with fingerprint {line.model}, this one "
                f"has {config.base.fingerprint}: its layers do other things. Take `model` out of the line to force it "
                "all the same."
            )
        try:
            rows.append(route_rows(torch.tensor(line.route), 1, num_layers, config.layers_to_route(num_layers)))
        except RouteError as error:
            raise RouteError(f"request {name!r}: {error}") from error
    return torch.cat(rows)


def draw_routes(skipped: Sequence[int], routed_layers: Sequence[int], num_layers: int, seed: int) -> Tensor:
    """Random routes.

    Args:
        skipped: layers that each of the N routes skips.
        routed_layers: those that may be skipped.
        num_layers: L.
        seed: of the draws.

    Returns:
        Keep flags [N, L].

    Raises:
        RouteError: if a route should skip more layers than are routed.
    """
    if max(skipped, default=0) > len(routed_layers):
        raise RouteError(
            f"a random route that skips {max(skipped)} layers: {len(routed_layers)} are routed. Skip fewer."
        )
    rng = np.random.default_rng(seed)
    routes = torch.ones(len(skipped), num_layers, dtype=torch.bool)
    for row, count in enumerate(skipped):
        routes[row, rng.permutation(np.asarray(routed_layers))[:count].tolist()] = False
    return routes


def refuse_repeated(ids: Iterable[str], where: str) -> None:
    """Raises ``RouteError`` if two requests have one id: their routes could not be told apart."""
    first: dict[str, int] = {}
    for number, name in enumerate(ids, start=1):
        if name in first:
            raise RouteError(
                f"{where}: id {name!r} stands at {first[name]} and at {number}, but a route belongs to one request. "
                "Give each an id of its own."
            )
        first[name] = number


def _parse(path: Path, texts: Sequence[str]) -> list[RouteLine]:
    if not texts:
        raise RouteError(f"{path} holds no routes: {_EXPECTED}. Give at least one line.")
    lines = [_line(text, f"{path}, line {number}") for number, text in enumerate(texts, start=1)]
    for number, line in enumerate(lines, start=1):
        if len(line.route) != len(lines[0].route):
            raise RouteError(
                f"{path}, line {number}: a route of {len(line.route)} layers, but line 1 has {len(lines[0].route)}. "
                "Routes of one file are of one model; correct the line."
            )
    refuse_repeated([line.id for line in lines], f"{path}, lines")
    return lines


def _line(text: str, where: str) -> RouteLine:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise RouteError(f"{where} is not JSON ({error}): {_EXPECTED}. Correct the line, or take it out.") from error
    if not isinstance(values, dict) or not {"id", "route"} <= set(values) <= {"id", "route", "model"}:
        raise RouteError(f"{where} is {shown(values)}: {_EXPECTED}. Correct the line, or take it out.")
    name, route, model = values["id"], values["route"], values.get("model", "")
    for field, value in (("id", name), ("route", route), ("model", model)):
        if not isinstance(value, str):
            raise RouteError(f"{where}: {field} is {shown(value)}, not a text: {_EXPECTED}. Correct the line.")
    if not route or set(route) - {"0", "1"}:
        raise RouteError(f"{where}: route is {shown(route)}: {_EXPECTED}. Correct the line.")
    return RouteLine(name, tuple(from_bits(route)), model)
