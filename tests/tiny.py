"""Tiny random models and prompts for tests: a LLaVA with its tower, a Llama with grouped heads.

Ids: 0 padding, 1 BOS, 2 end of answer (and EOS), 50 opens a user turn, 51 52 open an answer, 60 is an image token;
3 to 49 are words. An image is four tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from routing_experts.config import RoEConfig, TurnMarkers
from routing_experts.models.context import RoutingContext
from routing_experts.models.convert import convert
from routing_experts.models.families import family_of
from routing_experts.models.model import routing_context
from routing_experts.models.options import RoutingOptions
from routing_experts.models.spans import segments_from_ids

PAD, BOS, END, USER, IMAGE, VOCAB = 0, 1, 2, 50, 60, 64
ANSWER = (51, 52)
TOKENS_PER_IMAGE, IMAGE_SIZE = 4, 16
NUM_LAYERS, HIDDEN, KEY_VALUE_HEADS, HEAD_SIZE = 5, 32, 2, 8
MARKERS = TurnMarkers(generation_prompt=ANSWER, end_of_answer=(END,), user_prompt=(USER,))


def text_config(**changes: Any) -> LlamaConfig:
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": HIDDEN // HEAD_SIZE,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # of the usual 0.02, tiny layers would hardly differ from doing nothing
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": END,
    }
    return LlamaConfig(**(settings | changes))


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM._from_config(text_config(), attn_implementation=attention)
    return model.to(dtype).eval()


def tiny_llava(
    seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=IMAGE_SIZE // 2,
        initializer_range=0.2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        image_seq_length=TOKENS_PER_IMAGE,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=END,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
    return model.to(dtype).eval()


def route_everywhere(model: Any, seed: int = 0, **settings: Any) -> Any:
    """Converts; the adapters do something, and the routers' large random weights tell examples apart."""
    config = RoEConfig(**({"adapter_init": "xavier", "routing_token_std": 1.0} | settings))
    convert(model, config, markers=MARKERS, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for layer in family_of(model).decoder_layers(model):
        if "router" in layer._modules:
            layer.router.weight.data.copy_(torch.randn(2, 2 * HIDDEN, generator=generator))
    return model


@dataclass
class Prompt:
    """One request: its ids and, [n, 3, 16, 16], its pictures."""

    ids: list[int]
    pictures: Tensor


def prompt(seed: int, images: int = 1, words: int = 4, earlier_turns: int = 0, answer: int = 0) -> Prompt:
    """BOS, a user marker, images and words, an answer marker; before it, whole turns; after it, answer words."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(3, 50, (count,), generator=generator).tolist()

    ids = [BOS, USER] + [IMAGE] * (TOKENS_PER_IMAGE * images)
    for _ in range(earlier_turns):
        ids += [*draw(words), *ANSWER, *draw(2), END, USER]
    ids += [*draw(words), *ANSWER]
    if answer:
        ids += [*draw(answer), END]
    return Prompt(ids, torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator))


def batch_of(prompts: list[Prompt], side: str = "left", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Padded ids, mask, positions that count real tokens, and pictures if there are any."""
    longest = max(len(p.ids) for p in prompts)
    ids = torch.full((len(prompts), longest), PAD)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, one in enumerate(prompts):
        where = slice(longest - len(one.ids), None) if side == "left" else slice(0, len(one.ids))
        ids[row, where] = torch.tensor(one.ids)
        mask[row, where] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    pictures = torch.cat([p.pictures for p in prompts])
    return batch | ({"pixel_values": pictures.to(dtype)} if len(pictures) else {})


def for_generate(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without positions: generate counts them from the mask."""
    return {name: value for name, value in batch.items() if name != "position_ids"}


def segments_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Segment ids of a batch, found as a call of the model finds them."""
    image_ids = family_of(model).image_token_ids(model.config)
    return segments_from_ids(batch["input_ids"], batch["attention_mask"], image_ids, model.roe_config.markers)


def context_of(
    model: Any, batch: dict[str, Tensor], options: RoutingOptions | None = None, **training: Any
) -> RoutingContext:
    """A routing context that the test can look into after the call."""
    return routing_context(model, segments_of(model, batch), options, **training)


def real_logits(logits: Tensor, batch: dict[str, Tensor]) -> list[Tensor]:
    """Each row's logits at its real tokens."""
    return [row[mask.bool()] for row, mask in zip(logits, batch["attention_mask"], strict=True)]


# Words only: a generated image token would ask for a picture, a generated end would stop rows at different lengths.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "max_new_tokens": 5,
    "min_new_tokens": 5,
    "suppress_tokens": list(range(50, VOCAB)),
}
