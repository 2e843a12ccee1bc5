"""The memory that a stage is counted to take: by hand where it can be, against packed weights, and by its trends."""

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from runs import settings

from routing_experts.errors import ConfigError
from routing_experts.models.convert import convert
from routing_experts.models.load import POCKET, load_base
from routing_experts.training.memory import LiveBytes, StageMemory, estimate, methods_of, own_method
from routing_experts.training.parameters import group_of
from routing_experts.training.recipe import LoraSettings, Recipe, recipe_from_dict

TOKENS = 64


def recipe(**training: Any) -> Recipe:
    made = settings("nowhere", **({"batch_size": 2} | training)) | {"random_init": False}
    return recipe_from_dict(made)


def counted(of: Recipe, processes: int = 1, method: str | None = None) -> dict[str, StageMemory]:
    """By stage, of the recipe's own method; others behind it are not counted."""
    wanted, rows = method or own_method(of), {}
    for row in estimate(of, processes, TOKENS):
        if row.method == wanted:
            rows[row.stage] = row
        if len(rows) == len(of.stages):
            break
    return rows


@pytest.fixture(scope="module")
def sizes() -> dict[str, int]:
    """Parameters of the routed pocket model by group."""
    model = convert(load_base("pocket"), recipe().roe)
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        found[group_of(name)] = found.get(group_of(name), 0) + parameter.numel()
    return found


def test_a_plain_run_by_hand(sizes):
    """Guards four bytes a weight, four a gradient and eight of moments, of what each stage trains."""
    rows = counted(recipe())
    total = sum(sizes.values())
    trained = {
        "adapter_warmup": sizes["adapters"],
        "router_warmup": sizes["adapters"] + sizes["routers"],
        "instruction_tuning": total - sizes["vision"],
    }
    assert list(rows) == list(trained)
    for stage, row in rows.items():
        assert row.trained == trained[stage]
        assert row.weights == pytest.approx(4 * total, rel=0.001)  # and rotary tables
        assert (row.gradients, row.optimizer) == (4 * trained[stage], 8 * trained[stage])
        assert row.total == row.weights + row.gradients + row.optimizer + row.activations


@pytest.mark.parametrize(
    ("sharding", "precision", "of_weights", "of_gradients", "of_optimizer"),
    [
        ("zero2", "fp32", 4, 4 / 4, 12 / 4),
        ("zero2", "bf16", 2, 2 / 4, 12 / 4),
        ("zero3", "bf16", 2 / 4, 2 / 4, 12 / 4),
        ("zero3_offload", "bf16", 0, 0, 0),
        ("fsdp2", "fp32", 4 / 4, 4 / 4, 8 / 4),
        ("fsdp2", "bf16", 4 / 4, 4 / 4, 8 / 4),
    ],
)
def test_what_four_processes_share_out(sharding, precision, of_weights, of_gradients, of_optimizer, sizes):
    """Guards the shares: bytes a parameter on each device, and what is gathered: two layers, or all of so small a
    model under ZeRO-3, whose limit is a thousand million numbers."""
    row = counted(recipe(sharding=sharding, precision=precision), 4)["instruction_tuning"]
    weights = sum(sizes.values())
    width = 4 if precision == "fp32" else 2
    layer = width * (sizes["decoder"] - 512 * 96) / 12
    gathered = row.weights - of_weights * weights
    if sharding == "zero2":
        assert gathered == pytest.approx(0, abs=0.01 * row.weights)
    elif sharding == "fsdp2":
        assert gathered / layer == pytest.approx(2, rel=0.1)
    else:
        assert gathered == pytest.approx(width * weights, rel=0.01)
    buckets = 0 if sharding == "fsdp2" else 2 * 96**2 * width
    assert row.gradients == pytest.approx(of_gradients * row.trained + buckets)
    assert row.optimizer == pytest.approx(of_optimizer * row.trained)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_packed_weights_are_as_large_as_counted(bits):
    """Guards bits a weight against what bitsandbytes makes of the decoder."""
    pytest.importorskip("bitsandbytes")
    from routing_experts.models.load import load_processor
    from routing_experts.training.making import make_model

    processor = load_processor("pocket")
    of = replace(recipe(), lora=LoraSettings(rank=4), quantization=bits)
    model = make_model(of, processor)
    held = sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        held += 0 if state is None else state.absmax.nbytes + state.state2.absmax.nbytes
    row = counted(of)["adapter_warmup"]
    assert row.weights == pytest.approx(held, rel=0.03)


