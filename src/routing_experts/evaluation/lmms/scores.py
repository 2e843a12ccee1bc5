"""lmms-eval's results as records: each metric by side, paired sample by sample, with routes and times."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from routing_experts.errors import EvaluationError
from routing_experts.evaluation.paired import paired_difference
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
            scores += [_score(task, metric, by_side) for metric in _metrics(results, task)]
    lengths = {len(route) for runs in found.values() for one in runs for route in _routes(one)}
    if not scores or len(lengths) != 1:
        raise EvaluationError("no task gave a score that is a number: there is nothing to compare. Choose other tasks.")
    return scores, lengths.pop()


def _metrics(results: Results, task: str) -> list[str]:
    """lmms-eval's names of a task's metrics that are numbers, ``metric,filter``."""
    return [
        name
        for name, value in results["results"][task].items()
        if "," in name and "_stderr" not in name and isinstance(value, int | float) and not isinstance(value, bool)
    ]


def _score(task: str, name: str, by_side: Mapping[str, Results]) -> TaskScore:
    metric = name.split(",")[0]
    sides: list[SideScore] = []
    reference: dict[Any, float] = {}
    for side, results in by_side.items():
        samples = results["samples"][task]
        single = _by_sample(samples, metric)
        reference = reference or single
        difference = None
        if sides and single and single.keys() == reference.keys():
            pairs = [np.array([[values[key] for key in reference]]) for values in (single, reference)]
            difference = paired_difference(*pairs)
        told = [counts for sample in samples for counts in sample["token_counts"] if counts]
        sides.append(
            SideScore(
                side=side,
                value=float(results["results"][task][name]),
                skip_rate=_mean([counts["skip_rate"] for counts in told]),
                layer_skip_rates=_layer_skip_rates([counts["route"] for counts in told]),
                difference=difference.mean if difference else None,
                low=difference.low if difference else None,
                high=difference.high if difference else None,
                seconds_to_first=_spread([c["seconds_to_first"] for c in told if "seconds_to_first" in c]),
                seconds_a_token=_spread(
                    [
                        counts["decode_seconds"] / (counts["output_tokens"] - 1)
                        for counts in told
                        if (counts.get("output_tokens") or 0) > 1
                    ]
                ),
                empty=sum(not str(answer).strip() for sample in samples for answer in sample["filtered_resps"]),
            )
        )
    return TaskScore(
        task=task,
        metric=metric,
        higher_is_better=bool(results["higher_is_better"].get(task, {}).get(metric, True)),
        samples=len(samples),
        sides=sides,
    )


def _by_sample(samples: Sequence[Mapping[str, Any]], metric: str) -> dict[Any, float]:
    """Each document's own score; empty if the metric has none for a single one.

    A task may have metrics that only some of its documents count for, as MME's two.
    """
    found = {}
    for sample in samples:
        if metric in sample:
            value = _score_of(sample[metric])
            if value is None:
                return {}
            found[sample["doc_id"]] = value
    return found


def _score_of(value: Any) -> float | None:
    """A number, or the score or the match within what a task's scorer notes of a document."""
    if isinstance(value, Mapping) and {"pred", "answer"} <= value.keys():  # SEED-Bench
        return float(str(value["pred"]).strip().casefold() == str(value["answer"]).strip().casefold())
    value = value.get("score") if isinstance(value, Mapping) else value
    return float(value) if isinstance(value, int | float) else None


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
