"""Pages quote records only: what stands between markers is a committed record's, word for word."""

from collections.abc import Callable
from statistics import mean, median, pstdev
from typing import Any

import pytest
from quoted import RESULTS, ROOT, block_of, page_of, record_of

from routing_experts.records import BenchRecord, Results, StudyRecord, from_marks
from routing_experts.reports import bench_markdown, front_markdown, results_markdown, study_markdown
from routing_experts.reports.study_tables import claims_grid, rate_grids
from routing_experts.training.recipe import load_recipe


def test_readme_table_is_the_record():
    assert block_of("README.md", "results") == results_markdown(Results.load(RESULTS / "quickstart.json")).strip()


def test_the_study_s_tables_are_the_record() -> None:
    """Guards docs/studies.md against numbers that no study measured."""
    assert block_of("docs/studies.md", "study") == study_markdown(StudyRecord.load(RESULTS / "study.json")).strip()


@pytest.mark.parametrize("name", ["front", "ablations"])
def test_the_tables_of_studies_by_rate_are_their_records(name: str) -> None:
    """Guards docs/studies.md against numbers that no study measured."""
    study = StudyRecord.load(RESULTS / f"{name}.json")
    assert block_of("docs/studies.md", name) == front_markdown(study).strip()
    assert not study.environment["commit"].endswith("-dirty")


def test_the_front_meets_its_bar() -> None:
    """Guards the method: at three tenths of the layers at most a point is lost, to either dense."""
    study = StudyRecord.load(RESULTS / "front.json")
    own = mean(run.accuracy for run in study.reference_runs[0.3])
    dense = next(one for one in study.contrasts if (one.second, one.wanted) == ("dense", 0.3))
    assert study.base_accuracy - own <= 0.01
    assert -dense.difference <= 0.01


def test_the_ablations_are_whole_and_each_claim_has_its_answer() -> None:
    """Guards the paper's claims: every one is agreed with by three seeds, or a remark says why it is not."""
    study = StudyRecord.load(RESULTS / "ablations.json")
    plans = study.plan["arms"]
    assert all(len(one.by_seed) == 3 for one in study.contrasts)
    grid = claims_grid(study)
    assert grid is not None
    assert {row[0] for row in grid.rows} == {arm for arm, plan in plans.items() if plan.get("claim")}
    for arm, _, _, measured, *_ in grid.rows:
        assert measured == "agrees" or plans[arm].get("remark"), arm


def test_the_remark_on_a_target_for_each_example_is_the_record_s() -> None:
    """Guards a cause that is given in numbers: how far questions differ in the layers that they run."""
    study = StudyRecord.load(RESULTS / "ablations.json")

    def spread(arm: str) -> float:
        runs = [run for run in study.runs if (run.arm, run.wanted) == (arm, 0.3)]
        return mean(pstdev(from_marks(run.layers_run)) for run in runs)

    told = f"spread by {spread('example_target'):.1f} around their mean, by {spread('routed'):.1f} with"
    assert told in study.plan["arms"]["example_target"]["remark"]


def test_readme_quotes_the_front() -> None:
    """Guards README's sentence on longer training, whose figures are means of three seeds at three tenths."""
    study = StudyRecord.load(RESULTS / "front.json")
    assert all(len(runs) == 3 for runs in study.reference_runs.values())
    grid = next(grid for grid in rate_grids(study) if grid.title.startswith("30"))
    rows = {row[0]: [cell.replace("\u00a0", " ") for cell in row] for row in grid.rows}
    right = {arm: row[1] for arm, row in rows.items()}
    assert right["static"] == right["least_important"]  # both are fixed layers
    assert right["routed"] == f"{100 * study.base_accuracy:.1f} %"
    page, left_out = page_of("README.md"), rows["routed"][3]
    assert f"routing keeps {right['routed']} of 4,000 answers right with {left_out} of the layers left out" in page
    assert f"as many as the base model; routers without adapters {right['router']}" in page
    assert f"fixed layers {right['static']}, an early exit {right['early_exit']}" in page
    assert f"tuned without skipping {right['dense']} (means of three seeds)" in page


def test_readme_quotes_the_install_record() -> None:
    """Guards README's seconds: those of a stranger's install, recorded on a clean commit."""
    record = record_of("install")
    assert f"[{record['seconds_install']:.0f} seconds](benchmarks/results/install.json)" in page_of("README.md")


def calibration_table(record: dict[str, Any]) -> str:
    """A table of docs/studies.md: a row a wanted rate, a figure a run."""
    lines = ["| wanted | held out, by seed | right answers, by seed |", "|--:|--:|--:|"]
    for wanted in sorted({row["wanted"] for row in record["rows"]}):
        rows = [row for row in record["rows"] if row["wanted"] == wanted]
        rates = " / ".join(f"{100 * row['heldout_skip_rate']:.1f}" for row in rows)
        right = " / ".join(f"{100 * row['accuracy']:.1f}" for row in rows)
        lines.append(f"| {100 * wanted:.0f} % | {rates} % | {right} % |")
    return "\n".join(lines)


