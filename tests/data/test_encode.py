"""Guards encoding: labels are exactly the answers and their EOS, ids are those of tokenising in one pass."""

import copy
import dataclasses
import re

import pytest
import torch
from PIL import Image

from routing_experts.data.digits import DigitsTask
from routing_experts.data.encode import IGNORED, Encoder, user_header
from routing_experts.data.prompts import WRITTEN, render
from routing_experts.data.records import Record, Turn
from routing_experts.errors import PromptError, RecordError

PICTURE = Image.new("RGB", (40, 30), (200, 30, 30))
VISUAL_TOKENS = 16  # the pocket model's: (32 / 8)²
FORMATS = ("chat_template", "vicuna_v1")
ASK, READ = Turn("<image>\nWhat is it?", "A kite."), Turn("Which colour?", "red")
DIALOGUES = {
    "one_turn": Record("one", (ASK,), (PICTURE,)),
    "several_turns": Record("several", (ASK, READ, Turn("Sure?", "yes")), (PICTURE,)),
    "text_only": Record("text", (Turn("Add 3 and 4.", "7"), Turn("Now add 5.", "12"))),
    "several_images": Record("two", (Turn("<image><image>\nSame?", "yes"), READ), (PICTURE, PICTURE)),
    "images_apart": Record("apart", (Turn("First <image>, then <image>: same?", "yes"),), (PICTURE, PICTURE)),
    "later_image": Record("later", (Turn("Ready?", "yes"), ASK, Turn("<image>\nAnd this?", "no")), (PICTURE, PICTURE)),
    "both": Record("both", (ASK, Turn("<image>\nAnd this?", "no")), (PICTURE, PICTURE)),
    "system": Record("system", (ASK, READ), (PICTURE,), "Be brief."),
    "system_text": Record("systemtext", (Turn("Add 3 and 4.", "7"),), (), "Be brief."),
    "unanswered": Record("open", (ASK, Turn("Which colour?", "")), (PICTURE,)),
    "only_question": Record("ask", (Turn("<image>\nWhat is it?", ""),), (PICTURE,)),
    "accents": Record("accents", (Turn("Größe? 漢字 🙂", "naïve 🙂🙂 ¿qué?"), Turn("é", "ü")), ()),
}
each_dialogue = pytest.mark.parametrize("record", DIALOGUES.values(), ids=DIALOGUES.keys())
each_format = pytest.mark.parametrize("prompt_format", FORMATS)


@pytest.fixture(scope="module")
def encoders(processor, chatml_processor):
    return {name: Encoder(processor, name) for name in FORMATS} | {"chatml": Encoder(chatml_processor)}


def answers_of(record):
    return [turn.answer for turn in record.turns if turn.answer]


@each_dialogue
@each_format
def test_labels_are_exactly_the_answers_with_their_eos(encoders, processor, record, prompt_format):
    encoded = encoders[prompt_format](record)
    labelled = encoded.labels != IGNORED
    assert torch.equal(encoded.labels[labelled], encoded.input_ids[labelled])
    text = processor.tokenizer.decode(encoded.labels[labelled], clean_up_tokenization_spaces=False)
    space = " " if prompt_format == "vicuna_v1" else ""
    assert text == "".join(f"{space}{answer}</s>" for answer in answers_of(record))
    for turn, answer in enumerate(answers_of(record), start=1):
        ids = encoded.input_ids[encoded.segment_ids == 2 * turn]
        assert processor.tokenizer.decode(ids) == f"{space}{answer}</s>"


@each_dialogue
@pytest.mark.parametrize("prompt_format", [*FORMATS, "chatml"])
def test_ids_are_those_of_tokenising_the_expanded_text_in_one_pass(encoders, record, prompt_format):
    encoder = encoders[prompt_format]
    text = render(encoder.processor, record.turns, record.system, encoder.prompt_format).text
    ids = encoder.processor.tokenizer(text.replace("<image>", "<image>" * VISUAL_TOKENS))["input_ids"]
    encoded = encoder(record)
    assert encoded.input_ids.tolist() == ids
    assert encoded.input_ids.dtype == encoded.labels.dtype == encoded.segment_ids.dtype == torch.int64
    assert len(encoded.vision.get("pixel_values", ())) == len(record.images)
    assert set(encoded.vision) == ({"pixel_values"} if record.images else set())


@pytest.fixture(scope="module")
def marked_processor(processor):
    """The pocket model's processor with the marks of Llama 3 and of ChatML."""
    marked = copy.deepcopy(processor)
    marks = [token for layout in WRITTEN.values() for token in layout.tokens]
    marked.tokenizer.add_special_tokens({"additional_special_tokens": marks})
    return marked


