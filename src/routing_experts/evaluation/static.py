"""Which layers a static model drops, and how it does beside the routed one: answers, and seconds in turn."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from routing_experts.errors import ConfigError
from routing_experts.evaluation.bench.work import generate_seconds, interleave
from routing_experts.evaluation.controls import most_skipped
from routing_experts.evaluation.evaluate import ask
from routing_experts.evaluation.paired import Difference, paired_difference
from routing_experts.evaluation.questions import Question, records_of
from routing_experts.evaluation.scoring import Evaluation
from routing_experts.inference.generate import prompt_batches, to_model
from routing_experts.records import StaticRow

RARELY = 0.5  # a layer that at least so many questions skip is rarely kept
BATCHES = (1, 16)
GENERATED = 8  # tokens
REPEATS = 9


def rarely_kept(layer_skip_rates: Sequence[float], routed_layers: Sequence[int], count: int | None = None) -> list[int]:
    """The layers to drop: so many of the most skipped, or all that most questions skip.

    Raises:
        ConfigError: if there are none, or fewer than asked for.
    """
    order = most_skipped(layer_skip_rates, routed_layers)
    if count is None:
        chosen = [layer for layer in order if layer_skip_rates[layer] >= RARELY]
        if not chosen:
            raise ConfigError(
                f"no layer is skipped by {RARELY:.0%} of the questions; the most skipped, layer {order[0]}, by "
                f"{layer_skip_rates[order[0]]:.0%}. Say how many to drop (--layers), or keep the routed model."
            )
        return sorted(chosen)
    if not 0 < count <= len(order):
        raise ConfigError(f"dropping {count} layers: {len(order)} are routed. Choose from 1 to {len(order)}.")
    return sorted(order[:count])


def static_rows(
    sides: dict[str, Any],
    processor: Any,
    questions: Sequence[Question],
    batch_size: int,
    advance: Callable[[int], None],
) -> tuple[list[StaticRow], Difference]:
    """Every side asked, then timed in turn; and static minus routed, question by question.

    Args:
        sides: "dense", "routed" and "static" models, on one device.
        processor: of all.
        questions: asked of each; the first are timed.
        batch_size: questions asked at a time.
        advance: told of each answer.
    """
    asked_as = sides["static"].roe_config.prompt_format
    asked = {
        name: ask(model, processor, questions, batch_size, prompt_format=asked_as, advance=advance)
        for name, model in sides.items()
    }
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    for size in BATCHES:
        of_batch = [questions[index % len(questions)] for index in range(size)]
        batch = next(prompt_batches(sides["static"], processor, records_of(of_batch), size, asked_as))
        timed = [partial(generate_seconds, m, to_model(batch, m), tokens=GENERATED) for m in sides.values()]
        for name, found in zip(sides, interleave(timed, REPEATS), strict=True):
            seconds[name][str(size)] = found
    rows = [_row(name, sides[name], asked[name], seconds[name]) for name in sides]
    pair = [np.array([asked[name].right]) for name in ("static", "routed")]
    return rows, paired_difference(*pair)


def _row(name: str, model: Any, asked: Evaluation, seconds: dict[str, list[float]]) -> StaticRow:
    return StaticRow(
        name=name,
        accuracy=asked.accuracy,
        skip_rate=asked.skip_rate,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        seconds=seconds,
    )
