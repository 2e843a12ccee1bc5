"""Guards what families' processors write for pictures: segments, labels, markers and batches that follow it."""

from importlib.util import find_spec

import pytest
import torch
from PIL import Image

from routing_experts.data.collate import Collator
from routing_experts.data.encode import IGNORED, Encoded, Encoder
from routing_experts.data.markers import find_markers
from routing_experts.data.records import Record, Turn
from routing_experts.errors import MissingExtraError, RecordError
from routing_experts.models.families import known_families
from routing_experts.models.load import load_processor
from routing_experts.models.spans import segments_from_ids
from routing_experts.training.parameters import group_of
from tiny_families import FAMILIES
from tiny_processors import PROCESSORS

SMALL, WIDE, TALL = (Image.new("RGB", size, (200, 30, 30)) for size in ((16, 16), (60, 20), (20, 60)))
ASK = Turn("<image>\nWhat is it?", "A kite.")
DIALOGUES = {
    "one": Record("one", (ASK,), (WIDE,)),
    "turns": Record("turns", (ASK, Turn("Sure?", "yes")), (TALL,), "Be brief."),
    "two": Record("two", (Turn("First <image>, then <image>: same?", "no"),), (SMALL, WIDE)),
    "later": Record("later", (ASK, Turn("<image>\nAnd this?", "no")), (WIDE, TALL)),
    "first_text": Record("first_text", (Turn("Ready?", "yes"), ASK), (WIDE,)),
    "text": Record("text", (Turn("Add 3 and 4.", "7"), Turn("Now add 5.", "12"))),
    "asked": Record("asked", (Turn("<image>\nWhat is it?", ""),), (TALL,)),
}


@pytest.fixture(params=PROCESSORS)
def family(request):
    return request.param


@pytest.fixture
def processor(family, monkeypatch):
    return PROCESSORS[family](monkeypatch)


@pytest.mark.parametrize("record", DIALOGUES.values(), ids=DIALOGUES)
def test_ids_alone_give_the_segments_that_training_has(family, processor, record):
    """Guards that inference, which knows ids only, finds the spans that the text's characters gave."""
    encoded, markers = Encoder(processor)(record), find_markers(processor)
    assert markers is not None
    config = FAMILIES[family](image=processor.image_token_id).config
    image_ids = known_families()[family].image_token_ids(config)
    found_BT = segments_from_ids(encoded.input_ids[None], None, image_ids, markers)
    assert torch.equal(found_BT[0], encoded.segment_ids)
    labelled = encoded.labels != IGNORED
    said = processor.tokenizer.decode(encoded.labels[labelled])
    end = processor.tokenizer.eos_token
    assert [one.strip() for one in said.split(end)[:-1]] == [turn.answer for turn in record.turns if turn.answer]
    is_picture = encoded.input_ids == processor.image_token_id
    assert bool(is_picture.any()) == bool(record.images)
    if record.id in ("one", "turns", "two", "asked"):
        assert encoded.segment_ids[is_picture].unique().tolist() == [0]
        last = is_picture.nonzero()[-1]
        assert (encoded.segment_ids[: last + 1] == 0).all()
    if record.id == "later":
        assert encoded.segment_ids[is_picture].unique().tolist() == [0, 3]


@torch.no_grad()
def test_a_batch_is_what_its_dialogues_are_alone(family, processor):
    """Guards pictures of several sizes and dialogues without any: logits by row, from the processor to the model."""
    vocabulary = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 1024}
    model = FAMILIES[family](image=processor.image_token_id, dtype=torch.float64, **vocabulary)
    encoder, collate = Encoder(processor), Collator(processor.tokenizer.pad_token_id)

    def logits(dialogues: list[Encoded]) -> torch.Tensor:
        batch = collate(dialogues)
        assert ("mm_token_type_ids" in batch) == (family == "qwen2_5_vl")
        given = {n: t.double() if n == "pixel_values" else t for n, t in batch.items()}
        return model(**{n: t for n, t in given.items() if n not in ("labels", "segment_ids", "example_keys")}).logits

    for names in (("two", "text", "one", "later"), ("text", "text"), ("text", "turns")):
        encoded = [encoder(DIALOGUES[name]) for name in names]
        together = logits(encoded)
        for row, one in enumerate(encoded):
            alone = logits([one])[0]
            assert (together[row, : len(alone)] - alone).abs().max() <= 1e-10
    twice = [encoder(DIALOGUES["one"]), encoder(DIALOGUES["two"])]
    twice[1].vision["pixel_values"] = twice[1].vision["pixel_values"] + 1
    assert not torch.equal(logits(twice)[1], logits([encoder(DIALOGUES[name]) for name in ("one", "two")])[1])


