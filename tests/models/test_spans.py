"""Guards spans: ``segments_from_ids`` against a textbook twin and against the characters that training goes by."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

import routing_experts.pocket
from routing_experts.config import TurnMarkers
from routing_experts.data.collate import Collator
from routing_experts.data.digits import DigitsTask
from routing_experts.data.encode import Encoder
from routing_experts.data.markers import find_markers
from routing_experts.models.spans import (
    answer_segment,
    only_last_question,
    open_history,
    question_segment,
    segments_from_ids,
    turns_of,
)

PAD, BOS, EOS, IMAGE, USER, ASSISTANT = range(6)
WORDS = (6, 7, 8, 9)
ONE_TOKEN = TurnMarkers((ASSISTANT,), (EOS,), (USER,))
SEVERAL_TOKENS = TurnMarkers((6, ASSISTANT), (EOS, 7), (USER, 8))
WITHOUT_USER = TurnMarkers((ASSISTANT,), (EOS,))


def twin(row, mask, image_ids, markers):
    """One row, token by token, as the module's docstring tells it."""
    real = [place for place, kept in enumerate(mask) if kept]
    segments = [-1] * len(row)
    if not real:
        return segments

    def ends(place, pattern):
        start = place - len(pattern) + 1
        return bool(pattern) and start >= real[0] and tuple(row[start : place + 1]) == tuple(pattern)

    turn, answering, last_image, user_start = 1, False, None, None
    for place in real:
        segments[place] = 2 * turn if answering else 2 * turn - 1
        if row[place] in image_ids and turn == 1 and not answering:
            last_image = place
        if markers is None:
            continue
        if user_start is None and ends(place, markers.user_prompt):
            user_start = place - len(markers.user_prompt) + 1
        closes = ends(place, markers.end_of_answer)
        if answering and closes:
            turn, answering = turn + 1, False
        elif not answering and ends(place, markers.generation_prompt) and not closes:
            answering = True
    if last_image is not None:
        context = last_image + 1
    else:
        context = user_start if user_start is not None and user_start > real[0] else real[0] + 1
    for place in real:
        if place < context:
            segments[place] = 0
    return segments


@st.composite
def dialogues(draw, markers):
    """A row as a template would write it, now and then with marks where none should stand."""
    words = st.lists(st.sampled_from(WORDS), max_size=4)
    question = st.lists(st.sampled_from((*WORDS, IMAGE, IMAGE)), max_size=6)
    noise = st.lists(st.sampled_from((*WORDS, ASSISTANT, USER)), max_size=4)
    row = [*draw(st.sampled_from(([], [BOS]))), *draw(words)]
    num_turns = draw(st.integers(1, 4))
    for turn in range(num_turns):
        row += [*markers.user_prompt, *draw(question), *markers.generation_prompt]
        if turn < num_turns - 1 or draw(st.booleans()):
            row += [*draw(noise), *markers.end_of_answer]
    return row


def padded(rows, side, pad):
    longest = max(map(len, rows))
    fill = [[pad] * (longest - len(row)) for row in rows]
    ids = [f + row if side == "left" else row + f for row, f in zip(rows, fill, strict=True)]
    mask = [
        [0] * len(f) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(f)
        for row, f in zip(rows, fill, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


def assert_twins_agree(rows, side, pad, markers):
    ids, mask = padded(rows, side, pad)
    found = segments_from_ids(ids, mask, {IMAGE}, markers)
    expected = [twin(row, kept, {IMAGE}, markers) for row, kept in zip(ids.tolist(), mask.tolist(), strict=True)]
    assert found.tolist() == expected
    assert found.dtype == torch.int64
    for row, kept, alone in zip(rows, mask.bool(), found, strict=True):
        single = segments_from_ids(torch.tensor([row]), None, {IMAGE}, markers)
        assert torch.equal(single[0], alone[kept])


sides = st.sampled_from(("left", "right"))
pads = st.sampled_from((PAD, EOS))  # many tokenizers pad with their EOS


@pytest.mark.parametrize("markers", [ONE_TOKEN, SEVERAL_TOKENS, WITHOUT_USER])
@settings(max_examples=120)
@given(data=st.data(), side=sides, pad=pads)
def test_dialogues_agree_with_the_textbook_twin(markers, data, side, pad):
    assert_twins_agree(data.draw(st.lists(dialogues(markers), min_size=1, max_size=4)), side, pad, markers)


@settings(max_examples=80)
@given(data=st.data(), side=sides)
def test_without_markers_all_after_the_context_is_one_question(data, side):
    rows = data.draw(st.lists(dialogues(ONE_TOKEN), min_size=1, max_size=3))
    assert_twins_agree(rows, side, PAD, None)
    found = segments_from_ids(*padded(rows, side, PAD), {IMAGE}, None)
    assert found.max() <= question_segment(1)


@pytest.mark.parametrize("markers", [ONE_TOKEN, WITHOUT_USER, SEVERAL_TOKENS])
@settings(max_examples=120)
@given(rows=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=14), min_size=1, max_size=4), side=sides)
def test_any_ids_agree_with_the_textbook_twin(markers, rows, side):
    assert_twins_agree(rows, side, EOS, markers)


