"""The pieces of work that are timed: a prefill, decoding steps behind it, both together.

Keys and values of a past do not change how long decoding takes, so decoding is timed behind pasts that are filled
with noise: the prefill of a large batch would cost minutes a repeat and show nothing.

Shapes: B rows, T prompt tokens, L decoder layers.
"""

import ctypes
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from routing_experts.evaluation.cost import head_size
from routing_experts.inference.engine import Engine
from routing_experts.inference.requests import Request
from routing_experts.models.cache import RoutedCache
from routing_experts.models.convert import is_routed
from routing_experts.models.device import synchronize
from routing_experts.models.options import RoutingOptions

Timed = Callable[[], float]
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def empty_cache(model: Any, options: RoutingOptions | None = None) -> Any:
    """A new cache of the kind that a model uses."""
    if is_routed(model):
        return RoutedCache(model.config, options)
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def filled_cache(model: Any, route_BL: Tensor, length: int, seed: int = 0) -> Any:
    """A cache as a prefill of ``length`` tokens leaves it, with noise for keys and values.

    Args:
        model: routed, dense, or the static twin of a route.
        route_BL: keep flags. A model that does not route has one route for all rows, and a layer a kept layer.
        length: T.
        seed: of the noise.
    """
    config = model.config.get_text_config(decoder=True)
    generator = torch.Generator(model.device).manual_seed(seed)
    shape = (len(route_BL), config.num_key_value_heads, length, head_size(config))
    noise = torch.randn(shape, generator=generator, device=model.device, dtype=model.dtype)
    cache = empty_cache(model)
    if not is_routed(model):
        for index in range(int(route_BL[0].sum())):
            cache.update(noise, noise, index)
        return cache
    for layer, keep_B in zip(cache.layers, route_BL.T, strict=True):
        layer.set_keep(keep_B)
        if layer.any_keep:
            layer.update(noise[: int(keep_B.sum())], noise[: int(keep_B.sum())])
        else:
            layer.skip(length)
    return cache


@torch.inference_mode()
def prefilled_cache(model: Any, batch: Mapping[str, Tensor], options: RoutingOptions | None = None) -> Any:
    """The cache that a prefill leaves."""
    cache = empty_cache(model, options)
    model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.inference_mode()
def prefill_seconds(model: Any, batch: Mapping[str, Tensor], options: RoutingOptions | None = None) -> float:
    """Seconds until the first token's logits."""
    started = clock(model)
    prefilled_cache(model, batch, options)
    return clock(model) - started


@torch.inference_mode()
def decode_seconds(
    model: Any, batch: Mapping[str, Tensor], steps: int, options: RoutingOptions | None = None, cache: Any = None
) -> float:
    """Seconds of that many greedy single-token steps behind a prompt.

    Args:
        model: routed or not.
        batch: the prompt's; its mask counts the tokens that are real.
        steps: how many.
        options: of the prompt's prefill, which is not timed.
        cache: of a prompt that was prefilled already; without it the prompt is prefilled first.
    """
    mask = batch["attention_mask"]
    token = batch["input_ids"][:, -1:]
    if cache is None:
        cache = empty_cache(model, options)
        token = model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
    started = clock(model)
    _decode(model, token, mask, cache, steps)
    return clock(model) - started


@torch.inference_mode()
def generate_seconds(
    model: Any, batch: Mapping[str, Tensor], tokens: int, options: RoutingOptions | None = None
) -> float:
    """Seconds of ``model.generate`` for that many greedy tokens, as a user calls it."""
    settings = {"routing_options": options} if is_routed(model) else {}
    started = clock(model)
    model.generate(**batch, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, **settings)
    return clock(model) - started


@torch.inference_mode()
def engine_seconds(engine: Engine, requests: Sequence[Request]) -> float:
    """Seconds until an engine has answered all of them."""
    started = clock(engine.model)
    completions = engine.generate(requests)
    seconds = clock(engine.model) - started
    failed = [completion.error for completion in completions if completion.error]
    assert not failed, failed[0]
    return seconds


def _decode(model: Any, token_B1: Tensor, mask_BT: Tensor, cache: Any, steps: int) -> None:
    positions_B1 = mask_BT.sum(1, keepdim=True)
    padded = not bool(mask_BT.all())
    for step in range(steps):
        mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], dim=1)
        logits = model(
            input_ids=token_B1,
            attention_mask=mask_BT if padded else None,
            position_ids=positions_B1 + step,
            past_key_values=cache,
            use_cache=True,
        ).logits
        token_B1 = logits[:, -1:].argmax(-1)


def interleave(sides: Sequence[Timed], repeats: int) -> list[list[float]]:
    """Runs all once to warm up, then in turn, so that a drift of the machine's speed falls on all alike.

    Who begins changes from round to round, and so does the direction: nobody always runs behind the same other.
    """
    for side in sides:
        side()
    times: list[list[float]] = [[] for _ in sides]
    for number in range(repeats):
        order = [(number // 2 + place) % len(sides) for place in range(len(sides))]
        for index in order if number % 2 == 0 else reversed(order):
            times[index].append(sides[index]())
    return times


def keep_freed_memory() -> None:
    """Asks glibc to hold on to freed memory for the rest of the process.

    Its default gives large blocks back to the system, and the page faults of getting them again fall on whoever
    comes next: a fifth of a prefill on a CPU, and more noise than any of the differences that are measured.
    Other C libraries go their own ways.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def clock(model: Any) -> float:
    """Now, once the model's device has done all it was given."""
    synchronize(model.device)
    return time.perf_counter()