def vicuna_by_hand(record, system):
    """Pieces of a prompt, and whether each is an answer."""
    yield f"{system} ", False
    for turn in record.turns:
        question = turn.question
        if question.count("<image>") == 1:  # as LLaVA's code moves it
            question = "<image>\n" + question.replace("<image>", "").strip()
        yield f"USER: {question} ASSISTANT:", False
        yield f" {turn.answer}</s>", True


def llama_by_hand(record, system):
    yield f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>", False
    for turn in record.turns:
        yield f"<|start_header_id|>user<|end_header_id|>\n\n{turn.question}<|eot_id|>", False
        yield "<|start_header_id|>assistant<|end_header_id|>\n\n", False
        yield f"{turn.answer}{'<|end_of_text|>' if turn is record.turns[-1] else '<|eot_id|>'}", True


def hermes_by_hand(record, system):
    yield f"<|im_start|>system\n{system}<|im_end|>", False
    for turn in record.turns:
        yield f"<|im_start|>user\n{turn.question}<|im_end|>", False
        yield "<|im_start|>assistant\n", False
        yield f"{turn.answer}<|im_end|>", True


BY_HAND = {"vicuna_v1": vicuna_by_hand, "llama_3": llama_by_hand, "hermes_2": hermes_by_hand}


@each_dialogue
@pytest.mark.parametrize("prompt_format", WRITTEN)
def test_ids_and_labels_are_those_of_splitting_by_hand(marked_processor, record, prompt_format):
    """As LLaVA's own code does: pieces between pictures and answers tokenised apart, pictures' ids put in between."""
    tokenizer, encoder = marked_processor.tokenizer, Encoder(marked_processor, prompt_format)
    ids = [tokenizer.bos_token_id]  # Llama 3's own mark is no BOS to this tokenizer
    labels = [IGNORED]
    pieces = BY_HAND[prompt_format](record, record.system or WRITTEN[prompt_format].system)
    for piece, is_answer in pieces:
        if is_answer and piece.strip() in ("</s>", "<|end_of_text|>", "<|im_end|>"):
            break  # a question that waits for its answer
        for place, chunk in enumerate(piece.split("<image>")):
            shown = [encoder.image_token_id] * VISUAL_TOKENS if place else []
            said = tokenizer(chunk, add_special_tokens=False)["input_ids"]
            ids += shown + said
            labels += [IGNORED] * len(shown) + (said if is_answer else [IGNORED] * len(said))
    encoded = encoder(record)
    assert encoded.input_ids.tolist() == ids
    assert encoded.labels.tolist() == labels


@each_dialogue
@pytest.mark.parametrize("prompt_format", [*FORMATS, "chatml"])
def test_segments_never_go_back_and_cover_each_turn(encoders, record, prompt_format):
    segments = encoders[prompt_format](record).segment_ids
    assert (segments.diff() >= 0).all()
    assert segments[0] == 0
    assert segments.unique().tolist() == list(range(1 + len(record.turns) + len(answers_of(record))))


def context_text(encoder, record):
    encoded = encoder(record)
    return encoder.processor.tokenizer.decode(encoded.input_ids[encoded.segment_ids == 0])


@pytest.mark.parametrize(
    ("name", "prompt_format", "expected"),
    [
        ("one_turn", "chat_template", "<s><|user|>" + "<image>" * 16),
        ("several_images", "chat_template", "<s><|user|>" + "<image>" * 32),
        ("images_apart", "chat_template", "<s><|user|>First " + "<image>" * 16 + ", then " + "<image>" * 16),
        ("both", "chat_template", "<s><|user|>" + "<image>" * 16),
        ("later_image", "chat_template", "<s>"),
        ("text_only", "chat_template", "<s>"),
        ("system_text", "chat_template", "<s>Be brief."),
        ("system_text", "vicuna_v1", "<s>Be brief."),
        ("system_text", "chatml", "<s><|im_start|>system\nBe brief.<|im_end|>\n"),
    ],
)
def test_context_is_the_first_pictures_or_the_system_prompt(encoders, name, prompt_format, expected):
    assert context_text(encoders[prompt_format], DIALOGUES[name]) == expected


def test_pictures_of_later_turns_belong_to_their_question(encoders):
    encoded = encoders["chat_template"](DIALOGUES["later_image"])
    is_picture = encoded.input_ids == encoders["chat_template"].image_token_id
    assert encoded.segment_ids[is_picture].tolist() == [3] * VISUAL_TOKENS + [5] * VISUAL_TOKENS


def test_a_template_that_writes_bos_gets_no_second_one(processor, monkeypatch):
    plain = Encoder(processor)(DIALOGUES["text_only"])
    monkeypatch.setattr(processor, "chat_template", "<s>" + processor.chat_template)
    written = Encoder(processor)(DIALOGUES["text_only"])
    assert torch.equal(written.input_ids, plain.input_ids)
    assert torch.equal(written.segment_ids, plain.segment_ids)


