"""Several processes: launchers, kills, and going on with another engine or another number of processes."""

import os
import re
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import EPOCH, STEPS, Run, ended, finished, kill_when, recipe, torchrun, training, wait_until, workers

from routing_experts.models.convert import is_routed
from routing_experts.models.load import from_pretrained
from routing_experts.records import LogLine, read_log

pytestmark = pytest.mark.distributed
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs deepspeed: pip install routing-experts[deepspeed]"
)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]


OVERFLOWS = """
from routing_experts.cli import main
from routing_experts.training.trainer import RoETrainer

step = RoETrainer.training_step

def overflows(self, model, *args, **kwargs):
    loss = step(self, model, *args, **kwargs)
    if self.state.global_step == 1:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(float("inf"))
    return loss

RoETrainer.training_step = overflows
main()
"""


def log(folder: Path) -> list[LogLine]:
    return read_log(folder / "log.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[LogLine]:
    """The log of a run in one process, never cut."""
    folder = tmp_path_factory.mktemp("whole")
    finished(training([sys.executable], recipe(folder, "run")))
    return log(folder / "run")


def assert_is_the_run(folder: Path, whole: list[LogLine]) -> None:
    """The same losses and skip rates at every step, and a model that loads."""
    lines = log(folder)
    assert [line.step for line in lines] == list(range(1, STEPS + 1))
    for line, expected in zip(lines, whole, strict=True):
        assert (line.loss, line.ce) == pytest.approx((expected.loss, expected.ce), abs=1e-4)
        assert line.skip_rate == pytest.approx(expected.skip_rate, abs=1e-4)
    assert is_routed(from_pretrained(folder / "model"))
    assert not [path for path in (folder / "model").iterdir() if path.suffix in (".pt", ".pth", ".bin")]


def saved(folder: Path, step: int) -> bool:
    return (folder / "checkpoints" / f"checkpoint-{step}" / "complete.json").is_file()


def test_a_run_that_is_finished_is_finished_for_all_processes(whole, tmp_path):
    """Guards a repeated command, in which no process may wait for one that has nothing to do."""
    of = recipe(tmp_path, "run", 2)
    finished(training(torchrun(2), of))
    assert_is_the_run(tmp_path / "run", whole)
    said = " ".join(finished(training(torchrun(2), of)).split())
    assert said.count("is finished already") == 1  # one process speaks for all


@needs_deepspeed
def test_two_kills_under_zero_3_change_nothing(whole, tmp_path):
    """Guards sharded weights and optimiser state: killed inside a stage and in the next, the run ends as if never."""
    of = recipe(tmp_path, "run", 2, sharding="zero3", save_steps=1)
    for step in (2, 5):
        kill_when(training(torchrun(2), of), lambda step=step: saved(tmp_path / "run", step))
        assert not (tmp_path / "run" / "model").exists()
    finished(training(torchrun(2), of))
    assert_is_the_run(tmp_path / "run", whole)


PATHS = [
    *[((2, "zero3"), (1, None)), ((1, None), (2, "zero2")), ((2, "zero2"), (2, "zero3")), ((2, None), (2, "fsdp2"))],
    ((2, "zero3_offload"), (2, "zero3_offload")),
]


def test_a_kill_in_the_second_epoch_changes_nothing(whole, tmp_path):
    """Guards the data's order: processes that go on are in the epoch and at the place that they were in."""
    of = recipe(tmp_path, "run", 2, save_steps=1)
    kill_when(training(torchrun(2), of), lambda: saved(tmp_path / "run", EPOCH + 1))
    finished(training(torchrun(2), of))
    assert_is_the_run(tmp_path / "run", whole)


@needs_deepspeed
@pytest.mark.parametrize("path", PATHS, ids=lambda path: " to ".join(f"{count} {engine}" for count, engine in path))
def test_a_run_goes_on_with_another_engine_on_other_processes(path, whole, tmp_path):
    """Guards what is saved: it is whole, and belongs to no engine."""
    (count, engine), (other_count, other_engine) = path
    first = recipe(tmp_path, "run", count, sharding=engine, save_steps=1)
    kill_when(training(torchrun(count), first, engine), lambda: saved(tmp_path / "run", 5))
    second = recipe(tmp_path, "run", other_count, sharding=other_engine, save_steps=1)
    finished(training(torchrun(other_count), second, other_engine))
    assert_is_the_run(tmp_path / "run", whole)


@needs_deepspeed
@pytest.mark.parametrize("path", [("zero3", "fsdp2"), ("zero2", None)], ids=str)
def test_low_rank_updates_train_under_any_engine(path, tmp_path):
    """Guards LoRA: frozen weights are shared out as well, and the updates are merged into whole ones."""
    lora = {"rank": 4}
    finished(training([sys.executable], recipe(tmp_path, "alone", lora=lora)))
    first = recipe(tmp_path, "run", 2, lora=lora, sharding=path[0], save_steps=1)
    kill_when(training(torchrun(2), first), lambda: saved(tmp_path / "run", 8))
    held = {file.name for file in (tmp_path / "run" / "checkpoints" / "checkpoint-8").glob("*.safetensors")}
    assert {"adapter_model.safetensors", "roe.safetensors"} <= held
    assert "model.safetensors" not in held
    second = recipe(tmp_path, "run", 2, lora=lora, sharding=path[1], save_steps=1)
    finished(training(torchrun(2), second, path[1]))
    assert_is_the_run(tmp_path / "run", log(tmp_path / "alone"))
    expected = from_pretrained(tmp_path / "alone" / "model").state_dict()
    for name, value in from_pretrained(tmp_path / "run" / "model").state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=2e-4, rtol=0, msg=name)


