"""Timing one preset's cases: dense, routed, and the static twin where all rows share a route.

Shapes: B rows, L decoder layers.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from routing_experts.evaluation.bench.models import Sides, twin_of
from routing_experts.evaluation.bench.presets import BenchPreset, Work
from routing_experts.evaluation.bench.serving import ARRIVAL, answered
from routing_experts.evaluation.bench.work import (
    Timed,
    decode_seconds,
    engine_seconds,
    filled_cache,
    generate_seconds,
    interleave,
    prefill_seconds,
    prefilled_cache,
)
from routing_experts.evaluation.cost import Cost, decoder_sizes
from routing_experts.inference.engine import Engine, EngineSettings
from routing_experts.inference.routes import draw_routes
from routing_experts.models.cache import cache_bytes
from routing_experts.models.options import RoutingOptions
from routing_experts.records import BenchCase, Counted

SEED = 0
ALWAYS = 1e6  # a keep bias beyond any logit: the routers are asked, and all say keep


def time_work(sides: Sides, preset: BenchPreset, work: Work) -> BenchCase:
    """One case, all sides in turn."""
    piece = _Piece(sides, preset, work, routes_of(work, sides), _words(sides, work.batch, preset.prompt))
    models = [sides.dense, sides.routed]
    if not work.mixed and not work.asks and work.skipped and work.phase != "engine":
        models.append(twin_of(sides.routed, piece.route[0]))
    repeats = preset.repeats if work.batch <= preset.large else preset.large_repeats
    _forget_peak(sides)
    seconds = interleave([piece.timed(model) for model in models], repeats)
    return BenchCase(
        name=_name(work, preset, piece.route.shape[1]),
        phase=work.phase,  # type: ignore[arg-type]
        batch=work.batch,
        skip_rate=1 - piece.route.double().mean().item(),
        mixed=work.mixed,
        tokens=preset.prompt if work.phase == "prefill" else preset.new_tokens,
        dense_seconds=seconds[0],
        routed_seconds=seconds[1],
        twin_seconds=seconds[2] if len(seconds) > 2 else None,
        dense=piece.counted(sides.dense),
        routed=piece.counted(sides.routed),
        peak_bytes=_peak(sides),
    )


@dataclass(frozen=True)
class _Piece:
    """One case's work, ready for any side."""

    sides: Sides
    preset: BenchPreset
    work: Work
    route: Tensor
    batch: dict[str, Tensor]

    def timed(self, model: Any) -> Timed:
        """One repetition on a model."""
        steps = self.preset.new_tokens
        if self.work.phase == "prefill":
            return partial(prefill_seconds, model, self.batch, self._options(model))
        if self.work.phase == "engine" and model is self.sides.routed:
            return partial(engine_seconds, self._engine, answered(self.batch["input_ids"], steps, list(self.route)))
        if self.work.phase in ("generate", "engine"):
            return partial(generate_seconds, model, self.batch, steps, self._options(model))
        return lambda: decode_seconds(model, self.batch, steps, cache=self._filled(model))

    def counted(self, model: Any) -> Counted:
        """What the work asks for, and what the cache holds behind the prompt: a real prefill's, if it is small.

        An engine's slots have room for the answer besides, and every row has one in a layer that any row keeps.
        """
        sizes, length = decoder_sizes(self.sides.routed), self.preset.prompt
        prefill = sizes.prefill(self._route(model), length)
        decode = sizes.decode(self._route(model), length, self.preset.new_tokens)
        cost = {
            "prefill": prefill,
            "decode": decode,
        }.get(self.work.phase, Cost(prefill.flops + decode.flops, prefill.bytes + decode.bytes))
        if self.work.phase == "engine" and model is self.sides.routed:
            return Counted(cost.flops, cost.bytes, self._engine.statistics.slot_bytes)
        if self.work.phase == "prefill" and self.work.batch <= self.preset.large:
            cache = prefilled_cache(model, self.batch, self._options(model))
        else:
            cache = self._filled(model)
        return Counted(cost.flops, cost.bytes, cache_bytes(cache))

    @cached_property
    def _engine(self) -> Engine:
        """One that decodes all rows together."""
        rows, prompt = self.work.batch, self.preset.prompt
        settings = EngineSettings(
            max_rows=rows,
            max_waiting=rows,
            max_prefill_tokens=rows * prompt,
            capacity=prompt + self.preset.new_tokens,
            cost=ARRIVAL,
            capture=self.sides.routed.device.type == "cuda",
        )
        return Engine(self.sides.routed, None, settings)

    def _route(self, model: Any) -> Tensor:
        return torch.ones_like(self.route) if model is self.sides.dense else self.route

    def _options(self, model: Any) -> RoutingOptions | None:
        if model is not self.sides.routed:
            return None
        return RoutingOptions(keep_bias=ALWAYS) if self.work.asks else RoutingOptions(route=self.route)

    def _filled(self, model: Any) -> Any:
        return filled_cache(model, self._route(model), self.preset.prompt)


def routes_of(work: Work, sides: Sides) -> Tensor:
    """Keep flags [B, L], with so many skipped layers in every row; the same for the same work."""
    num_layers = sides.dense.config.get_text_config(decoder=True).num_hidden_layers
    routed = sides.routed.roe_config.layers_to_route(num_layers)
    drawn = draw_routes([work.skipped] * (work.batch if work.mixed else 1), routed, num_layers, SEED)
    return drawn.expand(work.batch, -1).clone()


def _words(sides: Sides, rows: int, length: int) -> dict[str, Tensor]:
    """Random words; nothing is padded."""
    vocabulary = sides.dense.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator).to(sides.dense.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _name(work: Work, preset: BenchPreset, num_layers: int) -> str:
    what = {
        "prefill": f"prefill of {preset.prompt} tokens",
        "decode": f"decode of {preset.new_tokens} tokens",
        "generate": f"{preset.prompt} tokens and {preset.new_tokens} new ones",
        "engine": f"engine, {preset.prompt} tokens and {preset.new_tokens} new ones",
    }[work.phase]
    skipped = f"{work.skipped} of {num_layers} layers skipped" if work.skipped else "all layers kept"
    manner = ", another route in each row" if work.mixed else ", routers asked" if work.asks else ""
    return f"{what}, batch {work.batch}, {skipped}{manner}"


def _forget_peak(sides: Sides) -> None:
    if sides.dense.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(sides.dense.device)


def _peak(sides: Sides) -> int | None:
    """Most memory that the case held, all sides' weights among it; only CUDA counts it."""
    return torch.cuda.max_memory_allocated(sides.dense.device) if sides.dense.device.type == "cuda" else None
