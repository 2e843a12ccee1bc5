"""Guards the search for turn markers: found where ids can mark turns, None where they cannot."""

import pytest
import torch

from routing_experts.data.digits import DigitsTask
from routing_experts.data.encode import Encoder
from routing_experts.data.markers import find_markers
from routing_experts.data.records import Record, Turn
from routing_experts.errors import PromptError
from routing_experts.models.spans import segments_from_ids


def texts(processor, markers):
    fields = (markers.generation_prompt, markers.end_of_answer, markers.user_prompt)
    return tuple(processor.tokenizer.decode(list(ids)) for ids in fields)


def assert_segments_agree(processor, markers, prompt_format, records):
    encoder = Encoder(processor, prompt_format)
    for record in records:
        encoded = encoder(record)
        found = segments_from_ids(encoded.input_ids[None], None, (encoder.image_token_id,), markers)
        assert torch.equal(found[0], encoded.segment_ids), record


@pytest.mark.parametrize(
    ("prompt_format", "expected"),
    [("chat_template", ("<|assistant|>", "</s>", "<|user|>")), ("vicuna_v1", (" ASSISTANT:", "</s>", " USER:"))],
)
def test_pocket_processor(processor, prompt_format, expected):
    markers = find_markers(processor, prompt_format)
    assert texts(processor, markers) == expected
    task = DigitsTask(seed=5)
    assert_segments_agree(processor, markers, prompt_format, [task[index] for index in range(60)])


def test_chatml(chatml_processor):
    markers = find_markers(chatml_processor)
    generation_prompt, end_of_answer, user_prompt = texts(chatml_processor, markers)
    assert generation_prompt == "<|im_end|>\n<|im_start|>assistant\n"
    assert end_of_answer == "<|im_end|>\n"
    assert user_prompt == "<|im_start|>user"
    task = DigitsTask(seed=6)
    spoken = Record("s", (Turn("is it late?", "yes"), Turn("Why?\n", "")), (), "Be brief.\nBe kind.")
    assert_segments_agree(chatml_processor, markers, "chat_template", [*(task[i] for i in range(60)), spoken])


def with_template(processor, monkeypatch, template):
    monkeypatch.setattr(processor, "chat_template", template)
    return processor


def test_a_template_may_refuse_system_prompts(processor, monkeypatch):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + processor.chat_template
    markers = find_markers(with_template(processor, monkeypatch, refusing))
    assert texts(processor, markers) == ("<|assistant|>", "</s>", "<|user|>")


def test_answers_that_nothing_closes_are_not_markers(processor, monkeypatch):
    unclosed = processor.chat_template.replace("</s>", "")
    assert find_markers(with_template(processor, monkeypatch, unclosed)) is None


def test_a_template_that_rewrites_earlier_turns_has_no_markers(processor, monkeypatch):
    assert (
        find_markers(with_template(processor, monkeypatch, "{{ messages | length }}" + processor.chat_template)) is None
    )


def test_marks_that_also_stand_within_answers_are_not_markers(processor, monkeypatch):
    ambiguous = processor.chat_template.replace("</s>", "\n")  # the check dialogues have answers of several lines
    assert find_markers(with_template(processor, monkeypatch, ambiguous)) is None


def test_an_unknown_format_is_an_error_not_a_missing_marker(processor):
    with pytest.raises(PromptError, match="prompt format 'alpaca'"):
        find_markers(processor, "alpaca")
