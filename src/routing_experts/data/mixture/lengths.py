"""Tokens of dialogues without decoding their pictures: of those, the processor's tokens depend on the size alone."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from PIL import Image

from routing_experts.data.encode import Encoder, tokenize
from routing_experts.data.images import upright_size
from routing_experts.data.prompts import render
from routing_experts.data.records import IMAGE_PLACEHOLDER, Record, Turn
from routing_experts.models.load import load_processor

Size = tuple[int, int]


@dataclass(frozen=True)
class TokenCounter:
    """Counts as ``Encoder`` would; goes to other processes as it is, where the processor is loaded on first use.

    Attributes:
        model: whose processor.
        prompt_format: how dialogues are laid out.
    """

    model: str
    prompt_format: str = "chat_template"

    def __call__(self, record: Record) -> int:
        """A record's tokens, pictures' included.

        Raises:
            RecordError: if a picture cannot be read.
            PromptError: if the dialogue cannot be laid out.
        """
        encoder, picture_tokens = _loaded(self)
        prompt = render(encoder.processor, record.turns, record.system, self.prompt_format)
        written = len(tokenize(encoder.processor, prompt.text)[0])
        return written + sum(picture_tokens(upright_size(image, record.id)) for image in record.images)


@cache
def _loaded(counter: TokenCounter) -> tuple[Encoder, Callable[[Size], int]]:
    """The encoder, and what a picture of a size adds to its placeholder's one token; each size is asked once."""
    encoder = Encoder(load_processor(counter.model), counter.prompt_format, sys.maxsize)

    @cache
    def added(size: Size) -> int:
        record = Record("blank", (Turn(f"{IMAGE_PLACEHOLDER}\nWhat?", "This."),), (Image.new("RGB", size),))
        text = render(encoder.processor, record.turns, "", counter.prompt_format).text
        return len(encoder(record).input_ids) - len(tokenize(encoder.processor, text)[0])

    return encoder, added
