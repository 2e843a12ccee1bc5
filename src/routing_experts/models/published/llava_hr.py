"""LLaVA-HR as its authors publish it, read into our model: both training stages, 7B and X-13B."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from routing_experts.errors import CheckpointError
from routing_experts.models.llava_hr.configuration import LlavaHrConfig, LlavaHrVisionConfig
from routing_experts.models.published.blueprint import Blueprint, PictureSettings, described_by
from routing_experts.models.published.clip import POSITION_IDS, STOCK_LEFT_OUT, clip_settings
from routing_experts.models.published.language import LANGUAGE_RULES, has_head, llama_config
from routing_experts.models.published.llava import CAUSES, PROJECTOR_RULES, check_width
from routing_experts.models.published.renames import Part, Rule
from routing_experts.models.published.sources import Sources
from routing_experts.models.published.tensors import Tensors

_FAST = "model.vision_tower.fast_vision_tower.vision_tower.vision_model."
_SLOW = "model.vision_tower.slow_vision_tower.vision_tower."
_TOWER = "model.vision_tower."
_DEPTHWISE = re.compile(r"stages\.(\d)\.blocks\.(\d{1,3})\.conv_dw\.weight")
_CONVOLUTION = 4  # axes of its weight
_XXLARGE = "convnext_xxlarge"  # which normalises with 1e-5
# Of the last maps of the ConvNeXts that LLaVA-HR was published with.
_CHANNELS = {"convnext_large": 1536, _XXLARGE: 3072}
_STAGE = rf"{_TOWER}slow_tower.encoder.stages.\1"
_BLOCK = rf"{_STAGE}.layers.\2"


def _fast_rules(prefix: str) -> tuple[Rule, ...]:
    return (
        POSITION_IDS,
        Rule(rf"{prefix}embeddings\.class_embedding", None, "the class token is dropped unread"),
        Rule(rf"{prefix}post_layernorm\.(?:weight|bias)", None, "nothing is read behind it"),
        Rule(rf"{prefix}(.+)", rf"{_TOWER}\1"),
    )


def _slow_rules(prefix: str) -> tuple[Rule, ...]:
    """From timm's names; it calls a block's layer scale ``gamma``, LLaVA-HR's own copy ``weight``."""
    kept = r"\.(weight|bias)"
    return (
        Rule(rf"{prefix}stem\.0{kept}", rf"{_TOWER}slow_tower.embeddings.patch_embeddings.\1"),
        Rule(rf"{prefix}stem\.1{kept}", rf"{_TOWER}slow_tower.embeddings.layernorm.\1"),
        Rule(rf"{prefix}stages\.(\d+)\.downsample\.([01]){kept}", rf"{_STAGE}.downsampling_layer.\2.\3"),
        Rule(rf"{prefix}stages\.(\d+)\.blocks\.(\d+)\.conv_dw{kept}", rf"{_BLOCK}.dwconv.\3"),
        Rule(rf"{prefix}stages\.(\d+)\.blocks\.(\d+)\.norm{kept}", rf"{_BLOCK}.layernorm.\3"),
        Rule(rf"{prefix}stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc([12]){kept}", rf"{_BLOCK}.pwconv\3.\4"),
        Rule(rf"{prefix}stages\.(\d+)\.blocks\.(\d+)\.(?:weight|gamma)", rf"{_BLOCK}.layer_scale_parameter"),
        Rule(rf"{prefix}head\..+", None, "there is no head"),
    )


_OWN = r"(?:model\.)?"  # a first stage's file may leave the prefix out
_PARTS = r"(slow_conv|slow_proj|fast_conv|fast_proj|gate\.0|gate\.2)\.(weight|bias)"
_JOINING = (
    Rule(rf"{_OWN}vision_tower\.align_stages_latent\.(\d+)\.{_PARTS}", rf"{_TOWER}adapters.\1.\2.\3"),
    Rule(
        rf"{_OWN}vision_tower\.align_stages\.0\.(fast_proj|slow_proj)\.(weight|bias)",
        rf"{_TOWER}fusion_projector.\1.\2",
    ),
    *PROJECTOR_RULES,
)
_CAUSES = (
    (r"adapters\.|align_stages_latent", "freeze_vision says whether the towers have adapters: these do not fit it."),
    (r"slow_", "The high-resolution tower is another one than the configuration says."),
    *CAUSES,
)


def is_llava_hr(raw: Mapping[str, Any]) -> bool:
    """Whether a configuration is a LLaVA-HR's."""
    return "is_multipath_encoder" in raw or "vision_tower_slow" in raw


