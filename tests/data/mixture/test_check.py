"""Guards `data check`: every kind of fault is found, counted by source and named, and nothing else is."""

import json
import random
import re
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from routing_experts.data.mixture import work
from routing_experts.data.mixture.check import check_mixture
from routing_experts.data.mixture.files import format_of, look_at
from routing_experts.data.mixture.looking import Look
from routing_experts.data.readers.sources import open_source
from routing_experts.data.token_settings import TokenSettings
from routing_experts.records import MixtureCheck
from routing_experts.reports import print_check

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A kite."}]
TEXT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}] * 2


def picture(side: int = 8) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures in order, and one of everything that is wrong with pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "coco").mkdir()
    (folder / "ocr").mkdir()
    picture().save(folder / "coco" / "good.jpg")
    picture().save(folder / "ocr" / "png.jpg", "PNG")
    picture().convert("CMYK").save(folder / "ocr" / "cmyk.jpg")
    picture().convert("P").save(folder / "ocr" / "palette.gif")
    picture().convert("L").save(folder / "ocr" / "grey.png")
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(folder / "ocr" / "sixteen.png")
    picture().save(folder / "ocr" / "moving.gif", save_all=True, append_images=[picture(8).rotate(90)])
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().crop((0, 0, 8, 4)).save(folder / "ocr" / "turned.jpg", exif=exif)
    (folder / "ocr" / "empty.jpg").write_bytes(b"")
    (folder / "ocr" / "page.jpg").write_bytes(b"<!DOCTYPE html><html>404</html>")
    (folder / "ocr" / "noise.jpg").write_bytes(b"\x00\x01\x02 no picture")
    whole = (folder / "coco" / "good.jpg").read_bytes()
    (folder / "ocr" / "cut.jpg").write_bytes(whole[: len(whole) - 100])
    (folder / "ocr" / "folder.jpg").mkdir()
    return folder


FINE = ("png.jpg", "cmyk.jpg", "palette.gif", "grey.png", "sixteen.png", "moving.gif", "turned.jpg")
BAD = ("empty.jpg", "page.jpg", "noise.jpg")


def record(number: int, image: str | list[str] | None = None, talk: list | None = None, **more) -> dict:
    named = {} if image is None else {"image": image}
    return {"id": f"r{number}", **named, "conversations": talk or (TEXT if image is None else TALK), **more}


def checked(folder: Path, records: list | str, look: Look | None = None, name: str = "set.json") -> MixtureCheck:
    path = folder / name
    path.write_text(records if isinstance(records, str) else json.dumps(records), encoding="utf-8")
    return check_mixture(open_source(path), look or Look(), workers=1)


@pytest.mark.parametrize("verify", [False, True])
def test_a_sound_set_is_counted_by_source(folder, verify):
    names = [f"ocr/{name}" for name in FINE]
    pictured = [record(n, name) for n, name in enumerate([*names, "coco/good.jpg"])]
    found = checked(folder, [*pictured, record(9)], Look(verify))
    assert found.is_sound
    assert [(one.source, one.records, one.turns, one.pictures) for one in found.sources] == [
        ("ocr", 7, 7, 7),
        ("coco", 1, 1, 1),
        ("text only", 1, 2, 0),
    ]
    assert [one.misnamed for one in found.sources] == [1, 0, 0]
    assert found.faults == []
    assert found.bytes == (folder / "set.json").stat().st_size - 1  # to the end of the last record


