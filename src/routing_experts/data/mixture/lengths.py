"""Tokens of dialogues, counted in other processes and without decoding pictures."""

import sys
from dataclasses import dataclass
from functools import cache

from routing_experts.data.encode import Encoder
from routing_experts.data.records import Record
from routing_experts.models.load import load_processor


@dataclass(frozen=True)
class TokenCounter:
    """Counts as the encoder would; goes to other processes as it is, where the processor is loaded on first use.

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
        return len(_loaded(self).without_pixels(record).input_ids)


@cache
def _loaded(counter: TokenCounter) -> Encoder:
    return Encoder(load_processor(counter.model), counter.prompt_format, sys.maxsize)
