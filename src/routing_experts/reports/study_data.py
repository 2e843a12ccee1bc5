"""What a study's tables and figures are made of: each arm's front, its numbers by task, routes and depths."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from statistics import mean

from routing_experts.records import BaseAnswers, Contrast, StudyRecord, StudyRun, from_marks

MAIN_RATE = 0.3  # the paper's
AS_GOOD = 0.01  # of the answers: what may be lost by an arm that is as good
TENTHS = 10


@dataclass(frozen=True)
class Point:
    """An arm at a rate.

    Attributes:
        wanted: what was asked for.
        skip_rate: mean over seeds.
        accuracies: by seed.
    """

    wanted: float
    skip_rate: float
    accuracies: list[float]


Front = list[Point]


def fronts_of(study: StudyRecord) -> dict[str, Front]:
    """Each arm that saves something, by rising rate; the reference first, then in the plan's order."""
    order = {arm: (arm != study.reference, place) for place, arm in enumerate(study.plan.get("arms", {}))}
    groups: dict[str, dict[float, list[StudyRun]]] = {}
    for run in study.runs:
        if run.wanted:
            groups.setdefault(run.arm, {}).setdefault(run.wanted, []).append(run)
    names = sorted(groups, key=lambda arm: order.get(arm, (True, len(order))))
    return {
        name: [
            Point(wanted, mean(run.skip_rate for run in runs), [run.accuracy for run in runs])
            for wanted, runs in sorted(groups[name].items())
        ]
        for name in names
    }


def main_rate(study: StudyRecord) -> float:
    """The study's rate that is nearest to the paper's."""
    return min(study.reference_runs, key=lambda rate: abs(rate - MAIN_RATE), default=0.0)


def reference_run(study: StudyRecord) -> StudyRun | None:
    """The reference at the main rate, of the first seed; None if there is none with its routes."""
    runs = [run for run in study.reference_runs.get(main_rate(study), []) if run.routes]
    return min(runs, key=lambda run: run.seed, default=None)


def accuracy_at(study: StudyRecord, contrast: Contrast) -> dict[int, float]:
    """A contrast's second arm: the accuracy of each seed, mixtures of two runs included."""
    of_first = {
        run.seed: run.accuracy for run in study.runs if (run.arm, run.wanted) == (contrast.first, contrast.wanted)
    }
    return {seed: of_first[seed] - gap for seed, gap in zip(contrast.seeds, contrast.by_seed, strict=True)}


def agreement(claim: str, contrast: Contrast) -> str:
    """Whether a difference to the reference bears out what was said of the arm: "worse", or "as_good".

    The interval speaks of these models alone, so every seed's has to point the same way, and one seed decides nothing.
    """
    if len(contrast.seeds) < 2:
        return "undecided"
    worse = contrast.low > 0 and min(contrast.by_seed) > 0
    better = contrast.high < 0 and max(contrast.by_seed) < 0
    loses_little = contrast.high < AS_GOOD  # however sure that little is
    agrees, differs = (loses_little, worse) if claim == "as_good" else (worse, better)
    return "agrees" if agrees else "does not agree" if differs else "undecided"


def speed_ups(study: StudyRecord, arm: str, wanted: float, batch: int) -> list[float]:
    """Base over arm, of whole answers, each repetition with that beside it; empty where it was not timed."""
    for one in study.speeds:
        if (one.arm, one.wanted, one.batch, one.phase) == (arm, wanted, batch, "generate"):
            return [base / own for base, own in zip(one.base_seconds, one.arm_seconds, strict=True)]
    return []


def mixed_speed_ups(study: StudyRecord, contrast: Contrast, batch: int) -> list[float]:
    """The same of an arm that is two of its models, each asked as often as the mixture's rate says.

    Its seconds are the mean of theirs, each over those of the base beside it; empty where one was not timed.
    """
    timed = {
        run.skip_rate: found
        for run in study.runs
        if run.arm == contrast.second and (found := speed_ups(study, run.arm, run.wanted, batch))
    }
    below = max((rate for rate in timed if rate < contrast.wanted), default=None)
    above = min((rate for rate in timed if rate > contrast.wanted), default=None)
    if below is None or above is None:
        return []
    share = (contrast.wanted - below) / (above - below)
    return [1 / ((1 - share) / low + share / high) for low, high in zip(timed[below], timed[above], strict=True)]


def depths(run: StudyRun, num_layers: int) -> dict[int, float]:
    """The share of questions by the number of layers that they skipped."""
    if not run.layers_run:
        return {round(run.skip_rate * num_layers): 1.0}
    counts = Counter(num_layers - ran for ran in from_marks(run.layers_run))
    return {count: counts[count] / len(run.layers_run) for count in sorted(counts)}


def tenth_shares(base: BaseAnswers, values: Sequence[float]) -> list[float]:
    """The mean of a value over each tenth of the questions, from the easiest."""
    parts: list[list[float]] = [[] for _ in range(TENTHS)]
    for mark, value in zip(base.tenth_of, values, strict=True):
        parts[int(mark)].append(value)
    return [mean(part) if part else 0.0 for part in parts]


@dataclass(frozen=True)
class AuthorsRoutes:
    """What the authors of the method logged of theirs (see the file's own description).

    Attributes:
        layer_skip_rates: of each decoder layer.
        skipped: the share of questions by the share of layers that they skipped.
        distinct: how many routes there are.
        top_share: of questions, that the five commonest cover.
        skip_rate: of all decisions.
    """

    layer_skip_rates: list[float]
    skipped: dict[float, float]
    distinct: int
    top_share: float
    skip_rate: float


@cache
def authors_routes() -> AuthorsRoutes:
    """The authors' log, counted."""
    logged = json.loads(files("routing_experts.evaluation.bench").joinpath("authors_routes.json").read_text())
    routes: dict[str, int] = logged["routes"]
    total, num_layers = sum(routes.values()), int(logged["layers"])
    rates = [sum(n for route, n in routes.items() if route[layer] == "1") / total for layer in range(num_layers)]
    skipped: Counter[int] = Counter()
    for route, count in routes.items():
        skipped[route.count("1")] += count
    return AuthorsRoutes(
        layer_skip_rates=rates,
        skipped={count / num_layers: skipped[count] / total for count in sorted(skipped)},
        distinct=len(routes),
        top_share=sum(sorted(routes.values())[-5:]) / total,
        skip_rate=mean(rates),
    )
