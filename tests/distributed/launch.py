"""Runs of ``roe train`` under launchers, in processes of this machine that train on its CPUs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
STEPS = 9  # three in each stage
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
            "records": 8 * STEPS + held_out,
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


def training(launcher: Sequence[str], of: Path, sharding: str | None = None) -> subprocess.Popen[str]:
    """Starts a run."""
    flag = "--module" if "deepspeed.launcher.runner" in launcher else "-m"
    roe = [str(ROOT / "benchmarks" / "fsdp_on_cpu.py")] if sharding == "fsdp2" else [flag, "routing_experts"]
    command = [*launcher, *roe, "train", str(of)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=os.environ | CPUS, **pipes)


def finished(run: subprocess.Popen[str], timeout: float = 600) -> str:
    """What a run said that has come to its end."""
    output, _ = run.communicate(timeout=timeout)
    assert run.returncode == 0, output[-6000:]
    return output


def kill_when(run: subprocess.Popen[str], moment: Callable[[], bool], timeout: float = 300) -> None:
    """Kills all of a run's processes at once, as a power cut does."""
    deadline = time.monotonic() + timeout
    while not moment():
        assert run.poll() is None, run.communicate()[0][-6000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process in (run.pid, *workers(run)):
        os.kill(process, signal.SIGKILL)
    run.communicate()


def workers(run: subprocess.Popen[str]) -> list[int]:
    """The processes that train, whichever session the launcher put them into."""
    found = [run.pid]
    for pid in found:  # grows meanwhile
        found += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found[1:]