def test_activations_follow_the_batch_and_shrink_when_recomputed():
    """Guards the count: twice the dialogues take twice as much, recomputed layers a part of it, longer ones more."""
    plain, double = (counted(recipe(batch_size=size))["router_warmup"].activations for size in (2, 4))
    assert double == pytest.approx(2 * plain, rel=0.1)
    recomputed = counted(recipe(gradient_checkpointing=True))["router_warmup"].activations
    assert recomputed < 0.5 * plain
    longer = next(row for row in estimate(recipe(batch_size=2), 1, 2 * TOKENS) if row.stage == "router_warmup")
    assert longer.activations > 2 * plain


def test_gradients_wait_only_where_something_accumulates():
    """Guards steps that as many processes take at once: no gradient of an earlier batch is held beside activations."""
    held, none, plain = (
        counted(recipe(**steps), processes)["instruction_tuning"].activations
        for steps, processes in (({"records_a_step": 8}, 1), ({"records_a_step": 8}, 4), ({}, 4))
    )
    assert held > none
    assert none == plain


def test_distillation_takes_the_dense_predictions():
    """Guards its other forward, whose predictions are kept."""
    plain, drawn = (counted(recipe(distill_coef=coef))["router_warmup"].activations for coef in (0.0, 1.0))
    assert drawn > plain + 2 * TOKENS / 2 * 4 * 64  # at least a 32-bit number a word of the vocabulary for each answer


def test_low_rank_updates_train_few(sizes):
    """Guards the methods: LoRA trains its updates and the RoE parts, and takes less than full tuning."""
    rows = {method: counted(recipe(), method=method)["instruction_tuning"] for method in ("full", "lora")}
    assert rows["lora"].trained < 0.3 * rows["full"].trained
    assert rows["lora"].total < rows["full"].total


def test_nothing_but_the_configuration_is_read(tmp_path):
    """Guards an estimate before fourteen gigabytes are downloaded."""
    shutil.copy(POCKET / "config.json", tmp_path)
    of = replace(recipe(), model=str(tmp_path))
    assert counted(of) == counted(recipe())


def test_engines_decide_which_methods_there_are(tmp_path):
    """Guards the table: packed weights are not shared out, and the recipe's own way is among the rows."""
    assert list(methods_of(recipe())) == ["full", "lora", "lora 8bit", "lora 4bit"]
    assert list(methods_of(recipe(sharding="fsdp2"))) == ["full", "lora"]
    with pytest.raises(ConfigError, match=r"sharding='zero4' is no engine.*fsdp2, zero2, zero3, zero3_offload"):
        next(estimate(recipe(sharding="zero4")))
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"memory is counted for zero2, zero3, zero3_offload and fsdp2"):
        next(estimate(recipe(sharding=str(tmp_path / "mine.json"))))


def test_live_bytes_are_those_that_are_held():
    """Guards the counter: views are free, what is let go is given back, what was there before is not counted."""
    before = torch.ones(100)
    with LiveBytes([before]) as live:
        first = before + 1
        view = first.view(10, 10)[2:]
        assert live.now == 400
        second = view * 2
        assert live.now == 400 + 320
        del first, view
        assert live.now == 320
        third = second.mul_(2).t()
        assert live.now == 320
        del second, third
    assert (live.now, live.peak) == (0, 720)