def test_a_worked_example():
    row = [BOS, USER, IMAGE, IMAGE, 6, ASSISTANT, 7, EOS, USER, IMAGE, 8, ASSISTANT]
    expected = [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert segments_from_ids(torch.tensor([row]), None, {IMAGE}, ONE_TOKEN)[0].tolist() == expected
    assert turns_of(torch.tensor([-1, *expected])).tolist() == [-1, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert (question_segment(2), answer_segment(2)) == (3, 4)


def test_an_answer_that_quotes_the_generation_prompt_stays_one_answer():
    row = [BOS, USER, 6, ASSISTANT, 7, ASSISTANT, 7, EOS, USER, 8, ASSISTANT]
    expected = [0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    assert segments_from_ids(torch.tensor([row]), None, {IMAGE}, ONE_TOKEN)[0].tolist() == expected


def test_padding_never_completes_a_mark():
    markers = TurnMarkers((EOS, 9), (EOS,))  # the pad id begins the mark, the row continues it
    ids, mask = torch.tensor([[EOS, EOS, 9, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1]])
    assert segments_from_ids(ids, mask, {IMAGE}, markers)[0].tolist() == [-1, -1, 0, 1, 1]


def test_a_row_of_padding_and_a_row_of_pictures():
    ids, mask = torch.tensor([[PAD, PAD, PAD], [PAD, BOS, IMAGE]]), torch.tensor([[0, 0, 0], [0, 1, 1]])
    segments = segments_from_ids(ids, mask, {IMAGE}, None)
    assert segments.tolist() == [[-1, -1, -1], [-1, 0, 0]]
    assert only_last_question(segments).tolist() == segments.tolist()


def test_views_for_inference():
    segments = torch.tensor([[0, 0, 1, 1, 2, 3, 3, 4], [-1, -1, 0, 1, 2, 2, 3, 3], [0, 1, 1, 1, 1, -1, -1, -1]])
    assert open_history(segments).tolist() == [
        [0, 0, 1, 1, 1, 1, 1, 2],
        [-1, -1, 0, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, -1, -1, -1],
    ]
    assert only_last_question(segments).tolist() == [
        [0, 0, 2, 2, 2, 1, 1, 2],
        [-1, -1, 0, 2, 2, 2, 1, 1],
        [0, 1, 1, 1, 1, -1, -1, -1],
    ]


@pytest.mark.parametrize("prompt_format", ["chat_template", "vicuna_v1"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_digits_batches_agree_with_the_encoder(prompt_format, side):
    processor = AutoProcessor.from_pretrained(Path(routing_experts.pocket.__file__).parent, backend="pil")
    encoder, task = Encoder(processor, prompt_format), DigitsTask(text_share=0.4)
    batch = Collator(processor.tokenizer.pad_token_id, side)([encoder(task[index]) for index in range(64)])
    markers = find_markers(processor, prompt_format)
    found = segments_from_ids(batch["input_ids"], batch["attention_mask"], {encoder.image_token_id}, markers)
    assert torch.equal(found, batch["segment_ids"])
