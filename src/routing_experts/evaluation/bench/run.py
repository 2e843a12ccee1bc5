"""A preset from its first case to its record."""

import time
from collections.abc import Callable

import torch

from routing_experts.evaluation.bench.cases import time_work
from routing_experts.evaluation.bench.models import Sides, random_sides
from routing_experts.evaluation.bench.presets import BenchPreset, fitted
from routing_experts.evaluation.bench.serving import time_serving
from routing_experts.evaluation.cost import decoder_sizes
from routing_experts.records import BenchRecord, environment


def run_bench(
    preset: BenchPreset,
    device: torch.device,
    sides: Sides | None = None,
    weights: str = "random",
    about: Callable[[str], None] = lambda line: None,
) -> BenchRecord:
    """Times all that a preset names.

    Args:
        preset: shape and work.
        device: of random weights.
        sides: real models in place of the preset's random weights.
        weights: where the sides' came from, for the record.
        about: told what is timed next.
    """
    started = time.perf_counter()
    if sides is None:
        about(f"random weights of {preset.name}")
        sides = random_sides(preset.shape, getattr(torch, preset.dtype), device)
    config = sides.dense.config.get_text_config(decoder=True)
    preset = fitted(preset, config, len(sides.routed.roe_config.layers_to_route(config.num_hidden_layers)))
    cases = []
    for work in preset.work:
        about(f"{work.phase}, batch {work.batch}, {work.skipped} layers skipped{', mixed' if work.mixed else ''}")
        cases.append(time_work(sides, preset, work))
    served = preset.serving
    if served is not None:
        about(f"{served.requests} requests of different routes")
        cases += time_serving(sides, preset, served)
    sizes = decoder_sizes(sides.routed)
    return BenchRecord(
        name=preset.name,
        model={
            "weights": weights,
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "dtype": str(sides.dense.dtype).removeprefix("torch."),
            "layer_weights": sizes.layer,
            "adapter_weights": sizes.adapter,
            "prompt": preset.prompt,
            "new_tokens": preset.new_tokens,
        },
        cases=cases,
        environment=environment() | {"device": _device_name(sides.dense.device), "threads": torch.get_num_threads()},
        seconds_total=time.perf_counter() - started,
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
