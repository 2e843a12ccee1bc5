"""What a report says in words and numbers: one headline and four tables, made once for console, Markdown and page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from routing_experts.records import BenchCase, BudgetRecord, Calibration, Results, Score, SpeedCase

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
NONE = "\N{EM DASH}"
HEADLINE_BATCHES = (1, 16)
PHASES = ("generate", "decode", "prefill")  # what users wait for first
EVEN = 0.005  # a speed-up that rounds to 1.00 is called neither faster nor slower


@dataclass(frozen=True)
class Grid:
    """A table of finished texts. Columns up to ``num_texts`` hold words, the others numbers; one row may stand out."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_texts: int = 1
    highlighted: int | None = None
    note: str = ""


def headline(results: Results) -> str:
    """What the run achieved, in one sentence."""
    routed, dense = results.routed, results.dense
    sentence = (
        f"{percent(routed.accuracy)} of answers right with {percent(routed.skip_rate)} of the decoder layers skipped, "
        f"against {percent(dense.accuracy)} dense"
    )
    measured = [f"{speed_up_words(case)} at batch {case.batch}" for case in headline_cases(results)]
    if not measured and results.speed.routed_seconds > 0:
        measured = [_ratio_words(results.speed.dense_seconds / results.speed.routed_seconds)]
    return sentence + (f"; measured {' and '.join(measured)}." if measured else ".")


def headline_cases(results: Results) -> list[SpeedCase]:
    """The run's own model at batch 1 and 16: whole answers before parts, mixed routes where there are several rows."""
    chosen = []
    for batch in HEADLINE_BATCHES:
        cases = [case for case in results.speed.cases if case.model == "this" and case.batch == batch]
        cases.sort(key=lambda case: (PHASES.index(case.phase), case.mixed != (case.batch > 1)))
        chosen += cases[:1]
    return chosen


def comparison(results: Results) -> Grid:
    """Every way of running the model, side by side."""
    base_name, tuned_name = "dense, base model", "dense, tuned as long"
    rows = [_compared(base_name, results.base, 0.0, results)]
    if results.tuned is not None:
        rows.append(_compared(tuned_name, results.tuned, 0.0, results))
    highlighted = len(rows)
    rows.append(_compared("routed", results.routed, results.routed.skip_rate, results))
    rows.append(_compared("same layers always skipped", results.static, results.static.skip_rate, results))
    rows.append(_compared("layers skipped at random", results.random, results.random.skip_rate, results))
    if results.tuned is None:
        reference = "“Dense” is the base model; it was not tuned on the same records for comparison."
    else:
        reference = (
            f"“Dense” is “{base_name if results.dense.source == 'base' else tuned_name}”, the better of the two."
        )
    calibrated = f" {calibration_line(results.calibration)}" if results.calibration is not None else ""
    return Grid(
        "Results",
        ("model", "accuracy", "layers skipped", "to dense, points", "95 % interval"),
        tuple(rows),
        highlighted=highlighted,
        note=f"{results.questions:,} questions, the same for every row. {reference}{calibrated}",
    )


def by_task(results: Results) -> Grid:
    """Accuracy and skip rate of each task."""
    rows = tuple(
        (
            name,
            f"{task.questions:,}",
            percent(task.dense),
            percent(task.routed),
            points(task.routed - task.dense),
            NONE if task.low is None or task.high is None else span(task.low, task.high),
            percent(task.skip_rate),
        )
        for name, task in results.tasks.items()
    )
    columns = ("task", "questions", "dense", "routed", "to dense, points", "95 % interval, paired", "layers skipped")
    note = ""
    if results.route_information is not None:
        note = f"Which route a question takes tells {results.route_information:.2f} bits about its task."
    return Grid("By task", columns, rows, note=note)


def speed(results: Results, ranges: bool = True) -> Grid:
    """Measured time of each case: medians and, with ``ranges``, the fastest and slowest repetition."""
    rows = tuple(
        (
            case.name,
            case.phase,
            case.model,
            f"{case.batch} mixed" if case.mixed else str(case.batch),
            percent(case.skip_rate),
            times(speed_up(case)),
            measured(case, case.dense_seconds, ranges),
            measured(case, case.routed_seconds, ranges),
        )
        for case in results.speed.cases
    )
    columns = ("case", "phase", "model", "batch", "skipped", "speed-up", "dense", "routed")
    note = "Medians, with minimum to maximum in brackets. " if ranges else "Medians. "
    note += "In a mixed batch the rows take different routes."
    if any(case.model == "larger" for case in results.speed.cases):
        note += " The larger model has random weights and shows what routing saves where layers weigh more."
    return Grid("Speed", columns, rows, num_texts=3, note=note)


def surroundings(results: Results) -> Grid:
    """Where the numbers come from."""
    facts = {
        "recipe": results.recipe,
        "seed": results.seed,
        "decoder layers": results.num_layers,
        "whole run": duration(results.seconds_total),
        **results.environment,
    }
    rows = tuple((str(name), NONE if value is None else str(value)) for name, value in facts.items())
    return Grid("Environment", ("", ""), rows, num_texts=2)


