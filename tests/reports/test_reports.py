import io
import json
import math
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from routing_experts.errors import ReportError
from routing_experts.records import LogLine, Results, TrainingLog
from routing_experts.reports import print_results, results_markdown, write_report
from routing_experts.reports.figures import draw_layers, draw_tradeoff, draw_training
from routing_experts.reports.gallery import layers_in_words
from routing_experts.reports.palette import LOOKS
from routing_experts.reports.summary import headline, interval, points

HOSTILE = "<script>alert('$x_{$')</script>|[bold]\n\"&"
NUM_LAYERS = 4
STAGES = ("adapter_warmup", "router_warmup", "instruction_tuning")


def results_values(task: str = "sum", recipe: str = "digits") -> dict:
    case = {"name": "answers", "phase": "generate", "model": "this", "skip_rate": 0.25}
    return {
        "base": {"accuracy": 0.88},
        "tuned": {"accuracy": 0.9},
        "dense": {"accuracy": 0.9, "source": "tuned"},
        "routed": {"accuracy": 0.895, "skip_rate": 0.25, "layer_skip_rates": [0.0, 0.2, 0.3, 0.5]},
        "static": {"accuracy": 0.8, "skip_rate": 0.25, "skipped_layers": [3]},
        "random": {"accuracy": 0.6, "skip_rate": 0.25},
        "speed": {
            "dense_seconds": 0.2,
            "routed_seconds": 0.16,
            "cases": [
                case | {"batch": 1, "mixed": False, "dense_seconds": [0.2, 0.19, 0.3], "routed_seconds": [0.16, 0.15]},
                case | {"batch": 16, "mixed": True, "dense_seconds": [1.0], "routed_seconds": [1.1]},
            ],
            "note": "Groups by route read the weights again.",
        },
        "tasks": {
            name: {
                "questions": 50,
                "dense": 0.9,
                "routed": 0.9,
                "skip_rate": 0.25,
                "layer_skip_rates": [0, 0.1, 0.3, 0.6],
            }
            for name in (task, "count")
        },
        "sweep": [{"keep_bias": b, "accuracy": 0.895 + b / 100, "skip_rate": 0.25 - b / 10} for b in (-2.0, 0.0, 2.0)],
        "questions": 100,
        "seed": 0,
        "environment": {"python": "3.12", "date": "2025-01-01T00:00:00+00:00"},
        "seconds_total": 3700.0,
        "recipe": recipe,
        "num_layers": NUM_LAYERS,
    }


def write_log(path: Path) -> None:
    with TrainingLog(path) as log:
        for step in range(1, 31):
            rate = None if step < 10 else 0.3 - 1 / step
            stage = STAGES[(step - 1) // 10]
            log.append(
                LogLine(step, step / 30, stage, 1 / step, 1 / step, rate, 0.3, 1.0, 0.0, 1e-4, None, float(step))
            )


def write_gallery(run: Path, question: str = "Add top left and top right.", **changes: object) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 8, 0, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\0\xff")) + chunk(b"IEND", b"")
    )
    (run / "picture.png").write_bytes(png)
    item = {"question": question, "answer": "12", "dense": "12 ", "routed": "13", "route": [True, False, True, False]}
    values = [item | {"image": "picture.png"}, item | {"image": None}] * 8
    (run / "gallery.json").write_text(json.dumps([values[0] | changes, *values[1:]]))


