"""lmms-eval's results as records: each metric by side, paired sample by sample, with routes and times."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from routing_experts.errors import EvaluationError
from routing_experts.evaluation.paired import Difference, paired_difference
from routing_experts.records import SideScore, Spread, TaskScore

Results = Mapping[str, Any]


def task_scores(found: Mapping[str, Sequence[Results]]) -> tuple[list[TaskScore], int]:
    """Every metric of every task.

    Args:
        found: by side, lmms-eval's results; the first side is what the others are held against.

    Returns:
        The scores, and the model's number of layers.
    """
    first = next(iter(found))
    scores = []
    for place, results in enumerate(found[first]):
        for task in results["samples"]:
            by_side = {side: runs[place] for side, runs in found.items()}
            told = [_metrics(one, task) for one in by_side.values()]
            shared = [metric for metric in told[0] if all(metric in other for other in told)]
            scores += [_score(task, metric, by_side) for metric in shared]
    lengths = {len(route) for runs in found.values() for one in runs for route in _routes(one)}
    if not scores or len(lengths) != 1:
        raise EvaluationError(
            "no task gave every side a score that is a number: there is nothing to compare. Answers for a benchmark's "
            "server, if it takes some, lie beside the samples; for a table choose other tasks."
        )
    return scores, lengths.pop()


def _metrics(results: Results, task: str) -> list[str]:
    """lmms-eval's names of a task's metrics that are numbers, ``metric,filter``."""
    return [
        name
        for name, value in results["results"][task].items()
        if "," in name and "_stderr" not in name and _is_number(value)
    ]


def _is_number(value: Any) -> bool:
    """Any library's; what is no finite number is no score."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _score(task: str, name: str, by_side: Mapping[str, Results]) -> TaskScore:
    metric, filtered = name.split(",")
    filters = {other.split(",")[1] for results in by_side.values() for other in _metrics(results, task)}
    sides: list[SideScore] = []
    singles: list[dict[Any, float]] = []
    for side, results in by_side.items():
        samples = _once(results["samples"][task])
        value = float(results["results"][task][name])
        # Each filter's scores of a sample have one name in lmms-eval's log: of several nobody can tell whose they are.
        singles.append(_by_sample(samples, metric, value) if len(filters) == 1 else {})
        sides.append(_side(side, value, samples, _difference(singles)))
    return TaskScore(
        task=task,
        metric=metric if len(filters) == 1 else f"{metric}, {filtered}",
        higher_is_better=bool(next(iter(by_side.values()))["higher_is_better"].get(task, {}).get(metric, True)),
        samples=len(samples),
        sides=sides,
    )


def _once(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each document's first entry: lmms-eval logs one a filter."""
    first: dict[Any, Mapping[str, Any]] = {}
    for sample in samples:
        first.setdefault(sample["doc_id"], sample)
    return list(first.values())


def _difference(singles: Sequence[Mapping[Any, float]]) -> Difference | None:
    """The last side's samples against the first one's; None if either has no score of its own for each of them."""
    reference, own = singles[0], singles[-1]
    if len(singles) < 2 or not own or own.keys() != reference.keys():
        return None
    return paired_difference(*(np.array([[values[key] for key in reference]]) for values in (own, reference)))


def _side(side: str, value: float, samples: Sequence[Mapping[str, Any]], difference: Difference | None) -> SideScore:
    told = [counts for sample in samples for counts in sample["token_counts"] if counts]
    return SideScore(
        side=side,
        value=value,
        skip_rate=_mean([counts["skip_rate"] for counts in told]),
        layer_skip_rates=_layer_skip_rates([counts["route"] for counts in told]),
        difference=difference.mean if difference else None,
        low=difference.low if difference else None,
        high=difference.high if difference else None,
        seconds_to_first=_spread([c["seconds_to_first"] for c in told if "seconds_to_first" in c]),
        seconds_a_token=_spread([c["decode_seconds"] / (c["steps"] - 1) for c in told if c.get("steps", 0) > 1]),
        empty=sum(not str(answer).strip() for sample in samples for answer in sample["filtered_resps"]),
        batch_sizes=sorted({counts["asked_at"] for counts in told}),
    )


def _by_sample(samples: Sequence[Mapping[str, Any]], metric: str, value: float) -> dict[Any, float]:
    """Each document's own score, in the metric's unit; empty if the metric is no mean of such scores.

    Precision, recall and MME's points are not; of such a metric the samples' difference would be that of another one.
    """
    found = {}
    for sample in samples:
        if metric in sample:
            score = _score_of(sample[metric])
            if score is None:
                return {}
            found[sample["doc_id"]] = score
    mean = _mean(list(found.values()))
    unit = next((unit for unit in (1.0, 100.0) if math.isclose(unit * mean, value, abs_tol=1e-6 * unit)), None)
    return {} if unit is None else {name: unit * score for name, score in found.items()}


def _score_of(value: Any) -> float | None:
    """A number, or the score or the match within what a task's scorer notes of a document."""
    if isinstance(value, Mapping) and "score" not in value and {"pred", "answer"} <= value.keys():  # SEED-Bench
        return float(str(value["pred"]).strip().casefold() == str(value["answer"]).strip().casefold())
    value = value.get("score") if isinstance(value, Mapping) else value
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _routes(results: Results) -> list[str]:
    return [
        counts["route"]
        for samples in results["samples"].values()
        for sample in samples
        for counts in sample["token_counts"]
        if counts
    ]


def _layer_skip_rates(routes: Sequence[str]) -> list[float]:
    return [column.count("0") / len(routes) for column in zip(*routes, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    low, median, high = np.percentile(values, (25, 50, 75))
    return Spread(median=float(median), low=float(low), high=float(high))