def calibration_line(calibration: Calibration) -> str:
    """Raw and calibrated rates, on training data and on held-out questions, in one sentence."""
    rates = (
        f"Calibrated to {percent(calibration.wanted)} with a keep bias of {calibration.keep_bias:+.3f}: "
        f"{percent(calibration.skip_rate)} skipped on training data ({percent(calibration.raw_skip_rate)} before)"
    )
    if calibration.heldout_skip_rate is None or calibration.heldout_raw_skip_rate is None:
        return f"{rates}; not checked on held-out questions."
    return (
        f"{rates}, {percent(calibration.heldout_skip_rate)} on held-out questions "
        f"({percent(calibration.heldout_raw_skip_rate)} before)."
    )


def budget(record: BudgetRecord) -> Grid:
    """What each wanted skip ratio gave, on the questions of the trace and on held-out ones."""
    rows = tuple(
        (
            percent(check.wanted),
            NONE if check.keep_bias is None else f"{check.keep_bias:+.3f}",
            NONE if check.skip_rate is None else percent(check.skip_rate),
            NONE if check.heldout_skip_rate is None else percent(check.heldout_skip_rate),
            NONE if check.heldout_skip_rate is None else points(check.heldout_skip_rate - check.wanted),
        )
        for check in record.checks
    )
    most = record.pairs[-1][0] if record.pairs else 0.0
    note = (
        f"Requests may ask for 0 (all layers) to {percent(most)}; {len(record.pairs)} biases measured on "
        f"{record.questions:,} questions."
    )
    if any(check.keep_bias is None for check in record.checks):
        note += " Where there is no bias, the rate jumps past the ratio, and requests for it are refused."
    columns = ("skip ratio", "keep bias", "skipped, training data", "held out", "off, points")
    return Grid("Budget", columns, rows, num_texts=0, note=note)


def interval(accuracy: float, questions: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share of ``questions``; it stays within 0 and 1, unlike the normal one near the ends."""
    spread = z * math.sqrt(accuracy * (1 - accuracy) / questions + (z / (2 * questions)) ** 2)
    middle, scale = accuracy + z * z / (2 * questions), 1 + z * z / questions
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def speed_up(case: SpeedCase | BenchCase) -> float:
    """Dense over routed, of medians; above 1 is faster."""
    routed = median(case.routed_seconds)
    return median(case.dense_seconds) / routed if routed > 0 else math.nan


def speed_up_words(case: SpeedCase) -> str:
    """As ``1.25× faster``."""
    return _ratio_words(speed_up(case))


def percent(share: float) -> str:
    """As ``12.3 %``."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def points(difference: float) -> str:
    """A difference of shares in percentage points, signed; what rounds to zero has no sign."""
    text = f"{abs(100 * difference):.1f}"
    return text if text == "0.0" else ("+" if difference > 0 else MINUS) + text


def span(low: float, high: float) -> str:
    """An interval of differences in points, as ``−1.0 to +0.3``."""
    return f"{points(low)} to {points(high)}"


def plural(count: int, name: str) -> str:
    """As ``2 seeds``."""
    return f"{count:,} {name}" + ("" if count == 1 else "s")


def times(factor: float) -> str:
    """As ``1.25×``."""
    return NONE if math.isnan(factor) else f"{factor:.2f}{TIMES}"


def spread(factors: Sequence[float]) -> str:
    """Median and quartiles, as ``1.25× (1.22–1.31)``; a dash for none."""
    if len(factors) < 2:
        return times(factors[0]) if factors else NONE
    low, middle, high = quantiles(factors, n=4, method="inclusive")
    return f"{times(middle)} ({low:.2f}\N{EN DASH}{high:.2f})"


def duration(seconds: float) -> str:
    """As ``3 min 20 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _compared(name: str, score: Score, skip_rate: float, results: Results) -> tuple[str, ...]:
    low, high = interval(score.accuracy, results.questions)
    return (
        name,
        percent(score.accuracy),
        percent(skip_rate),
        points(score.accuracy - results.dense.accuracy),
        f"{100 * low:.1f}\N{EN DASH}{100 * high:.1f}",
    )


def measured(case: SpeedCase | BenchCase, seconds: Sequence[float], ranges: bool) -> str:
    """A median in ms or s; with ``ranges`` the fastest and slowest repetition behind it, if there are several."""
    # All of a case's times in one unit, whichever side of a second they fall.
    factor, unit = (1000, "ms") if median(case.dense_seconds) < 1 else (1, "s")
    middle, low, high = (_three_digits(factor * value) for value in (median(seconds), min(seconds), max(seconds)))
    return f"{middle}\N{NO-BREAK SPACE}{unit}" + (f" ({low}\N{EN DASH}{high})" if ranges and len(seconds) > 1 else "")


def _three_digits(value: float) -> str:
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{decimals}f}"


def _ratio_words(factor: float) -> str:
    if math.isnan(factor) or abs(factor - 1) < EVEN:
        return "no faster"
    return f"{times(factor)} faster" if factor > 1 else f"{times(1 / factor)} slower"
