"""LLaVA-1.5 in its original layout (``liuhaotian/llava-v1.5-*`` and what is trained with that code).

The released files hold no vision weights: the tower was frozen, and a stock CLIP belongs to them. Checkpoints of one's
own training hold it; both are read.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from routing_experts.errors import CheckpointError
from routing_experts.models.published.blueprint import Blueprint, PictureSettings, described_by
from routing_experts.models.published.clip import POSITION_IDS, STOCK_LEFT_OUT, clip_settings
from routing_experts.models.published.language import LANGUAGE_RULES, has_head, llama_config
from routing_experts.models.published.renames import Part, Rule
from routing_experts.models.published.sources import Sources
from routing_experts.models.published.tensors import Tensors

TOWER = "model.vision_tower.vision_tower.vision_model."
PROJECTOR_RULES = (  # a first stage's file may leave the prefix out
    Rule(r"(?:model\.)?mm_projector\.0\.(weight|bias)", r"model.multi_modal_projector.linear_1.\1"),
    Rule(r"(?:model\.)?mm_projector\.2\.(weight|bias)", r"model.multi_modal_projector.linear_2.\1"),
)
_OWN_TOWER = (POSITION_IDS, Rule(rf"{re.escape(TOWER)}(.+)", r"model.vision_tower.\1"))
_STOCK_TOWER = (*STOCK_LEFT_OUT, Rule(r"vision_model\.(.+)", r"model.vision_tower.\1"))
STRATEGIES: dict[str, Literal["default", "full"]] = {"patch": "default", "cls_patch": "full"}

CAUSES = (
    (r"adapter_MHA|router\.expert", "It was trained with RoE's own code: name the model that it began from (--base)."),
    (r"deepspeed_moe", "It is a MoE-LLaVA, whose experts a LLaVA has no place for."),
    (r"lora_[AB]\.", "It holds LoRA's updates alone: merge them into their base first."),
    (
        r"vision_model\.head\.|head\.probe",
        "The tower is a SigLIP, and a CLIP is due: give its own.",
    ),
    (
        r"(?:embed_tokens|lm_head)\S* \[(\d+), (\d+)\], where \[(?!\1,)\d+, \2\]",
        "The vocabulary is another one's: give the configuration that belongs to these weights.",
    ),
    (r"align_stages|slow_vision_tower", "It is a LLaVA-HR, but its configuration lacks is_multipath_encoder."),
    (r"model\.vision_tower\.", "The tower is incomplete, or another one than its configuration says."),
    (r"model\.language_model\.", "A shard is missing, or the configuration is of a larger model."),
)


def check_settings(raw: Mapping[str, Any], folder: Path) -> None:
    """Refuses settings of other models of this code.

    Raises:
        CheckpointError: names the setting.
    """
    projector = raw.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise CheckpointError(
            f"{folder}: mm_projector_type {projector!r}, where LLaVA-1.5 has mlp2x_gelu: an older or another model. "
            "Models with that projector are not read."
        )
    if raw.get("mm_use_im_start_end") or raw.get("mm_use_im_patch_token"):
        raise CheckpointError(
            f"{folder}: mm_use_im_start_end or mm_use_im_patch_token is set, so tokens of its own stand around "
            "pictures; no released model has them. It is not read."
        )
    aspect = raw.get("image_aspect_ratio") or "square"
    if aspect not in ("pad", "square"):
        raise CheckpointError(
            f"{folder}: image_aspect_ratio {aspect!r} cuts pictures into tiles, as LLaVA-1.6 does. Read models with "
            "`pad` or `square`; LLaVA-1.6 is in transformers' own layout as llava-hf/llava-v1.6-*."
        )


def check_width(raw: Mapping[str, Any], folder: Path, width: int) -> None:
    """Refuses a tower of another width than the checkpoint was trained with."""
    told = raw.get("mm_hidden_size")
    if told is not None and told != width:
        raise CheckpointError(
            f"{folder}: mm_hidden_size is {told}, and the tower is {width} wide: it is another tower. Give the one "
            "that the checkpoint was trained with, or its own configuration."
        )


def llava_blueprint(raw: Mapping[str, Any], folder: Path, sources: Sources) -> Blueprint:
    """The native LLaVA that a checkpoint becomes.

    Raises:
        CheckpointError: if a setting is another model's, or a size cannot be told.
    """
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    sources.refuse_slow_tower(folder, "is a LLaVA-1.5, which has one tower")
    checkpoint, others = sources.open_checkpoint(folder)
    tower, tower_rules, stock = llava_tower(raw, checkpoint, sources)
    prefix = "vision_model." if stock is not None else TOWER
    told = sources.named_tower() if stock is None else stock.folder
    settings = clip_settings(tower, prefix, sources.tower_name(raw), told)
    check_width(raw, folder, settings["hidden_size"])
    layer, chosen = _chosen(raw, folder, settings["num_hidden_layers"])
    text = llama_config(raw, folder, has_head((checkpoint, *(part.tensors for part in others))))
    with described_by(folder):
        config = LlavaConfig(
            text_config=text,
            vision_config=CLIPVisionConfig(**settings),
            vision_feature_layer=layer,
            vision_feature_select_strategy=STRATEGIES[chosen],
            image_seq_length=(settings["image_size"] // settings["patch_size"]) ** 2 + (chosen == "cls_patch"),
            projector_hidden_act="gelu",
        )
    own = Part("the checkpoint", checkpoint, (*tower_rules, *PROJECTOR_RULES, *LANGUAGE_RULES))
    parts = (own, *others, *([] if stock is None else [Part("the stock tower", stock, _STOCK_TOWER)]))
    pictures = PictureSettings(
        size=settings["image_size"],
        patch_size=settings["patch_size"],
        extra_tokens=1,
        strategy=STRATEGIES[chosen],
        pads=raw.get("image_aspect_ratio") == "pad",
    )
    return Blueprint(config, LlavaForConditionalGeneration, parts, pictures, CAUSES)


def _chosen(raw: Mapping[str, Any], folder: Path, layers: int) -> tuple[int, str]:
    """Which layer's features are taken, and which of them."""
    layer, chosen = raw.get("mm_vision_select_layer", -2), raw.get("mm_vision_select_feature", "patch")
    if not isinstance(layer, int) or not -layers - 1 <= layer <= layers:
        raise CheckpointError(
            f"{folder}: mm_vision_select_layer {layer!r} of a tower of {layers} layers; LLaVA-1.5 takes -2. Restore "
            "the configuration."
        )
    if not isinstance(chosen, str) or chosen not in STRATEGIES:
        raise CheckpointError(
            f"{folder}: mm_vision_select_feature {chosen!r} is none of {', '.join(STRATEGIES)}. Restore the "
            "configuration."
        )
    return layer, chosen


def llava_tower(
    raw: Mapping[str, Any], checkpoint: Tensors, sources: Sources
) -> tuple[Tensors, tuple[Rule, ...], Tensors | None]:
    """Where the tower is: the tensors that hold it, the checkpoint's rules for it, and the stock tower if it is one."""
    if any(name.startswith(TOWER) for name in checkpoint.shapes):
        return checkpoint, _OWN_TOWER, None
    stock = sources.open_tower(raw)
    return stock, (), stock
