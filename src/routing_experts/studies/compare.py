"""A study's record from its runs, and every arm held against the reference."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from routing_experts.evaluation.paired import paired_difference
from routing_experts.records import ArmSpeed, Contrast, StudyRecord, StudyRun, environment, from_bits
from routing_experts.studies.contest import Contest
from routing_experts.studies.plan import STATIC_CONTROLS, Study

ROUNDING = 1e-4  # of a rate: a quarter, written out, is met by three layers of twelve


def study_record(name: str, contest: Contest, runs: Sequence[StudyRun], speeds: Sequence[ArmSpeed] = ()) -> StudyRecord:
    """All runs, and every arm against the reference at each rate; with what was timed, now or in an earlier record."""
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
        speeds=newest([*contest.known_speeds, *speeds]),
    )


def newest(speeds: Sequence[ArmSpeed]) -> list[ArmSpeed]:
    """One an arm, rate, phase and batch: the last, whichever seed's model was at hand."""
    return list({(one.arm, one.wanted, one.phase, one.batch): one for one in speeds}.values())


def contrasts(study: Study, runs: Sequence[StudyRun]) -> list[Contrast]:
    """The reference minus every other arm at each of the study's rates, for the seeds that both were run with."""
    found = []
    for name in study.arms:
        for rate in study.rates:
            sides = [rights_at(study, runs, arm, rate) for arm in (study.reference, name)]
            seeds = sorted(set(sides[0]) & set(sides[1]))
            if name != study.reference and seeds:
                first_SN, second_SN = (np.stack([side[seed] for seed in seeds]) for side in sides)
                difference = paired_difference(first_SN, second_SN)
                found.append(
                    Contrast(
                        first=study.reference,
                        second=name,
                        wanted=rate,
                        seeds=seeds,
                        difference=difference.mean,
                        low=difference.low,
                        high=difference.high,
                        by_seed=(first_SN.mean(1) - second_SN.mean(1)).tolist(),
                        mixed=is_mixed(study, runs, name, rate),
                    )
                )
    return found


def rights_at(study: Study, runs: Sequence[StudyRun], arm: str, rate: float) -> dict[int, np.ndarray]:
    """By seed, how often an arm at a rate is right on each question [N].

    A control that drops whole layers may have been run at the rates below and above alone. Drawing one of its two
    models for each question, so often that the mean rate is the wanted one, is right as often as the two on average.
    """
    if study.arms[arm].control == "dense":
        rate = 0.0
    below, above = _neighbours(study, runs, arm, rate)
    if below is None or above is None:
        return {}
    of_arm = {
        (_rate_of(study, run), run.seed): np.array(from_bits(run.right), dtype=float) for run in runs if run.arm == arm
    }
    share = 0.0 if above == below else (rate - below) / (above - below)
    return {
        seed: (1 - share) * of_arm[below, seed] + share * of_arm[above, seed]
        for seed in study.seeds
        if (below, seed) in of_arm and (above, seed) in of_arm
    }


def is_mixed(study: Study, runs: Sequence[StudyRun], arm: str, rate: float) -> bool:
    """Whether an arm at a rate is two of its models, each question drawing one."""
    below, above = _neighbours(study, runs, arm, rate)
    return below != above


def _neighbours(study: Study, runs: Sequence[StudyRun], arm: str, rate: float) -> tuple[float | None, float | None]:
    """The rates at which an arm was run, next to a rate: equal where it was met, two for whole layers, else None."""
    rates = {_rate_of(study, run) for run in runs if run.arm == arm}
    below = max((there for there in rates if there <= rate + ROUNDING), default=None)
    above = min((there for there in rates if there >= rate - ROUNDING), default=None)
    if below == above or (study.arms[arm].control in STATIC_CONTROLS and None not in (below, above)):
        return below, above
    return None, None


def _rate_of(study: Study, run: StudyRun) -> float:
    """What counts as a run's rate: what whole layers drop is a number of them, whatever was wanted."""
    return run.skip_rate if study.arms[run.arm].control in STATIC_CONTROLS else run.wanted
