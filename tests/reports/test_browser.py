"""Pages in a real browser: light and dark, on a desk and on a phone, whole and without a word of complaint."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_reports import results_values, write_gallery, write_log
from test_tasks_page import RECORD

from routing_experts.records import LOG_NAME, TASKS_NAME, StudyRecord, TrainingLog, read_log
from routing_experts.reports import (
    ProgressPage,
    write_comparison,
    write_folder_report,
    write_report,
    write_study_report,
)
from tiny_records import study_run

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
SCREENS = {"desk": (1200, 900), "phone": (375, 740)}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the path")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


def run_folder(folder: Path) -> Path:
    folder.mkdir()
    routes = [{"keeps": "1011", "questions": 60, "right": 0.9}, {"keeps": "1111", "questions": 40, "right": 0.88}]
    (folder / "results.json").write_text(json.dumps(results_values() | {"routes": routes, "route_information": 1.5}))
    write_log(folder / LOG_NAME)
    write_gallery(folder)
    return folder


def study_folder(folder: Path) -> Path:
    runs = []
    for arm in ("routed", "static"):
        for seed in (0, 1):
            write = folder / f"{arm}-25" / f"seed-{seed}"
            write.mkdir(parents=True)
            write_log(write / LOG_NAME)
            runs.append(
                study_run(
                    *(arm, 0.25, seed, "10"),
                    layer_skip_rates=[0.0, 0.5],
                    task_accuracy={"sum": 0.5},
                    task_skip_rate={"sum": 0.25},
                    varied_layers=0.5,
                    steps=3,
                )
            )
    StudyRecord("digits", {}, 0.9, 2, 0, runs, [], {"date": "2026-01-01"}).save(folder / "study.json")
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    first, second = run_folder(folder / "first"), run_folder(folder / "second")
    return {
        "run": write_report(first),
        "comparison": write_comparison([first, second], folder / "both"),
        "study": write_study_report(study_folder(folder / "study")),
        "progress": progress_page(folder / "training"),
        "benchmarks": benchmarks_page(folder / "benchmarks"),
    }


def benchmarks_page(folder: Path) -> Path:
    RECORD.save(folder / TASKS_NAME)
    return write_folder_report(folder)


def progress_page(folder: Path) -> Path:
    write_log(folder / LOG_NAME)
    page = ProgressPage(folder, every=60)
    page.renew()
    return page.path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("kind", ["run", "comparison", "study", "progress", "benchmarks"])
def test_a_page_is_whole_in_the_browser(kind, screen, scheme, browser, pages):
    """Guards what its reader sees: every picture loads, nothing overflows, the ground follows the scheme."""
    width, height = SCREENS[screen]
    tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    complaints: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(pages[kind].as_uri())
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    pictures = tab.eval_on_selector_all("img", "all => all.map(one => one.complete && one.naturalWidth > 0)")
    assert len(pictures) >= (1 if kind == "progress" else 2)
    assert all(pictures)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("document.querySelector('h1').getBoundingClientRect().height") > 20
    shot = np.asarray(Image.open(io.BytesIO(tab.screenshot())).convert("L"))
    assert (shot[5, 5] > 128) == (scheme == "light")
    assert shot.std() > 8
    tab.close()


def test_routes_are_told_to_those_who_do_not_see_them(browser, pages):
    tab = browser.new_page()
    tab.goto(pages["run"].as_uri())
    labels = tab.eval_on_selector_all(".route", "all => all.map(one => one.getAttribute('aria-label'))")
    assert labels
    assert all(label.startswith("Runs layers") for label in labels)
    tab.close()


def test_an_open_tab_renews_itself(browser, tmp_path):
    """Guards the page of a run that trains: what was written since is shown without a click, from the disk alone."""
    write_log(tmp_path / "whole.jsonl")
    lines = read_log(tmp_path / "whole.jsonl")
    page = ProgressPage(tmp_path, every=1)
    tab = browser.new_page()
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    with TrainingLog(tmp_path / LOG_NAME) as log:
        log.append(lines[0])
        page.renew()
        tab.goto(page.path.as_uri())
        assert "step 1 of 30" in tab.inner_text("h1")
        log.append(lines[1])
        page.renew()
        tab.locator("h1", has_text="step 2 of 30").wait_for(timeout=10000)
    page.close(is_finished=True)
    tab.get_by_text("The run is finished").wait_for(timeout=10000)
    asked.clear()
    tab.wait_for_timeout(1500)
    assert asked == []  # it rests
    tab.close()
