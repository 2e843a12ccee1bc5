"""One run, many engines: the same losses whoever computes them (``make test-dist``).

Twenty steps in each of three stages on the pocket model with random weights: one process, accumulation, recomputed
layers, and two processes under DDP, ZeRO-2, ZeRO-3 and FSDP2. ``python benchmarks/equivalence.py --json RECORD`` fails
where a step's loss is more than 1e-4 from that of one process.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import yaml

from routing_experts.records import LogLine, environment, read_log, save_json

STEPS, BATCH, TOLERANCE = 60, 8, 1e-4
STAGES = [
    {"name": "adapter_warmup", "until": 1 / 3, "trains": ["adapters"], "gate": "random"},
    {"name": "router_warmup", "until": 2 / 3, "trains": ["adapters", "routers"], "gate": "learned", "biased": True},
    {"name": "instruction_tuning", "until": 1.0, "gate": "learned"}
    | {"trains": ["adapters", "routers", "decoder", "projector"]},
]
WAYS: dict[str, tuple[int, dict[str, Any]]] = {  # processes, and what the recipe's training says besides
    "one process": (1, {}),
    "accumulation 4 x 1": (1, {"batch_size": 2, "accumulation": 4}),
    "recomputed layers": (1, {"gradient_checkpointing": True}),
    "DDP": (2, {}),
    "DDP, recomputed layers": (2, {"gradient_checkpointing": True}),
    "DDP, accumulation 2 x 2": (2, {"batch_size": 2, "accumulation": 2}),
    "ZeRO-2": (2, {"sharding": "zero2"}),
    "ZeRO-3": (2, {"sharding": "zero3"}),
    "ZeRO-3, recomputed layers": (2, {"sharding": "zero3", "gradient_checkpointing": True}),
    "FSDP2": (2, {"sharding": "fsdp2"}),
    "FSDP2, accumulation 2 x 2": (2, {"sharding": "fsdp2", "batch_size": 2, "accumulation": 2}),
}


def recipe(output: Path, processes: int, training: dict[str, Any]) -> dict[str, Any]:
    """A run's settings: batches of the same records for any number of processes."""
    common = {"steps": STEPS, "batch_size": BATCH // processes, "learning_rate": 1e-3, "base_learning_rate": 1e-3}
    return {
        "model": "pocket",
        "random_init": True,
        "output": str(output),
        "stages": STAGES,
        "annealing": {"start": 1 / 3},
        "data": {"source": "digits", "records": 64 * BATCH},
        "training": common | {"logging_steps": 1} | training,
    }


def run(folder: Path, name: str, processes: int, training: dict[str, Any]) -> list[LogLine]:
    """The log of one way's run.

    Raises:
        SystemExit: if it failed, with what it said last.
    """
    output = folder / name.replace(" ", "_")
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe(output, processes, training)), encoding="utf-8")
    on_cpus = str(Path(__file__).parent / "fsdp_on_cpu.py")
    roe = [on_cpus] if training.get("sharding") == "fsdp2" else ["-m", "routing_experts"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else ()), *roe, "train", str(file)]
    cpus = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=os.environ | cpus, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return read_log(output / "log.jsonl")


def distances(lines: list[LogLine], expected: list[LogLine]) -> dict[str, float]:
    """The largest distance of losses in each stage, and of skip rates over all."""
    assert [line.step for line in lines] == [line.step for line in expected] == list(range(1, STEPS + 1))
    found = dict.fromkeys((stage["name"] for stage in STAGES), 0.0)
    for line, other in zip(lines, expected, strict=True):
        assert line.loss is not None
        assert other.loss is not None
        found[line.stage] = max(found[line.stage], abs(line.loss - other.loss))
    rates = ((line.skip_rate or 0.0, other.skip_rate or 0.0) for line, other in zip(lines, expected, strict=True))
    return found | {"skip_rate": max(abs(one - other) for one, other in rates)}


def main() -> None:
    """Runs all ways, compares them with the first, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/equivalence.json"))
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        expected: list[LogLine] = []
        for name, (processes, training) in WAYS.items():
            started = perf_counter()
            lines = run(Path(folder), name, processes, training)
            expected = expected or lines
            found = distances(lines, expected)
            rows.append({"way": name, "processes": processes, "training": training, "distance": found})
            rows[-1] |= {"losses": [line.loss for line in lines], "seconds": perf_counter() - started}
            print(f"{name}: " + ", ".join(f"{stage} {value:.1e}" for stage, value in found.items()), flush=True)
    save_json(asked.json, {"steps": STEPS, "tolerance": TOLERANCE, "rows": rows, "environment": environment()})
    far = [row["way"] for row in rows if max(row["distance"][stage["name"]] for stage in STAGES) > TOLERANCE]
    if far:
        raise SystemExit(f"farther than {TOLERANCE:g} from one process: {', '.join(far)}")


if __name__ == "__main__":
    main()
