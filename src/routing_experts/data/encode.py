"""Records to token ids, labels and segments by turn, through the model's own processor.

T tokens, counted after the processor has written each picture's tokens in place of its placeholder.
"""

import sys
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from PIL import Image
from torch import Tensor

from routing_experts.data.faults import Fault
from routing_experts.data.images import load_image, upright_size
from routing_experts.data.prompts import Prompt, gap_behind_images, image_token, render
from routing_experts.data.records import IMAGE_PLACEHOLDER, Record, Turn
from routing_experts.errors import PromptError, RecordError
from routing_experts.models.spans import CONTEXT, PADDING, question_segment
from routing_experts.nn.losses import IGNORED

SIZES_KEPT = 10_000  # of pictures, of which is known what is written for them
STAND_IN_SIDE = 64  # pixels; white, since zeros after normalising are Idefics' padding
BY_DIALOGUE = "pixel_attention_mask"  # comes with pictures that are laid out by dialogue, [1, pictures, …]
TOKEN_TYPES = "mm_token_type_ids"  # transformers' name
_NOT_VISION = frozenset({"attention_mask", "token_type_ids", TOKEN_TYPES})


@dataclass
class Encoded:
    """One dialogue, ready to be padded into a batch.

    Attributes:
        input_ids, labels, segment_ids: [T] int64 each; labels are -100 outside answers. Segments: see ``models.spans``.
        vision: the processor's tensors of this dialogue's pictures, as it gives them for a batch of one dialogue (empty
            without any): pictures first in most families, [1, pictures, …] in some; see ``data.collate``.
        token_types: [T], 1 at a picture's tokens, where the family's positions need them.
        faults: of records that this one stands in for.
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    segment_ids: Tensor
    vision: dict[str, Tensor] = field(default_factory=dict)
    token_types: Tensor | None = None
    faults: tuple[Fault, ...] = ()


class Encoder:
    """Turns records into ``Encoded`` dialogues with one processor and one prompt format.

    Args:
        processor: a transformers processor that says what it writes in place of each picture's placeholder.
        prompt_format: one of ``data.prompts.FORMATS``.
        max_length: longest dialogue in tokens; a longer one is an error, since cutting would lose answers or image
            tokens silently.
    """

    def __init__(self, processor: Any, prompt_format: str = "chat_template", max_length: int = 2048) -> None:
        self.processor = processor
        self.prompt_format = prompt_format
        self.max_length = max_length
        self.image_token_id = int(processor.image_token_id)
        self.image_token = image_token(processor)
        self.user_header = user_header(processor, prompt_format)
        self.gap = gap_behind_images(processor)
        self._replacements: dict[tuple[int, int], tuple[str, bool]] = {}

    def __call__(self, record: Record) -> Encoded:
        """Encodes a dialogue; an unanswered last question gives a prompt for generation, without labels for it.

        Raises:
            RecordError: if pictures and placeholders do not match, a picture cannot be read, or it is too long.
            PromptError: if the dialogue cannot be laid out, or the processor's ids are not those of its text.
        """
        prompt = self._prompt(record)
        images = [load_image(image, record.id) for image in record.images]
        bos = adds_special_tokens(self.processor, prompt.text)
        try:
            features = self.processor(
                text=[prompt.text], images=images or None, add_special_tokens=bos, return_text_replacement_offsets=True
            )
        except ValueError as error:
            raise _refused(record, error) from error
        written = features.pop("text_replacement_offsets", None) or [[]]
        encoded = self._encoded(record, _expanded(prompt, written[0]), np.asarray(features.pop("input_ids")[0]))
        if images:
            encoded.vision = {name: _stack(value) for name, value in features.items() if name not in _NOT_VISION}
        if TOKEN_TYPES in features:
            encoded.token_types = torch.from_numpy(np.asarray(features[TOKEN_TYPES][0]))
        return encoded

    def without_pixels(self, record: Record, sizes: Sequence[tuple[int, int]] | None = None) -> Encoded:
        """The same dialogue with ``vision`` empty: a picture's size says what is written for it.

        Args:
            record: a dialogue.
            sizes: of its pictures, where they were asked already; see ``upright_size``.

        Raises:
            RecordError: as encoding does, but for what only decoding shows.
            PromptError: if the dialogue cannot be laid out.
        """
        prompt, end, written = self._prompt(record), 0, []
        for number, image in enumerate(record.images):
            start = prompt.text.index(self.image_token, end)
            end = start + len(self.image_token)
            try:
                size = upright_size(image, record.id) if sizes is None else sizes[number]
                replacement, _ = self._written(size)
            except RecordError:
                raise
            except ValueError as error:
                raise _refused(record, error) from error
            written.append({"span": (start, end), "replacement": replacement})
        return self._with_types(self._encoded(record, _expanded(prompt, written)))

    def with_pictures(self, name: str, ids_T: Tensor, segments_T: Tensor, images: Sequence[Image.Image]) -> Encoded:
        """A dialogue whose ids and segments are known already: its pictures alone go through the processor.

        Args:
            name: of the record.
            ids_T, segments_T: as ``without_pixels`` gives them.
            images: as ``load_image`` gives them, of the sizes that the ids are for.
        """
        encoded = self._with_types(Encoded(name, ids_T, _labels(ids_T, segments_T), segments_T))
        if images:
            features = self.processor.image_processor(list(images))
            encoded.vision = {name: _stack(value) for name, value in features.items() if name not in _NOT_VISION}
        return encoded

    def _with_types(self, encoded: Encoded) -> Encoded:
        """With token types where the processor gives them: pictures' tokens are of another than text."""
        if self._written((STAND_IN_SIDE, STAND_IN_SIDE))[1]:
            encoded.token_types = (encoded.input_ids == self.image_token_id).long()
        return encoded

    def _written(self, size: tuple[int, int]) -> tuple[str, bool]:
        """What the processor writes for a picture of a size, and whether it gives token types; a size is asked once."""
        if size not in self._replacements:
            if len(self._replacements) == SIZES_KEPT:
                self._replacements.clear()
            blank = Image.new("RGB", size)
            features = self.processor(text=[self.image_token], images=[blank], return_text_replacement_offsets=True)
            written = features["text_replacement_offsets"][0]
            self._replacements[size] = (written[0]["replacement"], TOKEN_TYPES in features)
        return self._replacements[size]

    def _prompt(self, record: Record) -> Prompt:
        """The dialogue laid out, one placeholder a picture."""
        try:
            prompt = render(self.processor, record.turns, record.system, self.prompt_format, self.gap)
        except PromptError as error:
            raise PromptError(f"record {record.id}: {error}") from error
        except TemplateError as error:
            raise PromptError(
                f"record {record.id}: the processor's chat template refuses the dialogue ({error}). Change the record "
                "(some templates take no system prompt), or use prompt format vicuna_v1."
            ) from error
        asked = prompt.text.count(self.image_token)
        if asked != len(record.images):
            raise RecordError(
                f"record {record.id}: {asked} <image> placeholders but {len(record.images)} pictures. Each picture "
                "needs exactly one placeholder, in a question and in order: correct the dialogue or the image list."
            )
        return prompt

    def _encoded(self, record: Record, prompt: Prompt, ids_T: np.ndarray | None = None) -> Encoded:
        """A prompt with its pictures' tokens written out; its ids are those of its text unless the processor's come."""
        read_T, offsets_T2 = tokenize(self.processor, prompt.text)
        ids_T = read_T if ids_T is None else ids_T
        if len(ids_T) > self.max_length:
            raise RecordError(
                f"record {record.id}: {len(ids_T)} tokens, more than max_length={self.max_length}; cutting would "
                "lose answers or image tokens. Raise max_length, or leave the record out."
            )
        _check_ids(ids_T, read_T, record.id)
        ids, segments = map(torch.from_numpy, (ids_T, self._segments(prompt, ids_T, offsets_T2)))
        return Encoded(record.id, ids, _labels(ids, segments), segments)

    def stand_in(self) -> Encoded:
        """A white picture's tokens alone, as padding: for batches without pictures whose tower has to run all the same.

        Nothing attends to them, and no loss falls on them.
        """
        question = Turn(IMAGE_PLACEHOLDER, "")
        picture = Image.new("RGB", (STAND_IN_SIDE, STAND_IN_SIDE), "white")
        unlimited = copy(self)
        unlimited.max_length = sys.maxsize  # padding is no part of a dialogue's length
        encoded = unlimited(Record("stand-in", (question,), (picture,)))
        ids, vision = encoded.input_ids[encoded.input_ids == self.image_token_id], encoded.vision
        if BY_DIALOGUE in vision:  # a picture may be cut into many; the first is enough
            ids = ids[: len(ids) // vision[BY_DIALOGUE].shape[1]]
            vision = {name: tensor[:, :1] for name, tensor in vision.items()}
        types = None if encoded.token_types is None else torch.zeros_like(ids)
        ignored, padding = torch.full_like(ids, IGNORED), torch.full_like(ids, PADDING)
        return Encoded(encoded.id, ids, ignored, padding, vision, types)

    def _segments(self, prompt: Prompt, ids_T: np.ndarray, offsets_T2: np.ndarray) -> np.ndarray:
        """Segments of ids, by the characters of the text that they were read from."""
        # Answers' edges alternate, start and end, so counting the passed ones gives question 1, answer 1, question 2 …
        # Added tokens have no place in the text: an EOS at the end takes its predecessor's.
        edges = [edge for span in prompt.answer_spans for edge in span]
        starts_T = np.maximum.accumulate(offsets_T2[:, 0])
        segments_T = np.searchsorted(edges, starts_T, side="right") + question_segment(1)
        pictures = np.flatnonzero((ids_T == self.image_token_id) & (segments_T == question_segment(1)))
        if len(pictures):
            segments_T[: pictures[-1] + 1] = CONTEXT
        else:
            first_user = prompt.text.find(self.user_header) if self.user_header else 0
            segments_T[starts_T < first_user] = CONTEXT
            segments_T[:1] = CONTEXT  # BOS, whether the tokenizer or the template wrote it
        return segments_T


def _labels(ids_T: Tensor, segments_T: Tensor) -> Tensor:
    """The ids of answers; nothing is learned elsewhere."""
    return torch.where((segments_T > CONTEXT) & (segments_T % 2 == 0), ids_T, IGNORED)


def _check_ids(ids_T: np.ndarray, read_T: np.ndarray, name: str) -> None:
    """Raises ``PromptError`` if a processor's ids are not those of its text."""
    if np.array_equal(read_T, ids_T):
        return
    same = min(len(read_T), len(ids_T))
    where = int(np.argmin(np.append(read_T[:same] == ids_T[:same], False)))
    raise PromptError(
        f"record {name}: from token {where} on ({ids_T[where : where + 4].tolist()} instead of "
        f"{read_T[where : where + 4].tolist()}) the processor changed more than the pictures' placeholders. "
        "Routing reads from it what it writes for each picture: it has to heed "
        "return_text_replacement_offsets=True, as transformers' own do. Use one of those."
    )


def _refused(record: Record, error: ValueError) -> RecordError:
    return RecordError(
        f"record {record.id}: the processor refuses it ({error}). Mend the text or the picture, or leave the record "
        "out."
    )


def _expanded(prompt: Prompt, written: Sequence[Mapping[str, Any]]) -> Prompt:
    """The prompt with what the processor wrote in place of its placeholders.

    Args:
        prompt: as rendered, one placeholder a picture.
        written: of each placeholder, in order: ``span`` [start, end) in the prompt, and ``replacement``.
    """
    pieces, last = [], 0
    for one in written:
        start, end = one["span"]
        pieces += [prompt.text[last:start], one["replacement"]]
        last = end

    def moved(edge: int) -> int:
        grown = (
            len(one["replacement"]) - (one["span"][1] - one["span"][0]) for one in written if one["span"][0] < edge
        )
        return edge + sum(grown)

    spans = tuple((moved(start), moved(end)) for start, end in prompt.answer_spans)
    return Prompt("".join([*pieces, prompt.text[last:]]), spans)


def adds_special_tokens(processor: Any, text: str) -> bool:
    """Whether the tokenizer shall add its own: a template that writes BOS itself must not get a second one."""
    bos = processor.tokenizer.bos_token
    return not (bos and text.startswith(bos))


def tokenize(processor: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids [T] and [start, end) characters [T, 2] of a text.

    Raises:
        PromptError: if the tokenizer keeps no track of characters.
    """
    if not processor.tokenizer.is_fast:
        raise PromptError(
            f"{type(processor.tokenizer).__name__} does not say which characters a token stands for, so answers cannot "
            "be found in it. Load the processor with its fast tokenizer (use_fast=True)."
        )
    plain = processor.tokenizer(
        text, add_special_tokens=adds_special_tokens(processor, text), return_offsets_mapping=True
    )
    return np.asarray(plain["input_ids"]), np.asarray(plain["offset_mapping"]).reshape(-1, 2)


def user_header(processor: Any, prompt_format: str) -> str:
    """The text that opens every user's message; empty if a dialogue of two turns does not show one.

    Raises:
        PromptError: if the prompt format is unknown, or the processor has no chat template where one is asked for.
    """
    if prompt_format == "chat_template" and not getattr(processor, "chat_template", None):
        raise PromptError(
            f"this {type(processor).__name__} has no chat template, which prompt format chat_template needs. "
            "Use prompt format vicuna_v1 if the model was trained on it, or set processor.chat_template."
        )
    first, second = "Where grows mallow", "Who found quartz"
    render(processor, (Turn(first, ""),), "", prompt_format)
    try:
        prompt = render(processor, (Turn(first, "marsh"), Turn(second, "miner")), "", prompt_format)
    except (PromptError, TemplateError):
        return ""  # dialogues of one turn still work; any other's own rendering reports what is wrong
    first_start, second_start = prompt.text.find(first), prompt.text.find(second)
    if min(first_start, second_start) < 0:
        return ""
    openings = prompt.text[:first_start], prompt.text[prompt.answer_spans[0][1] : second_start]
    pairs = zip(*(reversed(opening) for opening in openings), strict=False)
    header = "".join(character for character, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))[::-1]
    # A space that the first message alone begins with is part of its first token.
    spaced = openings[0].endswith(f" {header}")
    return f" {header}" if header and spaced else header


def _stack(value: Any) -> Tensor:
    """A processor's list of arrays as one tensor; through numpy, which is fast where torch is slow."""
    return value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))
