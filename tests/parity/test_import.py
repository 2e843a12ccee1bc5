"""Checkpoints in the authors' layout: the recorded weights, imported, make the model that parity is shown with."""

from pathlib import Path

import golden
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from routing_experts.config import RoEConfig
from routing_experts.errors import CheckpointError
from routing_experts.models.convert import revert
from routing_experts.models.published.roe import import_official
from tiny import tiny_llava

RECORDING = golden.load()
OTHER = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "adapter_down": "adapter_MHA.conv_A",
    "adapter_up": "adapter_MHA.conv_B",
    "router": "adapter_MHA_router.expert.0",
    "down_proj": "mlp.down_proj",
    "up_proj": "mlp.up_proj",
    "gate_proj": "mlp.gate_proj",
} | {name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
TOP = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight"}
TOKENS = {"routing_token_image": "model.routing_token_image", "routing_token_text": "model.routing_token_text"}


def authors_layout(**renamed: str) -> dict[str, Tensor]:
    """The recorded weights under the names that the authors' code saves."""
    named = {}
    for name, value in RECORDING.group("weights").items():
        if name in TOKENS:
            named[renamed.get(name, TOKENS[name])] = value[None, None].clone()
        elif name in TOP:
            named[TOP[name]] = value.clone()
        else:
            _, index, part = name.split(".")
            named[f"model.layers.{index}.{OTHER[part]}.weight"] = value.clone()
    return named


def write(folder: Path, tensors: dict[str, Tensor], shards: int = 2) -> Path:
    names = sorted(tensors)
    for shard in range(shards):
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors")
    return folder


def fresh_base() -> torch.nn.Module:
    base = revert(golden.build_model(RECORDING))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_()
    return base


def test_the_recorded_weights_import_into_the_model_that_parity_is_shown_with(tmp_path):
    """Guards every name: nothing of the fresh base is left, and the width is read off the checkpoint."""
    expected = golden.build_model(RECORDING)
    imported = import_official(write(tmp_path, authors_layout()), fresh_base(), markers=RECORDING.markers)
    ours, theirs = imported.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert imported.roe_config.gate == "softmax"
    assert imported.roe_config.layers_to_route(RECORDING.num_layers) == tuple(range(RECORDING.num_layers))


def test_an_import_survives_being_saved(tmp_path):
    """Guards the use of an import: loaded from our layout it computes the same, bit for bit."""
    imported = import_official(write(tmp_path, authors_layout()), fresh_base(), markers=RECORDING.markers)
    imported.save_pretrained(tmp_path / "ours")
    from routing_experts import from_pretrained

    loaded = from_pretrained(tmp_path / "ours")
    ids = torch.tensor([[1, 20, 21, 40, 41, 22, 23]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, imported(input_ids=ids).logits, rtol=0, atol=0)


def test_projector_and_vocabulary_come_over_and_the_tower_stays(tmp_path):
    """Guards what the third stage tunes beside the language model, in the base's own layout."""
    base = tiny_llava(seed=1)
    text = {
        k.removeprefix("model.language_model."): v
        for k, v in tiny_llava(seed=2).state_dict().items()
        if "language" in k
    }
    hidden = base.config.text_config.hidden_size
    tensors = {f"model.{name}": value.clone() for name, value in text.items()}
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-2].clone()  # before the image token
    tensors["lm_head.weight"] = torch.randn(62, hidden)
    for layer in range(base.config.text_config.num_hidden_layers):
        tensors[f"model.layers.{layer}.adapter_MHA.conv_A.weight"] = torch.randn(3, hidden)
        tensors[f"model.layers.{layer}.adapter_MHA.conv_B.weight"] = torch.randn(hidden, 3)
        tensors[f"model.layers.{layer}.adapter_MHA_router.expert.0.weight"] = torch.randn(2, 2 * hidden)
    tensors |= {"model.img_token": torch.randn(hidden), "model.txt_token": torch.randn(hidden)}
    projector = {"0": "linear_1", "2": "linear_2"}
    for theirs, ours in projector.items():
        for kind in ("weight", "bias"):
            own = base.state_dict()[f"model.multi_modal_projector.{ours}.{kind}"]
            tensors[f"model.mm_projector.{theirs}.{kind}"] = torch.randn_like(own)
    tensors["model.vision_tower.vision_tower.embeddings.position_ids"] = torch.zeros(1)
    tensors["model.vision_tower.vision_tower.embeddings.patch_embedding.weight"] = torch.zeros(0)  # under ZeRO-3
    before = base.state_dict()
    tower = {name: value.clone() for name, value in before.items() if "vision_tower" in name}
    last_words = before["model.language_model.embed_tokens.weight"][-2:].clone()
    model = import_official(write(tmp_path, tensors), base)
    state = model.state_dict()
    assert model.roe_config.bottleneck_size == 3
    assert all(torch.equal(state[name], value) for name, value in tower.items())
    assert torch.equal(state["model.language_model.embed_tokens.weight"][-2:], last_words)
    for theirs, ours in projector.items():
        assert torch.equal(
            state[f"model.multi_modal_projector.{ours}.weight"], tensors[f"model.mm_projector.{theirs}.weight"]
        )
    assert torch.equal(state["routing_tokens"][0], tensors["model.img_token"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.2.adapter_MHA.conv_B.weight"), "lacks .*layers.2.skip_up"),
        (lambda t: t.pop("lm_head.weight"), "lacks .*lm_head"),
        (lambda t: [t.pop(name) for name in list(t) if "conv_A" in name], "not trained with the authors' code"),
        (lambda t: t.update({"model.layers.0.strange": torch.zeros(3)}), "strange .* has no place"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.zeros(3, 3)}), "was trained from another"),
        (lambda t: t.update({"model.second_text": torch.zeros(64)}), "routing tokens of image and text"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(change, message, tmp_path):
    tensors = authors_layout()
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        import_official(write(tmp_path, tensors), fresh_base())


def test_routing_tokens_of_any_name_can_be_named(tmp_path):
    tensors = authors_layout(routing_token_image="model.first", routing_token_text="model.second")
    folder = write(tmp_path, tensors)
    with pytest.raises(CheckpointError, match="--routing-tokens"):
        import_official(folder, fresh_base())
    model = import_official(folder, fresh_base(), token_names=("model.first", "model.second"))
    assert torch.equal(model.routing_tokens[1], RECORDING.tensors["weights.routing_token_text"])
    with pytest.raises(CheckpointError, match="no routing token"):
        import_official(folder, fresh_base(), token_names=("model.first", "model.third"))


def test_pickles_are_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="pickles can run code"):
        import_official(tmp_path, fresh_base(), RoEConfig.preset("paper"))
