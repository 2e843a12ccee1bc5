"""Dialogues as one text, with the character spans of every question and answer in it.

Two formats: ``chat_template`` (what the processor's own template says) and ``vicuna_v1`` (LLaVA-1.5's, written out).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from routing_experts.data.records import IMAGE_PLACEHOLDER, Turn
from routing_experts.errors import PromptError

FORMATS = ("chat_template", "vicuna_v1")
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Prompt:
    """A rendered dialogue.

    Attributes:
        text: with one image placeholder token a picture.
        answer_spans: [start, end) characters of each answer, closing token included. A last question that is yet to
            be answered has none.
    """

    text: str
    answer_spans: tuple[tuple[int, int], ...]


def render(processor: Any, turns: Sequence[Turn], system: str = "", format: str = "chat_template") -> Prompt:
    """Lays out a dialogue. An empty answer is allowed in the last turn only: it is the question to be answered.

    Raises:
        PromptError: for an unknown format, an empty answer in an earlier turn, or a chat template whose rendering of
            a dialogue's beginning is not the beginning of its rendering of the whole.
    """
    for number, turn in enumerate(turns[:-1], start=1):
        if not turn.answer:
            raise PromptError(
                f"turn {number} of {len(turns)} has no answer: only the last may wait for one. Fill it in."
            )
    if format == "vicuna_v1":
        return _render_vicuna(processor, turns, system)
    if format != "chat_template":
        raise PromptError(f"prompt format {format!r}: the formats are {', '.join(FORMATS)}. Name one of them.")
    return _render_template(processor, turns, system)


def _render_vicuna(processor: Any, turns: Sequence[Turn], system: str) -> Prompt:
    end = processor.tokenizer.eos_token
    text, spans = system or VICUNA_SYSTEM, []
    for turn in turns:
        question = turn.question.replace(IMAGE_PLACEHOLDER, image_token(processor))
        text += f" USER: {question} ASSISTANT:"
        if turn.answer:
            spans.append((len(text), len(text) + len(turn.answer) + 1 + len(end)))
            text += f" {turn.answer}{end}"
    return Prompt(text, tuple(spans))


def _render_template(processor: Any, turns: Sequence[Turn], system: str) -> Prompt:
    messages: list[dict[str, Any]] = []
    if system:
        messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
    prompts, dialogues = [], []
    for turn in turns:
        messages.append({"role": "user", "content": message_content(turn.question)})
        prompts.append(list(messages))
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        if turn.answer:
            dialogues.append(list(messages))
    opened = processor.apply_chat_template(prompts, add_generation_prompt=True)
    closed = processor.apply_chat_template(dialogues) if dialogues else []
    text = opened[-1] if len(opened) > len(closed) else closed[-1]
    for piece in (*opened, *closed):
        if not text.startswith(piece):
            raise PromptError(
                "the processor's chat template does not render a dialogue's beginning as the beginning of the whole, "
                f"so its answers cannot be found: {piece[-60:]!r} is no prefix. Use prompt format vicuna_v1, or a "
                "template without whole-dialogue rewriting."
            )
    return Prompt(text, tuple((len(a), len(b)) for a, b in zip(opened, closed, strict=False)))


def message_content(question: str) -> list[dict[str, str]]:
    """A question as chat-template parts; the newline that LLaVA's data puts beside a placeholder is the template's."""
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(question.split(IMAGE_PLACEHOLDER)):
        if index:
            parts.append({"type": "image"})
        text = piece.strip("\n")
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def image_token(processor: Any) -> str:
    """The text that stands for one picture before the processor expands it."""
    return getattr(processor, "image_token", None) or IMAGE_PLACEHOLDER
