"""Which finished samples are taken for answered, and which are asked again."""

import pytest
from PIL import Image

from routing_experts.data.records import Record, Turn
from routing_experts.evaluation.lmms.kept import SampleLog, key_of
from routing_experts.evaluation.lmms.samples import Asked


def asked_of(**generation):
    return Asked("t/test/0", generation, ("\n",), lambda: record_of())


def record_of(question="<image>\nWhich digit?", colour="red", system=""):
    return Record("0", (Turn(question, ""),), (Image.new("RGB", (4, 4), colour),), system)


@pytest.mark.parametrize(
    ("text", "generation", "is_taken"),
    [
        ("seven", {}, True),
        ("seven", {"do_sample": False, "temperature": 0}, True),
        ("", {}, False),
        ("seven", {"do_sample": True}, False),
    ],
    ids=["a word", "greedy", "silence", "drawn"],
)
def test_an_answer_that_would_come_again_is_taken(text, generation, is_taken, tmp_path):
    SampleLog(tmp_path, {}).add({"id": "t/test/0", "key": "k", "text": text})
    log = SampleLog(tmp_path, {})
    assert (log.get(asked_of(**generation), "k") is not None) == is_taken
    assert log.get(asked_of(**generation), "other") is None


def test_a_likelihood_has_no_text_and_is_taken(tmp_path):
    SampleLog(tmp_path, {}).add({"id": "t/test/0", "key": "k", "likelihood": -1.5})
    assert SampleLog(tmp_path, {}).get(asked_of(), "k") is not None


def test_a_key_is_of_all_that_is_shown_and_asked():
    same = key_of(record_of(), asked_of(max_new_tokens=8))
    assert same == key_of(record_of(), asked_of(max_new_tokens=8))
    others = {
        key_of(record_of(colour="blue"), asked_of(max_new_tokens=8)),
        key_of(record_of(question="<image>\nWhich?"), asked_of(max_new_tokens=8)),
        key_of(record_of(system="Be brief."), asked_of(max_new_tokens=8)),
        key_of(record_of(), asked_of(max_new_tokens=9)),
    }
    assert len(others | {same}) == 5