class Page(HTMLParser):
    """What a browser would make of a page: its tags, addresses and text."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        named = {"src", "srcset", "href", "action", "data", "poster"}
        self.addresses += [value or "" for name, value in attributes if name in named]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("hostile")
    (run / "results.json").write_text(json.dumps(results_values(task=HOSTILE, recipe=HOSTILE)))
    write_log(run / "log.jsonl")
    write_gallery(run, question=HOSTILE, routed=HOSTILE)
    write_report(run)
    return run


def test_hostile_texts_are_shown_and_never_run(hostile_run: Path):
    source = (hostile_run / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) >= 5  # title, header, task, question, answer, recipe
    assert "[bold]" in page.text


def test_the_page_asks_nothing_of_the_network(hostile_run: Path):
    source = (hostile_run / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"https?:|@import|url\(|//[a-z]", re.sub(r"base64,[\w+/=]+", "", source))
    assert {"script", "link", "iframe", "object"}.isdisjoint(page.tags)


def test_every_figure_has_four_looks_and_none_is_blank(hostile_run: Path):
    files = sorted((hostile_run / "figures").iterdir())
    assert len(files) == 3 * 4
    for file in files:
        with Image.open(file) as opened:
            pixels = np.asarray(opened.convert("L"), dtype=float)
        paper = pixels[0, 0]
        assert paper < 60 if ".dark" in file.name else paper > 240
        assert 0.01 < np.mean(np.abs(pixels - paper) > 40) < 0.9, file.name


def test_the_gallery_shows_twelve_with_verdicts_and_routes_in_words(hostile_run: Path):
    source = (hostile_run / "report.html").read_text(encoding="utf-8")
    assert source.count('class="route"') == 12
    assert source.count("✓ right") == 12
    assert source.count("✗ wrong") == 12
    assert 'aria-label="Runs layers 0, 2; skips 1, 3."' in source


def test_missing_records_are_said_and_old_figures_go(hostile_run: Path, tmp_path: Path):
    values = results_values() | {"sweep": [], "tasks": {}, "tuned": None, "dense": {"accuracy": 0.88, "source": "base"}}
    values["speed"]["cases"] = []
    (tmp_path / "results.json").write_text(json.dumps(values))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "layers.dark.png").touch()
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    for missing in ("no tasks", "no sweep", "no log.jsonl", "no timed cases", "was not tuned"):
        assert missing in text
    assert not list((tmp_path / "figures").iterdir())
    assert "measured 1.25× faster." in text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"route": [True]}, r"gallery\.json: \[0\]\.route has 1 cells"),
        ({"answer": 12}, r"gallery\.json: \[0\]\.answer is 12: expected a text"),
        ({"image": "absent.png"}, r"gallery\.json: \[0\]\.image is 'absent\.png', which cannot be read"),
        ({"image": "results.json"}, r"\[0\]\.image is 'results\.json', which is no PNG"),
        ({"image": "../secret.png"}, r"must lie in the run's folder"),
    ],
)
def test_a_gallery_that_does_not_fit_is_named(tmp_path: Path, changes: dict, named: str):
    (tmp_path / "results.json").write_text(json.dumps(results_values()))
    write_gallery(tmp_path, **changes)
    with pytest.raises(ReportError, match=named):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_partial_run_is_named(tmp_path: Path):
    with pytest.raises(ReportError, match=r"results\.json cannot be read"):
        write_report(tmp_path)
    values = results_values()
    del values["random"]
    (tmp_path / "results.json").write_text(json.dumps(values))
    with pytest.raises(ReportError, match=rf"{re.escape(str(tmp_path))}.*: random missing"):
        write_report(tmp_path)


def test_the_headline_says_what_was_gained_and_what_was_lost():
    assert headline(Results.from_dict(results_values())).replace("\N{NO-BREAK SPACE}", " ") == (
        "89.5 % of answers right with 25.0 % of the decoder layers skipped, against 90.0 % dense; "
        "measured 1.29× faster at batch 1 and 1.10× slower at batch 16."
    )


def test_console_and_markdown_say_the_same_and_take_texts_as_they_are():
    results = Results.from_dict(results_values(task=HOSTILE))
    console = Console(file=io.StringIO(), width=200, record=True)
    print_results(results, console)
    printed = console.export_text()
    assert "<script>alert('$x_{$')</script>|[bold]" in printed
    markdown = results_markdown(results)
    assert "<script>" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6, 8, 9}
    for text in ("89.5", "routed", "1.29×", "200 ms (190–300)", "1.00 s"):
        assert text in printed.replace("\N{NO-BREAK SPACE}", " ")
        assert text in markdown


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_layers", [1, 80])
def test_small_and_large_runs_are_drawn(num_layers: int):
    values = results_values(task=HOSTILE) | {"num_layers": num_layers}
    rates = [0.5] * num_layers
    values["routed"]["layer_skip_rates"] = rates
    values["static"]["skipped_layers"] = []
    task = values["tasks"]["count"] | {"layer_skip_rates": rates}
    values["tasks"] = {f"{HOSTILE}{i}": task for i in range(min(num_layers, 20))}
    values["sweep"] = values["sweep"][: 1 + num_layers // 40]
    results = Results.from_dict(values)
    dense = LogLine(0, 0.0, "dense_tuning", None, None, None, None, None, None, 0.0, None, 0.0)
    for look in (LOOKS[0], LOOKS[-1]):
        for figure in (draw_layers(results, look), draw_tradeoff(results, look), draw_training([dense], look)):
            figure.savefig(io.BytesIO(), format="png", dpi=50)


def test_a_narrow_console_loses_ranges_and_no_digits():
    console = Console(file=io.StringIO(), width=80, record=True)
    print_results(Results.from_dict(results_values()), console)
    printed = console.export_text()
    assert "200\N{NO-BREAK SPACE}ms" in printed
    assert "Groups by route read the weights again." in printed
    assert "…" not in printed


def test_routes_in_words():
    assert layers_in_words([True, False, True, True, True, False]) == "Runs layers 0, 2–4; skips 1, 5."
    assert layers_in_words([True, True]) == "Runs layers 0–1; skips none."


def test_wilsons_interval_and_signs():
    low, high = interval(0.5, 100)
    assert math.isclose(low, 0.4038, abs_tol=1e-4)
    assert math.isclose(high, 0.5962, abs_tol=1e-4)
    assert interval(1.0, 50)[1] == 1.0
    assert interval(0.0, 50)[0] == 0.0
    assert [points(x) for x in (0.0123, -0.0123, -0.0001)] == ["+1.2", "−1.2", "0.0"]