def llava_hr_blueprint(raw: Mapping[str, Any], folder: Path, sources: Sources) -> Blueprint:
    """The model that a checkpoint becomes.

    Raises:
        CheckpointError: if a setting is another model's, or a size cannot be told.
    """
    from routing_experts.models.llava_hr.modeling import LlavaHrForConditionalGeneration

    if not raw.get("is_multipath_encoder"):
        raise CheckpointError(
            f"{folder}: is_multipath_encoder is off, so there is one tower and no mixture of resolutions. Such "
            "ablations are not read."
        )
    checkpoint, others = sources.open_checkpoint(folder)
    has_towers = any(name.startswith(_FAST) for name in checkpoint.shapes)
    fast = checkpoint if has_towers else sources.open_tower(raw)
    if has_towers:
        sources.refuse_slow_tower(folder, "holds its own towers, which were tuned")
    slow = checkpoint if has_towers else sources.open_slow_tower(raw, folder)
    fast_prefix, slow_prefix = (_FAST, _SLOW) if has_towers else ("vision_model.", "")
    clip = clip_settings(
        fast, fast_prefix, sources.tower_name(raw), sources.named_tower() if has_towers else fast.folder
    )
    check_width(raw, folder, clip["hidden_size"])
    freeze_vision, side = _freezing_and_side(raw, folder)
    slow_sizes = _slow_sizes(slow, slow_prefix, str(raw.get("vision_tower_slow")))
    adapter_layers = [] if freeze_vision else _quarters(clip["num_hidden_layers"], folder)
    text = llama_config(raw, folder, has_head((checkpoint, *(part.tensors for part in others))))
    with described_by(folder):
        vision = LlavaHrVisionConfig(
            **clip,
            **slow_sizes,
            input_image_size=side,
            freeze_vision=freeze_vision,
            adapter_layers=adapter_layers,
        )
        config = LlavaHrConfig(text_config=text, vision_config=vision)
    if has_towers:
        own = (*_fast_rules(re.escape(_FAST)), *_slow_rules(re.escape(_SLOW)), *_JOINING, *LANGUAGE_RULES)
        parts: tuple[Part, ...] = (Part("the checkpoint", checkpoint, own), *others)
    else:
        parts = (
            Part("the checkpoint", checkpoint, (*_JOINING, *LANGUAGE_RULES)),
            *others,
            Part("the stock CLIP tower", fast, (*STOCK_LEFT_OUT, *_fast_rules(r"vision_model\."))),
            Part("the stock ConvNeXt", slow, _slow_rules("")),
        )
    pictures = PictureSettings(
        size=vision.input_image_size,
        # A token stands for a place of the finer map, in pixels of what both towers get.
        patch_size=vision.input_image_size // vision.patches_per_side,
        extra_tokens=0,
        strategy="full",
        pads=raw.get("image_aspect_ratio") == "pad",
    )
    return Blueprint(config, LlavaHrForConditionalGeneration, parts, pictures, _CAUSES)


def _freezing_and_side(raw: Mapping[str, Any], folder: Path) -> tuple[bool, int]:
    """Whether the towers are frozen, and so without adapters, and a picture's side in pixels."""
    freeze_vision, side = raw.get("freeze_vision"), raw.get("input_image_size")
    if not isinstance(freeze_vision, bool) or not isinstance(side, int):
        raise CheckpointError(
            f"{folder}/config.json says freeze_vision {freeze_vision!r} and input_image_size {side!r}: true or false, "
            "and pixels, which tensors do not tell. Restore the checkpoint's own configuration."
        )
    return freeze_vision, side


def _quarters(layers: int, folder: Path) -> list[int]:
    """The last layer of each quarter but the last: an adapter stands behind it."""
    if layers % 4:
        raise CheckpointError(
            f"{folder}: a CLIP tower of {layers} layers, where LLaVA-HR's adapters stand behind each quarter of them. "
            "Give a tower whose layers can be divided so."
        )
    return [quarter * layers // 4 - 1 for quarter in (1, 2, 3)]


def _slow_sizes(tower: Tensors, prefix: str, name: str) -> dict[str, Any]:
    """A ConvNeXt's widths and depths, read off its tensors; its name says how it normalises."""
    shapes = {key.removeprefix(prefix): shape for key, shape in tower.shapes.items() if key.startswith(prefix)}
    widths: dict[int, int] = {}
    blocks: dict[int, set[int]] = {}
    for key, shape in shapes.items():
        if (match := _DEPTHWISE.fullmatch(key)) is not None and len(shape) == _CONVOLUTION:
            stage = int(match[1])
            widths[stage] = shape[0]
            blocks.setdefault(stage, set()).add(int(match[2]))
    if sorted(widths) != list(range(4)) or any(found != set(range(len(found))) for found in blocks.values()):
        raise CheckpointError(
            f"{tower.folder} holds no ConvNeXt of four stages of convolutions where LLaVA-HR has one ({name}), or some "
            "of its blocks are missing. Give the tower that it was trained with, whole."
        )
    named = next((channels for kind, channels in _CHANNELS.items() if kind in name), None)
    if widths[3] in _CHANNELS.values() and named not in (None, widths[3]):
        raise CheckpointError(
            f"{tower.folder}: vision_tower_slow is {name}, whose last map has {named} channels, and the ConvNeXt's has "
            f"{widths[3]}. One of the two is another checkpoint's: give the tower that belongs to it."
        )
    return {
        "slow_hidden_sizes": [widths[stage] for stage in range(4)],
        "slow_depths": [len(blocks[stage]) for stage in range(4)],
        "slow_norm_eps": 1e-5 if _XXLARGE in name or widths[3] == _CHANNELS[_XXLARGE] else 1e-6,
    }
