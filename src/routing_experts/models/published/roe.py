"""Checkpoints trained with the authors' code, read into a routed model of ours.

Their files hold a whole LLaVA in its original layout, with ``adapter_MHA`` (``conv_A``, ``conv_B``) and
``adapter_MHA_router.expert.0`` in every decoder layer and two routing tokens. The third stage tunes the language model
and the projector, so these come over as well; the vision tower is frozen there and stays the base's.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from routing_experts.config import RoEConfig, TurnMarkers
from routing_experts.errors import CheckpointError
from routing_experts.models.checkpoint import check_no_pickle
from routing_experts.models.convert import convert
from routing_experts.models.families import family_of
from routing_experts.models.published.tensors import Tensors

_PARTS = {
    "adapter_MHA.conv_A.weight": "skip_down.weight",
    "adapter_MHA.conv_B.weight": "skip_up.weight",
    "adapter_MHA_router.expert.0.weight": "router.weight",
}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
_PROJECTOR = {"mm_projector.0.": "linear_1.", "mm_projector.2.": "linear_2."}
_IMAGE_WORDS, _TEXT_WORDS = ("image", "img", "vis"), ("text", "txt", "lang", "question")
_NOT_OURS = ("vision_tower", "image_newline", "rotary_emb.inv_freq")


def import_official(
    folder: str | Path,
    base: Any,
    config: RoEConfig | None = None,
    markers: TurnMarkers | None = None,
    token_names: tuple[str, str] | None = None,
) -> Any:
    """Converts ``base`` and fills it from the authors' checkpoint.

    Args:
        folder: of ``*.safetensors``.
        base: the model that they started from, of a registered family; its weights are overwritten.
        config: the method's settings; the preset ``paper`` by default. The adapter's width is read off the checkpoint.
        markers: how prompts mark their turns.
        token_names: the names of the image side's and the text side's routing token, where they cannot be told.

    Returns:
        ``base``, routed.

    Raises:
        CheckpointError: if a part is missing, of another shape, or has no place in the base.
    """
    tensors = dict(_tensors(Path(folder)))
    config = config or RoEConfig.preset("paper")
    width = next((len(value) for name, value in tensors.items() if name.endswith("adapter_MHA.conv_A.weight")), None)
    if width is None:
        raise CheckpointError(
            f"{folder} has no adapter_MHA.conv_A: it was not trained with the authors' code, or its adapters were not "
            "saved. Give the folder that their training wrote."
        )
    model = convert(base, replace(config, bottleneck_size=width), markers)
    own = model.state_dict()
    prefix = _decoder_prefix(own)
    found: dict[str, Tensor] = {}
    tokens: dict[str, Tensor] = {}
    hidden_size = model.routing_tokens.shape[1]
    for name, value in tensors.items():
        target = _our_name(name, prefix, own)
        if target is not None:
            found[target] = _fitted(value, own[target], name)
        elif value.numel() == hidden_size and "layers." not in name:
            tokens[name] = value.reshape(hidden_size)
        else:
            raise CheckpointError(
                f"{folder}: {name} {list(value.shape)} has no place in {type(base).__name__}. Give the base model that "
                "the checkpoint was trained from."
            )
    found["routing_tokens"] = torch.stack(_routing_tokens(tokens, token_names, folder))
    _check_complete(model, found, folder)
    model.load_state_dict(found, strict=False)
    return model.eval()


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Of all safetensors files of a folder: adapters may lie beside the model."""
    files, tensors = sorted(folder.glob("*.safetensors")), Tensors(folder, _NOT_OURS)
    if not files:
        check_no_pickle(folder, "model.safetensors")
    for path in files:
        tensors.add(path, unpickle=False)
    for name in tensors.shapes:
        yield name, tensors.read(name)


def _our_name(name: str, prefix: str, own: dict[str, Tensor]) -> str | None:
    """The state-dict key of ours that a recorded name stands for; None if there is none."""
    layer = _LAYER.search(name)
    if layer is not None:
        inside = _PARTS.get(layer[2], layer[2])
        target = f"{prefix}layers.{layer[1]}.{inside}"
        return target if target in own else None
    for theirs, ours in _PROJECTOR.items():
        if theirs in name:
            ending = ours + name.rsplit(".", 1)[1]
            return next((key for key in own if "projector" in key and key.endswith(ending)), None)
    for last in ("embed_tokens.weight", "norm.weight"):
        if name in (f"model.{last}", last):
            return f"{prefix}{last}" if f"{prefix}{last}" in own else None
    return "lm_head.weight" if name == "lm_head.weight" and name in own else None


def _decoder_prefix(own: dict[str, Tensor]) -> str:
    key = next(name for name in own if name.endswith(".skip_down.weight"))
    return key[: key.index("layers.")]


def _fitted(value: Tensor, own: Tensor, name: str) -> Tensor:
    """A tensor in our shape; a vocabulary may have grown since (the image's own token), never shrunk."""
    if value.shape == own.shape:
        return value
    if name.endswith(("embed_tokens.weight", "lm_head.weight")) and len(value) < len(own):
        return torch.cat([value.to(own.dtype), own[len(value) :]])
    raise CheckpointError(
        f"{name} has shape {list(value.shape)}, the base {list(own.shape)}: it was trained from another model. Give "
        "that one."
    )


def _routing_tokens(
    tokens: dict[str, Tensor], names: tuple[str, str] | None, folder: str | Path
) -> tuple[Tensor, Tensor]:
    """Image side and text side."""
    if names is None:
        image = [name for name in tokens if any(word in name.lower() for word in _IMAGE_WORDS)]
        text = [name for name in tokens if any(word in name.lower() for word in _TEXT_WORDS)]
        if len(image) != 1 or len(text) != 1:
            raise CheckpointError(
                f"{folder}: which of {sorted(tokens) or 'no tensors'} are the routing tokens of image and text? Name "
                "both (--routing-tokens IMAGE TEXT)."
            )
        names = (image[0], text[0])
    missing = [name for name in names if name not in tokens]
    if missing:
        raise CheckpointError(f"{folder} has no routing token {missing[0]}: it holds {sorted(tokens)}. Name two.")
    return tokens[names[0]], tokens[names[1]]


def _check_complete(model: Any, found: dict[str, Tensor], folder: str | Path) -> None:
    """All that the authors' code trains must be there; only the vision tower, which it freezes, is the base's."""
    tied = bool(getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False))
    needed = [name for name in model.state_dict() if "vision_tower" not in name]
    missing = [name for name in needed if name not in found and not (tied and name == "lm_head.weight")]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {missing[:4]} ({len(missing)} in all): a shard may be missing, or the base have more "
            f"than its layers ({len(family_of(model).decoder_layers(model))}). Restore it, or give its own base."
        )