def test_a_stand_in_picture_reaches_the_tower_and_nothing_else(family, processor):
    """Guards batches without pictures beside others that have some: the projector is called and gets zero gradients,
    and the dialogues' logits are what they were."""
    vocabulary = {"vocab_size": len(processor.tokenizer), "max_position_embeddings": 1024}
    model = FAMILIES[family](image=processor.image_token_id, dtype=torch.float64, **vocabulary)
    encoder, pad = Encoder(processor), processor.tokenizer.pad_token_id
    texts = [encoder(DIALOGUES["text"]), encoder(Record("short", (Turn("Add 3.", "3"),)))]
    projector = [p for name, p in model.named_parameters() if group_of(name) == "projector"]

    def logits(collate: Collator) -> torch.Tensor:
        batch = collate(texts)
        real = batch["attention_mask"].bool()
        given = {n: t.double() if n == "pixel_values" else t for n, t in batch.items()}
        out = model(**{n: t for n, t in given.items() if n not in ("labels", "segment_ids", "example_keys")}).logits
        return out[real]

    plain, stood_in = logits(Collator(pad)), logits(Collator(pad, stand_in=encoder.stand_in()))
    torch.testing.assert_close(stood_in, plain, atol=1e-10, rtol=0)
    stood_in.square().sum().backward()
    assert projector
    assert all(p.grad is not None and not bool(p.grad.any()) for p in projector)


def test_a_stand_in_is_one_picture_however_a_processor_cuts_it(processor):
    """Guards text-only batches against a processor that makes many tiles of one picture, and against max_length."""
    encoder = Encoder(processor, max_length=2)
    stand_in = encoder.stand_in()
    assert encoder.max_length == 2
    if "pixel_attention_mask" in stand_in.vision:
        assert stand_in.vision["pixel_values"].shape[:2] == (1, 1)
        with_tiles = Encoder(processor)(Record("white", (ASK,), (Image.new("RGB", (64, 64), "white"),)))
        num_pictures = with_tiles.vision["pixel_values"].shape[1]
        assert num_pictures > 1
        in_dialogue = int((with_tiles.input_ids == processor.image_token_id).sum())
        assert len(stand_in.input_ids) == in_dialogue // num_pictures


def test_what_a_processor_refuses_names_its_record(family, processor):
    """Guards a run of hours: the message says which record it was."""
    if family != "qwen2_5_vl":
        pytest.skip("takes any shape")
    with pytest.raises(RecordError, match=r"record thin: the processor refuses it \(absolute aspect ratio"):
        Encoder(processor)(Record("thin", (ASK,), (Image.new("RGB", (1000, 4)),)))


def test_smaller_pictures_are_filled_up():
    """Guards pictures by dialogue that differ in number and size: zeros fill, and the mask says so."""
    dialogues = []
    for pictures, height in ((1, 4), (0, 0), (3, 2)):
        vision = {
            "pixel_values": torch.ones(1, pictures, 3, height, 2),
            "pixel_attention_mask": torch.ones(1, pictures, height, 2),
        }
        ids = torch.arange(3)
        dialogues.append(Encoded(str(pictures), ids, ids, ids, vision if pictures else {}))
    batch = Collator(0)(dialogues)
    assert batch["pixel_values"].shape == (3, 3, 3, 4, 2)
    assert batch["pixel_attention_mask"].sum((1, 2, 3)).tolist() == [8.0, 0.0, 12.0]
    assert torch.equal(batch["pixel_values"][:, :, 0], batch["pixel_attention_mask"])


def test_a_saved_processor_loads_with_pil_pictures_or_says_what_it_needs(family, processor, tmp_path):
    """Guards families whose processors also take videos: a hint without torchvision, never a traceback."""
    FAMILIES[family](image=processor.image_token_id).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    needed = {"qwen2_5_vl": ("torchvision",), "smolvlm": ("torchvision", "num2words")}.get(family, ())
    lacking = [name for name in needed if find_spec(name) is None]
    if not lacking:
        assert type(load_processor(tmp_path).image_processor) is type(processor.image_processor)
        return
    with pytest.raises(MissingExtraError, match=f"videos as well, needs {lacking[0]}"):
        load_processor(tmp_path)
