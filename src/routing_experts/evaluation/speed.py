"""Measured seconds, dense against routed: interleaved runs of the same work, all raw timings kept.

Three phases are timed apart, because one-word answers are all prefill: ``prefill`` is one forward of the prompts up to
the first token's logits, ``decode`` a number of single-token steps after it, ``generate`` the whole call.

Shapes: B rows, T prompt tokens, L layers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from routing_experts.config import RoEConfig
from routing_experts.evaluation.bench.work import decode_seconds, generate_seconds, interleave, prefill_seconds
from routing_experts.evaluation.questions import Question, records_of
from routing_experts.inference.generate import prompt_batches, to_model
from routing_experts.models.cache import RoutedCache
from routing_experts.models.convert import convert
from routing_experts.models.options import RoutingOptions
from routing_experts.records import Speed, SpeedCase

BATCHES = (1, 16)
DECODE_STEPS = 16
GENERATED = 8  # tokens
LARGER: dict[str, Any] = {
    "num_hidden_layers": 32,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
}
LARGER_PROMPT = 64
TYPICAL_OF = 64  # questions among which the one that is timed alone is of median skip rate


def measure_speed(
    dense: Any, routed: Any, processor: Any, questions: Sequence[Question], repeats: int = 9, larger_repeats: int = 5
) -> Speed:
    """Times both models on the same prompts, then the routes found on a larger model of random weights.

    Args:
        dense, routed: of one architecture; the routed one chooses its own routes.
        processor: of both.
        questions: a batch takes them in order, again from the first if there are too few; its rows'
            routes differ as they happen to. Batch 1 is one of the first of them, of median skip rate.
        repeats: timed runs a case, after one to warm up.
        larger_repeats: the same for the larger model.
    """
    cases: list[SpeedCase] = []
    routes: dict[int, Tensor] = {}
    for batch_size in BATCHES:
        in_order = [questions[index % len(questions)] for index in range(batch_size)]
        asked = in_order if batch_size > 1 else [_typical(routed, processor, questions[:TYPICAL_OF])]
        batch = _prompts(routed, processor, asked)
        routes[batch_size] = _routes(routed, batch)
        cases += _cases(dense, routed, batch, routes[batch_size], None, "this", repeats)
    cases += _larger_cases(routes, larger_repeats)
    headline = next(case for case in cases if case.model == "this" and case.phase == "generate" and case.batch == 1)
    return Speed(
        dense_seconds=median(headline.dense_seconds),
        routed_seconds=median(headline.routed_seconds),
        cases=cases,
        note=_note(cases),
    )


def _prompts(routed: Any, processor: Any, asked: Sequence[Question]) -> dict[str, Tensor]:
    """One batch of all questions."""
    batches = prompt_batches(routed, processor, records_of(list(asked)), len(asked), routed.roe_config.prompt_format)
    return to_model(next(iter(batches)), routed)


@torch.inference_mode()
def _routes(routed: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the routers choose for a batch; bool [B, L]."""
    cache = RoutedCache(routed.config)
    routed(**batch, past_key_values=cache)
    assert cache.route is not None
    return cache.route


def _typical(routed: Any, processor: Any, questions: Sequence[Question]) -> Question:
    """A question of median skip rate: what is timed alone must neither flatter routing nor slight it."""
    kept = _routes(routed, _prompts(routed, processor, questions)).sum(1)
    return questions[int(kept.argsort(stable=True)[len(kept) // 2])]


def _cases(
    dense: Any, routed: Any, batch: dict[str, Tensor], route: Tensor, forced: Tensor | None, model: str, repeats: int
) -> list[SpeedCase]:
    size = len(route)
    options = RoutingOptions(route=forced)
    timed: dict[str, Callable[..., float]] = {"prefill": prefill_seconds, "decode": _step_seconds}
    if forced is None:
        timed["generate"] = partial(generate_seconds, tokens=GENERATED)
    found = []
    for phase, time_it in timed.items():
        sides = (partial(time_it, dense, batch), partial(time_it, routed, batch, options=options))
        dense_seconds, routed_seconds = interleave(sides, repeats)
        found.append(
            SpeedCase(
                name=f"{phase}, batch {size}" + (", larger model" if model == "larger" else ""),
                phase=phase,  # type: ignore[arg-type]
                batch=size,
                model=model,  # type: ignore[arg-type]
                skip_rate=1 - route.float().mean().item(),
                mixed=bool((route != route[:1]).any()),
                dense_seconds=dense_seconds,
                routed_seconds=routed_seconds,
            )
        )
    return found


def _step_seconds(model: Any, batch: dict[str, Tensor], options: RoutingOptions | None = None) -> float:
    """Seconds a decoding step."""
    return decode_seconds(model, batch, DECODE_STEPS, options) / DECODE_STEPS


def _larger_cases(routes: dict[int, Tensor], repeats: int) -> list[SpeedCase]:
    """The same routes, stretched over 32 layers, replayed on random weights: what layers of some size gain.

    A replayed route asks no router and carries no routing tokens, so these times leave out the cost of deciding.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=512, max_position_embeddings=512, pad_token_id=0, **LARGER)
        dense, routed = (LlamaForCausalLM(config).eval() for _ in range(2))
        convert(routed, RoEConfig(num_unrouted_layers=0))
        ids = torch.randint(3, 512, (max(routes), LARGER_PROMPT))
    cases = []
    for size, route in routes.items():
        source = torch.arange(config.num_hidden_layers) * route.shape[1] // config.num_hidden_layers
        stretched = route[:, source]
        batch = {"input_ids": ids[:size], "attention_mask": torch.ones_like(ids[:size])}
        cases += _cases(dense, routed, batch, stretched, stretched, "larger", repeats)
    return cases


def _note(cases: Sequence[SpeedCase]) -> str:
    """Says where routing did not pay, and why; empty where it always did."""
    slower = [c for c in cases if c.model == "this" and median(c.routed_seconds) >= median(c.dense_seconds)]
    if not slower:
        return ""
    return (
        f"Not faster on this model: {', '.join(case.name for case in slower)}. A layer of this width costs little more "
        "than launching its kernels, and deciding (two routing tokens and one host synchronisation a layer) and moving "
        "rows cost launches too. The larger model's rows show the same routes where layers do real work."
    )
