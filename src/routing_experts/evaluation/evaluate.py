"""Asking a model all questions, and the comparison that a run's ``results.json`` holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from routing_experts.evaluation.controls import most_skipped, random_routes, static_routes
from routing_experts.evaluation.paired import mutual_information, paired_difference
from routing_experts.evaluation.questions import BATCH_SIZE, Question, records_of
from routing_experts.evaluation.scoring import Evaluation
from routing_experts.inference.generate import answer
from routing_experts.models.convert import is_routed
from routing_experts.models.options import RoutingOptions
from routing_experts.records import MAX_ROUTES, RouteCount, Routed, Skipping, Static, SweepPoint, TaskResult, as_bits

MAX_NEW_TOKENS = 16
SWEEP_BIASES = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
Advance = Callable[[int], None]


def ask(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    batch_size: int = BATCH_SIZE,
    options: RoutingOptions | None = None,
    routes: Tensor | None = None,
    prompt_format: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    advance: Advance = lambda count: None,
) -> Evaluation:
    """Greedy answers to all questions; ``advance`` is told of each one.

    Without ``prompt_format`` a routed model is asked as it was trained, any other by its chat template.
    """
    if prompt_format is None:
        prompt_format = model.roe_config.prompt_format if is_routed(model) else "chat_template"
    answers = []
    for given in answer(
        model,
        processor,
        records_of(questions),
        batch_size,
        options,
        routes,
        prompt_format,
        max_new_tokens=max_new_tokens,
    ):
        answers.append(given)
        advance(1)
    return Evaluation(questions, answers)


@dataclass(frozen=True)
class Comparison:
    """The routed model beside its untrained controls at the same skip rate."""

    routed: Evaluation
    static: Evaluation
    random: Evaluation
    static_layers: list[int]


def compare(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    seed: int,
    advance: Advance = lambda count: None,
    batch_size: int = BATCH_SIZE,
) -> Comparison:
    """Asks the routed model three times: its own routes, its own most-skipped layers for everyone, random routes."""
    routed = ask(model, processor, questions, batch_size, advance=advance)
    num_layers = len(routed.layer_skip_rates)
    routable = model.roe_config.layers_to_route(num_layers)
    order = most_skipped(routed.layer_skip_rates, routable)
    fixed = static_routes(order, routed.skip_rate, len(questions), num_layers, seed)
    drawn = random_routes(routable, routed.skip_rate, len(questions), num_layers, seed)
    static = ask(model, processor, questions, batch_size, routes=fixed, advance=advance)
    random = ask(model, processor, questions, batch_size, routes=drawn, advance=advance)
    most = int((~fixed).sum(1).max())
    return Comparison(routed, static, random, order[:most])


def sweep_bias(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    biases: Sequence[float] = SWEEP_BIASES,
    advance: Advance = lambda count: None,
    batch_size: int = BATCH_SIZE,
) -> list[SweepPoint]:
    """Accuracy and skip rate as a bias on top of the config's moves every keep logit."""
    points = []
    for bias in biases:
        options = RoutingOptions(keep_bias=model.roe_config.keep_bias + bias)
        asked = ask(model, processor, questions, batch_size, options, advance=advance)
        points.append(SweepPoint(accuracy=asked.accuracy, skip_rate=asked.skip_rate, keep_bias=bias))
    return points


def task_results(dense: Evaluation, routed: Evaluation) -> dict[str, TaskResult]:
    """Each task's accuracies, their paired difference, and what it skipped."""
    dense_tasks = dense.by_task()
    found = {}
    for task, part in routed.by_task().items():
        difference = paired_difference(np.array([part.right]), np.array([dense_tasks[task].right]))
        found[task] = TaskResult(
            questions=len(part.answers),
            dense=dense_tasks[task].accuracy,
            routed=part.accuracy,
            skip_rate=part.skip_rate,
            layer_skip_rates=part.layer_skip_rates,
            low=difference.low,
            high=difference.high,
        )
    return found


def route_counts(routed: Evaluation) -> list[RouteCount]:
    """The commonest routes, with how many questions took each and the share of them answered right."""
    rows: dict[tuple[bool, ...], list[bool]] = {}
    for given, right in zip(routed.answers, routed.right, strict=True):
        rows.setdefault(given.route, []).append(right)
    commonest = sorted(rows.items(), key=lambda item: (-len(item[1]), item[0]))[:MAX_ROUTES]
    return [RouteCount(as_bits(route), len(rights), sum(rights) / len(rights)) for route, rights in commonest]


def information(routed: Evaluation) -> float:
    """Bits that a question's route tells about its task."""
    return mutual_information([q.task for q in routed.questions], [a.route for a in routed.answers])


def scores(comparison: Comparison) -> tuple[Routed, Static, Skipping]:
    """A comparison as ``results.json`` holds it."""
    routed, static, random = comparison.routed, comparison.static, comparison.random
    return (
        Routed(accuracy=routed.accuracy, skip_rate=routed.skip_rate, layer_skip_rates=routed.layer_skip_rates),
        Static(accuracy=static.accuracy, skip_rate=static.skip_rate, skipped_layers=comparison.static_layers),
        Skipping(accuracy=random.accuracy, skip_rate=random.skip_rate),
    )
