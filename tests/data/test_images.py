"""Guards picture reading: every mode ends as upright RGB with the right brightness, every bad file in a clear error."""

import warnings

import numpy as np
import pytest
from PIL import Image, ImageFile

from routing_experts.data.images import load_image
from routing_experts.errors import RecordError


@pytest.fixture
def gradient():
    values = np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3)
    return Image.fromarray((values % 251).astype(np.uint8))


def saved(image, path, **options):
    image.save(path, **options)
    return path


def refusal(image):
    with pytest.raises(RecordError) as caught:
        load_image(image, "r7")
    message = str(caught.value)
    assert message.startswith("record r7: picture ")
    return message


def test_rgb_files_and_pictures_in_memory_are_read_as_they_are(gradient, tmp_path):
    path = saved(gradient, tmp_path / "a.png")
    for image in (gradient, path):
        loaded = load_image(image, "r")
        assert loaded.mode == "RGB"
        assert np.array_equal(np.asarray(loaded), np.asarray(gradient))


def test_a_picture_in_memory_is_not_changed(gradient):
    grey = gradient.convert("L")
    load_image(grey, "r")
    assert grey.mode == "L"


def test_exif_rotation_is_applied(gradient, tmp_path):
    wide = gradient.crop((0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    path = saved(wide, tmp_path / "turned.png", exif=exif)
    loaded = load_image(path, "r")
    assert loaded.size == (32, 64)
    assert np.array_equal(np.asarray(loaded), np.rot90(np.asarray(wide), -1))


@pytest.mark.parametrize("dtype_mode", ["I;16", "I"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, dtype_mode):
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    image = Image.fromarray(values) if dtype_mode == "I;16" else Image.fromarray(values.astype(np.int32))
    assert image.mode == dtype_mode
    expected = [[[v] * 3 for v in (0, 1, 128, 255)]]
    assert np.asarray(load_image(image, "r")).tolist() == expected
    path = saved(image, tmp_path / "deep.tiff")
    assert np.asarray(load_image(path, "r")).tolist() == expected


def test_palettes_cmyk_grey_bilevel_and_alpha_become_rgb(gradient, tmp_path):
    palette = gradient.quantize(16)
    transparent = gradient.quantize(16)
    transparent.info["transparency"] = bytes([0] * 16)
    alpha = gradient.convert("RGBA")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image in (palette, transparent):
            assert np.array_equal(np.asarray(load_image(image, "r")), np.asarray(palette.convert("RGB")))
    assert np.array_equal(np.asarray(load_image(alpha, "r")), np.asarray(gradient))
    cmyk = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path / "c.jpg")
    red, green, blue = np.asarray(load_image(cmyk, "r")).mean((0, 1))
    assert red > 200 > 60 > max(green, blue)
    for mode in ("L", "1", "LA"):
        assert load_image(gradient.convert(mode), "r").mode == "RGB"


def test_a_missing_file_is_named(tmp_path):
    assert "is not there. Put it in place" in refusal(tmp_path / "no.jpg")


def test_a_folder_is_refused(tmp_path):
    assert "is a folder; a picture is one file" in refusal(tmp_path)


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "zero.jpg"
    path.touch()
    assert "is empty (0 bytes)" in refusal(path)


@pytest.mark.parametrize(
    "start", ["<!DOCTYPE html><html>404", "\n<html>", "version https://git-lfs.github.com/spec/v1"]
)
def test_text_named_as_a_picture_is_refused(tmp_path, start):
    path = tmp_path / "page.jpg"
    path.write_text(start)
    message = refusal(path)
    assert "is a text file, not a picture" in message
    assert start.split()[0] in message


def test_an_unknown_format_shows_its_first_bytes(tmp_path):
    path = tmp_path / "noise.png"
    path.write_bytes(b"\x01\x02\x03\x04" * 20)
    assert "is in no format that Pillow knows; it begins b'\\x01\\x02" in refusal(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".gif", ".webp", ".tiff"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.02])
def test_truncated_files_are_refused(gradient, tmp_path, suffix, share):
    path = saved(gradient, tmp_path / f"cut{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    message = refusal(path)
    assert "cut short" in message or "no format that Pillow knows" in message


def test_decompression_bombs_are_refused(gradient, tmp_path, monkeypatch):
    path = saved(gradient, tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "is too large" in refusal(path)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.array([[0.5]], dtype=np.float32), "has floating-point pixels"),
        (np.array([[-3, 70000]], dtype=np.int32), "has pixels from -3 to 70000"),
    ],
)
def test_pixels_without_an_agreed_range_are_refused(pixels, message):
    assert message in refusal(Image.fromarray(pixels))


def test_a_closed_picture_in_memory_is_refused(gradient, tmp_path):
    with Image.open(saved(gradient, tmp_path / "a.png")) as image:
        pass
    assert "given in memory cannot be read" in refusal(image)


def test_no_other_library_s_leniency_lets_a_cut_picture_through(tmp_path, monkeypatch):
    """Guards against what some evaluation libraries tell Pillow on import: to fill what is missing with grey."""
    path = tmp_path / "cut.jpg"
    Image.effect_noise((64, 64), 60).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RecordError, match="cut short"):
        load_image(path, "r")
    assert ImageFile.LOAD_TRUNCATED_IMAGES
