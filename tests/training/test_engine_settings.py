"""What engines cannot do with a recipe is told before a model is loaded; what divides a step does not change a run."""

import json
import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
import transformers
from runs import assert_same_losses, log, quiet_run, recipe, settings
from safetensors import safe_open

from routing_experts.errors import ConfigError, TrainingError
from routing_experts.training import run
from routing_experts.training.checks import check_engine
from routing_experts.training.processes import lost_the_others
from routing_experts.training.recipe import recipe_from_dict
from routing_experts.training.schedule import Stage
from routing_experts.training.sharding import engine_forgotten, is_sharded

WHOLE = {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}  # what a DeepSpeed file has to name


@pytest.fixture
def nothing_loads(monkeypatch):
    monkeypatch.setattr(run, "make_model", lambda *loads: pytest.fail("a model was loaded"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"zero_optimization": {"stage": 1}}, r"zero_optimization\.stage is 1\. Stages 2 and 3"),
        ({}, r"zero_optimization\.stage is None"),
        ({"zero_optimization": {"stage": 3}, "optimizer": {"type": "Adam"}}, "sets optimizer: the recipe's learning"),
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}, "scheduler": {}}, "sets scheduler, fp16"),
        ({"zero_optimization": {"stage": 2}, "gradient_clipping": None}, "does not name gradient_clipping: DeepSpeed"),
        ({"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": None}, "does not name gradient_accum"),
        *[
            ({"zero_optimization": {"stage": 3}} | value, f"{name}, the recipe's is {ours}, and the two must agree")
            for value, name, ours in (
                ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4", 8),
                ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2", 1),
                ({"train_batch_size": 64}, "train_batch_size is 64", 8),
                ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5", 1.0),
                ({"bf16": {"enabled": True}}, "bf16.enabled is True", False),
            )
        ],
    ],
)
def test_a_deepspeed_file_that_would_overrule_the_recipe_is_refused(changes, told, nothing_loads, tmp_path):
    """Guards learning rates and state that such a file would change without a word."""
    pytest.importorskip("deepspeed")
    path = tmp_path / "mine.json"
    given = WHOLE | changes
    path.write_text(json.dumps({name: value for name, value in given.items() if value is not None}))
    with pytest.raises(ConfigError, match=told):
        quiet_run(recipe(tmp_path / "run", sharding=str(path)))


@pytest.mark.parametrize("settings", [{}, {"FSDP_VERSION": "1"}, {"FSDP_VERSION": "2", "LAZY": "true"}], ids=str)
def test_a_launcher_s_fsdp_that_loses_names_is_refused(settings, tmp_path, monkeypatch):
    """Guards ``accelerate launch`` with a configuration of its own."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name.replace("LAZY", "FSDP_CPU_RAM_EFFICIENT_LOADING"), value)
    of = recipe(tmp_path)
    with pytest.raises(ConfigError, match="only fsdp_version 2 without"):
        check_engine(of)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.delenv("FSDP_CPU_RAM_EFFICIENT_LOADING", raising=False)
    check_engine(of)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"ZERO_STAGE": "1"}, r"accelerate's DeepSpeed configuration: zero_optimization\.stage is 1"),
        ({"ZERO_STAGE": "2", "STEPS": "4"}, r"gradient_accumulation_steps is 4\.0, the recipe's is 1"),
        ({"CONFIG_FILE": "own.json"}, r"own\.json sets optimizer: the recipe's learning"),
        ({"CONFIG_FILE": "none.json"}, r"accelerate's DeepSpeed configuration none\.json is no DeepSpeed JSON file"),
    ],
    ids=str,
)
def test_a_launcher_s_deepspeed_is_held_to_the_recipe(settings, told, tmp_path, monkeypatch):
    """Guards ``accelerate launch`` with DeepSpeed's settings, which would change learning rates or steps."""
    own = WHOLE | {"zero_optimization": {"stage": 2}, "fp16": {"enabled": "auto"}}
    (tmp_path / "own.json").write_text(json.dumps(own | {"optimizer": {"type": "Adam"}}))
    (tmp_path / "good").write_text(json.dumps(own))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value in settings.items():
        short = name == "STEPS"
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS" if short else f"ACCELERATE_DEEPSPEED_{name}", value)
    with pytest.raises(ConfigError, match=told):
        check_engine(recipe(tmp_path))
    for name in ("CONFIG_FILE", "ZERO_STAGE"):
        monkeypatch.delenv(f"ACCELERATE_DEEPSPEED_{name}", raising=False)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    check_engine(recipe(tmp_path))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "good")
    check_engine(recipe(tmp_path))


@pytest.mark.parametrize("launched", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_an_engine_is_named_once(launched, nothing_loads, tmp_path, monkeypatch):
    """Guards a recipe's engine beside a launcher's, of which accelerate would take one without a word."""
    monkeypatch.setenv(launched, "true")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match=rf"training\.sharding='fsdp2' beside {launched} of the launcher"):
        check_engine(recipe(tmp_path, sharding="fsdp2"))


