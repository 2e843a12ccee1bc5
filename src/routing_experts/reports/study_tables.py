"""A study's tables: the main one by rate, the paper's claims, the reference by task, its routes beside the authors'."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

from routing_experts.records import Contrast, StudyRecord, StudyRun, from_bits, from_marks
from routing_experts.reports.study_data import (
    AS_GOOD,
    accuracy_at,
    agreement,
    authors_routes,
    main_rate,
    mixed_speed_ups,
    speed_ups,
)
from routing_experts.reports.summary import NONE, Grid, percent, points, span, spread

BATCHES = (1, 16)
FAR = 0.02  # of a rate: further off, arms are not compared at it
CLAIMED = {"worse": "needs what it lacks", "as_good": "has it so"}
NOTE = (
    "Left out: share of layers times tokens at prefill. Differences in points, paired by question over the seeds that "
    "both were run with. Controls that drop whole layers are mixtures of the two nearest, where the rate lies between."
)
SPEED_NOTE = (
    " Speed-up: of whole answers, to the base model, which took turns: median and quartiles; of a mixture, by the mean "
    "of its two models' times."
)


def rate_grids(study: StudyRecord) -> list[Grid]:
    """The main table, one part a rate: every arm with its distance to the reference, and its speed if it was timed."""
    rates, note = list(study.reference_runs), NOTE + (SPEED_NOTE if study.speeds else "")
    return [_rate_grid(study, rate, note if rate == rates[-1] else "") for rate in rates]


def _rate_grid(study: StudyRecord, rate: float, note: str) -> Grid:
    reference, own = study.reference, study.reference_runs[rate]
    left_out = percent(mean(run.skip_rate for run in own))
    first = (reference, *_accuracies(study, {run.seed: run.accuracy for run in own}), left_out, NONE, NONE)
    rows: list[tuple[str, ...]] = [first + _speeds(study, reference, rate)]
    contrasts = [contrast for contrast in study.contrasts if contrast.wanted == rate]
    for contrast in sorted(contrasts, key=lambda one: one.difference):
        rows.append(_contrast_row(study, contrast))
    columns = ("arm", "accuracy", "by seed", "left out", f"{reference} minus it", "95 % interval")
    titles = tuple(f"speed-up, batch {batch}" for batch in _timed(study))
    return Grid(f"{percent(rate)} left out", columns + titles, tuple(rows), highlighted=0, note=note)


def _contrast_row(study: StudyRecord, contrast: Contrast) -> tuple[str, ...]:
    wanted = 0.0 if study.is_dense(contrast.second) else contrast.wanted
    return (
        contrast.second,
        *_accuracies(study, accuracy_at(study, contrast)),
        percent(_left_out(study, contrast)),
        points(contrast.difference),
        span(contrast.low, contrast.high),
        *(_mixed_speeds(study, contrast) if contrast.mixed else _speeds(study, contrast.second, wanted)),
    )


def _left_out(study: StudyRecord, contrast: Contrast) -> float:
    """What a contrast's second arm was measured to leave out; of a mixture, what it was mixed to."""
    if study.is_dense(contrast.second):
        return 0.0
    found = [run.skip_rate for run in study.runs if (run.arm, run.wanted) == (contrast.second, contrast.wanted)]
    return contrast.wanted if contrast.mixed or not found else mean(found)


def _timed(study: StudyRecord) -> tuple[int, ...]:
    """The batches that have a column each; none where nothing was timed."""
    return BATCHES if study.speeds else ()


def _speeds(study: StudyRecord, arm: str, rate: float) -> tuple[str, ...]:
    return tuple(spread(speed_ups(study, arm, rate, batch)) for batch in _timed(study))


def _mixed_speeds(study: StudyRecord, contrast: Contrast) -> tuple[str, ...]:
    return tuple(spread(mixed_speed_ups(study, contrast, batch)) for batch in _timed(study))


def _accuracies(study: StudyRecord, by_seed: Mapping[int, float]) -> tuple[str, str]:
    """The mean, and a figure for each of the study's seeds."""
    return percent(mean(by_seed.values())), seed_cell(study, by_seed)


def seed_cell(study: StudyRecord, by_seed: Mapping[int, float]) -> str:
    """Percentages beside each other, one for each of the study's seeds, a dash for one that is missing."""
    return " / ".join(f"{100 * by_seed[seed]:.1f}" if seed in by_seed else NONE for seed in study.seeds)


