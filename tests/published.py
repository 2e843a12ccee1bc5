"""Checkpoints as their authors publish them, at tiny shapes or as names and shapes alone.

Names and shapes are written out here from the layouts' description, not taken from the code that reads them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor

from routing_experts.models.published.tensors import Tensors

Shapes = dict[str, tuple[int, ...]]
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VOCABULARY = 480
HR_SIDE = 256  # so that CLIP's 6 × 6 positions are spread over 8 × 8 patches and the ConvNeXt's map has as many places
HR_SPREAD = 0.15  # resizing is done in 32 bits: wilder weights would magnify its rounding
HR_SETTINGS = {"input_image_size": HR_SIDE}


@dataclass(frozen=True)
class Sizes:
    """Of a whole model: language model, CLIP tower, ConvNeXt tower."""

    vocabulary: int = VOCABULARY
    hidden: int = 32
    layers: int = 3
    heads: int = 4
    kv_heads: int = 4
    ffn: int = 48
    clip: int = 16
    clip_layers: int = 4
    clip_heads: int = 2
    clip_ffn: int = 24
    patch: int = 4
    image: int = 24
    slow_widths: tuple[int, ...] = (4, 6, 8, 12)
    slow_depths: tuple[int, ...] = (1, 1, 2, 1)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


CLIP_336 = {"clip": 1024, "clip_layers": 24, "clip_heads": 16, "clip_ffn": 4096, "patch": 14, "image": 336}
VICUNA_7B = {"vocabulary": 32000, "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "ffn": 11008}
VICUNA_13B = {"vocabulary": 32000, "hidden": 5120, "layers": 40, "heads": 40, "kv_heads": 40, "ffn": 13824}
LARGE = {"slow_widths": (192, 384, 768, 1536), "slow_depths": (3, 3, 27, 3)}
XXLARGE = {"slow_widths": (384, 768, 1536, 3072), "slow_depths": (3, 4, 30, 3)}
TINY, SIZES_7B, SIZES_13B = Sizes(), Sizes(**VICUNA_7B, **CLIP_336, **LARGE), Sizes(**VICUNA_13B, **CLIP_336, **XXLARGE)


def _with_bias(name: str, *shape: int, bias: int | None = None) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": (shape[0] if bias is None else bias,)}


def language_shapes(s: Sizes) -> Shapes:
    """Vicuna, as its own repository has it."""
    shapes: Shapes = {"model.embed_tokens.weight": (s.vocabulary, s.hidden), "model.norm.weight": (s.hidden,)}
    shapes["lm_head.weight"] = (s.vocabulary, s.hidden)
    kv = s.hidden // s.heads * s.kv_heads
    for i in range(s.layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (s.hidden, s.hidden) for n in ("q", "o")}
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (kv, s.hidden) for n in ("k", "v")}
        shapes |= {f"{at}.mlp.{n}_proj.weight": (s.ffn, s.hidden) for n in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = (s.hidden, s.ffn)
        shapes |= {f"{at}.{n}_layernorm.weight": (s.hidden,) for n in ("input", "post_attention")}
    return shapes


def clip_shapes(s: Sizes, prefix: str) -> Shapes:
    """A CLIP vision model in transformers' names before version 5."""
    shapes: Shapes = {
        f"{prefix}embeddings.class_embedding": (s.clip,),
        f"{prefix}embeddings.patch_embedding.weight": (s.clip, 3, s.patch, s.patch),
        f"{prefix}embeddings.position_embedding.weight": (s.patches + 1, s.clip),
    }
    shapes |= _with_bias(f"{prefix}pre_layrnorm", s.clip) | _with_bias(f"{prefix}post_layernorm", s.clip)
    for i in range(s.clip_layers):
        at = f"{prefix}encoder.layers.{i}"
        for n in ("q", "k", "v", "out"):
            shapes |= _with_bias(f"{at}.self_attn.{n}_proj", s.clip, s.clip)
        shapes |= _with_bias(f"{at}.layer_norm1", s.clip) | _with_bias(f"{at}.layer_norm2", s.clip)
        shapes |= _with_bias(f"{at}.mlp.fc1", s.clip_ffn, s.clip) | _with_bias(f"{at}.mlp.fc2", s.clip, s.clip_ffn)
    return shapes