def test_digits_records_encode_with_their_answers(encoders, processor):
    task = DigitsTask()
    for index in range(100):
        record = task[index]
        encoded = encoders["chat_template"](record)
        text = processor.tokenizer.decode(encoded.labels[encoded.labels != IGNORED])
        assert text == "".join(f"{turn.answer}</s>" for turn in record.turns)


def test_user_headers_are_read_from_the_format(processor, chatml_processor):
    assert user_header(processor, "chat_template") == "<|user|>"
    assert user_header(processor, "vicuna_v1") == " USER: "
    assert user_header(chatml_processor, "chat_template") == "<|im_start|>user\n"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Record("r1", (Turn("<image>\nWhat?", "x"),)), "record r1: 1 <image> placeholders but 0 pictures"),
        (Record("r2", (Turn("What?", "x"),), (PICTURE,)), "record r2: 0 <image> placeholders but 1 pictures"),
        (Record("r3", (Turn("<image>What?", "an <image>"),), (PICTURE,)), "record r3: 2 <image> placeholders but 1"),
        (Record("r4", (Turn("What?", "x " * 200),)), "record r4: 204 tokens, more than max_length=100"),
    ],
)
def test_records_that_do_not_fit_are_refused(processor, record, message):
    encoder = Encoder(processor, max_length=100)
    with pytest.raises(RecordError) as caught:
        encoder(record)
    assert re.sub(r"\d+ tokens", "204 tokens", str(caught.value)).startswith(message)


def test_prompt_errors_name_the_record(encoders):
    with pytest.raises(PromptError, match="record r5: turn 1 of 2 has no answer"):
        encoders["chat_template"](Record("r5", (Turn("a", ""), Turn("b", "c"))))


def test_a_template_that_refuses_the_dialogue_is_reported(processor, monkeypatch):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    monkeypatch.setattr(processor, "chat_template", refusing + processor.chat_template)
    encoder = Encoder(processor)
    assert encoder(DIALOGUES["one_turn"]).id == "one"
    with pytest.raises(PromptError, match=r"record system: the processor's chat template refuses.*no system here"):
        encoder(DIALOGUES["system"])


def test_unusable_processors_are_refused(processor, monkeypatch):
    with pytest.raises(PromptError, match="prompt format 'alpaca'"):
        Encoder(processor, "alpaca")
    monkeypatch.setattr(processor, "chat_template", None)
    with pytest.raises(PromptError, match="has no chat template"):
        Encoder(processor)
    assert Encoder(processor, "vicuna_v1")(DIALOGUES["one_turn"]).id == "one"


class OtherExpansion:
    """A processor that changes more than the placeholders."""

    def __init__(self, processor):
        self.inner = processor

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, **options):
        features = self.inner(**options)
        features["input_ids"][0][-2] += 1
        return features


def test_a_processor_that_rewrites_text_is_refused(processor):
    encoder = Encoder(OtherExpansion(processor))
    with pytest.raises(PromptError, match=r"record one: from token .* the processor changed more"):
        encoder(DIALOGUES["one_turn"])


def test_a_slow_tokenizer_is_refused(processor):
    encoder = Encoder(processor)

    class Slow:
        is_fast = False
        bos_token = "<s>"

        def __init__(self):
            self.calls = processor.tokenizer

        def __call__(self, *args, **options):
            return self.calls(*args, **options)

    class WithSlow(OtherExpansion):
        tokenizer = Slow()

        def __call__(self, **options):
            return self.inner(**options)

    encoder.processor = WithSlow(processor)
    with pytest.raises(PromptError, match="Slow does not say which characters"):
        encoder(DIALOGUES["text_only"])


def test_an_eos_that_the_tokenizer_appends_belongs_to_the_last_answer(processor):
    encoder = Encoder(processor)

    class Appending(OtherExpansion):
        def __call__(self, **options):
            features = self.inner(**options)
            features["input_ids"][0].append(2)
            return features

        @property
        def tokenizer(self):
            inner = self.inner.tokenizer

            class Tokenizer:
                is_fast, bos_token = True, inner.bos_token

                def __call__(self, *args, **options):
                    plain = inner(*args, **options)
                    plain["input_ids"].append(2)
                    plain["offset_mapping"].append((0, 0))
                    return plain

            return Tokenizer()

    encoder.processor = Appending(processor)
    encoded = encoder(DIALOGUES["text_only"])
    assert encoded.segment_ids[-3:].tolist() == [4, 4, 4]


def test_encoding_does_not_change_the_record(encoders):
    record = DIALOGUES["several_turns"]
    copy = dataclasses.replace(record)
    encoders["chat_template"](record)
    assert record == copy
