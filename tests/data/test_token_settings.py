"""Guards token counts without decoding: what the encoder gives, in every family's processor and for any size."""

import pytest
import torch
from PIL import Image

from routing_experts.data import token_settings
from routing_experts.data.encode import Encoder
from routing_experts.data.records import Record, Turn
from routing_experts.data.token_settings import TokenSettings
from routing_experts.errors import RecordError
from tiny_processors import PROCESSORS

ASK = Turn("<image>\nWhat is it?", "A kite.")
SIZES = [(16, 16), (60, 20), (20, 60), (33, 47)]


@pytest.mark.parametrize("family", PROCESSORS)
def test_counts_and_ids_are_the_encoder_s(family, monkeypatch, tmp_path):
    processor = PROCESSORS[family](monkeypatch)
    monkeypatch.setattr(token_settings, "load_processor", lambda model: processor)
    token_settings._made.cache_clear()
    counts, encoder = TokenSettings(family).count_tokens, Encoder(processor)
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
        assert counts(record) == len(whole.input_ids), record
        for name in ("input_ids", "labels", "segment_ids", "token_types"):
            found, expected = getattr(plain, name), getattr(whole, name)
            assert (found is None and expected is None) or torch.equal(found, expected), (record.id, name)
        assert plain.vision == {}
    token_settings._made.cache_clear()


@pytest.mark.parametrize("family", PROCESSORS)
def test_what_a_processor_refuses_is_a_fault_of_the_record(family, monkeypatch):
    """Guards sets against one picture that no model takes: Qwen's raise on a line of pixels, with and without it."""
    encoder = Encoder(PROCESSORS[family](monkeypatch))
    thin = Record("thin", (ASK,), (Image.new("RGB", (1, 400)),))
    found = []
    for encode in (encoder, encoder.without_pixels):
        try:
            found.append(len(encode(thin).input_ids))
        except RecordError as error:
            assert "record thin: the processor refuses it" in str(error)  # noqa: PT017 (some families take it)
            found.append(0)
    assert found[0] == found[1]
    assert (found[0] == 0) == family.startswith("qwen")