@pytest.mark.parametrize("verify", [False, True])
def test_faulty_pictures_are_found_and_named(folder, verify):
    """A picture that is cut short shows only when it is decoded."""
    names = [*BAD, "cut.jpg", "gone.jpg", "folder.jpg"]
    found = checked(folder, [record(n, f"ocr/{name}") for n, name in enumerate(names)], Look(verify))
    (source,) = found.sources
    assert (source.missing, source.unreadable, source.faulty) == (2, 4 if verify else 3, 0)
    assert not found.is_sound
    told = {fault.record: (fault.kind, fault.problem) for fault in found.faults}
    assert set(told) == ({0, 1, 2, 3, 4, 5} if verify else {0, 1, 2, 4, 5})
    for number, kind, words in (
        (0, "unreadable", "empty.jpg is empty"),
        (1, "unreadable", "page.jpg is a text file, not a picture"),
        (2, "unreadable", "noise.jpg is in no format that Pillow knows"),
        (4, "missing", "gone.jpg is not there"),
        (5, "missing", "folder.jpg is a folder"),
    ):
        assert told[number][0] == kind
        assert words in told[number][1]
        assert told[number][1].startswith(f"{folder / 'set.json'}: record {number}: ")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (record(1, "coco/good.jpg", [TALK[1], TALK[0]]), "it is 'gpt' where 'human' must speak"),
        (record(1, "coco/good.jpg", [TALK[0], {"from": "gpt", "value": " "}]), "the answer is empty"),
        (record(1, None, TALK), "0 pictures, but the questions have 1 <image>"),
        (record(1, "../coco/good.jpg"), "leaves the image folder"),
        (record(1, "/etc/hostname"), "leaves the image folder"),
        (record(1, "\ud800.jpg"), "half of a surrogate pair"),
        (record(1, "coco/good.jpg", TEXT), "1 pictures, but the questions have 0"),
        ({"id": 1}, "field conversations: it is missing"),
        ("text", "it is text, but a record is an object"),
    ],
)
def test_faulty_records_are_counted_and_the_rest_goes_on(folder, bad, words):
    found = checked(folder, [record(0, "coco/good.jpg"), bad, record(2, "coco/good.jpg")])
    assert sum(one.faulty for one in found.sources) == 1
    assert sum(one.records for one in found.sources) == 3
    ((number, kind, problem),) = [(fault.record, fault.kind, fault.problem) for fault in found.faults]
    assert (number, kind) == (1, "record")
    assert words in problem


def test_a_set_that_is_cut_short_is_told_with_its_byte_and_record(folder):
    whole = json.dumps([record(n, "coco/gone.jpg") for n in range(3)])
    found = checked(folder, whole[:-20], name="cut.json")
    assert found.cut is not None
    said = re.search(r"record 2: not JSON at byte (\d+) of (\d+)", found.cut)
    assert said is not None
    assert int(said[2]) == len(whole) - 20
    start = len(json.dumps([record(n, "coco/gone.jpg") for n in range(2)])) + 1  # a bracket is a comma now, and a space
    assert start <= int(said[1]) <= len(whole) - 20
    assert not found.is_sound
    assert found.sources[0].missing == 2  # what came before was looked at


def test_names_that_are_no_utf_8_and_repeated_ids(folder):
    """Half of a pair of surrogates is a fault and no crash, in folders too; ids that come again are counted."""
    records = [record(0, "coco/\udcff.jpg"), record(5, "coco/good.jpg"), record(5, "coco/good.jpg")]
    found = checked(folder, [*records, record(6, "c\ud800/a.jpg")])
    assert [(one.source, one.records, one.faulty) for one in found.sources] == [("coco", 3, 1), (r"c\ud800", 1, 1)]
    assert found.repeated_ids == 1
    print_check(found, Console(file=TextIOWrapper(BytesIO(), encoding="utf-8")))


def test_a_faulty_record_s_pictures_are_looked_at_all_the_same(folder):
    """Guards against mending one thing after the other: all that is wrong is told of at once."""
    empty = [TALK[0], {"from": "gpt", "value": ""}]
    found = checked(folder, [record(0, "coco/gone.jpg", empty)])
    assert [(one.faulty, one.missing) for one in found.sources] == [(1, 1)]
    assert {fault.kind for fault in found.faults} == {"record", "missing"}


@pytest.mark.parametrize(
    "broken",
    [{"id": 1.5}, {"messages": [{"role": "user", "content": "Hi"}]}, {"images": ["coco/good.jpg"]}],
    ids=lambda broken: next(iter(broken)),
)
def test_a_record_that_is_refused_early_is_of_its_own_source(folder, broken):
    """Guards the table: what is wrong with an id or a layout says nothing of where the pictures lie."""
    found = checked(folder, [record(0, "coco/gone.jpg") | broken, record(1, "../gone.jpg") | broken])
    told = [(one.source, one.records, one.faulty, one.pictures, one.missing) for one in found.sources]
    assert told == [("coco", 1, 1, 1, 1), ("..", 1, 1, 1, 0)]


def test_faults_are_in_the_order_of_their_records_whoever_finds_them(folder, monkeypatch):
    """Guards lists of faults, which would differ from one number of processes to another."""
    monkeypatch.setattr(work, "BLOCK", 2)
    empty = [TALK[0], {"from": "gpt", "value": ""}]
    records = [record(n, f"coco/{'good' if n % 3 else 'gone'}.jpg", empty if n % 2 else TALK) for n in range(12)]
    (folder / "set.json").write_text(json.dumps(records))
    few, many = (check_mixture(open_source(folder / "set.json"), Look(), workers=count).faults for count in (1, 3))
    assert few == many
    assert [fault.record for fault in few] == sorted(fault.record for fault in few)