@needs_deepspeed
@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2", None])
def test_sixteen_bits(engine, lora, tmp_path):
    """Guards bf16, where engines keep and compute in precisions of their own: near the run in 32 bits."""
    finished(training([sys.executable], recipe(tmp_path, "alone", lora=lora)))
    of = recipe(tmp_path, "run", 2, lora=lora, sharding=engine, precision="bf16")
    finished(training(torchrun(2), of, engine))
    for line, expected in zip(log(tmp_path / "run"), log(tmp_path / "alone"), strict=True):
        assert line.ce == pytest.approx(expected.ce, abs=0.03)
    assert is_routed(from_pretrained(tmp_path / "run" / "model"))


@needs_deepspeed
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_a_kill_in_sixteen_bits_changes_nothing(engine, tmp_path):
    """Guards the 32-bit copies of weights that train in 16: checkpoints keep them, and a run goes on from them."""
    finished(training(torchrun(2), recipe(tmp_path, "uncut", 2, sharding=engine, precision="bf16"), engine))
    of = recipe(tmp_path, "run", 2, sharding=engine, precision="bf16", save_steps=1)
    kill_when(training(torchrun(2), of, engine), lambda: saved(tmp_path / "run", 8))
    finished(training(torchrun(2), of, engine))
    assert_is_the_run(tmp_path / "run", log(tmp_path / "uncut"))


@needs_deepspeed
@pytest.mark.parametrize("engine", ["zero3", "fsdp2", None])
def test_processes_are_drawn_to_the_dense_path_together(engine, whole, tmp_path):
    """Guards distillation: the second forward keeps all layers, of whatever weights are shared out."""
    finished(training([sys.executable], recipe(tmp_path, "alone", distill_coef=1.0)))
    of = recipe(tmp_path, "run", 2, distill_coef=1.0, sharding=engine)
    finished(training(torchrun(2), of, engine))
    alone = log(tmp_path / "alone")
    assert_is_the_run(tmp_path / "run", alone)
    for line, plain in zip(alone, whole, strict=True):
        assert line.loss - line.ce > plain.loss - plain.ce + 1e-3  # the distance counts


@needs_deepspeed
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2", None])
def test_batches_without_pictures_do_not_part_the_processes(engine, tmp_path):
    """Guards mixtures with text: a process whose dialogues have no picture calls the vision tower as the others do."""
    finished(training([sys.executable], recipe(tmp_path, "alone", text_share=0.8)))
    finished(training(torchrun(2), recipe(tmp_path, "run", 2, text_share=0.8, sharding=engine), engine))
    assert_is_the_run(tmp_path / "run", log(tmp_path / "alone"))


