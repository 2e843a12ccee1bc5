"""Processors that the data tests share: the pocket model's own, and one with a ChatML-like template."""

from pathlib import Path

import pytest
from transformers import AutoProcessor

import routing_experts.pocket

POCKET = Path(routing_experts.pocket.__file__).parent
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load_pocket():
    return AutoProcessor.from_pretrained(POCKET, backend="pil")


@pytest.fixture(scope="session")
def processor():
    return load_pocket()


@pytest.fixture(scope="session")
def chatml_processor():
    processor = load_pocket()
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    processor.chat_template = CHATML
    return processor