def test_the_calibration_table_is_the_record() -> None:
    """Guards docs/studies.md's table and its sentence: rates from 10 to 40 %, none off by a point."""
    record = record_of("calibration")
    assert block_of("docs/studies.md", "calibration") == calibration_table(record)
    assert {row["wanted"] for row in record["rows"]} >= {0.1, 0.2, 0.3, 0.4}
    assert len({row["run"] for row in record["rows"]}) == 3
    assert max(abs(row["heldout_skip_rate"] - row["wanted"]) for row in record["rows"]) < 0.01


def test_the_budget_table_is_the_record() -> None:
    """Guards docs/studies.md's second table, and that a skip ratio is met within two points on held-out questions."""
    record = record_of("budget")
    assert block_of("docs/studies.md", "budget") == calibration_table(record)
    assert {row["wanted"] for row in record["rows"]} >= {0.0, 0.1, 0.2, 0.3, 0.4, 0.5}
    assert len({row["run"] for row in record["rows"]}) == 3
    assert max(abs(row["heldout_skip_rate"] - row["wanted"]) for row in record["rows"]) <= 0.02


def test_the_bench_s_tables_are_the_record() -> None:
    """Guards docs/speed.md against numbers that nobody measured."""
    record = BenchRecord.load(RESULTS / "cpu-100m.json")
    assert block_of("docs/speed.md", "bench") == bench_markdown(record).strip()
    assert not record.environment["commit"].endswith("-dirty")


def test_compiled_layers_are_the_record() -> None:
    """Guards docs/speed.md's sentence on what compiling gives on a CPU."""
    record = record_of("compiled")
    page = page_of("docs/speed.md")
    for seconds in record["step_seconds"].values():
        assert f"{1000 * median(seconds):.1f} ms" in page


