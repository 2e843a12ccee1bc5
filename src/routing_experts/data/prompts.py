"""Dialogues as one text, with the character spans of every question and answer in it.

``chat_template`` is what the processor's own template says; the others are written out here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from routing_experts.data.records import IMAGE_PLACEHOLDER, Turn
from routing_experts.errors import PromptError

CHAT_TEMPLATE = "chat_template"


@dataclass(frozen=True)
class Written:
    """What stands around the words of a dialogue.

    Attributes:
        system: said where a record brings no system prompt of its own.
        before_system, after_system: around it.
        asks: before a question.
        asks_again: the same behind an answer; None where it is no other.
        answers: between a question and its answer, up to where generation begins.
        gap: opens an answer; part of it.
        closes: an answer; part of it. None for the tokenizer's end token.
        ends: the last answer, in place of ``closes``.
        tokens: that a tokenizer has to know whole.
        picture_first: a question's only picture goes before its words, as LLaVA's code moves it in training.
    """

    system: str
    asks: str
    answers: str
    before_system: str = ""
    after_system: str = ""
    asks_again: str | None = None
    gap: str = ""
    closes: str | None = None
    ends: str | None = None
    tokens: tuple[str, ...] = ()
    picture_first: bool = False


WRITTEN = {
    # LLaVA-1.5, LLaVA-HR and most of VILA.
    "vicuna_v1": Written(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        asks=" USER: ",
        asks_again="USER: ",
        answers=" ASSISTANT:",
        gap=" ",
        picture_first=True,
    ),
    # Llama-3-VILA1.5-8b-Fix. The upload before it called the assistant `system` and closed with <|end_of_text|>.
    "llama_3": Written(
        system="You are a helpful language and vision assistant. You are able to understand the visual content that "
        "the user provides, and assist the user with a variety of tasks using natural language.",
        before_system="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n",
        after_system="<|eot_id|>",
        asks="<|start_header_id|>user<|end_header_id|>\n\n",
        answers="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        closes="<|eot_id|>",
        ends="<|end_of_text|>",
        tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
    ),
    # VILA1.5-40b; no line breaks behind <|im_end|>, unlike ChatML.
    "hermes_2": Written(
        system="Answer the questions.",
        before_system="<|im_start|>system\n",
        after_system="<|im_end|>",
        asks="<|im_start|>user\n",
        answers="<|im_end|><|im_start|>assistant\n",
        closes="<|im_end|>",
        tokens=("<|im_start|>", "<|im_end|>"),
    ),
}
FORMATS = (CHAT_TEMPLATE, *WRITTEN)
_BEFORE_TEXT = re.compile(rf"{IMAGE_PLACEHOLDER}(?!{IMAGE_PLACEHOLDER})")


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


def render(
    processor: Any, turns: Sequence[Turn], system: str = "", format: str = "chat_template", gap: str | None = None
) -> Prompt:
    """Lays out a dialogue. An empty answer is allowed in the last turn only: it is the question to be answered.

    Args:
        processor: whose tokens it is for.
        turns: of the dialogue.
        system: its system prompt; the format's own where it is empty.
        format: one of ``FORMATS``.
        gap: what ``gap_behind_images`` gives, where that is known already.

    Raises:
        PromptError: for an unknown format, an empty answer in an earlier turn, or a chat template whose rendering of
            a dialogue's beginning is not the beginning of its rendering of the whole.
    """
    for number, turn in enumerate(turns[:-1], start=1):
        if not turn.answer:
            raise PromptError(
                f"turn {number} of {len(turns)} has no answer: only the last may wait for one. Fill it in."
            )
    if format in WRITTEN:
        return _write_out(processor, format, turns, system, gap)
    if format != CHAT_TEMPLATE:
        raise PromptError(f"prompt format {format!r}: the formats are {', '.join(FORMATS)}. Name one of them.")
    return _render_template(processor, turns, system)


def _write_out(processor: Any, name: str, turns: Sequence[Turn], system: str, gap: str | None) -> Prompt:
    layout, tokenizer = WRITTEN[name], processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids(list(layout.tokens))
    if lacking := [t for t, n in zip(layout.tokens, ids, strict=True) if n in (None, tokenizer.unk_token_id)]:
        raise PromptError(
            f"prompt format {name} with a tokenizer that lacks {', '.join(lacking)}: it would spell them out, and the "
            "model was never trained on that. Use the model's own format, such as chat_template."
        )
    closes = tokenizer.eos_token if layout.closes is None else layout.closes
    text, spans = f"{layout.before_system}{system or layout.system}{layout.after_system}", []
    picture = image_token(processor)
    gap = gap_behind_images(processor) if gap is None else gap
    for number, turn in enumerate(turns):
        asks = layout.asks if number == 0 or layout.asks_again is None else layout.asks_again
        asked = _moved(turn.question) if layout.picture_first else turn.question
        question = _BEFORE_TEXT.sub(f"{IMAGE_PLACEHOLDER}{gap}", asked).replace(IMAGE_PLACEHOLDER, picture)
        text += f"{asks}{question}{layout.answers}"
        if turn.answer:
            is_last = number == len(turns) - 1
            end = layout.ends if layout.ends is not None and is_last else closes
            spans.append((len(text), len(text) + len(layout.gap) + len(turn.answer) + len(end)))
            text += f"{layout.gap}{turn.answer}{end}"
    return Prompt(text, tuple(spans))


def _moved(question: str) -> str:
    """A question with its only picture before its words; several stay where they are."""
    if question.count(IMAGE_PLACEHOLDER) != 1:
        return question
    return f"{IMAGE_PLACEHOLDER}\n{question.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()


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


def gap_behind_images(processor: Any) -> str:
    """What a text behind a picture needs in front to be tokenised as LLaVA's own code does it: as a text of its own.

    That code splits a prompt at its pictures and tokenises the pieces one by one, so that SentencePiece puts a space
    before each. A tokenizer that puts one before the first piece alone needs it written; others need nothing.
    """
    tokenizer, picture, probe = processor.tokenizer, image_token(processor), "\n"
    alone = tokenizer(probe, add_special_tokens=False)["input_ids"]
    behind = tokenizer(f"{picture}{probe}", add_special_tokens=False)["input_ids"][1:]
    spaced = tokenizer(f"{picture} {probe}", add_special_tokens=False)["input_ids"][1:]
    return " " if behind != alone and spaced == alone else ""
