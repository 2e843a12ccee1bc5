"""A base in four or eight bits, tuned by LoRA beside the RoE parts, and what is left of it: whole weights."""

import json
import shutil

import pytest
import torch
from runs import quiet_run, settings

from routing_experts.errors import ConfigError, TrainingError
from routing_experts.models.checkpoint import is_roe_key
from routing_experts.models.load import from_pretrained, load_base
from routing_experts.training.recipe import recipe_from_dict

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")


def quantised(output, bits, **training):
    made = settings(output, **({"steps": 6} | training)) | {"random_init": False, "lora": {"rank": 4}}
    return recipe_from_dict(made | {"quantization": bits})


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_ends_as_whole_weights(bits, watched, tmp_path):
    """Guards QLoRA: the decoder's matrices are packed and nothing else is, what trains is in 32 bits, and the result
    is the original base with the updates worked in."""
    trained = quiet_run(quantised(tmp_path, bits))
    (*_, last) = watched()
    packed = {name for name, tensor in last.before.items() if not tensor.dtype.is_floating_point}
    assert len(packed) == 12 * 7
    assert all(".layers." in name and "vision" not in name for name in packed)
    beside = {name for name in last.before if "lora_" in name or is_roe_key(name)}
    assert all(last.before[name].dtype == torch.float32 for name in beside)
    changed = {name for name in beside if not torch.equal(last.before[name], last.after[name])}
    assert {name for name in beside if "lora_B" in name or "skip_up" in name} <= changed
    loaded = from_pretrained(tmp_path / "model")
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    base, tuned = load_base("pocket").state_dict(), loaded.state_dict()
    moved = {name for name, value in base.items() if not torch.equal(tuned[name], value)}
    assert moved == {name for name in base if ".layers." in name and "proj.weight" in name and "vision" not in name}
    assert max(float((tuned[name] - base[name]).abs().max()) for name in moved) < 0.05  # small updates, no packed copy
    assert torch.equal(trained.model.routing_tokens, loaded.routing_tokens)


def test_a_broken_quantised_run_resumes_to_the_same_weights(tmp_path):
    """Guards checkpoints of a packed base, which hold the updates and the RoE parts alone."""
    whole = quiet_run(quantised(tmp_path / "whole", "4bit"))
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "cut" / "checkpoints")
    noted = json.loads((tmp_path / "whole" / "run.json").read_text())
    (tmp_path / "cut" / "run.json").write_text(json.dumps(noted | {"finished": False}))
    resumed = quiet_run(quantised(tmp_path / "cut", "4bit"))
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora": None}, "with full tuning: packed weights take no gradients. Add `lora: {}`"),
        ({"random_init": True}, "only weights that are loaded can be packed"),
        ({"quantization": "3bit"}, "quantization='3bit': it must be one of 8bit, 4bit"),
    ],
)
def test_what_cannot_be_packed_is_refused(changes, told, tmp_path):
    """Guards settings errors: before a model is loaded."""
    made = settings(tmp_path) | {"random_init": False, "lora": {}, "quantization": "4bit"} | changes
    with pytest.raises(ConfigError, match=told.replace("{}", r"\{\}")):
        recipe_from_dict(made)


def test_packed_weights_are_not_shared_out(tmp_path, monkeypatch):
    """Guards the message, before processes are joined or a model is loaded, whoever brings the engine."""
    with pytest.raises(ConfigError, match="packed weights cannot be shared out"):
        quantised(tmp_path, "4bit", sharding="fsdp2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(TrainingError, match="packed weights cannot be shared out"):
        quiet_run(quantised(tmp_path, "4bit"))
