"""Guards dialogues as text: exact wording, and answer spans that are the answers and their closing token."""

import pytest

from routing_experts.data.prompts import VICUNA_SYSTEM, image_token, message_content, render
from routing_experts.data.records import Turn
from routing_experts.errors import PromptError

TURNS = (Turn("<image>\nWhat is it?", "A kite."), Turn("Which colour?", "red"))


def answers(prompt):
    return [prompt.text[start:end] for start, end in prompt.answer_spans]


def test_chat_template_and_its_answer_spans(processor):
    prompt = render(processor, TURNS)
    assert prompt.text == (
        "<|user|><image>What is it?<|assistant|>A kite.</s><|user|>Which colour?<|assistant|>red</s>"
    )
    assert answers(prompt) == ["A kite.</s>", "red</s>"]


def test_vicuna_is_written_as_llava_15_was_trained(processor):
    prompt = render(processor, TURNS, format="vicuna_v1")
    assert prompt.text == (
        f"{VICUNA_SYSTEM} USER: <image>\nWhat is it? ASSISTANT: A kite.</s> USER: Which colour? ASSISTANT: red</s>"
    )
    assert answers(prompt) == [" A kite.</s>", " red</s>"]


@pytest.mark.parametrize("format", ["chat_template", "vicuna_v1"])
def test_an_unanswered_last_question_ends_with_the_generation_prompt(processor, format):
    whole = render(processor, TURNS, format=format)
    asked = render(processor, (TURNS[0], Turn("Which colour?", "")), format=format)
    assert asked.answer_spans == whole.answer_spans[:1]
    assert whole.text.startswith(asked.text)
    assert asked.text.endswith(("<|assistant|>", "ASSISTANT:"))


def test_system_prompts_come_first(processor):
    assert render(processor, TURNS, "Be brief.").text.startswith("Be brief.<|user|>")
    assert render(processor, TURNS, "Be brief.", "vicuna_v1").text.startswith("Be brief. USER:")


def test_text_that_repeats_an_answer_does_not_move_its_span(processor):
    prompt = render(processor, (Turn("red red", "red"), Turn("red", "red red")))
    assert answers(prompt) == ["red</s>", "red red</s>"]


def test_placeholders_become_parts_wherever_they_stand():
    assert message_content("<image>\nA <image>?") == [
        {"type": "image"},
        {"type": "text", "text": "A "},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    assert message_content("Why?\n<image>") == [{"type": "text", "text": "Why?"}, {"type": "image"}]


def test_a_processor_names_its_own_image_token(processor):
    assert image_token(processor) == "<image>"
    assert image_token(object()) == "<image>"


def test_bad_dialogues_and_formats_are_refused(processor):
    with pytest.raises(PromptError, match="turn 1 of 2 has no answer"):
        render(processor, (Turn("One?", ""), Turn("Two?", "2")))
    with pytest.raises(PromptError, match="prompt format 'alpaca': the formats are chat_template, vicuna_v1"):
        render(processor, TURNS, format="alpaca")


def test_a_template_that_rewrites_earlier_turns_is_refused(processor, monkeypatch):
    rewriting = "{{ messages | length }}" + processor.chat_template
    monkeypatch.setattr(processor, "chat_template", rewriting)
    with pytest.raises(PromptError, match="does not render a dialogue's beginning"):
        render(processor, TURNS)
