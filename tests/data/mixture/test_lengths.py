"""Guards token counts without decoding: what the encoder gives, in every family's processor and for any size."""

import pytest
import torch
from PIL import Image

from routing_experts.data.encode import Encoder
from routing_experts.data.mixture import lengths
from routing_experts.data.mixture.lengths import TokenCounter
from routing_experts.data.records import Record, Turn
from tiny_processors import PROCESSORS

ASK = Turn("<image>\nWhat is it?", "A kite.")
SIZES = [(16, 16), (60, 20), (20, 60), (33, 47)]


@pytest.mark.parametrize("family", PROCESSORS)
def test_counts_and_ids_are_the_encoder_s(family, monkeypatch, tmp_path):
    processor = PROCESSORS[family](monkeypatch)
    monkeypatch.setattr(lengths, "load_processor", lambda model: processor)
    lengths._loaded.cache_clear()
    counter, encoder = TokenCounter(family), Encoder(processor)
    pictures = [Image.new("RGB", size) for size in SIZES]
    exif = Image.Exif()
    exif[0x0112] = 8
    pictures[1].save(tmp_path / "turned.jpg", exif=exif)
    records = [Record("text", (Turn("Add 3 and 4.", "7"), Turn("Now add 5.", "12")))]
    records += [Record("one", (ASK, Turn("Sure?", "yes")), (picture,), "Be brief.") for picture in pictures]
    records += [Record("two", (Turn("First <image>, then <image>: same?", "no"),), tuple(pictures[1:3]))]
    records += [Record("file", (ASK,), (tmp_path / "turned.jpg",))]
    for record in records * 2:  # sizes that were met before, too
        whole, plain = encoder(record), encoder.without_pixels(record)
        assert counter(record) == len(whole.input_ids), record
        for name in ("input_ids", "labels", "segment_ids", "token_types"):
            found, expected = getattr(plain, name), getattr(whole, name)
            assert (found is None and expected is None) or torch.equal(found, expected), (record.id, name)
        assert plain.vision == {}
    lengths._loaded.cache_clear()