@needs_deepspeed
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_processes_ask_held_out_records_together(engine, tmp_path):
    """Guards evaluation of sharded weights: processes whose records take different routes call the same modules."""
    asks: dict[str, Any] = {"held_out": 7, "eval_steps": 3}
    said = {
        "alone": finished(training([sys.executable], recipe(tmp_path, "alone", **asks))),
        "run": finished(training(torchrun(2), recipe(tmp_path, "run", 2, sharding=engine, **asks), engine)),
    }
    found = {
        name: re.findall(r"step (\d+), held out: CE ([\d.]+) · skips ([\d.]+)%", text) for name, text in said.items()
    }
    assert [int(step) for step, *_ in found["run"]] == [3, 6, 9]
    for one, other in zip(found["run"], found["alone"], strict=True):
        assert [float(value) for value in one] == pytest.approx([float(value) for value in other], abs=0.0011)
    assert_is_the_run(tmp_path / "run", log(tmp_path / "alone"))


def test_other_batches_are_refused(tmp_path):
    """Guards the run's steps: twice the processes with as many records each would train something else."""
    kill_when(training(torchrun(2), recipe(tmp_path, "run", 2, save_steps=1)), lambda: saved(tmp_path / "run", 2))
    run = training(torchrun(1), recipe(tmp_path, "run", 2, save_steps=1))
    status, said = ended(run, timeout=300)
    assert status != 0
    assert "records_a_step: 8 there, 4 asked for" in said


def test_when_one_process_dies_all_end(tmp_path):
    """Guards a cluster's hours: the rest say so within a minute, and what was saved stays."""
    of = recipe(tmp_path, "run", 2, save_steps=1)
    run = training(torchrun(2), of)
    wait_until(lambda: saved(tmp_path / "run", 2), run)
    os.kill(workers(run)[-1], signal.SIGKILL)
    started = time.monotonic()
    status, said = ended(run, timeout=120)
    assert time.monotonic() - started < 60
    assert status != 0
    assert "SIGKILL" in said or "lost the other processes" in said
    assert "could not be written" not in said
    assert saved(tmp_path / "run", 2)


def test_weights_that_a_step_spoiled_are_not_kept_and_all_say_why(tmp_path):
    """Guards what is left after an update that overflows: no checkpoint, and the reason whoever ends first."""
    (script := tmp_path / "overflow.py").write_text(OVERFLOWS)
    status, said = ended(training(torchrun(2), recipe(tmp_path, "run", 2, save_steps=1), script=script), timeout=300)
    assert status != 0
    assert "holds what is no number, from a gradient that overflowed" in " ".join(said.split())
    assert "lost the other processes" not in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-1"]


@needs_deepspeed
@pytest.mark.parametrize(
    "launcher",
    [
        [*ACCELERATE, "--multi_gpu"],
        [*ACCELERATE, "--use_deepspeed", "--zero_stage", "2"],
        [*ACCELERATE, "--use_deepspeed", "--zero_stage", "3", "--zero3_save_16bit_model", "true"],
        [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--no_local_rank"],
    ],
    ids=["accelerate", "accelerate zero2", "accelerate zero3", "deepspeed"],
)
def test_launchers_as_they_are(launcher, whole, tmp_path):
    """Guards other ways to start: the launcher's engine trains the recipe's run."""
    finished(training(launcher, recipe(tmp_path, "run", 2)))
    assert_is_the_run(tmp_path / "run", whole)


def nodes(of: Path, port: int) -> list[Run]:
    """The documented command for two nodes, each with an address of this machine."""
    common = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.2", "--master_port", str(port)]
    addresses = [["--node_rank", str(rank), "--local_addr", f"127.0.0.{2 + rank}"] for rank in range(2)]
    return [training([*TORCHRUN, *common, *own], of) for own in addresses]


def test_two_nodes(whole, tmp_path):
    """Guards the documented command."""
    for run in nodes(recipe(tmp_path, "run", 2), 29000 + os.getpid() % 1000):
        finished(run)
    assert_is_the_run(tmp_path / "run", whole)


def test_when_one_node_dies_the_other_says_so(tmp_path):
    """Guards a cluster's hours where no common launcher ends the rest: what is left says what it lost, in a minute."""
    first, second = nodes(recipe(tmp_path, "run", 2, save_steps=1), 30000 + os.getpid() % 1000)
    kill_when(second, lambda: saved(tmp_path / "run", 2))
    started = time.monotonic()
    status, said = ended(first, timeout=120)
    assert time.monotonic() - started < 60
    assert status != 0
    assert re.search(r"process 0 lost the other processes.*run the same command\s+again", said, re.DOTALL)
    assert saved(tmp_path / "run", 2)
