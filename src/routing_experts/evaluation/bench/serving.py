"""Many requests of different routes through the engine: what sharing batches by route is worth.

Decoding is timed over replayed prefills, whose keys and values are noise: they change no time, and 128 real prefills
would take minutes a repeat. The time to the first token comes from runs that prefill for real. Routes are forced in
both, so that no time of routers is in it: the cases in which they are asked have that.

Shapes: V vocabulary.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from statistics import mean, quantiles
from typing import Any

import numpy as np
import torch
from torch import Tensor

from routing_experts.data.encode import Encoded
from routing_experts.evaluation.bench.models import Sides
from routing_experts.evaluation.bench.presets import BenchPreset, Serving
from routing_experts.evaluation.cost import head_size
from routing_experts.inference.engine import Engine, EngineSettings
from routing_experts.inference.prefill import Prefiller, Prompt
from routing_experts.inference.requests import Completion, Request, Sampling
from routing_experts.inference.schedule import StepCost
from routing_experts.inference.slots import Past
from routing_experts.inference.statistics import EngineStatistics
from routing_experts.models.options import RoutingOptions
from routing_experts.nn.losses import IGNORED
from routing_experts.records import BenchCase, Served

SEED = 0
# Batches are always filled, and who joins a row's place that is free is the longest waiting where ends do not fall
# together: as if routes were unknown.
ARRIVAL = StepCost(row=0.0, fixed=1e9)


def authors_routes(skipped: tuple[int, int], count: int, seed: int = SEED) -> list[Tensor]:
    """Routes drawn from those that RoE's authors logged, as often as they logged them.

    Args:
        skipped: fewest and most layers that a route skips.
        count: how many to draw.
        seed: of the draw.

    Returns:
        Keep flags bool [32] each.
    """
    logged = json.loads(files("routing_experts.evaluation.bench").joinpath("authors_routes.json").read_text())
    fitting = {text: n for text, n in logged["routes"].items() if skipped[0] <= text.count("1") <= skipped[1]}
    weights = np.array(list(fitting.values()), dtype=float)
    drawn = np.random.default_rng(seed).choice(list(fitting), size=count, p=weights / weights.sum())
    return [torch.tensor([flag == "0" for flag in text]) for text in drawn]


class ReplayedPrefills(Prefiller):
    """Prefills that cost nothing: the route is the request's, keys and values are noise that all share."""

    def __init__(self, model: Any, length: int) -> None:
        super().__init__(model, None)
        config = model.config.get_text_config(decoder=True)
        shape = (config.num_key_value_heads, length, head_size(config))
        self.noise = torch.randn(shape, device=model.device, dtype=model.dtype)

    def run(self, prompts: Sequence[Prompt]) -> tuple[Tensor, list[Past]]:
        """Even logits [B, V], and pasts of the prompts' lengths."""
        return torch.zeros(len(prompts), self.vocabulary), [self._past(prompt) for prompt in prompts]

    def _past(self, prompt: Prompt) -> Past:
        route = prompt.routing.route
        flags = (True,) * self.num_layers if route is None else tuple(route.tolist())
        held = [self.noise[:, : prompt.length] if keep else None for keep in flags]
        return Past(prompt.length, flags, held, held)


@dataclass(frozen=True)
class _Contender:
    """One way of serving the same requests."""

    name: str
    model: Any
    routes: list[Tensor] | None
    waiting: int
    cost: StepCost


def time_serving(sides: Sides, preset: BenchPreset, serving: Serving) -> list[BenchCase]:
    """Routed requests with more and more of them waiting, each against the dense model; all interleaved."""
    routes = authors_routes(serving.skipped, serving.requests)
    contenders = [_Contender("dense", sides.dense, None, serving.max_rows, ARRIVAL)]
    for number, waiting in enumerate(serving.waiting):
        name, cost = ("in arrival order", ARRIVAL) if number == 0 else (f"{waiting} waiting", StepCost())
        contenders.append(_Contender(name, sides.routed, routes, waiting, cost))
    _serve(contenders, preset, replace(serving, requests=serving.max_rows))  # to warm up
    rounds = [[statistics for statistics, _ in _serve(contenders, preset, serving)] for _ in range(serving.repeats)]
    first_tokens = _first_tokens(contenders, preset, serving)
    skipped = 1 - torch.stack(routes).double().mean().item()
    seconds = [[statistics[index].decode_seconds for statistics in rounds] for index in range(len(contenders))]
    return [
        BenchCase(
            name=f"{serving.requests} requests of {preset.new_tokens} new tokens, {one.name}",
            phase="decode",
            batch=serving.max_rows,
            skip_rate=skipped,
            mixed=True,
            tokens=preset.new_tokens,
            dense_seconds=seconds[0],
            routed_seconds=seconds[index],
            twin_seconds=None,
            served=_served(serving, one, rounds[0][0], rounds[0][index], first_tokens, index),
        )
        for index, one in enumerate(contenders)
        if one.routes is not None
    ]


