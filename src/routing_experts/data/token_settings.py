"""How a set's dialogues become tokens: what an encoder is made of, small enough to send to other processes."""

import sys
from dataclasses import dataclass
from functools import cache

from routing_experts.data.encode import Encoder
from routing_experts.data.records import Record, Turn
from routing_experts.data.square import padding_to_square
from routing_experts.models.load import load_processor


@dataclass(frozen=True)
class TokenSettings:
    """Makes one encoder a process, on first use.

    Attributes:
        model: whose processor.
        prompt_format, max_length: see ``Encoder``; any length by default.
        pad_to_square: see ``padding_to_square``.
    """

    model: str
    prompt_format: str = "chat_template"
    max_length: int = sys.maxsize
    pad_to_square: bool = False

    @property
    def encoder(self) -> Encoder:
        """Of this process."""
        return _made(self)

    def try_out(self) -> None:
        """Makes the encoder and lays a dialogue out: what is wrong with either is wrong with every record.

        Raises:
            CheckpointError: if there is no such processor.
            PromptError: if it cannot lay dialogues out so.
        """
        self.encoder.without_pixels(Record("a greeting", (Turn("Hello", "Good day"),)))

    def count_tokens(self, record: Record) -> int:
        """A record's tokens, pictures' included, of which the sizes are asked.

        Raises:
            RecordError: if a picture cannot be read.
            PromptError: if the dialogue cannot be laid out.
        """
        return len(self.encoder.without_pixels(record).input_ids)


@cache
def _made(settings: TokenSettings) -> Encoder:
    processor = load_processor(settings.model)
    processor = padding_to_square(processor) if settings.pad_to_square else processor
    return Encoder(processor, settings.prompt_format, settings.max_length)
