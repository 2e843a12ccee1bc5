"""Tiny processors of the families that ``tiny_families.py`` builds, with templates of their checkpoints' layout.

Two of them come with a video processor, which needs torchvision, and one with num2words, for videos alone: here stand
ins take their place. No picture meets them.
"""

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Idefics3Processor,
    LlavaImageProcessorPil,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    SmolVLMProcessor,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tiny import IMAGE_SIZE, TOKENS_PER_IMAGE
from tiny_families import HIGH_RESOLUTION, PATCH

QWEN_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOL_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}:"
    "{% if message.content[0].type != 'image' %} {% endif %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
QWEN_TOKENS += ("<|image_pad|>", "<|video_pad|>")
TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
SMOL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>")
SMOL_TOKENS += ("<global-img>", *TILES)


def _tokenizer(special: tuple[str, ...], end: str, **names: str) -> PreTrainedTokenizerFast:
    """Bytes, and the family's special tokens; no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*special, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token=end,
        additional_special_tokens=list(special),
        **names,
    )


class _NoVideo(SimpleNamespace):
    """Where a video processor belongs."""

    _auto_class = None
    num_frames, fps = 1, 1


def _without_video(processor_class: Any, video: str) -> Any:
    """The class, but for what it asks of its video processor; saved, it names the one that belongs there."""

    def check(self: Any, name: str, argument: Any) -> Any:
        own = super(tiny, self).check_argument_for_proper_class
        return _NoVideo if name == "video_processor" else own(name, argument)

    def to_dict(self: Any) -> dict[str, Any]:
        stand_in, self.video_processor = self.video_processor, None
        try:
            return super(tiny, self).to_dict() | {"video_processor": {"video_processor_type": video}}
        finally:
            self.video_processor = stand_in

    body = {"check_argument_for_proper_class": check, "to_dict": to_dict}
    tiny = type(processor_class.__name__, (processor_class,), body)
    return tiny


def tiny_qwen_processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pictures of any size, resized to whole cells of 8 by 8 pixels, 4 to 16 of them."""
    pixels = (2 * PATCH) ** 2
    return _without_video(Qwen2_5_VLProcessor, "Qwen2VLVideoProcessor")(
        Qwen2VLImageProcessorPil(patch_size=PATCH, min_pixels=4 * pixels, max_pixels=16 * pixels),
        _tokenizer(QWEN_TOKENS, "<|im_end|>"),
        _NoVideo(),
        chat_template=QWEN_TEMPLATE,
    )


def tiny_smolvlm_processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pictures are cut into up to two tiles a side, of 16 by 16."""
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    return _without_video(SmolVLMProcessor, "SmolVLMVideoProcessor")(
        SmolVLMImageProcessorPil(size={"longest_edge": 2 * IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}),
        _tokenizer(SMOL_TOKENS, "<end_of_utterance>", bos_token="<|im_start|>"),
        _NoVideo(),
        image_seq_len=TOKENS_PER_IMAGE,
        chat_template=SMOL_TEMPLATE,
    )


def tiny_idefics3_processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As SmolVLM's, without need of stand-ins."""
    return Idefics3Processor(
        Idefics3ImageProcessorPil(size={"longest_edge": 2 * IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}),
        _tokenizer(SMOL_TOKENS, "<end_of_utterance>", bos_token="<|im_start|>"),
        image_seq_len=TOKENS_PER_IMAGE,
        chat_template=SMOL_TEMPLATE,
    )


def tiny_llava_hr_processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """LLaVA's, where a token stands for half of a picture's side: two visual tokens each way."""
    side = {"height": HIGH_RESOLUTION, "width": HIGH_RESOLUTION}
    return LlavaProcessor(
        LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": HIGH_RESOLUTION}, crop_size=side),
        _tokenizer(SMOL_TOKENS, "<end_of_utterance>", bos_token="<|im_start|>"),
        patch_size=HIGH_RESOLUTION // 2,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token="<image>",
        chat_template=SMOL_TEMPLATE,
    )


PROCESSORS = {
    "qwen2_5_vl": tiny_qwen_processor,
    "smolvlm": tiny_smolvlm_processor,
    "idefics3": tiny_idefics3_processor,
    "llava_hr": tiny_llava_hr_processor,
}
