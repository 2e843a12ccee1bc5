"""README quotes records only: the table between its markers is a committed record's, word for word."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

from routing_experts.records import BenchRecord, Results, StudyRecord
from routing_experts.reports import bench_markdown, results_markdown, study_markdown

ROOT = Path(__file__).parents[2]


def test_readme_table_is_the_record():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("<!-- results:begin -->")[1].split("<!-- results:end -->")[0]
    record = Results.load(ROOT / "benchmarks" / "results" / "quickstart.json")
    assert table.strip() == results_markdown(record).strip()


def test_the_study_s_tables_are_the_record() -> None:
    """Guards docs/studies.md against numbers that no study measured."""
    page = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    block = page.split("<!-- study:begin -->\n")[1].split("<!-- study:end -->")[0]
    assert block == study_markdown(StudyRecord.load(ROOT / "benchmarks" / "results" / "study.json"))


def test_readme_quotes_the_install_record() -> None:
    """Guards README's seconds: those of a stranger's install, recorded on a clean commit."""
    record = json.loads((ROOT / "benchmarks" / "results" / "install.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"[{record['seconds_install']:.0f} seconds](benchmarks/results/install.json)" in readme
    assert not record["environment"]["commit"].endswith("-dirty")


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
    record = json.loads((ROOT / "benchmarks" / "results" / "calibration.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    block = page.split("<!-- calibration:begin -->\n")[1].split("\n<!-- calibration:end -->")[0]
    assert block == calibration_table(record)
    assert {row["wanted"] for row in record["rows"]} >= {0.1, 0.2, 0.3, 0.4}
    assert len({row["run"] for row in record["rows"]}) == 3
    assert max(abs(row["heldout_skip_rate"] - row["wanted"]) for row in record["rows"]) < 0.01
    assert not record["environment"]["commit"].endswith("-dirty")


def test_the_budget_table_is_the_record() -> None:
    """Guards docs/studies.md's second table, and that a skip ratio is met within two points on held-out questions."""
    record = json.loads((ROOT / "benchmarks" / "results" / "budget.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    block = page.split("<!-- budget:begin -->\n")[1].split("\n<!-- budget:end -->")[0]
    assert block == calibration_table(record)
    assert {row["wanted"] for row in record["rows"]} >= {0.0, 0.1, 0.2, 0.3, 0.4, 0.5}
    assert len({row["run"] for row in record["rows"]}) == 3
    assert max(abs(row["heldout_skip_rate"] - row["wanted"]) for row in record["rows"]) <= 0.02
    assert not record["environment"]["commit"].endswith("-dirty")


def bench_block(page: str) -> str:
    return page.split("<!-- bench:begin -->\n")[1].split("<!-- bench:end -->")[0]


def test_the_bench_s_tables_are_the_record() -> None:
    """Guards docs/speed.md against numbers that nobody measured."""
    record = BenchRecord.load(ROOT / "benchmarks" / "results" / "cpu-100m.json")
    assert (
        bench_block((ROOT / "docs" / "speed.md").read_text(encoding="utf-8")).strip() == bench_markdown(record).strip()
    )
    assert not record.environment["commit"].endswith("-dirty")


def test_compiled_layers_are_the_record() -> None:
    """Guards docs/speed.md's sentence on what compiling gives on a CPU."""
    record = json.loads((ROOT / "benchmarks" / "results" / "compiled.json").read_text(encoding="utf-8"))
    page = " ".join((ROOT / "docs" / "speed.md").read_text(encoding="utf-8").split())
    for seconds in record["step_seconds"].values():
        assert f"{1000 * median(seconds):.1f} ms" in page
    assert not record["environment"]["commit"].endswith("-dirty")


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
    record = json.loads((ROOT / "benchmarks" / "results" / "dialogue.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "inference.md").read_text(encoding="utf-8")
    block = page.split("<!-- dialogue:begin -->\n")[1].split("\n<!-- dialogue:end -->")[0]
    assert block == dialogue_table(record)
    assert not record["environment"]["commit"].endswith("-dirty")


def test_readme_quotes_the_bench() -> None:
    """Guards README's gains: medians of the committed record."""
    record = BenchRecord.load(ROOT / "benchmarks" / "results" / "cpu-100m.json")
    gains = [median(case.dense_seconds) / median(case.routed_seconds) for case in record.cases]
    found = {(case.phase, case.batch): gain for case, gain in zip(record.cases, gains, strict=True) if case.skip_rate}
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"608 tokens {found['prefill', 1]:.2f} times faster alone" in readme
    assert f"and {found['prefill', 8]:.2f} in a batch of eight routes" in readme
    assert f"decoding {found['decode', 1]:.2f}, and 128 requests" in readme
    assert f"decoded {gains[-1]:.2f} times faster by the engine" in readme


def equivalence_table(record: dict[str, Any]) -> str:
    """The table of docs/scale.md: a row a way, a distance a stage."""
    stages = [name for name in record["rows"][0]["distance"] if name != "skip_rate"]
    lines = [f"| way | processes | {' | '.join(stages)} |", "|---|--:|" + "--:|" * len(stages)]
    for row in record["rows"]:
        cells = " | ".join(f"{row['distance'][stage]:.1e}" for stage in stages)
        lines.append(f"| {row['way']} | {row['processes']} | {cells} |")
    return "\n".join(lines)


def test_the_equivalence_table_is_the_record() -> None:
    """Guards docs/scale.md, and that no engine trains another run (contract 10)."""
    record = json.loads((ROOT / "benchmarks" / "results" / "equivalence.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert page.split("<!-- equivalence:begin -->\n")[1].split("\n<!-- equivalence:end -->")[0] == equivalence_table(
        record
    )
    assert {row["way"] for row in record["rows"]} >= {"one process", "DDP", "ZeRO-2", "ZeRO-3", "FSDP2"}
    assert max(max(row["distance"].values()) for row in record["rows"]) <= 1e-4
    assert not record["environment"]["commit"].endswith("-dirty")
