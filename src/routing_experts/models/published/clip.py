"""CLIP towers: those inside a checkpoint, and stock ones that it was trained beside."""

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from routing_experts.errors import CheckpointError
from routing_experts.models.published.renames import Rule
from routing_experts.models.published.sources import read_config
from routing_experts.models.published.tensors import Tensors

# Those that LLaVAs were published with; what their configurations say beyond the shapes of their tensors.
_HEADS = {("clip-vit-large-patch14-336", 1024): 16, ("clip-vit-large-patch14", 1024): 16}

_WIDENING = "encoder.layers.0.mlp.fc1.weight"  # [the layers' inner width, their width]
POSITION_IDS = Rule(r"(?:.*\.)?embeddings\.position_ids", None, "counted anew")
# Of a whole CLIP, what no tower needs.
STOCK_LEFT_OUT = (
    Rule(r"text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale", None, "CLIP's other half"),
    POSITION_IDS,
)


def clip_settings(tower: Tensors, prefix: str, name: str, stock: Path | None) -> dict[str, Any]:
    """A tower's sizes, read off its tensors; what shapes cannot tell is from its configuration or known by its name.

    Args:
        tower: holds it.
        prefix: of its names, up to ``embeddings`` and ``encoder``.
        name: that the checkpoint calls it by.
        stock: the folder of the stock tower, if it is at hand, whose ``config.json`` is asked.

    Raises:
        CheckpointError: if it is no CLIP tower, or the number of its heads cannot be told.
    """
    shapes = {key.removeprefix(prefix): shape for key, shape in tower.shapes.items() if key.startswith(prefix)}
    if "embeddings.class_embedding" not in shapes or len(shapes.get(_WIDENING, ())) != 2:
        kind = "a SigLIP tower" if any("head.probe" in key or "post_layernorm" in key for key in shapes) else "no tower"
        raise CheckpointError(
            f"{tower.folder} holds {kind} where a CLIP tower is due: there is no class embedding in it. Give the tower "
            f"that the checkpoint was trained with, {name}."
        )
    config_file = None if stock is None else stock / "config.json"
    told = _vision_part(config_file)
    width, patch, patches = _measured(shapes, tower.folder)
    heads = told.get("num_attention_heads") or _HEADS.get((name.rpartition("/")[2], width))
    if heads is None:
        raise CheckpointError(
            f"{name}, the tower that the checkpoint names, is none whose number of attention heads is known, and "
            "shapes do not tell it. Give the tower's folder, with its config.json (--vision-tower)."
        )
    read = {
        "hidden_size": width,
        "intermediate_size": shapes[_WIDENING][0],
        "num_hidden_layers": len({key.split(".")[2] for key in shapes if key.startswith("encoder.layers.")}),
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


def _measured(shapes: Mapping[str, tuple[int, ...]], folder: Path) -> tuple[int, int, int]:
    """Width, pixels of a patch's side, and number of patches."""
    patch = shapes.get("embeddings.patch_embedding.weight", ())
    table = shapes.get("embeddings.position_embedding.weight", ())
    if len(patch) != 4 or len(table) != 2 or table[0] < 2 or isqrt(table[0] - 1) ** 2 != table[0] - 1:
        raise CheckpointError(
            f"{folder}: patches of shape {list(patch)} and positions of {list(table)} are no CLIP tower's: it has a "
            "square of patches, and a position for each and for the class token. Give the tower whole."
        )
    return patch[0], patch[2], table[0] - 1


def _vision_part(config_file: Path | None) -> Mapping[str, Any]:
    """The vision part of a CLIP's configuration."""
    if config_file is None or not config_file.is_file():
        return {}
    raw = read_config(config_file.parent)
    vision = raw.get("vision_config") or raw
    if not isinstance(vision, dict):
        raise CheckpointError(f"{config_file}: vision_config is a {type(vision).__name__}, no settings by name.")
    return vision