def projector_shapes(s: Sizes) -> Shapes:
    return _with_bias("model.mm_projector.0", s.hidden, s.clip) | _with_bias("model.mm_projector.2", s.hidden, s.hidden)


def convnext_shapes(s: Sizes, prefix: str, scale: str = "weight") -> Shapes:
    """timm's ConvNeXt with its head; ``scale`` is what a block's layer scale is called."""
    shapes = _with_bias(f"{prefix}stem.0", s.slow_widths[0], 3, 4, 4) | _with_bias(f"{prefix}stem.1", s.slow_widths[0])
    for stage, (width, depth) in enumerate(zip(s.slow_widths, s.slow_depths, strict=True)):
        at = f"{prefix}stages.{stage}"
        if stage:
            before = s.slow_widths[stage - 1]
            shapes |= _with_bias(f"{at}.downsample.0", before) | _with_bias(f"{at}.downsample.1", width, before, 2, 2)
        for block in range(depth):
            inner = f"{at}.blocks.{block}"
            shapes |= _with_bias(f"{inner}.conv_dw", width, 1, 7, 7) | _with_bias(f"{inner}.norm", width)
            shapes |= _with_bias(f"{inner}.mlp.fc1", 4 * width, width) | _with_bias(
                f"{inner}.mlp.fc2", width, 4 * width
            )
            shapes[f"{inner}.{scale}"] = (width,)
    return shapes | _with_bias(f"{prefix}head.norm", s.slow_widths[-1])


def fusion_shapes(s: Sizes) -> Shapes:
    at = "model.vision_tower.align_stages.0"
    return _with_bias(f"{at}.fast_proj", s.clip, s.clip) | _with_bias(f"{at}.slow_proj", s.clip, s.slow_widths[-1])


def adapter_shapes(s: Sizes) -> Shapes:
    shapes: Shapes = {}
    slow = s.slow_widths[-1]
    for k in range(3):
        at = f"model.vision_tower.align_stages_latent.{k}"
        shapes |= _with_bias(f"{at}.slow_conv", slow, slow, 1, 1) | _with_bias(f"{at}.slow_proj", s.clip, slow, 1, 1)
        shapes |= _with_bias(f"{at}.fast_conv", s.clip, 1, 7, 7)
        shapes |= _with_bias(f"{at}.fast_proj", s.clip, s.clip, 1, 1)
        shapes |= _with_bias(f"{at}.gate.0", s.clip // 2, 2 * s.clip) | _with_bias(f"{at}.gate.2", 1, s.clip // 2)
    return shapes


LLAVA_TOWER = "model.vision_tower.vision_tower.vision_model."
FAST_TOWER = "model.vision_tower.fast_vision_tower.vision_tower.vision_model."
SLOW_TOWER = "model.vision_tower.slow_vision_tower.vision_tower."


def llava_shapes(s: Sizes, tower: bool) -> Shapes:
    return language_shapes(s) | projector_shapes(s) | (clip_shapes(s, LLAVA_TOWER) if tower else {})


def llava_hr_shapes(s: Sizes) -> Shapes:
    towers = clip_shapes(s, FAST_TOWER) | convnext_shapes(s, SLOW_TOWER)
    return language_shapes(s) | projector_shapes(s) | towers | fusion_shapes(s) | adapter_shapes(s)


def stage_one_shapes(s: Sizes) -> Shapes:
    return projector_shapes(s) | fusion_shapes(s)


def language_settings(s: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": s.vocabulary,
        "hidden_size": s.hidden,
        "intermediate_size": s.ffn,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "use_cache": True,
    }


def llava_settings(s: Sizes, **changes: Any) -> dict[str, Any]:
    """``config.json`` of a LLaVA-1.5."""
    own = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": s.clip,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "freeze_mm_mlp_adapter": False,
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
    }
    return language_settings(s) | own | changes