def _served(
    serving: Serving,
    one: _Contender,
    dense: EngineStatistics,
    routed: EngineStatistics,
    first_tokens: dict[int, list[float]],
    index: int,
) -> Served:
    return Served(
        requests=serving.requests,
        waiting=one.waiting,
        steps=routed.steps,
        layers_read=routed.layers_read / routed.steps,
        layer_rows=routed.layer_rows / routed.steps,
        weight_cap=dense.layers_read / routed.layers_read,
        row_cap=dense.layer_rows / routed.layer_rows,
        waiting_bytes=routed.waiting_bytes,
        first_token_requests=serving.prefilled if index in first_tokens else None,
        first_token_seconds=first_tokens.get(index),
        dense_first_token_seconds=first_tokens.get(0) if index in first_tokens else None,
    )


def _serve(
    contenders: Sequence[_Contender], preset: BenchPreset, serving: Serving, replayed: bool = True
) -> list[tuple[EngineStatistics, list[Completion]]]:
    """Every contender's engine takes a step in turn, so that a drift of the machine's speed falls on all alike."""
    engines = [_engine(one, preset, serving, replayed) for one in contenders]
    asked = [_requests(one, preset, serving) for one in contenders]
    numbers = [
        [engine.submit(request) for request in requests] for engine, requests in zip(engines, asked, strict=True)
    ]
    while busy := [engine for engine in engines if not engine.is_idle]:
        for engine in busy:
            engine.step()
    served = []
    for engine, own in zip(engines, numbers, strict=True):
        completions = [event[1] for event in engine.events(own) if isinstance(event, tuple)]
        failed = [completion.error for completion in completions if completion.error]
        assert not failed, failed[0]
        served.append((engine.statistics, completions))
    return served


def _engine(contender: _Contender, preset: BenchPreset, serving: Serving, replayed: bool) -> Engine:
    settings = EngineSettings(
        max_rows=serving.max_rows,
        max_waiting=contender.waiting,
        capacity=preset.prompt + preset.new_tokens,
        cost=contender.cost,
    )
    prefiller = ReplayedPrefills(contender.model, preset.prompt) if replayed else None
    return Engine(contender.model, None, settings, prefiller)


def _first_tokens(contenders: Sequence[_Contender], preset: BenchPreset, serving: Serving) -> dict[int, list[float]]:
    """Seconds to the first token with real prefills, of dense and of most waiting; each alone on the machine.

    Dense may hold as many waiting: who may not prefill while rows decode has a later first token, whatever it skips.
    """
    if not serving.prefilled:
        return {}
    fewer = replace(serving, requests=serving.prefilled)
    most = contenders[-1]
    found = {}
    for index, one in ((0, replace(contenders[0], waiting=most.waiting)), (len(contenders) - 1, most)):
        ((_, completions),) = _serve([one], preset, fewer, replayed=False)
        found[index] = _first_token_seconds(completions)
    return found


def _requests(contender: _Contender, preset: BenchPreset, serving: Serving) -> list[Request]:
    config = contender.model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(SEED)
    ids_BT = torch.randint(3, config.vocab_size, (serving.requests, preset.prompt), generator=generator)
    return answered(ids_BT, preset.new_tokens, contender.routes)


def answered(ids_BT: Tensor, new_tokens: int, routes: Sequence[Tensor] | None) -> list[Request]:
    """Requests of words, each to be answered with so many tokens, on forced routes if there are any."""
    sampling = Sampling(max_new_tokens=new_tokens, ignore_eos=True)
    return [
        Request(
            Encoded(str(number), row, torch.full_like(row, IGNORED), torch.ones_like(row)),
            sampling=sampling,
            routing=None if routes is None else RoutingOptions(route=routes[number]),
            id=str(number),
        )
        for number, row in enumerate(ids_BT.cpu())
    ]


def _first_token_seconds(completions: Sequence[Completion]) -> list[float]:
    """Median and 95th percentile."""
    seconds = sorted(completion.seconds_to_first for completion in completions)
    return [quantiles(seconds, n=2)[0], quantiles(seconds, n=20)[-1]] if len(seconds) > 1 else [mean(seconds)] * 2
