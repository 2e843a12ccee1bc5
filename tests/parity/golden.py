"""The authors' recorded numbers, read so that our model can be fed with them.

The recording (its JSON says what each tensor is) puts the routing tokens first in the sequence; ours travel beside it.
Everything here drops, splits or permutes accordingly, and takes every size from the files.

Shapes: B examples, N recorded positions = R routing tokens then T ordinary ones, Q = R - 1 turns, D hidden, L layers.
"""

import functools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from routing_experts.config import RoEConfig, TurnMarkers
from routing_experts.models.convert import convert

IGNORED = -100

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
    "adapter_down": "skip_down",
    "adapter_up": "skip_up",
    "router": "router",
}
_TOP_NAMES = {"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
_TOKEN_ROWS = {"routing_token_image": 0, "routing_token_text": 1}


@dataclass(frozen=True)
class Recording:
    """The two files, and the facts that the JSON states in words."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def said(self, convention: str, pattern: str) -> str:
        """The first group of ``pattern`` in one of the JSON's conventions."""
        found = re.search(pattern, self.facts["conventions"][convention])
        assert found, f"the recording's convention {convention!r} does not say {pattern!r}"
        return found[1]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors below a prefix, the prefix cut off."""
        return {k[len(prefix) + 1 :]: v for k, v in self.tensors.items() if k.startswith(prefix + ".")}

    def names(self, kind: str) -> list[str]:
        """The recorded prompts ("infer"), dialogues ("mask_case")."""
        return sorted({name.split(".")[1] for name in self.tensors if name.startswith(kind + ".")})

    @property
    def num_layers(self) -> int:
        """L."""
        return 1 + max(int(name.split(".")[2]) for name in self.tensors if name.startswith("weights.layers."))

    @property
    def target(self) -> float:
        """ρ."""
        return float(self.said("model", r"skip ratio ([\d.]+\d)"))

    @property
    def image_id(self) -> int:
        """The id that stands for an image."""
        return int(self.said("special_ids", r"(-?\d+) is the image placeholder"))

    @property
    def num_image_features(self) -> int:
        """How many tokens an image becomes."""
        return next(v.shape[1] for k, v in self.tensors.items() if k.endswith("image_features"))

    @property
    def markers(self) -> TurnMarkers:
        """The prompt format's marks."""

        def ids(pattern: str) -> tuple[int, ...]:
            return tuple(int(number) for number in self.said("special_ids", pattern).split())

        return TurnMarkers(
            generation_prompt=ids(r"([\d ]+) for 'ASSISTANT:'"),
            end_of_answer=ids(r"(\d+) EOS"),
            user_prompt=ids(r"([\d ]+) stand for 'USER:'"),
        )


@functools.cache
def load() -> Recording:
    """The recording in the folder that ROE_GOLDEN_DIR names; this folder's by default."""
    folder = Path(os.environ.get("ROE_GOLDEN_DIR") or Path(__file__).parent)
    (tensors,) = folder.glob("*.safetensors")
    return Recording(json.loads(tensors.with_suffix(".json").read_text(encoding="utf-8")), load_file(tensors))


def build_model(recording: Recording, attention: str = "sdpa") -> LlamaForCausalLM:
    """A converted Llama of the recorded shape with the recorded weights."""
    weights = recording.group("weights")
    vocab_size, hidden_size = weights["embed"].shape
    head_size = int(recording.said("model", r"heads of width (\d+)"))
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=len(weights["layers.0.gate_proj"]),
            num_hidden_layers=recording.num_layers,
            num_attention_heads=len(weights["layers.0.q_proj"]) // head_size,
            num_key_value_heads=len(weights["layers.0.k_proj"]) // head_size,
            head_dim=head_size,
            rms_norm_eps=float(recording.said("model", r"eps (\S+?),")),
            rope_parameters={"rope_type": "default", "rope_theta": float(recording.said("model", r"base (\d+)"))},
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            attn_implementation=attention,
        )
    )
    config = RoEConfig.preset(
        "paper", bottleneck_size=len(weights["layers.0.adapter_down"]), target_skip_ratio=recording.target
    )
    model = convert(base, config, recording.markers)
    left_over = {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for name, value in weights.items():
            part = parameter(model, name)
            assert part.shape == value.shape
            part.copy_(value)
            left_over.discard(_our_name(name))
    assert not left_over, f"the recording has no weights for {left_over}"
    return model


def _our_name(name: str) -> str:
    if name in _TOKEN_ROWS:
        return "routing_tokens"
    if name in _TOP_NAMES:
        return _TOP_NAMES[name] + ".weight"
    _, index, part = name.split(".")
    return f"model.layers.{index}.{_LAYER_NAMES[part]}.weight"


def parameter(model: LlamaForCausalLM, name: str) -> Tensor:
    """Our parameter of a recorded name; of a routing token, its row."""
    whole = model.get_parameter(_our_name(name))
    return whole[_TOKEN_ROWS[name]] if name in _TOKEN_ROWS else whole


def gradient(model: LlamaForCausalLM, name: str) -> Tensor | None:
    """Our gradient of a recorded name."""
    whole = model.get_parameter(_our_name(name)).grad
    return whole[_TOKEN_ROWS[name]] if whole is not None and name in _TOKEN_ROWS else whole


class Inputs:
    """One recorded batch or prompt, routing tokens taken out of the sequence.

    Args:
        ids_BT: token ids, the image's placeholder once a feature, 0 for padding.
        labels_BT: -100 where no loss falls.
        real_BT: what is no padding.
        features: image features, one image an example, in order.
        question_BRN, weight_BRN: the recorded masks.
        positions_BN: rotary positions.
        visible_BNN: who sees whom.

    Attributes:
        num_routing: R.
        valid_BQ: which turns exist: those whose row holds more than its own routing token.
        turns_BT: the mask row that owns a token, 0 context, q a turn; padding belongs to none and gets 0.
        visible_BRK: what routing tokens see, ordinary tokens first.
    """

    def __init__(
        self,
        ids_BT: Tensor,
        labels_BT: Tensor,
        real_BT: Tensor,
        features: Tensor,
        question_BRN: Tensor,
        weight_BRN: Tensor,
        positions_BN: Tensor,
        visible_BNN: Tensor,
    ) -> None:
        self.ids_BT, self.labels_BT, self.real_BT, self.features = ids_BT, labels_BT, real_BT, features
        self.question_BRN, self.positions_BN = question_BRN, positions_BN
        self.num_routing = question_BRN.shape[1]
        self.valid_BQ = question_BRN[:, 1:].sum(-1) > 1
        owned_BRT = weight_BRN[:, :, self.num_routing :].long()
        assert torch.equal(owned_BRT.sum(1), real_BT.long()), "a real token belongs to exactly one row"
        self.turns_BT = owned_BRT.argmax(1)
        self.visible_BRK = visible_BNN[:, : self.num_routing].roll(-self.num_routing, -1)
        self._ordinary_B1TT = visible_BNN[:, None, self.num_routing :, self.num_routing :]

    def ordinary_mask(self, model: LlamaForCausalLM) -> Tensor:
        """The recorded attention mask among ordinary tokens, [B, 1, T, T], as the model's attention takes it."""
        if model.config._attn_implementation == "eager":
            lowest = torch.finfo(torch.float32).min
            return torch.zeros(self._ordinary_B1TT.shape).masked_fill(~self._ordinary_B1TT, lowest)
        return self._ordinary_B1TT

    def embeddings(self, model: LlamaForCausalLM) -> Tensor:
        """inputs_embeds [B, T, D]: features in the image's place, zeros for padding."""
        embedded = model.get_input_embeddings()(self.ids_BT.clamp_min(0)) * self.real_BT[..., None]
        is_image_BT = self.ids_BT < 0
        return embedded.masked_scatter(is_image_BT[..., None], self.features[is_image_BT.any(1)])

    def rotary(self, model: LlamaForCausalLM) -> tuple[Tensor, Tensor]:
        """cos and sin at the routing tokens' recorded positions."""
        positions = self.positions_BN[:, : self.num_routing].expand(len(self.ids_BT), -1)
        return model.model.rotary_emb(self.features, positions)


def training_inputs(recording: Recording, batch: str) -> Inputs:
    """A recorded training batch ("train", "train_alone")."""
    tensors = recording.group(batch)
    question, weight = tensors["prep.question_mask"].bool(), tensors["prep.weight_mask"].bool()
    real = tensors.get("attention_mask", tensors["input_ids"] != 0).bool()
    ids, labels, real = expand(recording, tensors["input_ids"], tensors["labels"], real, question)
    visible = tensors["visible"].bool() if "visible" in tensors else training_visibility(question, real)
    features = tensors["image_features"].clone().requires_grad_()
    return Inputs(ids, labels, real, features, question, weight, tensors["position_ids"], visible)


def prompt_inputs(recording: Recording, name: str) -> Inputs:
    """A recorded prompt; its weight mask is its question mask, since a prompt has no answer."""
    tensors = recording.group("infer." + name)
    question = tensors["question_mask"].bool()[None]
    ids = tensors["input_ids"]
    ids, labels, real = expand(recording, ids, torch.full_like(ids, IGNORED), torch.ones_like(ids).bool(), question)
    visible = tensors["visible"].bool()[None]
    return Inputs(ids, labels, real, tensors["image_features"], question, question, tensors["position_ids"], visible)


def mask_case(recording: Recording, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Expanded ids [1, T], labels [1, T], question and weight mask over ordinary tokens [R, T] of an unusual input."""
    tensors = recording.group("mask_case." + name)
    question, weight = tensors["question_mask"].bool(), tensors["weight_mask"].bool()
    real = torch.ones_like(tensors["input_ids"]).bool()
    ids, labels, _ = expand(recording, tensors["input_ids"], tensors["labels"], real, question[None])
    return ids, labels, question[:, len(question) :], weight[:, len(weight) :]


def expand(
    recording: Recording, ids: Tensor, labels: Tensor, real: Tensor, mask_BRN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and real-token flags with one place an image feature, right-padded to T."""
    length = mask_BRN.shape[-1] - mask_BRN.shape[-2]
    out_ids = torch.zeros(len(ids), length, dtype=torch.int64)
    out_labels = torch.full_like(out_ids, IGNORED)
    out_real = torch.zeros_like(out_ids, dtype=torch.bool)
    for row in range(len(ids)):
        kept = real[row]
        repeats = torch.where(ids[row][kept] == recording.image_id, recording.num_image_features, 1)
        total = int(repeats.sum())
        out_ids[row, :total] = ids[row][kept].repeat_interleave(repeats)
        out_labels[row, :total] = labels[row][kept].repeat_interleave(repeats)
        out_real[row, :total] = True
    return out_ids, out_labels, out_real


def training_visibility(question_BRN: Tensor, real_BT: Tensor) -> Tensor:
    """The rule behind the recorded training masks, for batches recorded without theirs."""
    num_routing, length = question_BRN.shape[1:]
    causal_NN = torch.ones(length, length, dtype=torch.bool).tril()
    key_BN = torch.cat([torch.zeros(len(real_BT), num_routing, dtype=torch.bool), real_BT], 1)
    visible = causal_NN & key_BN[:, None]
    visible[:, :num_routing] |= question_BRN
    return visible
