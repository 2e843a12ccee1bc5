"""Runs of ``roe train`` under launchers, in processes of this machine that train on its CPUs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import yaml

ROOT = Path(__file__).parents[2]
STEPS = 9  # three in each stage
EPOCH = 5  # steps: the second begins within a stage, so that runs that go on find their place in it
CPUS = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
STAGES = [
    {"name": "adapter_warmup", "until": 1 / 3, "trains": ["adapters"], "gate": "random"},
    {"name": "router_warmup", "until": 2 / 3, "trains": ["adapters", "routers"], "gate": "learned", "biased": True},
    {"name": "tuning", "until": 1.0, "trains": ["adapters", "routers", "decoder"], "gate": "learned"},
]


def recipe(
    folder: Path,
    name: str,
    processes: int = 1,
    lora: dict[str, Any] | None = None,
    held_out: int = 0,
    text_share: float = 0.15,
    **training: Any,
) -> Path:
    """A recipe file whose steps take eight dialogues, however many processes share them."""
    common = {"steps": STEPS, "batch_size": 8 // processes, "learning_rate": 1e-3, "base_learning_rate": 1e-3}
    settings = {
        "model": "pocket",
        "random_init": True,
        "output": str(folder / name),
        "stages": STAGES,
        "data": {
            "source": "digits",
            "records": 8 * EPOCH + held_out,
            "held_out": held_out,
            "digits": {"text_share": text_share},
        },
        "training": common | {"logging_steps": 1} | training,
        "lora": lora,
    }
    path = folder / f"{name}.{processes}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


@dataclass(frozen=True)
class Run:
    """A launcher's process, and the file that all of it writes to: a pipe that nobody reads stops a run once full."""

    launcher: subprocess.Popen[bytes]
    output: IO[str]

    def said(self) -> str:
        """So far."""
        self.output.seek(0)
        return self.output.read()

    def is_over(self) -> bool:
        return self.launcher.poll() is not None


def training(launcher: Sequence[str], of: Path, sharding: str | None = None, script: Path | None = None) -> Run:
    """Starts a run; a script stands in for ``roe``."""
    flag = "--module" if "deepspeed.launcher.runner" in launcher else "-m"
    roe = [str(ROOT / "benchmarks" / "fsdp_on_cpu.py")] if sharding == "fsdp2" else [flag, "routing_experts"]
    output = TemporaryFile("w+")  # noqa: SIM115 - goes with the run
    command = [*launcher, *([str(script)] if script else roe), "train", str(of)]
    return Run(subprocess.Popen(command, env=os.environ | CPUS, stdout=output, stderr=subprocess.STDOUT), output)


def ended(run: Run, timeout: float) -> tuple[int, str]:
    """A run's exit status and what it said."""
    status = run.launcher.wait(timeout)
    return status, run.said()


def finished(run: Run, timeout: float = 600) -> str:
    """What a run said that has come to a good end."""
    status, said = ended(run, timeout)
    assert status == 0, said[-6000:]
    return said


def wait_until(moment: Callable[[], bool], run: Run, timeout: float = 300) -> None:
    """Waits for a moment in a run's life."""
    deadline = time.monotonic() + timeout
    while not moment():
        assert not run.is_over(), run.said()[-6000:]
        assert time.monotonic() < deadline, run.said()[-6000:]
        time.sleep(0.01)


def kill_when(run: Run, moment: Callable[[], bool]) -> None:
    """Kills all of a run's processes at once, as a power cut does."""
    wait_until(moment, run)
    for process in (run.launcher.pid, *workers(run)):
        os.kill(process, signal.SIGKILL)
    run.launcher.wait()


def workers(run: Run) -> list[int]:
    """The processes that train, whichever session the launcher put them into."""
    found = [run.launcher.pid]
    for pid in found:  # grows meanwhile
        found += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found[1:]
