"""Tiny random models of the families with layouts of their own for pictures, and what turns prompts into theirs.

Ids and sizes are those of ``tiny.py``: a picture of 16 by 16 becomes four tokens in every family.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from routing_experts.models.llava_hr import LlavaHrConfig, LlavaHrVisionConfig
from routing_experts.models.llava_hr.modeling import LlavaHrForConditionalGeneration
from tiny import BOS, END, HEAD_SIZE, HIDDEN, IMAGE, IMAGE_SIZE, PAD, TOKENS_PER_IMAGE, Prompt, batch_of, text_config

PATCH = 4
HIGH_RESOLUTION = 64
BEFORE_IMAGE, BEHIND_IMAGE = 62, 63


def tiny_qwen(
    seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "sdpa", image: int = IMAGE, **text: Any
) -> Qwen2_5_VLForConditionalGeneration:
    """Window attention in the first of its tower's two blocks; a rotary table of three parts."""
    plain = text_config(**text).to_dict()
    settings = {name: plain[name] for name in _TEXT} | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, HEAD_SIZE // 2 - 2]}
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": PATCH,
        "window_size": 2 * PATCH,
        "fullatt_block_indexes": [1],
        "out_hidden_size": HIDDEN,
        "initializer_range": 0.2,
    }
    tokens = {"image_token_id": image, "video_token_id": image + 1}
    tokens |= {"vision_start_token_id": image + 2, "vision_end_token_id": image + 3}
    config = Qwen2_5_VLConfig(text_config=settings | text, vision_config=vision, **tokens)
    return _made(Qwen2_5_VLForConditionalGeneration, config, seed, dtype, attention)


def tiny_smolvlm(
    seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "sdpa", image: int = IMAGE, **text: Any
) -> SmolVLMForConditionalGeneration:
    config = SmolVLMConfig(**_idefics_like("smolvlm_vision", image, text))
    return _made(SmolVLMForConditionalGeneration, config, seed, dtype, attention)


def tiny_idefics3(
    seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "sdpa", image: int = IMAGE, **text: Any
) -> Idefics3ForConditionalGeneration:
    config = Idefics3Config(**_idefics_like("idefics3_vision", image, text))
    return _made(Idefics3ForConditionalGeneration, config, seed, dtype, attention)


def tiny_llava_hr(
    seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "sdpa", image: int = IMAGE, **text: Any
) -> LlavaHrForConditionalGeneration:
    """Two patches a side at low and two places at high resolution; adapters that do something."""
    vision = LlavaHrVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=2 * PATCH,
        patch_size=PATCH,
        input_image_size=HIGH_RESOLUTION,
        slow_hidden_sizes=(4, 6, 8, 12),
        slow_depths=(1, 1, 1, 1),
        adapter_layers=(0, 1, 2),
        initializer_range=0.2,
    )
    config = LlavaHrConfig(vision_config=vision, text_config=text_config(**text), image_token_index=image)
    model = _made(LlavaHrForConditionalGeneration, config, seed, dtype, attention)
    for adapter in model.model.vision_tower.adapters:
        for part in (adapter.slow_proj, adapter.fast_proj):
            torch.nn.init.normal_(part.weight, std=0.2)
    return model


FAMILIES: dict[str, Callable[..., Any]] = {
    "qwen2_5_vl": tiny_qwen,
    "smolvlm": tiny_smolvlm,
    "idefics3": tiny_idefics3,
    "llava_hr": tiny_llava_hr,
}
_TEXT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "initializer_range"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)


def _idefics_like(vision_type: str, image: int, text: dict[str, Any]) -> dict[str, Any]:
    vision = {
        "model_type": vision_type,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
        "initializer_range": 0.2,
    }
    return {
        "vision_config": vision,
        "text_config": text_config(**text).to_dict(),
        "scale_factor": 2,
        "image_token_id": image,
        "pad_token_id": PAD,
    }


def _made(model_class: Any, config: Any, seed: int, dtype: torch.dtype, attention: str) -> Any:
    torch.manual_seed(seed)
    model = model_class._from_config(config, attn_implementation=attention)
    model.generation_config.update(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=END)
    return model.to(dtype).eval()


def family_batch(
    model: Any, prompts: list[Prompt], side: str = "left", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A batch in the layout that the model's own processor would give; positions are the model's to find."""
    batch = batch_of([Prompt(_framed(p.ids), p.pictures) for p in prompts], side, dtype)
    del batch["position_ids"]
    batch.pop("pixel_values", None)
    if not any(len(p.pictures) for p in prompts):
        return batch
    if model.config.model_type == "llava_hr":
        size = (HIGH_RESOLUTION, HIGH_RESOLUTION)
        return batch | {"pixel_values": interpolate(torch.cat([p.pictures for p in prompts]), size).to(dtype)}
    if model.config.model_type == "qwen2_5_vl":
        return batch | _patches(batch["input_ids"], torch.cat([p.pictures for p in prompts]).to(dtype))
    most = max(len(p.pictures) for p in prompts)
    pixels = torch.zeros(len(prompts), most, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=dtype)
    mask = torch.zeros(len(prompts), most, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.long)
    for row, one in enumerate(prompts):
        pixels[row, : len(one.pictures)] = one.pictures.to(dtype)
        mask[row, : len(one.pictures)] = 1
    return batch | {"pixel_values": pixels, "pixel_attention_mask": mask}


def _framed(ids: list[int]) -> list[int]:
    """A token before and one behind each picture's, as these families' processors write them."""
    framed: list[int] = []
    for position, one in enumerate(ids):
        number = ids[:position].count(IMAGE)
        framed += [BEFORE_IMAGE] * (one == IMAGE and number % TOKENS_PER_IMAGE == 0)
        framed.append(one)
        framed += [BEHIND_IMAGE] * (one == IMAGE and number % TOKENS_PER_IMAGE == TOKENS_PER_IMAGE - 1)
    return framed


def _patches(ids_BT: Tensor, pictures: Tensor) -> dict[str, Tensor]:
    """Rows of a patch's numbers, twice in time; in what order they stand is the same to a random tower."""
    side = IMAGE_SIZE // PATCH
    patches = pictures.reshape(len(pictures) * side**2, -1).repeat(1, 2)
    grid = torch.tensor([[1, side, side]] * len(pictures))
    return {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": (ids_BT == IMAGE).long()}
