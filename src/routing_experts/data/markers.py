"""Finds the token ids by which a prompt format marks its turns, from the processor itself.

Training knows each answer's characters; inference has ids only. The markers found here let ``segments_from_ids`` see
in the ids what the characters say; they count as found only if both agree on dialogues other than the probed one.
"""

from typing import Any

import torch
from jinja2.exceptions import TemplateError

from routing_experts.config import TurnMarkers
from routing_experts.data.encode import Encoder, tokenize
from routing_experts.data.prompts import Prompt, render
from routing_experts.data.records import Record, Turn
from routing_experts.errors import PromptError
from routing_experts.models.spans import segments_from_ids

_PROBE = (Turn("Which harbour is nearest?", "Bergen"), Turn("How many boats left?", "47"))
_SYSTEM = "Reply briefly, and never guess."
_CHECKS = (
    (Turn("Name the tallest tree.", "the old larch"),),
    (Turn("is 18 plus 5 a number below 31?", "23"), Turn("Is that odd?", "yes.")),
    (Turn("Read: 9 0 6", "9, 0 and 6!"), Turn("Again (slowly)", "nine\n\nzero\n\nsix"), Turn("“Größer” als 3?", "")),
)


def find_markers(processor: Any, prompt_format: str = "chat_template") -> TurnMarkers | None:
    """Derives the marks of answers and of users' messages from a rendered probe dialogue.

    Args:
        processor: of the model that will be routed.
        prompt_format: one of ``data.prompts.FORMATS``.

    Returns:
        The markers, or None if there are none that find every segment of the check dialogues; all that follows the
        context must then count as one question.

    Raises:
        PromptError: if the prompt format is unknown or the tokenizer keeps no track of characters.
    """
    encoder = Encoder(processor, prompt_format)
    markers = _probe(encoder)
    if markers is None:
        return None
    plain = [_agrees(encoder, markers, turns, "") for turns in _CHECKS]
    with_system = [_agrees(encoder, markers, turns, _SYSTEM) for turns in _CHECKS]
    # A template may refuse system prompts (None); it may not refuse the dialogues themselves.
    return markers if all(plain) and False not in with_system else None


def _probe(encoder: Encoder) -> TurnMarkers | None:
    """Reads the ids that stand around the probe's own words."""
    first, second = _PROBE
    prompt = _rendered(encoder, _SYSTEM) or _rendered(encoder, "")
    if prompt is None:
        return None
    start, end = prompt.answer_spans[0]
    question, answer = prompt.text.find(first.question), prompt.text.find(first.answer, start)
    if question < 0 or answer < 0 or prompt.text.find(second.question) < end:
        return None
    ids_P, offsets_P2 = tokenize(encoder.processor, prompt.text)
    starts_P, ends_P = offsets_P2.T
    header_start = question - len(encoder.user_header)

    def between(begin: int, stop: int) -> tuple[int, ...]:
        return tuple(ids_P[(starts_P >= begin) & (ends_P <= stop) & (ends_P > starts_P)].tolist())

    markers = TurnMarkers(
        generation_prompt=between(question + len(first.question), start),
        end_of_answer=between(answer + len(first.answer), end),
        # Without its last space, which some tokenizers join to the question's first word.
        user_prompt=between(header_start, header_start + len(encoder.user_header.rstrip())),
    )
    return markers if markers.generation_prompt and markers.end_of_answer else None


def _rendered(encoder: Encoder, system: str) -> Prompt | None:
    try:
        return render(encoder.processor, _PROBE, system, encoder.prompt_format)
    except (PromptError, TemplateError):
        return None


def _agrees(encoder: Encoder, markers: TurnMarkers, turns: tuple[Turn, ...], system: str) -> bool | None:
    """Whether ids and characters give the same segments; None if the template refuses the dialogue."""
    try:
        encoded = encoder(Record("markers-check", turns, (), system))
    except PromptError:
        return None
    found_BT = segments_from_ids(encoded.input_ids[None], None, (encoder.image_token_id,), markers)
    return torch.equal(found_BT[0], encoded.segment_ids)