def test_a_picture_that_counting_finds_broken_is_no_faulty_record(folder):
    """Guards counts: where tokens are counted, pictures are opened though nobody asked to decode them."""
    (folder / "coco" / "header.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"no chunk of it" * 9)
    counts = TokenSettings("pocket").count_tokens
    found = checked(folder, [record(0, "coco/header.png")], Look(count_tokens=counts, max_length=100))
    assert [(one.faulty, one.unreadable) for one in found.sources] == [(0, 1)]


def test_long_values_are_shortened_in_messages(folder):
    """A picture written out in the field of its path is a megabyte; the list of faults is for people."""
    data = "data:image/png;base64," + "A" * 1_000_000
    parts = [{"type": "image_url", "image_url": {"url": data}}]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A kite."}]
    found = checked(folder, [record(0, data), record(1, [data, data]), {"id": data}, {"messages": talk}])
    assert len(found.faults) >= 4
    assert max(len(fault.problem) for fault in found.faults) < 1500


def test_so_many_of_the_first_records(folder):
    path = folder / "set.json"
    path.write_text(json.dumps([record(n) for n in range(5)]))
    found = check_mixture(open_source(path), Look(), workers=1, limit=3)
    assert sum(one.records for one in found.sources) == 3


def test_lengths_are_held_against_the_limit(folder):
    """A dialogue of a hundred thousand words is counted, not run through a model."""
    long = [TALK[0], {"from": "gpt", "value": "word " * 100_000}]
    look = Look(count_tokens=TokenSettings("pocket").count_tokens, max_length=100)
    found = checked(folder, [record(0, "coco/good.jpg"), record(1, "coco/good.jpg", long), record(2)], look)
    coco, text = found.sources
    assert coco.lengths is not None
    assert text.lengths is not None
    assert (coco.lengths.counted, coco.lengths.over, text.lengths.over) == (2, 1, 0)
    assert coco.lengths.longest > 100_000
    assert [(fault.record, fault.kind) for fault in found.faults] == [(1, "long")]
    assert "more than max_length=100" in found.faults[0].problem


def test_decompression_bombs_are_not_decoded(tmp_path, monkeypatch):
    """30,000 × 30,000 pixels in a small file: a fault where pictures are decoded, and not said to be none otherwise."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    monkeypatch.undo()
    kind, problem = look_at(str(tmp_path / "bomb.png"), verify=True) or ("", "")
    assert (kind, "too large" in problem) == ("unreadable", True)
    found = checked(tmp_path, [record(0, "bomb.png")])
    console = Console(file=StringIO(), width=200)
    print_check(found, console)
    assert "--verify-images decodes them whole, and finds those that are too large" in console.file.getvalue()
    assert "All of it can be trained on" not in console.file.getvalue()


def test_whatever_a_file_holds_is_sound_or_a_fault(tmp_path):
    """Every format that Pillow writes, damaged at random: nothing but a finding comes of it."""
    Image.init()
    draw, tried = random.Random(0), 0
    for name in sorted(set(Image.SAVE) & set(Image.OPEN)):
        file = BytesIO()
        try:
            picture(16).save(file, name)
        except (OSError, KeyError, ValueError):  # not of colours, or made by another program
            continue
        for _ in range(25):
            content = bytearray(file.getvalue())
            for _ in range(draw.choice((1, 2, 8))):
                content[draw.randrange(min(len(content), 400))] = draw.randrange(256)
            for verify in (False, True):
                found = look_at(bytes(content), verify)
                assert found is None or found[0] in ("unreadable", "misnamed")
            tried += 1
    assert tried > 300


@pytest.mark.parametrize("content", [b"o", b"ok", b"BM", b"\xff\xd8", b"\x00" * 15])
def test_a_few_bytes_are_no_picture(tmp_path, content):
    """Pillow's own tests fail on them in many ways."""
    (tmp_path / "a.jpg").write_bytes(content)
    kind, _ = look_at(str(tmp_path / "a.jpg"), verify=False) or ("", "")
    assert kind == "unreadable"


def test_a_format_without_a_mark_is_read_all_the_same(tmp_path):
    picture().save(tmp_path / "a.tga")
    assert look_at(str(tmp_path / "a.tga"), verify=False) is None


def test_formats_are_told_by_their_first_bytes(tmp_path):
    for name in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        picture().save(tmp_path / name, name)
        assert format_of((tmp_path / name).read_bytes()[:64]) == name
    assert format_of(b"\x00" * 64) is None
