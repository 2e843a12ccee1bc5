"""Guards batches: padding on the stated side with the stated values, pictures in the order of their dialogues."""

import pytest
import torch

from routing_experts.data.collate import Collator
from routing_experts.data.dataset import EncodedDataset
from routing_experts.data.digits import DigitsTask
from routing_experts.data.encode import Encoded, Encoder


def dialogue(name, length, pictures=0):
    ids = torch.arange(10, 10 + length)
    vision = {"pixel_values": torch.full((pictures, 3, 2, 2), float(length))} if pictures else {}
    return Encoded(name, ids, ids + 100, torch.ones_like(ids), vision)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_on_one_side_and_marked_everywhere(side):
    batch = Collator(pad_token_id=7, padding_side=side)([dialogue("a", 4), dialogue("b", 2)])
    fill = slice(None, 2) if side == "left" else slice(2, None)
    text = slice(2, None) if side == "left" else slice(None, 2)
    for name, padding in (("input_ids", 7), ("attention_mask", 0), ("labels", -100), ("segment_ids", -1)):
        assert batch[name].shape == (2, 4)
        assert batch[name].dtype == torch.int64
        assert (batch[name][1, fill] == padding).all()
    assert batch["input_ids"][1, text].tolist() == [10, 11]
    assert batch["labels"][0].tolist() == [110, 111, 112, 113]
    assert batch["attention_mask"].sum(1).tolist() == [4, 2]
    assert "pixel_values" not in batch


def test_pictures_of_all_dialogues_are_stacked_in_order():
    batch = Collator(0)([dialogue("a", 3, pictures=2), dialogue("text", 2), dialogue("b", 5, pictures=1)])
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [3.0, 3.0, 5.0]


class CountingEncoder:
    def __init__(self, processor):
        self.encoder, self.calls = Encoder(processor), 0

    def __call__(self, record):
        self.calls += 1
        return self.encoder(record)


@pytest.mark.parametrize(("keep", "calls"), [(True, 3), (False, 6)])
def test_datasets_encode_once_if_they_may_keep(processor, keep, calls):
    encoder = CountingEncoder(processor)
    dataset = EncodedDataset(DigitsTask(), 3, encoder, keep=keep)
    first, second = ([dataset[index] for index in range(len(dataset))] for _ in range(2))
    assert encoder.calls == calls
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)


def test_encoded_digits_make_a_batch(processor):
    encoder, task = Encoder(processor), DigitsTask(text_share=0.5)
    encoded = [encoder(task[index]) for index in range(12)]
    batch = Collator(processor.tokenizer.pad_token_id)(encoded)
    pictured = [index for index in range(12) if task[index].images]
    assert 0 < len(pictured) < 12
    assert len(batch["pixel_values"]) == len(pictured)
    for row, one in enumerate(encoded):
        assert torch.equal(batch["input_ids"][row][batch["attention_mask"][row].bool()], one.input_ids)


def test_a_batch_without_pictures_gets_one_that_nobody_sees(processor):
    """Guards processes that train together: the tower runs for all, and the batch's own tokens stay as they are."""
    encoder = Encoder(processor)
    task = DigitsTask(text_share=1.0)
    texts = [encoder(task[index]) for index in range(3)]
    stand_in = encoder.stand_in()
    plain, batch = Collator(0)(texts), Collator(0, stand_in=stand_in)(texts)
    length, count = plain["input_ids"].shape[1], len(stand_in.input_ids)
    assert count == (stand_in.input_ids == processor.image_token_id).sum() > 0
    assert (batch["input_ids"] == processor.image_token_id).sum() == count
    for name in ("input_ids", "attention_mask", "labels", "segment_ids"):
        seen = batch["attention_mask"][:, :length].bool()
        assert torch.equal(batch[name][:, :length][seen], plain[name][plain["attention_mask"].bool()])
    hidden = batch["attention_mask"] == 0
    assert bool((batch["labels"][hidden] == -100).all() and (batch["segment_ids"][hidden] == -1).all())
    assert torch.equal(batch["pixel_values"], stand_in.vision["pixel_values"])
    assert bool(stand_in.vision["pixel_values"].any())
    with_picture = [*texts, encoder(DigitsTask(text_share=0.0)[0])]
    assert torch.equal(
        Collator(0, stand_in=stand_in)(with_picture)["input_ids"], Collator(0)(with_picture)["input_ids"]
    )
