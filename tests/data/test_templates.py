"""Written prompt formats as chat templates: what a processor is saved with says what the format says."""

import copy
from dataclasses import replace

import pytest
from jinja2.exceptions import TemplateError

from routing_experts.data.prompts import WRITTEN, render
from routing_experts.data.records import Turn
from routing_experts.data.templates import chat_template_of

TURNS = (Turn("<image>\nWhat is it?", "A kite."), Turn("Which colour?", "red"), Turn("Why?", ""))
every_format = pytest.mark.parametrize("name", WRITTEN)


@pytest.fixture
def templated(processor, request):
    """The pocket model's processor with the marks of all formats, and one format's template."""

    def make(name):
        marked = copy.deepcopy(processor)
        marks = [token for layout in WRITTEN.values() for token in layout.tokens]
        marked.tokenizer.add_special_tokens({"additional_special_tokens": marks})
        marked.chat_template = chat_template_of(marked, name)
        return marked

    return make


@every_format
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_a_template_writes_what_its_format_writes(templated, name, system):
    """Guards every piece of a layout, before the system prompt and behind the last answer."""
    marked = templated(name)
    written, through = render(marked, TURNS, system, name), render(marked, TURNS, system, "chat_template")
    assert through == written
    ends = WRITTEN[name].ends
    answered = render(marked, TURNS[:2], system, name).text
    if ends is not None:  # a template cannot know which answer is the last
        answered = answered.removesuffix(ends) + WRITTEN[name].closes
    assert render(marked, TURNS[:2], system, "chat_template").text == answered


@every_format
def test_pictures_go_first_and_strangers_nowhere(templated, name):
    marked = templated(name)
    asked = [{"type": "text", "text": "What is it?"}, {"type": "image"}]
    text = marked.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)
    assert "<image>\nWhat is it?" in text
    with pytest.raises(TemplateError, match="a part of type audio"):
        marked.apply_chat_template([{"role": "user", "content": [*asked, {"type": "audio"}]}])


def test_messages_that_would_be_lost_are_refused(templated):
    """Guards dialogues of tools and of prompts in between: the layout has no place for them."""
    marked, asked = templated("vicuna_v1"), {"role": "user", "content": "What?"}
    answered = {"role": "assistant", "content": "A kite."}
    for message in ({"role": "system", "content": "Be brief."}, {"role": "tool", "content": "7"}):
        with pytest.raises(TemplateError, match=f"a message from {message['role']}: user and assistant speak"):
            marked.apply_chat_template([asked, answered, message, asked])


def test_the_only_picture_is_moved_before_the_words_as_llava_moves_it(templated):
    marked = templated("vicuna_v1")
    first = render(marked, TURNS[:1], "", "vicuna_v1").text
    for question in ("What is it?\n<image>", "What <image>is it?", "<image> What is it?"):
        assert render(marked, (replace(TURNS[0], question=question),), "", "vicuna_v1").text == first
    several = "First <image>, then <image>"
    assert several in render(marked, (Turn(several, "A."),), "", "vicuna_v1").text
