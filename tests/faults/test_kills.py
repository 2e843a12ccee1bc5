"""kill -9 at any moment: the same command goes on to the same weights, bit for bit (contract 8)."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from routing_experts.training.state import FILES as OPTIMIZER_FILES

ROE = [sys.executable, "-W", "ignore", "-c", "from routing_experts.cli import main; main()"]
KILLS = 20
STEPS = 20  # the stages end after steps 6 and 10
BOUNDARIES = (6, 10)

pytestmark = pytest.mark.slow


def written(folder: Path, name: str) -> Path:
    recipe = {
        "model": "pocket",
        "random_init": True,
        "output": str(folder / name),
        "roe": {"adapter_init": "xavier", "sparsity_scope": "run"},
        "data": {"source": "digits", "records": 48},
        "training": {
            "steps": STEPS,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "base_learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 1,
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


Moment = Callable[[], bool]


def torn(run: Path) -> set[Path]:
    return {path for path in (run / "checkpoints").glob("checkpoint-*") if not (path / "complete.json").is_file()}


def in_a_save(run: Path) -> Moment:
    """A checkpoint is being written now: the run removes what earlier kills left before it trains."""
    left = torn(run)

    def now() -> bool:
        found = torn(run)
        left.intersection_update(found)
        return bool(found - left)

    return now


def at_a_boundary(run: Path) -> Moment:
    ends = [run / "checkpoints" / f"checkpoint-{step}" / "complete.json" for step in BOUNDARIES]
    before = [end for end in ends if end.is_file()]
    return lambda: any(end.is_file() for end in ends if end not in before)


def in_the_last_save(run: Path) -> Moment:
    before = set(run.glob(".model.*.partial"))
    return lambda: bool(set(run.glob(".model.*.partial")) - before)


def after(seconds: float) -> Moment:
    """So long after the process was started: while it imports, loads, trains or saves."""
    begun: list[float] = []

    def now() -> bool:
        return time.monotonic() - begun[0] >= seconds if begun else bool(begun.append(time.monotonic()))

    return now


def kill_when(command: list[str], moment: Moment) -> bool:
    """Starts the command and kills it at a moment; false if it ended first."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not moment():
        time.sleep(0.0005)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return True
    assert process.returncode == 0, process.stderr and process.stderr.read()
    return False


def whole_checkpoints_are_readable(run: Path) -> None:
    for marker in run.glob("checkpoints/*/complete.json"):
        assert load_file(marker.parent / "model.safetensors")
        assert load_file(marker.parent / "roe.safetensors")
        state = list(marker.parent.glob(OPTIMIZER_FILES))
        assert state
        assert all(load_file(path) for path in state)


def test_twenty_kills_change_nothing(tmp_path):
    """Guards resuming against moments that no callback sees: in saves, at boundaries, in the model's last save."""
    seed = 7
    rng = random.Random(seed)
    subprocess.run([*ROE, "train", str(written(tmp_path, "whole"))], check=True, capture_output=True)
    command, run = [*ROE, "train", str(written(tmp_path, "killed"))], tmp_path / "killed"
    landed: dict[str, int] = {}
    ended = 0
    while sum(landed.values()) < KILLS:
        kind = rng.choice(["save", "save", "delay", "boundary", "model"])
        moments = {
            "save": in_a_save(run),
            "delay": after(rng.uniform(3, 14)),
            "boundary": at_a_boundary(run),
            "model": in_the_last_save(run),
        }
        if kill_when(command, moments[kind]):
            landed[kind] = landed.get(kind, 0) + 1
            whole_checkpoints_are_readable(run)
        else:  # finished: begin another run of the same recipe
            ended += 1
            assert_same(run, tmp_path / "whole")
            shutil.rmtree(run)
    subprocess.run(command, check=True, capture_output=True)
    assert_same(run, tmp_path / "whole")
    print(f"kills: {landed}; runs that ended in between: {ended}")
    assert landed.get("save", 0) >= 3
    assert landed.get("boundary", 0) >= 1
    assert landed.get("model", 0) >= 1


def assert_same(run: Path, whole: Path) -> None:
    for name in ("model.safetensors", "roe.safetensors"):
        ours, theirs = load_file(run / "model" / name), load_file(whole / "model" / name)
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
