"""Guards dialogues as text: exact wording, and answer spans that are the answers and their closing token."""

import copy

import pytest

from routing_experts.data.markers import find_markers
from routing_experts.data.prompts import WRITTEN, image_token, message_content, render
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
    system = WRITTEN["vicuna_v1"].system
    assert prompt.text == (
        f"{system} USER: <image>\nWhat is it? ASSISTANT: A kite.</s>USER: Which colour? ASSISTANT: red</s>"
    )
    assert answers(prompt) == [" A kite.</s>", " red</s>"]


@pytest.fixture
def marked(processor):
    """The processor with the marks of Llama 3 and of ChatML."""
    marked = copy.deepcopy(processor)
    marked.tokenizer.add_tokens([*WRITTEN["llama_3"].tokens, *WRITTEN["hermes_2"].tokens], special_tokens=True)
    return marked


def test_llama_3_is_written_as_vila_was_trained(marked):
    """Its last answer ends the text; those before end their message."""
    system = f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{WRITTEN['llama_3'].system}<|eot_id|>"
    user, assistant = (f"<|start_header_id|>{name}<|end_header_id|>\n\n" for name in ("user", "assistant"))
    prompt = render(marked, TURNS, format="llama_3")
    assert prompt.text == (
        f"{system}{user}<image>\nWhat is it?<|eot_id|>{assistant}A kite.<|eot_id|>"
        f"{user}Which colour?<|eot_id|>{assistant}red<|end_of_text|>"
    )
    assert answers(prompt) == ["A kite.<|eot_id|>", "red<|end_of_text|>"]


def test_hermes_2_is_written_as_vila_was_trained(marked):
    prompt = render(marked, TURNS, "Be brief.", "hermes_2")
    assert prompt.text == (
        "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\n<image>\nWhat is it?<|im_end|><|im_start|>assistant\n"
        "A kite.<|im_end|><|im_start|>user\nWhich colour?<|im_end|><|im_start|>assistant\nred<|im_end|>"
    )
    assert answers(prompt) == ["A kite.<|im_end|>", "red<|im_end|>"]


@pytest.mark.parametrize("format", ["llama_3", "hermes_2"])
def test_routing_finds_the_turns_of_written_formats(marked, format):
    """Guards inference: the marks that ids show give the segments that characters do."""
    assert find_markers(marked, format) is not None


def test_a_tokenizer_without_a_format_s_marks_is_refused(processor):
    with pytest.raises(PromptError, match=r"prompt format hermes_2 with a tokenizer that lacks <\|im_start\|>"):
        render(processor, TURNS, format="hermes_2")


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