def claims_grid(study: StudyRecord) -> Grid | None:
    """What the method's paper says of arms, and what was measured of them; None if the plan tells of none."""
    rate, plans = main_rate(study), study.plan.get("arms", {})
    claimed = [one for one in study.contrasts if one.wanted == rate and plans.get(one.second, {}).get("claim")]
    if not claimed:
        return None
    measured = (f"{study.reference} minus it", "95 % interval", "by seed", "left out", "raw")
    columns = ("arm", "what differs", "the paper", "measured", *measured)
    remarks = [f"{one.second}: {remark}" for one in claimed if (remark := plans[one.second].get("remark"))]
    note = (
        "It agrees or not where the interval and every seed say so, more than one; “has it so” agrees where surely "
        f"less than {100 * AS_GOOD:.0f} point is lost. Raw: what it skips before calibration."
    )
    rows = tuple(_claim_row(study, one, plans[one.second]) for one in claimed)
    title = f"What the paper says, at {percent(rate)}"
    return Grid(title, columns, rows, num_texts=4, note=" ".join([note, *remarks]))


def _claim_row(study: StudyRecord, contrast: Contrast, plan: Mapping[str, Any]) -> tuple[str, ...]:
    runs = [run for run in study.runs if (run.arm, run.wanted) == (contrast.second, contrast.wanted)]
    raw = [run.raw_skip_rate for run in runs if run.raw_skip_rate is not None]
    left_out = _left_out(study, contrast)
    is_met = abs(left_out - contrast.wanted) <= FAR
    return (
        contrast.second,
        plan.get("about", ""),
        CLAIMED[plan["claim"]],
        agreement(plan["claim"], contrast) if is_met else "rate not met",
        points(contrast.difference),
        span(contrast.low, contrast.high),
        " / ".join(points(value) for value in contrast.by_seed),
        percent(left_out),
        percent(mean(raw)) if raw else NONE,
    )


def task_grid(study: StudyRecord) -> Grid | None:
    """The reference by task and rate: accuracy and what is skipped, means of seeds, beside the base model."""
    by_rate = study.reference_runs
    if study.base is None or not by_rate:
        return None
    right = {task: _share_right(study, task) for task in study.base.tasks}
    rows = tuple(
        (task, percent(right[task]), *(_task_cell(runs, task) for runs in by_rate.values()))
        for task in study.base.tasks
    )
    columns = ("task", "base model", *(f"at {percent(rate)}" for rate in by_rate))
    note = "Accuracy, and in brackets the share of layers skipped; means over seeds."
    return Grid(f"By task: {study.reference}", columns, rows, note=note)


def _share_right(study: StudyRecord, task: str) -> float:
    assert study.base is not None
    mark = study.base.tasks.index(task)
    of_task = from_marks(study.base.task_of)
    rights = [right for right, t in zip(from_bits(study.base.right), of_task, strict=True) if t == mark]
    return mean(rights) if rights else 0.0


def _task_cell(runs: list[StudyRun], task: str) -> str:
    accuracy, skipped = (mean(getattr(run, name)[task] for run in runs) for name in ("task_accuracy", "task_skip_rate"))
    return f"{percent(accuracy)} ({percent(skipped)})"


def routes_grid(study: StudyRecord, run: StudyRun) -> Grid:
    """What routes are like, here and in the authors' log."""
    theirs, questions = authors_routes(), len(run.right)
    top = sum(route.questions for route in run.routes[:5]) / questions
    ran = from_marks(run.layers_run)
    nothing = ran.count(max(ran)) / questions if ran else 1.0
    rows = (
        ("decisions that skip", percent(run.skip_rate), percent(theirs.skip_rate)),
        ("distinct routes", _count(run), f"{theirs.distinct:,}"),
        ("the five commonest cover", percent(top), percent(theirs.top_share)),
        ("questions at the fewest skipped", percent(nothing), percent(theirs.skipped[min(theirs.skipped)])),
        ("layers that some skip and some run", percent(run.varied_layers), percent(_varied(theirs.layer_skip_rates))),
        ("bits that a route tells of the task", f"{run.route_information:.2f}", NONE),
    )
    note = (
        f"Here: {run.arm} at {percent(main_rate(study))}, seed {run.seed}, {questions:,} questions. The authors' log: "
        "12,584 examples, 32 layers, probably GQA with LLaVA-1.5-7B at a target of 30 %; the log names neither."
    )
    return Grid("Routes", ("", "here", "the authors' log"), rows, note=note)


def _count(run: StudyRun) -> str:
    covered = sum(route.questions for route in run.routes)
    return f"{len(run.routes)}" if covered == len(run.right) else f"over {len(run.routes)}"


def _varied(rates: list[float]) -> float:
    return sum(0.05 <= rate <= 0.95 for rate in rates) / len(rates)
