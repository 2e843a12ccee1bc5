"""Timing one preset's cases: dense, routed, and the static twin where all rows share a route.

Shapes: B rows, L decoder layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from routing_experts.evaluation.bench.models import Sides, twin_of
from routing_experts.evaluation.bench.presets import BenchPreset, Work
from routing_experts.evaluation.bench.work import (
    Timed,
    decode_seconds,
    empty_cache,
    filled_cache,
    generate_seconds,
    interleave,
    prefill_seconds,
)
from routing_experts.evaluation.cost import Cost, DecoderSizes, decoder_sizes
from routing_experts.models.options import RoutingOptions
from routing_experts.records import BenchCase, Counted

SEED = 0
ALWAYS = 1e6  # a keep bias beyond any logit: the routers are asked, and all say keep


def time_work(sides: Sides, preset: BenchPreset, work: Work) -> BenchCase:
    """One case, all sides in turn."""
    route = draw_routes(work, sides)
    options = RoutingOptions(keep_bias=ALWAYS) if work.asks else RoutingOptions(route=route)
    batch = _batch(sides, work.batch, preset.prompt)
    models = [sides.dense, sides.routed]
    if not work.mixed and not work.asks and work.skipped:
        models.append(twin_of(sides.routed, route[0]))
    timed = [_timed(model, sides, preset, work, batch, route, options) for model in models]
    repeats = preset.repeats if work.batch <= preset.large else preset.large_repeats
    _forget_peak(sides)
    seconds = interleave(timed, repeats)
    sizes = decoder_sizes(sides.routed)
    return BenchCase(
        name=_name(work, preset, route.shape[1]),
        phase=work.phase,  # type: ignore[arg-type]
        batch=work.batch,
        skip_rate=1 - route.double().mean().item(),
        mixed=work.mixed,
        tokens=preset.prompt if work.phase == "prefill" else preset.new_tokens,
        dense_seconds=seconds[0],
        routed_seconds=seconds[1],
        twin_seconds=seconds[2] if len(seconds) > 2 else None,
        dense=_counted(sizes, preset, work, torch.ones_like(route)),
        routed=_counted(sizes, preset, work, route),
        peak_bytes=_peak(sides),
    )


def draw_routes(work: Work, sides: Sides) -> Tensor:
    """Keep flags [B, L], with so many skipped layers in every row; the same for the same work."""
    num_layers = sides.dense.config.get_text_config(decoder=True).num_hidden_layers
    routed = sides.routed.roe_config.layers_to_route(num_layers)
    rng = np.random.default_rng(SEED)
    route = torch.ones(work.batch, num_layers, dtype=torch.bool)
    for row in range(work.batch if work.mixed else 1):
        route[row, rng.permutation(routed)[: work.skipped].tolist()] = False
    return route if work.mixed else route[:1].expand(work.batch, -1).clone()


def measured_cache_bytes(model: Any, batch: dict[str, Tensor], options: RoutingOptions | None = None) -> int:
    """Bytes of keys and values that a prefill leaves, added up over the tensors that hold them."""
    cache = empty_cache(model, options)
    with torch.inference_mode():
        model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
    held = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def _timed(
    model: Any,
    sides: Sides,
    preset: BenchPreset,
    work: Work,
    batch: dict[str, Tensor],
    route: Tensor,
    options: RoutingOptions,
) -> Timed:
    asked = options if model is sides.routed else None
    if work.phase == "prefill":
        return partial(prefill_seconds, model, batch, asked)
    if work.phase == "generate":
        return partial(generate_seconds, model, batch, preset.new_tokens, asked)
    kept = torch.ones_like(route) if model is sides.dense else route
    make: Callable[[], Any] = partial(filled_cache, model, kept, preset.prompt)
    return lambda: decode_seconds(model, batch, preset.new_tokens, cache=make())


def _batch(sides: Sides, rows: int, length: int) -> dict[str, Tensor]:
    """Random words; nothing is padded."""
    vocabulary = sides.dense.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator).to(sides.dense.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _counted(sizes: DecoderSizes, preset: BenchPreset, work: Work, route: Tensor) -> Counted:
    prefill, steps = sizes.prefill(route, preset.prompt), preset.new_tokens
    decode = sizes.decode(route, preset.prompt, steps)
    cost = {
        "prefill": prefill,
        "decode": decode,
        "generate": Cost(prefill.flops + decode.flops, prefill.bytes + decode.bytes),
    }[work.phase]
    tokens = preset.prompt + (0 if work.phase == "prefill" else steps)
    return Counted(cost.flops, cost.bytes, int(route.sum()) * tokens * sizes.key_value * sizes.element)


def _name(work: Work, preset: BenchPreset, num_layers: int) -> str:
    what = {
        "prefill": f"prefill of {preset.prompt} tokens",
        "decode": f"decode of {preset.new_tokens} tokens",
        "generate": f"{preset.prompt} tokens and {preset.new_tokens} new ones",
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