def llava_hr_settings(s: Sizes, **changes: Any) -> dict[str, Any]:
    """``config.json`` of a LLaVA-HR."""
    name = (
        "convnext_xxlarge.clip_laion2b_soup" if s.slow_widths[-1] == 3072 else "convnext_large_mlp.clip_laion2b_ft_320"
    )
    own = {"vision_tower_slow": name, "is_multipath_encoder": True, "freeze_vision": False, "input_image_size": 1024}
    return llava_settings(s, unfreeze_mm_vision_tower=False) | own | changes


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int = 0, spread: float = 0.3) -> dict[str, Tensor]:
    """Random values, large enough that everything matters; norms around one."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator) * spread
        values[name] = value + 1 if "norm" in name and name.endswith("weight") else value
    return values


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    shards: int = 2,
    pickled: bool = False,
    stem: str = "model",
) -> Path:
    """Weights in shards with their index (or in one file), ``config.json``, and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, ending = ("pytorch_model" if stem == "model" else stem, "bin") if pickled else (stem, "safetensors")
    names, places = sorted(tensors), {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.{ending}" if shards > 1 else f"{stem}.{ending}"
        part = {name: tensors[name].clone() for name in names[shard::shards]}
        places |= dict.fromkeys(part, file)
        if pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(dict(settings)))
    return folder


def outline(folder: Path, shapes: Shapes) -> Tensors:
    """A checkpoint of which names and shapes alone are known."""
    tensors = Tensors(folder)
    tensors.shapes = dict(shapes)
    return tensors


def write_clip(folder: Path, s: Sizes, seed: int = 5) -> dict[str, Tensor]:
    """A stock CLIP, text half and all; returns its vision tensors."""
    vision = drawn(clip_shapes(s, "vision_model."), seed)
    text = {"text_model.final_layer_norm.weight": torch.ones(8), "logit_scale": torch.ones(())}
    text |= {"text_projection.weight": torch.ones(8, 8), "visual_projection.weight": torch.ones(8, s.clip)}
    numbers = {"vision_model.embeddings.position_ids": torch.arange(s.patches + 1)[None]}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(vision | text | numbers, folder / "model.safetensors")
    sizes = {
        "hidden_size": s.clip,
        "intermediate_size": s.clip_ffn,
        "num_hidden_layers": s.clip_layers,
        "num_attention_heads": s.clip_heads,
        "image_size": s.image,
        "patch_size": s.patch,
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": sizes}))
    return vision


@cache
def _sentencepiece_model() -> bytes:
    """A BPE of Llama's kind: bytes for what it lacks, a space before each text, nothing normalised."""
    import io

    from routing_experts.data.digits import DigitsTask

    task = DigitsTask(seed=0)
    words = [text for i in range(400) for turn in task[i].turns for text in (turn.question, turn.answer)]
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*words, VICUNA_SYSTEM, "USER: ASSISTANT: What is it? A kite. Which colour?"]),
        model_writer=written,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=True,
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


def write_tokenizer(folder: Path, legacy: bool = False) -> sentencepiece.SentencePieceProcessor:
    """``tokenizer.model`` and its settings, as Vicuna has them; returns SentencePiece's own reader of it."""
    (folder / "tokenizer.model").write_bytes(_sentencepiece_model())
    token = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": token | {"content": "<s>"},
        "eos_token": token | {"content": "</s>"},
        "unk_token": token | {"content": "<unk>"},
        "clean_up_tokenization_spaces": False,
        "legacy": legacy,
        "model_max_length": 2048,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"})
    )
    return sentencepiece.SentencePieceProcessor(model_proto=_sentencepiece_model())
