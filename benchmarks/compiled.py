"""Whether compiled layers decode faster on a CPU: one step of cpu-100m's dense model, batch 1, three ways in turn.

``python benchmarks/compiled.py --json RECORD`` times ``growing`` (the base as transformers runs it, with a cache that
grows), ``static`` (the layers one by one, keys and values in buffers of fixed size) and ``compiled`` (the same with
``torch.compile``). What a captured decode could win on a CPU is the difference between the last two.

Shapes: T past tokens, C capacity of a static buffer.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from routing_experts.evaluation.bench.presets import PRESETS
from routing_experts.records import environment, save_json

PAST, CAPACITY, STEPS, ROUNDS = 608, 704, 16, 9


class StaticLayerCache:
    """Keys and values of one layer in place, [1, H, C, head size] each; what a layer's forward calls ``update`` on."""

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        self.keys, self.values, self.position = keys, values, position

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Writes one token, [1, H, 1, head size] each, and returns both buffers."""
        return self.keys.index_copy_(2, self.position, keys), self.values.index_copy_(2, self.position, values)


def layer_step(
    layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, visible: Tensor, position: Tensor, held: tuple[Tensor, Tensor]
) -> Tensor:
    """One layer on one token, a function of tensors alone."""
    cache = StaticLayerCache(*held, position)
    result: Tensor = layer(hidden, attention_mask=visible, position_embeddings=(cos, sin), past_key_values=cache)
    return result


def growing_seconds(model: Any) -> float:
    """Seconds a step with the cache that grows."""
    cache = DynamicCache(config=model.config)
    past = torch.randn(1, model.config.num_key_value_heads, PAST, model.config.head_dim)
    for index in range(model.config.num_hidden_layers):
        cache.update(past, past, index)
    token = torch.tensor([[5]])
    started = perf_counter()
    for step in range(STEPS):
        model(token, position_ids=torch.tensor([[PAST + step]]), past_key_values=cache, use_cache=True)
    return (perf_counter() - started) / STEPS


def static_seconds(model: Any, step: Callable[..., Tensor], held: list[tuple[Tensor, Tensor]]) -> float:
    """Seconds a step with buffers of fixed size, every layer by ``step``."""
    base, token = model.model, torch.tensor([[5]])
    started = perf_counter()
    for index in range(STEPS):
        position = torch.tensor([PAST + index])
        hidden = base.embed_tokens(token)
        cos, sin = base.rotary_emb(hidden, position[None])
        visible = (torch.arange(CAPACITY) <= position)[None, None, None]
        for layer, buffers in zip(base.layers, held, strict=True):
            hidden = step(layer, hidden, cos, sin, visible, position, buffers)
        model.lm_head(base.norm(hidden)).argmax(-1)
    return (perf_counter() - started) / STEPS


@torch.inference_mode()
def main() -> None:
    """Compiles, times the three in turn and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/compiled.json"))
    asked = parser.parse_args()
    config = LlamaConfig(**PRESETS["cpu-100m"].shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    shape = (1, config.num_key_value_heads, CAPACITY, config.head_dim)
    held = [(torch.randn(shape), torch.randn(shape)) for _ in model.model.layers]
    compiled = torch.compile(layer_step, dynamic=False)
    started = perf_counter()
    # One recompilation a layer: each has a module of its own, and all share one kernel.
    with torch._dynamo.config.patch(recompile_limit=2 * config.num_hidden_layers):
        static_seconds(model, compiled, held)
        compile_seconds = perf_counter() - started
        ways: dict[str, Callable[[], float]] = {
            "growing": lambda: growing_seconds(model),
            "static": lambda: static_seconds(model, layer_step, held),
            "compiled": lambda: static_seconds(model, compiled, held),
        }
        timed: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                timed[name].append(way())
    for name, seconds in timed.items():
        print(f"{name}: {1000 * median(seconds):.1f} ms a step, {1000 * min(seconds):.1f} at best")
    counts = {"past": PAST, "steps": STEPS, "compile_seconds": compile_seconds}
    save_json(asked.json, counts | {"step_seconds": timed, "environment": environment()})


if __name__ == "__main__":
    main()
