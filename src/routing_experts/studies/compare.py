"""A study's record from its runs, and every arm held against the reference."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from routing_experts.evaluation.paired import paired_difference
from routing_experts.records import Contrast, StudyRecord, StudyRun, environment
from routing_experts.studies.contest import Contest
from routing_experts.studies.plan import Study


def study_record(name: str, contest: Contest, runs: Sequence[StudyRun]) -> StudyRecord:
    """All runs, and every arm against the reference at each rate."""
    study, base = contest.study, contest.answers_of_base
    return StudyRecord(
        name=name,
        plan=asdict(study),
        base_accuracy=base.accuracy,
        questions=study.questions,
        question_seed=study.question_seed,
        runs=list(runs),
        contrasts=contrasts(study, runs),
        environment=environment(),
        untrained=contest.choice.untrained,
        base=base,
        layers=contest.choice,
    )


def contrasts(study: Study, runs: Sequence[StudyRun]) -> list[Contrast]:
    """The reference minus every other arm, where both were run at the same rate with the same seeds."""
    found = []
    for name in study.arms:
        for rate in study.rates:
            first = {run.seed: run for run in runs if (run.arm, run.wanted) == (study.reference, rate)}
            at = 0.0 if study.arms[name].control == "dense" else rate
            second = {run.seed: run for run in runs if (run.arm, run.wanted) == (name, at)}
            seeds = sorted(set(first) & set(second))
            if name != study.reference and seeds:
                found.append(
                    _contrast(study.reference, name, rate, [first[s] for s in seeds], [second[s] for s in seeds])
                )
    return found


def _contrast(
    reference: str, name: str, rate: float, first: Sequence[StudyRun], second: Sequence[StudyRun]
) -> Contrast:
    pairs = [np.stack([_bits(run) for run in runs]) for runs in (first, second)]
    difference = paired_difference(*pairs)
    return Contrast(
        first=reference,
        second=name,
        wanted=rate,
        seeds=[run.seed for run in first],
        difference=difference.mean,
        low=difference.low,
        high=difference.high,
        by_seed=(pairs[0].mean(1) - pairs[1].mean(1)).tolist(),
    )


def _bits(run: StudyRun) -> np.ndarray:
    return np.array([mark == "1" for mark in run.right], dtype=float)
