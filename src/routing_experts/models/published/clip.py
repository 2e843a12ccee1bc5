"""CLIP towers: those inside a checkpoint, and stock ones that it was trained beside."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from routing_experts.errors import CheckpointError
from routing_experts.models.published.renames import Rule
from routing_experts.models.published.tensors import Tensors

# Those that LLaVAs were published with; what their configurations say beyond the shapes of their tensors.
_HEADS = {"openai/clip-vit-large-patch14-336": 16, "openai/clip-vit-large-patch14": 16}

# Of a whole CLIP, what no tower needs.
STOCK_LEFT_OUT = (
    Rule(r"text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale", None, "CLIP's other half"),
    Rule(r"(?:.*\.)?embeddings\.position_ids", None, "counted anew"),
)


def clip_settings(tower: Tensors, prefix: str, name: str, config_file: Path | None) -> dict[str, Any]:
    """A tower's sizes, read off its tensors; what shapes cannot tell is from its configuration or known by its name.

    Args:
        tower: holds it.
        prefix: of its names, up to ``embeddings`` and ``encoder``.
        name: that the checkpoint calls it by.
        config_file: ``config.json`` of the stock tower, if it is at hand.

    Raises:
        CheckpointError: if it is no CLIP tower, or the number of its heads cannot be told.
    """
    shapes = {key.removeprefix(prefix): shape for key, shape in tower.shapes.items() if key.startswith(prefix)}
    if "embeddings.class_embedding" not in shapes or "encoder.layers.0.mlp.fc1.weight" not in shapes:
        kind = "a SigLIP tower" if any("head.probe" in key or "post_layernorm" in key for key in shapes) else "no tower"
        raise CheckpointError(
            f"{tower.folder} holds {kind} where a CLIP tower is due: there is no class embedding in it. Give the tower "
            f"that the checkpoint was trained with, {name}."
        )
    width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
    patches = shapes["embeddings.position_embedding.weight"][0] - 1
    told = _told(config_file)
    heads = told.get("num_attention_heads") or _HEADS.get(name)
    if heads is None:
        raise CheckpointError(
            f"{name}, the tower that the checkpoint names, is none whose number of attention heads is known, and "
            "shapes do not tell it. Give the tower's folder, with its config.json (--vision-tower)."
        )
    read = {
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": 1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("encoder.layers.")),
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": patch * round(patches**0.5),
    }
    if wrong := {key: told[key] for key in read if told.get(key) not in (None, read[key])}:
        raise CheckpointError(
            f"{config_file} says {wrong}, the tensors are of a tower with { {key: read[key] for key in wrong} }: it is "
            f"another tower's configuration. Give the one that the checkpoint was trained with, {name}."
        )
    return read | {key: told[key] for key in ("hidden_act", "layer_norm_eps") if key in told}


def _told(config_file: Path | None) -> Mapping[str, Any]:
    """The vision part of a CLIP's configuration."""
    if config_file is None or not config_file.is_file():
        return {}
    raw = json.loads(config_file.read_text(encoding="utf-8"))
    vision: Mapping[str, Any] = raw.get("vision_config") or raw
    return vision
