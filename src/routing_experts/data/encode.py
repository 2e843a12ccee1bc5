"""Records to token ids, labels and segments by turn, through the model's own processor.

T tokens after the processor has expanded each picture's placeholder to its visual tokens.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from routing_experts.data.images import load_image
from routing_experts.data.prompts import Prompt, render
from routing_experts.data.records import Record
from routing_experts.errors import PromptError, RecordError
from routing_experts.models.spans import CONTEXT, answer_segment, question_segment

IGNORED = -100  # the label that PyTorch's cross-entropy leaves out


@dataclass
class Encoded:
    """One dialogue, ready to be padded into a batch.

    Attributes:
        input_ids, labels, segment_ids: [T] int64 each; labels are -100 outside answers; segments as in ``models.spans``.
        vision: the processor's tensors of this dialogue's pictures, pictures first (empty without any).
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    segment_ids: Tensor
    vision: dict[str, Tensor] = field(default_factory=dict)


class Encoder:
    """Turns records into ``Encoded`` dialogues with one processor and one prompt format.

    Args:
        processor: a transformers processor whose expansion repeats one image token.
        prompt_format: ``chat_template`` or ``vicuna_v1``.
        max_length: longest dialogue in tokens; a longer one is an error, since cutting would lose answers or image
            tokens silently.
    """

    def __init__(self, processor: Any, prompt_format: str = "chat_template", max_length: int = 2048) -> None:
        self.processor = processor
        self.prompt_format = prompt_format
        self.max_length = max_length
        self.image_token_id = int(processor.image_token_id)

    def __call__(self, record: Record) -> Encoded:
        """Encodes a dialogue; an unanswered last question gives a prompt for generation, without labels for it.

        Raises:
            RecordError: if pictures and placeholders do not match, a picture cannot be read, or the dialogue is too long.
        """
        prompt = render(self.processor, record.turns, record.system, self.prompt_format)
        images = [load_image(image, record.id) for image in record.images]
        asked = sum(turn.question.count("<image>") for turn in record.turns)
        if asked != len(images):
            raise RecordError(
                f"record {record.id}: {asked} <image> placeholders but {len(images)} pictures. "
                "Each picture needs exactly one placeholder, in order: correct the questions or the image list."
            )
        features = self.processor(text=[prompt.text], images=images or None, **self._text_options(prompt))
        input_ids = torch.tensor(features.pop("input_ids")[0])
        if len(input_ids) > self.max_length:
            raise RecordError(
                f"record {record.id}: {len(input_ids)} tokens, more than max_length={self.max_length}; cutting would "
                "lose answers or image tokens. Raise max_length, or leave the record out."
            )
        segment_ids = self._segments(prompt, input_ids, record.id)
        in_answer = (segment_ids > 0) & (segment_ids % 2 == 0)
        labels = torch.where(in_answer, input_ids, IGNORED)
        vision = {k: _stack(v) for k, v in features.items() if k != "attention_mask"} if images else {}
        return Encoded(record.id, input_ids, labels, segment_ids, vision)

    def _text_options(self, prompt: Prompt) -> dict[str, Any]:
        """A template that writes BOS itself must not get a second one from the tokenizer."""
        bos = self.processor.tokenizer.bos_token
        add_special_tokens = not (bos and prompt.text.startswith(bos))
        return {"add_special_tokens": add_special_tokens, "return_mm_token_type_ids": False, "return_tensors": None}

    def _segments(self, prompt: Prompt, input_ids: Tensor, name: str) -> Tensor:
        """Aligns the expanded ids with the unexpanded text's character offsets: image tokens are runs of one id."""
        options = self._text_options(prompt)
        plain = self.processor.tokenizer(
            prompt.text, add_special_tokens=options["add_special_tokens"], return_offsets_mapping=True
        )
        starts = [start if end > start else -1 for start, end in plain["offset_mapping"]]  # -1: added, not of the text
        is_image = [token == self.image_token_id for token in plain["input_ids"]]
        plain_segments = _segments_of_tokens(starts, is_image, prompt.answer_spans)
        segments: list[int] = []
        cursor = 0
        for index, token in enumerate(plain["input_ids"]):
            repeat = 1
            if is_image[index]:
                pictures_left = sum(is_image[index:])
                run = 0
                while cursor + run < len(input_ids) and int(input_ids[cursor + run]) == self.image_token_id:
                    run += 1
                neighbours = 1
                while index + neighbours < len(is_image) and is_image[index + neighbours]:
                    neighbours += 1
                repeat = run // neighbours  # adjacent pictures share a run evenly
                assert pictures_left >= neighbours
            elif int(input_ids[cursor]) != token:
                raise PromptError(
                    f"record {name}: token {cursor} is {int(input_ids[cursor])} after the processor expanded the "
                    f"pictures, {token} before. Routing needs a processor that only repeats the image token."
                )
            segments += [plain_segments[index]] * repeat
            cursor += repeat
        assert cursor == len(input_ids)
        return torch.tensor(segments)


def _stack(value: Any) -> Tensor:
    """A processor's list of arrays as one tensor; through numpy, which is fast where torch is slow."""
    return value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))


def _segments_of_tokens(starts: list[int], is_image: list[bool], answers: tuple[tuple[int, int], ...]) -> list[int]:
    """Segment ids of unexpanded tokens from where each starts in the text; -1 marks added tokens such as BOS."""
    first_answer = answers[0][0] if answers else float("inf")
    last_image = max((i for i, image in enumerate(is_image) if image and starts[i] < first_answer), default=-1)
    segments = []
    for index, start in enumerate(starts):
        closed = sum(1 for _, end in answers if start >= end)
        if index <= last_image or start < 0:
            segments.append(CONTEXT)
        elif any(begin <= start < end for begin, end in answers):
            segments.append(answer_segment(closed + 1))
        else:
            segments.append(question_segment(closed + 1))
    return segments
