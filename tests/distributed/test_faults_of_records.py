"""Records that cannot be used, met by one of several processes: all leave out the same, list it once, end together."""

import json
from pathlib import Path

import pytest
import yaml
from launch import EPOCH, STEPS, ended, finished, recipe, torchrun, training

from routing_experts.data.digits import DigitsTask
from routing_experts.data.mixture.export import export_digits
from routing_experts.records import read_log

pytestmark = pytest.mark.distributed
FAULTY = (3, 17, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The digits in the layout of LLaVA's mixture; three pictures are cut short, which shows when they are decoded."""
    folder = tmp_path_factory.mktemp("mixture")
    path = export_digits(folder, 8 * EPOCH, DigitsTask(seed=5, text_share=0.0))
    records = json.loads(path.read_text())
    for number in FAULTY:
        cut = folder / records[number]["image"]
        cut.write_bytes(cut.read_bytes()[:-200])
    return folder


def skipping(folder: Path, output: Path, processes: int, **data: object) -> Path:
    path = recipe(output, "run", processes)
    made = yaml.safe_load(path.read_text())
    source = {"source": str(next(folder.glob("*.json"))), "on_fault": "skip", "max_faulty": 0.2}
    path.write_text(yaml.safe_dump(made | {"data": source | data}))
    return path


def test_all_processes_leave_out_the_same(folder, tmp_path):
    """Guards the reduction of faults: what one process met is known to all, and the losses are one process's."""
    lines, listed = {}, {}
    for processes in (1, 2):
        output = tmp_path / str(processes)
        output.mkdir()
        finished(training(torchrun(processes), skipping(folder, output, processes)))
        lines[processes] = read_log(output / "run" / "log.jsonl")
        listed[processes] = [json.loads(line) for line in (output / "run" / "faults.jsonl").read_text().splitlines()]
    assert len(lines[1]) == STEPS
    for line, expected in zip(lines[2], lines[1], strict=True):
        assert (line.loss, line.ce) == pytest.approx((expected.loss, expected.ce), abs=1e-4)
    assert sorted(one["record"] for one in listed[2]) == list(FAULTY)
    assert sorted(listed[2], key=str) == sorted(listed[1], key=str)


@pytest.mark.parametrize("data", [{"max_faulty": 0.05}, {"on_fault": "error", "max_faulty": 0.01}], ids=str)
def test_all_processes_end_when_one_meets_too_many(data, folder, tmp_path):
    """Guards against processes that wait for one that has ended; the record is named once it is over."""
    status, said = ended(training(torchrun(2), skipping(folder, tmp_path, 2, **data)), 300)
    assert status != 0
    words = "3 of 40 records cannot be used" if "on_fault" not in data else "it may be cut short or damaged"
    assert words in " ".join(said.split())
