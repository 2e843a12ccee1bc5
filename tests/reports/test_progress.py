"""The page of a run that trains: written when its log has grown, renewing itself until it is closed."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from test_reports import write_log

from routing_experts.errors import ReportError
from routing_experts.records import LogLine, TrainingLog, read_log
from routing_experts.reports import ProgressPage, write_folder_report
from routing_experts.reports.html import training_drawing
from routing_experts.reports.page import Drawing

REFRESH = re.compile(r'<meta http-equiv="refresh" content="(\d+)">')


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[LogLine]:
    """Of thirty steps in three stages, a second each."""
    path = tmp_path_factory.mktemp("whole") / "log.jsonl"
    write_log(path)
    return read_log(path)


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """Figures are not drawn but noted, by how many lines they would have shown."""
    numbers: list[int] = []

    def note(folder: Path, log: list[LogLine]) -> Drawing:
        numbers.append(len(log))
        return Drawing("training", "not drawn")

    monkeypatch.setattr("routing_experts.reports.progress.training_drawing", note)
    return numbers


def grow(folder: Path, lines: list[LogLine]) -> None:
    with TrainingLog(folder / "log.jsonl") as log:
        for line in lines:
            log.append(line)


def text_of(page: ProgressPage) -> str:
    return " ".join(re.sub("<[^>]*>", " ", page.path.read_text(encoding="utf-8")).split())


def test_the_page_is_written_when_the_log_has_grown(lines, drawn, tmp_path):
    """Guards the training beside it: nothing is drawn while there is nothing new."""
    page = ProgressPage(tmp_path, every=2.5)
    assert not page.renew()  # no log yet
    (tmp_path / "log.jsonl").touch()
    assert not page.renew()  # no line yet
    assert not page.is_written
    grow(tmp_path, lines[:5])
    assert page.renew()
    assert "step 5 of 30" in text_of(page)
    assert not page.renew()
    grow(tmp_path, lines[5:12])
    assert page.renew()
    assert "step 12 of 30" in text_of(page)
    assert drawn == [5, 12]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "report.html"]  # nothing temporary


def test_only_a_page_that_is_followed_renews_itself(lines, drawn, tmp_path):
    """Guards a tab that is left open: it comes back every few whole seconds, and stops with the run."""
    grow(tmp_path, lines)
    page = ProgressPage(tmp_path, every=2.5)
    page.renew()
    assert REFRESH.findall(page.path.read_text(encoding="utf-8")) == ["3"]
    assert page.close(is_finished=False)
    assert not REFRESH.search(page.path.read_text(encoding="utf-8"))
    assert "follows the run no longer" in text_of(page)
    assert page.close(is_finished=True)
    assert "The run is finished" in text_of(page)
    assert not ProgressPage(tmp_path / "other", every=2.5).close(is_finished=True)


def test_a_line_that_is_being_written_is_left_for_later(lines, drawn, tmp_path):
    grow(tmp_path, lines[:6])
    log = tmp_path / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-20])
    page = ProgressPage(tmp_path, every=1)
    assert page.renew()
    log.write_bytes(whole)
    assert page.renew()
    assert drawn == [5, 6]


def test_tiles_say_what_the_last_line_says(lines, drawn, tmp_path):
    """Guards figures and time left: the last stage took a second a step, the one before it a hundred."""
    slow = [replace(line, seconds=100 * line.seconds) for line in lines[:10]]
    later = [replace(line, seconds=1000 + line.seconds, temperature=0.25, tokens_per_second=4321.4) for line in lines]
    grow(tmp_path, [*slow, *later[10:16]])
    page = ProgressPage(tmp_path, every=1)
    page.renew()
    text = text_of(page)
    for part in ("53.3\N{NO-BREAK SPACE}%", "about 14 s left", "0:16:56", "0.062", "gate temperature 0.25"):
        assert " ".join(part.split()) in text
    assert "layers skipped 23.8 % target 30.0 %" in text
    assert "tokens a second 4,321" in text


def test_a_dense_stage_has_no_tiles_for_routing(lines, drawn, tmp_path):
    nothing = {"skip_rate": None, "target_skip_ratio": None, "temperature": None, "ce": None}
    grow(tmp_path, [replace(lines[0], **nothing)])
    page = ProgressPage(tmp_path, every=1)
    page.renew()
    text = text_of(page)
    assert "time left not known yet" in text
    assert "\N{EM DASH}" in text  # the cross-entropy was not finite
    for absent in ("layers skipped", "gate temperature", "tokens a second"):
        assert absent not in text


def test_the_page_has_the_curves_of_one_line_or_many(lines, tmp_path):
    """Guards the picture of a log that has just begun."""
    for number in (1, 12):
        drawing = training_drawing(tmp_path / "figures", lines[:number])
        assert drawing.sources is not None
        assert len(drawing.sources) == 4


def test_a_damaged_log_is_named(lines, drawn, tmp_path):
    grow(tmp_path, lines[:2])
    log = tmp_path / "log.jsonl"
    log.write_text("no JSON\n" + log.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ReportError, match=r"log\.jsonl, line 1 is not JSON"):
        ProgressPage(tmp_path, every=1).renew()


def test_a_run_without_results_is_told_of_both_ways(tmp_path):
    """Guards the plain report of a run that was not evaluated."""
    write_log(tmp_path / "log.jsonl")
    with pytest.raises(ReportError, match=r"roe evaluate .*roe report --follow"):
        write_folder_report(tmp_path)
