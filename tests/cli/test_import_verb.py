"""`roe import`: a checkpoint in the authors' layout, from the command to a model that answers."""

import json

import torch
from safetensors.torch import save_file

from routing_experts import from_pretrained, is_routed
from routing_experts.models.load import load_base

PROJECTOR = {"linear_1": "0", "linear_2": "2"}
WIDTH = 5


def authors_name(name: str) -> str | None:
    """What the authors' code calls a parameter of a LLaVA; None for the vision tower's, which it leaves out."""
    if "vision_tower" in name:
        return None
    if "multi_modal_projector" in name:
        _, _, part, kind = name.split(".")
        return f"model.mm_projector.{PROJECTOR[part]}.{kind}"
    return name.replace("model.language_model.", "model.")


def test_import_writes_a_routed_model(roe, routed_run, tmp_path):
    """Guards the verb: names are found, the width is read off, and the folder is a model with its processor."""
    torch.manual_seed(0)
    folder, state = routed_run.parent / "base", load_base(routed_run.parent / "base").state_dict()
    tensors = {new: value.clone() for name, value in state.items() if (new := authors_name(name))}
    hidden = tensors["model.norm.weight"].numel()
    for layer in range(12):
        tensors[f"model.layers.{layer}.adapter_MHA.conv_A.weight"] = torch.randn(WIDTH, hidden)
        tensors[f"model.layers.{layer}.adapter_MHA.conv_B.weight"] = torch.randn(hidden, WIDTH)
        tensors[f"model.layers.{layer}.adapter_MHA_router.expert.0.weight"] = torch.randn(2, 2 * hidden)
    tensors |= {"model.img_token": torch.randn(hidden), "model.txt_token": torch.randn(hidden)}
    (tmp_path / "theirs").mkdir()
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")
    code, out, complaint = roe(
        "import", tmp_path / "theirs", tmp_path / "ours", "--base", folder, "--prompt-format", "chat_template", "--json"
    )
    assert code == 0, complaint
    assert json.loads(out) == {"model": str(tmp_path / "ours")}
    model = from_pretrained(tmp_path / "ours")
    assert is_routed(model)
    assert model.roe_config.bottleneck_size == WIDTH
    assert torch.equal(model.routing_tokens[1], tensors["model.txt_token"])
    code, out, _ = roe("generate", tmp_path / "ours", "--prompt", "Add 3 and 4.", "--max-new-tokens", "2", "--json")
    assert code == 0
    assert 0 < json.loads(out)["skip_rate"] < 1


def test_what_is_no_checkpoint_of_theirs_is_refused(roe, routed_run, tmp_path):
    """Guards against a folder of something else: said what it lacks, and nothing is written."""
    code, _, complaint = roe(
        "import", routed_run.parent / "base", tmp_path / "ours", "--base", routed_run.parent / "base"
    )
    assert code == 1
    assert "not trained with the authors' code" in " ".join(complaint.split())
    assert not (tmp_path / "ours").exists()
