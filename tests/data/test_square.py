"""Guards padding to squares: LLaVA's own steps, written out with Pillow, give the same pixels; processors remember."""

import numpy as np
import pytest
from PIL import Image

from routing_experts.data.encode import Encoder
from routing_experts.data.records import Record, Turn
from routing_experts.data.square import padding_to_square
from routing_experts.errors import ConfigError
from routing_experts.models.load import load_processor
from tiny_processors import PROCESSORS


def by_hand(picture: Image.Image, mean: list[float], std: list[float], side: int) -> np.ndarray:
    """The canvas of the longer side, filled with the mean colour, then scaled and normalised."""
    edge = max(picture.size)
    canvas = Image.new("RGB", (edge, edge), tuple(int(255 * value) for value in mean))
    canvas.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
    scaled = np.asarray(canvas.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    return ((scaled - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(50, 31), (31, 50), (40, 40), (1, 60)])
def test_pixels_are_those_of_llava_s_own_steps(size):
    processor = padding_to_square(load_processor("pocket"))
    values = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    record = Record("r", (Turn("<image>\nWhat?", "This."),), (Image.fromarray(values),))
    found = Encoder(processor)(record).vision["pixel_values"][0]
    own = processor.image_processor
    expected = by_hand(Image.fromarray(values), own.image_mean, own.image_std, own.size["height"])
    assert np.abs(found.numpy() - expected).max() < 1e-5


def test_a_saved_processor_pads_on_and_the_first_one_is_as_it_was(tmp_path):
    first = load_processor("pocket")
    padding = padding_to_square(first)
    assert not getattr(first.image_processor, "do_pad", False)
    padding.save_pretrained(tmp_path)
    again = load_processor(tmp_path)
    assert again.image_processor.do_pad
    assert padding_to_square(again) is again
    wide = Image.new("RGB", (64, 16), "red")
    pixels = [processor.image_processor(wide)["pixel_values"][0] for processor in (padding, again, first)]
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])


def test_processors_with_a_layout_of_their_own_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"data\.pad_to_square with a Qwen2VLImageProcessor"):
        padding_to_square(PROCESSORS["qwen2_5_vl"](monkeypatch))
