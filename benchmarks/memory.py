"""What ``roe train --estimate`` counts beside what steps take, on small models.

``python benchmarks/memory.py --json RECORD`` trains two steps of every stage in a process of its own, and compares the
growth of its resident memory since before the model was made. Each is measured with soft gates, which is what the
estimate counts, and with the default ones.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from routing_experts.config import RoEConfig
from routing_experts.evaluation.bench.presets import PRESETS
from routing_experts.models.convert import convert
from routing_experts.models.load import load_base
from routing_experts.records import environment, save_json
from routing_experts.training.lora import with_lora
from routing_experts.training.memory import estimate
from routing_experts.training.recipe import LoraSettings, Recipe, recipe_from_dict
from routing_experts.training.schedule import THREE_STAGES

FOLDER = Path("runs/bench/memory")
MIB = 2**20
# Freed memory goes back to the system at once, so that what is resident is what is held.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
CASES = [
    {"batch_size": batch, "lora": lora, "gradient_checkpointing": recomputed}
    for batch, recomputed in ((2, False), (4, True))
    for lora in (False, True)
]
TOKENS = 512


def recipe_of(case: dict[str, Any], gate: str) -> Recipe:
    """The case as a recipe on the preset's model."""
    training = {name: case[name] for name in ("batch_size", "gradient_checkpointing")}
    made = recipe_from_dict({"model": str(FOLDER), "output": "none", "data": {"records": 1}, "training": training})
    return replace(made, roe=RoEConfig(gate=gate), lora=LoraSettings() if case["lora"] else None)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """The most that was resident since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(case: dict[str, Any], stage_name: str, gate: str) -> None:
    """Prints the bytes that two steps took; in a process of its own."""
    from stages import batch_of, stepper

    torch.set_num_threads(1)
    recipe, stage = recipe_of(case, gate), next(stage for stage in THREE_STAGES if stage.name == stage_name)
    batch = batch_of(PRESETS["cpu-100m"].shape["vocab_size"], 1)
    times = case["batch_size"] // len(batch["input_ids"])
    batch = {name: torch.cat([value] * times) for name, value in batch.items()}
    batch["example_keys"] = torch.arange(case["batch_size"])
    torch.ones(64, 64, requires_grad=True).mm(torch.ones(64, 64)).sum().backward()  # what libraries set up once
    before = resident()
    model = convert(load_base(recipe.model, random_init=True), recipe.roe)
    if recipe.lora is not None:
        model = with_lora(model, recipe.lora)
    model.train()
    if case["gradient_checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    step = stepper(recipe, stage, model, batch, FOLDER / "trainer", foreach=True)
    for _ in range(2):
        step()
    print(json.dumps(peak() - before))


def main() -> None:
    """Compares all cases and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/memory.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        measure(*json.loads(asked.one))
        return
    config = LlamaConfig(**PRESETS["cpu-100m"].shape)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(FOLDER)
    rows = []
    for case in CASES:
        method = "lora" if case["lora"] else "full"
        counted = {row.stage: row for row in estimate(recipe_of(case, "softmax"), 1, TOKENS) if row.method == method}
        for stage in THREE_STAGES:
            row = case | {"stage": stage.name, "counted": counted[stage.name].total}
            for gate in ("softmax", RoEConfig().gate):
                command = [sys.executable, __file__, "--one", json.dumps([case, stage.name, gate])]
                told = subprocess.run(command, env=os.environ | ALLOCATOR, check=True, capture_output=True, text=True)
                row[f"measured_{gate}"] = int(told.stdout.splitlines()[-1])
            rows.append(row)
            sizes = {
                name: round(value / MIB) for name, value in row.items() if name.startswith(("counted", "measured"))
            }
            print(method, case, stage.name, sizes, f"{row['counted'] / row['measured_softmax']:.2f}", flush=True)
    save_json(asked.json, {"tokens": TOKENS, "rows": rows, "environment": environment()})


if __name__ == "__main__":
    main()
