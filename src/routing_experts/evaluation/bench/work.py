"""The pieces of work that are timed: a prefill, decoding steps behind it.

Shapes: B rows, T prompt tokens, L layers.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from routing_experts.models.cache import RoutedCache
from routing_experts.models.convert import is_routed
from routing_experts.models.device import synchronize
from routing_experts.models.options import RoutingOptions

Timed = Callable[[], float]


def cache_of(model: Any, route: Tensor | None) -> Any:
    """The cache of one request batch; a routed model follows the route."""
    if is_routed(model):
        return RoutedCache(model.config, RoutingOptions(route=route))
    return DynamicCache(config=model.config.get_text_config(decoder=True))


@torch.inference_mode()
def prefill_seconds(model: Any, ids_BT: Tensor, route: Tensor | None = None) -> float:
    """Seconds until the first token's logits."""
    cache = cache_of(model, route)
    started = clock(model)
    model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return clock(model) - started


@torch.inference_mode()
def decode_seconds(model: Any, ids_BT: Tensor, steps: int, route: Tensor | None = None) -> float:
    """Seconds of that many single-token steps behind a prompt, the prefill left out."""
    cache = cache_of(model, route)
    logits = model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    started = clock(model)
    for step in range(steps):
        position = torch.full((len(ids_BT), 1), ids_BT.shape[1] + step, device=ids_BT.device)
        token = logits[:, -1:].argmax(-1)
        logits = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits
    return clock(model) - started


@torch.inference_mode()
def cache_bytes(model: Any, ids_BT: Tensor, route: Tensor | None = None) -> int:
    """Bytes of keys and values behind a prefill."""
    cache = cache_of(model, route)
    model(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
    held = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def interleave(sides: Sequence[Timed], repeats: int) -> list[list[float]]:
    """Runs all once to warm up, then in turn, so that a drift of the machine's speed falls on all alike."""
    for side in sides:
        side()
    rounds = [[side() for side in sides] for _ in range(repeats)]
    return [list(times) for times in zip(*rounds, strict=True)]


def clock(model: Any) -> float:
    """Now, once the model's device has done all it was given."""
    synchronize(model.device)
    return time.perf_counter()
