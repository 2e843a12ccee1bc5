"""What is timed: a decoder's shape and the pieces of work, by name."""

from dataclasses import dataclass, replace
from typing import Any

from routing_experts.errors import ConfigError


@dataclass(frozen=True)
class Work:
    """One case.

    Attributes:
        phase: "prefill", "decode", "generate" for both as a user calls them, or "engine" for both through the engine,
            with captured decoding on CUDA, against the dense model's own ``generate``.
        batch: rows.
        skipped: decoder layers that each row skips, drawn at random.
        mixed: another route in each row, else one for all.
        asks: the routers are asked, and all of them keep: what deciding costs.
    """

    phase: str
    batch: int
    skipped: int = 0
    mixed: bool = False
    asks: bool = False


@dataclass(frozen=True)
class Serving:
    """Requests of many routes at once.

    Attributes:
        requests: how many, with routes drawn from the authors' logged ones that skip ``skipped`` layers.
        skipped: fewest and most skipped layers.
        max_rows: of a decoding step.
        waiting: bounds on requests that are prefilled and wait, a run each; the first is arrival order.
        repeats: runs of each, the first ``max_rows`` requests once before to warm up.
        prefilled: how many requests one more run prefills for real, for the time to the first token, in the dense
            model and the routed one, of both as many waiting as may at most; 0 for no such run.
    """

    requests: int = 128
    skipped: tuple[int, int] = (8, 12)
    max_rows: int = 16
    waiting: tuple[int, ...] = (16, 32, 64)
    repeats: int = 3
    prefilled: int = 128


@dataclass(frozen=True)
class BenchPreset:
    """A decoder of random weights, and what it is asked to do.

    Attributes:
        shape: of a Llama: transformers' names.
        dtype: of weights, keys and values.
        prompt, new_tokens: tokens a row.
        work: cases, in order.
        serving: the case of many requests; None for none, as for any depth but that of the logged routes.
        repeats: timed runs a case, after one to warm up; batches above ``large`` rows get ``large_repeats``.
    """

    name: str
    shape: dict[str, Any]
    dtype: str
    prompt: int
    new_tokens: int
    work: tuple[Work, ...]
    serving: Serving | None = None
    repeats: int = 9
    large: int = 4
    large_repeats: int = 5


def standard_work(skipped: int, batches: tuple[int, ...]) -> tuple[Work, ...]:
    """Prefill and decode of each batch, rows alike and rows mixed, and with all layers kept."""
    cases = []
    for phase in ("prefill", "decode"):
        cases += [Work(phase, batch, skipped) for batch in batches]
        cases += [Work(phase, batch, skipped, mixed=True) for batch in batches if batch > 1]
        cases += [Work(phase, batch) for batch in batches]
    cases += [Work("prefill", batch, asks=True) for batch in batches]
    return (*cases, *(Work("generate", batch, skipped, mixed=batch > 1) for batch in batches))


def engine_work(skipped: tuple[int, ...], batches: tuple[int, ...]) -> tuple[Work, ...]:
    """Whole answers through the engine, from all layers kept on."""
    return tuple(Work("engine", batch, count, mixed=batch > 1 and count > 0) for batch in batches for count in skipped)


def fitted(preset: BenchPreset, config: Any, routed_layers: int) -> BenchPreset:
    """A preset for a real model: the same shares of its layers are skipped; no logged routes for another depth.

    Args:
        preset: to fit.
        config: of the model's decoder.
        routed_layers: how many may be skipped.

    Raises:
        ConfigError: if the prompt and the new tokens exceed the model's positions.
    """
    needed, known = preset.prompt + preset.new_tokens, config.max_position_embeddings
    if needed > known:
        raise ConfigError(
            f"preset {preset.name!r} asks for {preset.prompt} tokens and {preset.new_tokens} new ones, but the model "
            f"knows {known} positions. Choose a preset of shorter prompts, such as pocket."
        )
    share = config.num_hidden_layers / preset.shape["num_hidden_layers"]
    work = tuple(replace(one, skipped=min(routed_layers, round(one.skipped * share))) for one in preset.work)
    logged = share == 1 and routed_layers >= config.num_hidden_layers - 1  # the authors' routes skip any but the first
    return replace(preset, work=work, serving=preset.serving if logged else None)


_VICUNA = {"vocab_size": 32000, "max_position_embeddings": 4096, "num_key_value_heads": None}
_LLAVA_7B = _VICUNA | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_LLAVA_13B = _VICUNA | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
_CPU = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 32,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
}
_POCKET = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_CPU_WORK = (
    Work("prefill", 1, 9),
    Work("prefill", 1),
    Work("prefill", 1, asks=True),
    Work("prefill", 8, 9, mixed=True),
    Work("prefill", 8),
    Work("decode", 1, 9),
    Work("decode", 1),
    Work("decode", 8, 9, mixed=True),
    Work("decode", 8),
    Work("generate", 1, 9),
    Work("engine", 1, 9),
    Work("engine", 1),
)
PRESETS = {
    preset.name: preset
    for preset in (
        BenchPreset(
            "cpu-100m",
            _CPU,
            "float32",
            608,
            64,
            _CPU_WORK,
            Serving(waiting=(16, 64), repeats=1, prefilled=32),
            repeats=5,
        ),
        BenchPreset("pocket", _POCKET, "float32", 96, 16, standard_work(3, (1, 4, 8, 32))),
        BenchPreset(
            "llava-1.5-7b",
            _LLAVA_7B,
            "bfloat16",
            624,
            128,
            (*standard_work(9, (1, 4, 8, 32)), *engine_work((0, 6, 10, 16), (1, 8, 32))),  # 20, 30, 50 %
            Serving(),
        ),
        BenchPreset(
            "llava-1.5-13b",
            _LLAVA_13B,
            "bfloat16",
            624,
            128,
            (*standard_work(12, (1, 4, 8, 32)), *engine_work((0, 8, 12, 20), (1, 8, 32))),
        ),
    )
}


def preset_named(name: str, repeats: int | None = None) -> BenchPreset:
    """A preset, with another number of repeats if one is given.

    Raises:
        ConfigError: if there is none of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r}: the presets are {', '.join(PRESETS)}. Name one of them.")
    preset = PRESETS[name]
    return preset if repeats is None else replace(preset, repeats=repeats, large_repeats=repeats)