def dialogue_table(record: dict[str, Any]) -> str:
    """The table of docs/inference.md: a row a contender, a figure a turn, each the mean over runs."""

    def by_turn(contender: str, value: Callable[[dict[str, Any]], float], form: str) -> str:
        runs = [row["turns"] for row in record["rows"] if row["contender"] == contender]
        return " / ".join(format(mean(map(value, turns)), form) for turns in zip(*runs, strict=True))

    lines = ["| contender | right, % | skipped, % | tokens run | cache, KiB | ms |", "|---|--:|--:|--:|--:|--:|"]
    for name in ("dense", "prefill", "project"):
        cells = (
            by_turn(name, lambda turn: 100 * turn["accuracy"], ".1f"),
            by_turn(name, lambda turn: 100 * turn["skip_rate"], ".1f"),
            by_turn(name, lambda turn: turn["prefilled_tokens"], ".0f"),
            by_turn(name, lambda turn: turn["cache_bytes"] / 1024, ".0f"),
            by_turn(name, lambda turn: 1000 * turn["seconds"]["median"], ".0f"),
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    later = record["project_minus_prefill"]
    low, middle, high = (f"{100 * later[name]:+.1f}".replace("-", "−") for name in ("low", "mean", "high"))
    same = mean(row["same_route_as_before"] for row in record["rows"] if row["contender"] == "prefill")
    runs = len({row["run"] for row in record["rows"]})
    return "\n".join(
        [
            *lines,
            "",
            f"{record['dialogues']} dialogues, {runs} routed models. From the second turn on, `project` − `prefill`: "
            f"{middle} points ({low} to {high}, 95 %, over dialogues). Under `prefill`, {100 * same:.0f} % of turns "
            "took the route of the turn before.",
        ]
    )


def test_the_dialogue_table_is_the_record() -> None:
    """Guards docs/inference.md against numbers that nobody measured."""
    record = record_of("dialogue")
    assert block_of("docs/inference.md", "dialogue") == dialogue_table(record)


def mixture_table(record: dict[str, Any]) -> str:
    """The tables of docs/data.md: a row a command, then what loading and grouping give."""
    size, halves = record["bytes"], record["halves"]
    commands = {
        "`roe data check`": (size, record["check"]),
        "`json.load`, for comparison": (size, record["json.load"]),
        "`roe data subset`": (size, halves[:2]),
        "`roe data subset` of a tenth": (halves[2]["bytes"], halves[2:]),
    }
    lines = ["| command | file, MB | seconds | MB/s | peak memory, MB |", "|---|--:|--:|--:|--:|"]
    for name, (read, runs) in commands.items():
        seconds, peak = (median(run[key] for run in runs) for key in ("seconds", "peak_bytes"))
        lines.append(f"| {name} | {read / 1e6:.0f} | {seconds:.1f} | {read / 1e6 / seconds:.0f} | {peak / 1e6:.0f} |")
    alone, beside = (median(record["loading"]["dialogues_a_second"][workers]) for workers in ("0", "2"))
    wasted = record["padding"]["padded_share"]
    shuffled, step, four = (100 * wasted[name] for name in ("shuffled", "window 1", "window 4"))
    return "\n".join(
        [
            *lines,
            "",
            "Memory is that of all processes together. Dialogues decoded, padded to squares of "
            f"{record['loading']['pixels']} pixels and tokenised: {beside:.0f} a second by two workers, {alone:.0f} "
            f"without any. Of a batch's tokens {shuffled:.0f} % are padding when shuffled, {step:.1f} % when a step is "
            f"cut by length, {four:.1f} % with `training.length_window: 4`.",
        ]
    )


def test_the_mixture_table_is_the_record() -> None:
    """Guards docs/data.md against numbers that nobody measured."""
    assert block_of("docs/data.md", "mixture") == mixture_table(record_of("mixture"))


def test_the_mixture_meets_its_bars() -> None:
    """Guards checking at full size, in speed and memory, subsets that come again, and grouping that pays."""
    record = record_of("mixture")
    assert record["records"] == 665_000
    assert record["bytes"] / 1e6 / median(run["seconds"] for run in record["check"]) >= 30
    assert max(run["peak_bytes"] for run in record["check"]) < 500e6
    first, again, tenth = record["halves"]
    assert first["sha256"] == again["sha256"]
    assert first["peak_bytes"] < 1.2 * tenth["peak_bytes"]
    wasted = record["padding"]["padded_share"]
    assert 3 * wasted["window 4"] <= wasted["shuffled"]  # a step alone has too few dialogues for it: 2.5 times


def llava_hr_table(record: dict[str, Any]) -> str:
    """The table of docs/families.md: a row a model, then what its training took."""
    rows = {row["contender"]: row for row in record["rows"]}
    named = {
        "base": "base",
        "low resolution": "its twin, from the low resolution alone",
        "dense 0": "dense: the base, trained on without routing",
        **{name: name.replace("routed", "routed, seed") for name in rows if name.startswith("routed")},
    }
    lines = ["| model | right, % | layers skipped, % |", "|---|--:|--:|"]
    for name, shown in named.items():
        skipped = f"{100 * rows[name]['skip_rate']:.1f}" if name.startswith("routed") else ""
        lines.append(f"| {shown} | {100 * rows[name]['accuracy']:.1f} | {skipped} |")
    lines.append(f"| each task's commonest answer | {100 * record['constant_answers']:.1f} | |")
    base, dense, low = (
        "{mean:.1f} points [{low:.1f}, {high:.1f}]".format(**{key: 100 * value for key, value in record[name].items()})
        for name in ("routed_minus_base", "routed_minus_dense", "base_minus_low_resolution")
    )
    return "\n".join(
        [
            *lines,
            "",
            f"Of {record['questions']:,} held-out questions about pictures; 95 % intervals over questions. Routed "
            f"minus dense: {dense}; minus base: {base}. Base minus its twin: {low}. The steps of teaching, "
            f"of the base and of the first seed took {record['minutes']:.0f} minutes.",
        ]
    )


def test_the_llava_hr_table_is_the_record() -> None:
    """Guards docs/families.md against numbers that nobody measured."""
    assert block_of("docs/families.md", "llava-hr") == llava_hr_table(record_of("llava-hr"))


def test_the_small_llava_hr_meets_its_bars() -> None:
    """Guards routing on LLaVA-HR: a fifth of the layers for two points at most, and pictures that need its ConvNeXt."""
    record = record_of("llava-hr")
    for name, recipe in (("base", "base"), ("routed 0", "routed")):
        assert record["steps"][name] == load_recipe(ROOT / f"benchmarks/llava_hr/{recipe}.yaml").training.steps
    assert record["sight"]["base"]["right"] > 0.8
    assert record["missed"] == []
    assert record["routed_skip_rate"] >= 0.2
    assert record["routed_minus_base"]["mean"] >= -0.02
    assert record["routed_minus_dense"]["mean"] >= -0.02
    assert record["minutes"] <= 45
    assert record["base_minus_low_resolution"]["low"] > 0.1


def test_readme_quotes_the_bench() -> None:
    """Guards README's gains: medians of the committed record."""
    record = BenchRecord.load(RESULTS / "cpu-100m.json")
    gains = [median(case.dense_seconds) / median(case.routed_seconds) for case in record.cases]
    found = {(case.phase, case.batch): gain for case, gain in zip(record.cases, gains, strict=True) if case.skip_rate}
    readme = page_of("README.md")
    assert f"608 tokens {found['prefill', 1]:.2f} times faster alone" in readme
    assert f"and {found['prefill', 8]:.2f} in a batch of eight routes" in readme
    assert f"decoding {found['decode', 1]:.2f}, and 128 requests" in readme
    assert f"decoded {gains[-1]:.2f} times faster by the engine" in readme