def test_a_launcher_s_precision_is_held_to_the_recipe(tmp_path, monkeypatch):
    """Guards 32 bits against a launcher whose configuration says 16, which the Trainer would follow."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ConfigError, match=r"mixed precision is fp16, training\.precision is fp32"):
        check_engine(recipe(tmp_path))
    check_engine(recipe(tmp_path, precision="bf16"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_engine(recipe(tmp_path))


@pytest.mark.parametrize("sharding", ["fsdp2", "zero3"])
def test_sharding_without_a_launcher_is_refused(sharding, nothing_loads, tmp_path, monkeypatch):
    """Guards ``roe train`` of a recipe for many: FSDP would share out nothing, DeepSpeed ask for MPI."""
    if sharding != "fsdp2":
        pytest.importorskip("deepspeed")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ConfigError, match=f"sharding='{sharding}' without a launcher: .*torchrun"):
        quiet_run(recipe(tmp_path / "run", sharding=sharding))
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_engine(recipe(tmp_path / "run", sharding=sharding))


def test_whose_failure_an_error_is(monkeypatch):
    """Guards the message for a process that was left alone, and errors of its own against that message."""
    assert lost_the_others(torch.distributed.DistNetworkError("failed to recv, got 0 bytes"))
    failed = "NCCL error, unhandled cuda error. ncclUnhandledCudaError: Call to CUDA function failed."
    assert not lost_the_others(torch.distributed.DistBackendError(failed))  # its own
    assert lost_the_others(torch.distributed.DistBackendError("NCCL error: ncclRemoteError: A call failed"))
    assert not lost_the_others(RuntimeError("Connection closed by peer"))  # one process has no peers
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert lost_the_others(RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"))
    assert not lost_the_others(RuntimeError("CUDA error: out of memory"))


def test_one_process_trains_on_one_device(tmp_path, monkeypatch):
    """Guards machines with several GPUs: the Trainer would split a process's batches, but not what its routers read."""

    def eight(arguments: transformers.TrainingArguments) -> torch.device:
        arguments._n_gpu = 8
        return torch.device("cpu")

    devices = cached_property(eight)
    devices.__set_name__(transformers.TrainingArguments, "_setup_devices")
    monkeypatch.setattr(transformers.TrainingArguments, "_setup_devices", devices)
    arguments = run.training_arguments(recipe(tmp_path))
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 8)


def test_a_run_in_the_same_process_shares_out_nothing_by_itself(monkeypatch):
    """Guards notebooks: what a run's engine told the process is taken back, what a launcher told stays."""
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    for name in names:
        monkeypatch.delenv(name, raising=False)
        with engine_forgotten():
            os.environ[name] = "true"
            assert is_sharded(None)
        assert not is_sharded(None)
        assert name not in os.environ
        monkeypatch.setenv(name, "true")
        with pytest.raises(RuntimeError, match="on the way"), engine_forgotten():
            raise RuntimeError(os.environ.pop(name) + " on the way")
        assert is_sharded(None)
        monkeypatch.delenv(name)


def test_stages_that_freeze_and_train_again_are_refused_under_deepspeed(nothing_loads, tmp_path):
    """Guards optimiser state that DeepSpeed keeps of what trains alone."""
    pytest.importorskip("deepspeed")
    groups = (("adapters",), ("routers",), ("adapters", "routers"))
    stages = tuple(Stage(str(i), (i + 1) / 3, trains, "learned") for i, trains in enumerate(groups))
    of = replace(recipe(tmp_path / "run", sharding="zero2"), stages=stages)
    with pytest.raises(TrainingError, match="stage '1' freezes adapters, and a later one trains it again"):
        quiet_run(of)


@pytest.mark.parametrize("records", [20, 23])
def test_epochs_are_whole_steps_however_they_are_divided(records, tmp_path):
    """Guards runs of several epochs: the second begins at the same step for batches of eight, and two of four."""
    found = []
    for name, training in (("one", {"batch_size": 8}), ("two", {"batch_size": 4, "records_a_step": 8})):
        made = settings(tmp_path / name, steps=6, **training) | {"data": {"source": "digits", "records": records}}
        quiet_run(recipe_from_dict(made))
        found.append(log(tmp_path / name))
    assert [line.step for line in found[0]] == [1, 2, 3, 4, 5, 6]
    assert_same_losses(*found)


def test_updates_are_merged_in_32_bits_and_rounded_once(monkeypatch, tmp_path):
    """Guards small updates, which 16 bits would swallow, and routers, which stay as exact as they were trained."""
    pytest.importorskip("peft")
    merged, kept = run.merged, {}

    def spy(*given):
        model = merged(*given)
        kept.update({name: value.clone() for name, value in model.state_dict().items()})
        return model

    monkeypatch.setattr(run, "merged", spy)
    quiet_run(recipe_from_dict(settings(tmp_path, precision="bf16") | {"lora": {"rank": 4}}))
    assert {value.dtype for value in kept.values() if value.is_floating_point()} == {torch.float32}
    with safe_open(tmp_path / "model" / "roe.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
            assert torch.equal(file.get_tensor(name), kept[name])
    files = list(Path(tmp_path / "model").glob("model*.safetensors"))
    assert files
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
