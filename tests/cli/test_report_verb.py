"""``roe report --follow``: a page beside a run that trains, until the run is finished or Ctrl-C."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from routing_experts.cli import report
from routing_experts.records import LogLine, TrainingLog
from routing_experts.training.folder import RunFolder

EVALUATED = Path(__file__).parents[2] / "benchmarks" / "results" / "quickstart.json"


def line(step: int) -> LogLine:
    return LogLine(step, step / 40, "router_warmup", 1.0, 0.9, 0.2, 0.27, 1.0, 0.2, 1e-4, None, float(step), 1000.0)


@pytest.fixture
def begun(tmp_path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.begin({"model": "pocket"})
    return run


def finish(run: RunFolder) -> None:
    run.model.mkdir()
    run.finish()


@pytest.fixture
def between_looks(monkeypatch) -> Callable[..., list[float]]:
    """Takes what happens in the pauses between looks, in order; gives the pauses' lengths."""

    def happens(*events: Callable[[], None]) -> list[float]:
        pauses: list[float] = []

        def sleep(seconds: float) -> None:
            pauses.append(seconds)
            events[len(pauses) - 1]()

        monkeypatch.setattr(report.time, "sleep", sleep)
        return pauses

    return happens


def interrupt() -> None:
    raise KeyboardInterrupt


def refreshes(run: RunFolder) -> bool:
    return 'http-equiv="refresh"' in (run.path / "report.html").read_text(encoding="utf-8")


def test_a_page_is_renewed_until_its_run_is_finished(roe, begun, between_looks):
    """Guards the whole loop: waiting said once, a page that renews itself, a last one that does not."""
    seen = []
    with TrainingLog(begun.log) as log:
        pauses = between_looks(
            lambda: None,
            lambda: log.append(line(10)),
            lambda: (seen.append(refreshes(begun)), log.append(line(40)), finish(begun)),
        )
        code, out, said = roe("report", "--follow", begun.path, "--every", "3")
    assert code == 0, said
    assert seen == [True]
    assert pauses == [3.0, 3.0, 3.0]
    assert said.count("waiting for the first") == 1
    assert said.count("following: ") == 1
    assert out.strip() == f"report: {begun.path / 'report.html'}"
    assert not refreshes(begun)
    assert "step 40 of 40" in (begun.path / "report.html").read_text(encoding="utf-8")


def test_ctrl_c_leaves_the_last_page(roe, begun, between_looks):
    """Guards the watcher's way out: no error, no traceback, and a page that rests."""
    with TrainingLog(begun.log) as log:
        log.append(line(10))
        pauses = between_looks(interrupt)
        code, out, said = roe("report", "--follow", begun.path)
    assert (code, pauses) == (0, [10.0])
    assert "Traceback" not in said
    assert out.startswith("report: ")
    assert not refreshes(begun)


def test_ctrl_c_before_the_first_line_says_why_there_is_no_page(roe, begun, between_looks):
    between_looks(interrupt)
    code, _, said = roe("report", "--follow", begun.path)
    assert code == 1
    assert "there is no page" in " ".join(said.split())
    assert not (begun.path / "report.html").exists()


def test_a_run_that_was_evaluated_keeps_its_report(roe, begun, between_looks):
    """Guards the report of an evaluation against a page that knows the log alone."""
    between_looks()
    with TrainingLog(begun.log) as log:
        log.append(line(40))
    finish(begun)
    shutil.copy(EVALUATED, begun.path / "results.json")
    assert roe("report", "--follow", begun.path)[0] == 0
    assert "Measured speed" in (begun.path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "taught"),
    [
        (["--follow", "--compare"], "--compare several afterwards"),
        (["--follow", "--json"], "read the run's log.jsonl"),
        (["--follow", "other"], "these are 2 folders"),
        (["--every", "5"], "--every is for --follow"),
        (["--follow", "--every", "0"], "--every"),
        (["--follow", "--output", "."], "--output is for --compare"),
    ],
)
def test_what_contradicts_following_is_refused(words, taught, roe, begun):
    code, _, said = roe("report", begun.path, *words)
    assert code == 2
    assert taught in " ".join(said.split())


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_without_a_run_is_refused(made, roe, tmp_path):
    """Guards against waiting forever beside a folder that nobody trains in."""
    folder = tmp_path / "none"
    if made:
        folder.mkdir()
    code, _, said = roe("report", "--follow", folder)
    assert code == 1
    assert "holds no training run" in " ".join(said.split())
    assert list(Path(tmp_path).rglob("report.html")) == []
