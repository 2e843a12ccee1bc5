"""`roe import`: a checkpoint in the authors' layout, from the command to a model that answers."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText

from published import (
    TINY,
    drawn,
    llava_hr_settings,
    llava_hr_shapes,
    llava_settings,
    llava_shapes,
    write_checkpoint,
    write_clip,
    write_tokenizer,
)
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


def written(place, hr):
    """A published checkpoint, its stock tower beside it."""
    shapes = llava_hr_shapes(TINY) if hr else llava_shapes(TINY, tower=False)
    settings = llava_hr_settings(TINY, input_image_size=256) if hr else llava_settings(TINY)
    folder = write_checkpoint(place / "theirs", drawn(shapes, spread=0.1), settings, pickled=True)
    write_tokenizer(folder)
    write_clip(place / "clip", TINY)
    return folder


@pytest.mark.parametrize("hr", [False, True], ids=["LLaVA-1.5", "LLaVA-HR"])
def test_import_writes_a_model_to_start_from(roe, tmp_path, hr):
    """Guards the whole way of a model owner: imported, converted, asked; an import replaces nothing."""
    told = ("--vision-tower", tmp_path / "clip", "--unpickle")
    code, out, complaint = roe("import", written(tmp_path, hr), tmp_path / "base", *told, "--json")
    assert code == 0, complaint
    assert json.loads(out) == {"model": str(tmp_path / "base")}
    assert not list((tmp_path / "base").rglob("*.bin"))
    assert "tensors left out: " in complaint
    code, _, complaint = roe("import", tmp_path / "theirs", tmp_path / "base", *told)
    assert code == 1
    assert "is there already" in " ".join(complaint.split())
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    assert model.config.model_type == ("llava_hr" if hr else "llava")
    code, _, complaint = roe("convert", tmp_path / "base", tmp_path / "routed")
    assert code == 0, complaint
    assert from_pretrained(tmp_path / "routed").roe_config.markers is not None
    code, out, complaint = roe(
        "generate", tmp_path / "routed", "--prompt", "What is it?", "--max-new-tokens", "2", "--json"
    )
    assert code == 0, complaint


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "is a pickle"),
        (("--unpickle", "--routing-tokens", "a", "b"), "--routing-tokens without --base"),
        (("--unpickle", "--base", "pocket"), "Leave those out"),
    ],
)
def test_what_cannot_be_imported_writes_nothing(roe, tmp_path, options, expected):
    code, _, complaint = roe(
        "import", written(tmp_path, False), tmp_path / "base", "--vision-tower", tmp_path / "clip", *options
    )
    assert code == 1
    assert expected in " ".join(complaint.split())
    assert not (tmp_path / "base").exists()
