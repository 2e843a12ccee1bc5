"""Guards JSON in streams: every value with its bytes, wherever a piece ends, and every fault with its byte."""

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing_experts.data.readers import json_items
from routing_experts.data.readers.items import Item
from routing_experts.data.readers.json_items import JsonItems
from routing_experts.errors import RecordError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=4), min_size=1, max_size=6)


def write(folder, content, name="set.json"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(folder, content, name="set.json"):
    path = write(folder, content, name)
    with pytest.raises(RecordError) as caught:
        list(JsonItems(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@given(RECORDS, st.integers(1, 40), st.booleans(), st.sampled_from([None, 1]), st.booleans(), st.booleans())
def test_values_and_places_whatever_the_pieces(tmp_path_factory, records, piece, ascii, indent, mark, lines):
    """A twin that reads all at once: json itself; places give each value back."""
    folder = tmp_path_factory.mktemp("pieces")
    if lines:
        content = "".join(json.dumps(record, ensure_ascii=ascii) + "\n\n" for record in records)
    else:
        content = json.dumps(records, ensure_ascii=ascii, indent=indent) + " \n"
    path = write(folder, b"\xef\xbb\xbf" * mark + content.encode(), "set.jsonl" if lines else "set.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_items, "PIECE", piece)
        items = list(JsonItems(path))
    assert [item.value for item in items] == records
    assert [item.index for item in items] == list(range(len(records)))
    source = JsonItems(path)
    for item in items:
        assert json.loads(path.read_bytes()[item.start : item.end]) == item.value
        assert source.at(Item(item.index, None, item.start, item.end)) == item.value
    assert [(item, json.loads(content)) for item, content in source.with_bytes()] == list(
        zip(items, records, strict=True)
    )


@pytest.mark.parametrize(
    ("cut", "index"),
    [
        (b'[{"a": 1}, {"b": ', 1),
        (b'[{"a": "\xc3\xa4"}, {"b": 2}, ', 2),
        (b"", 0),
        (b'[{"a": 1} {"b": 2}]', 1),
        (b'{"a" 1}', 0),
        (b'[{"a": 1}] []', 1),
    ],
)
def test_malformed_json_gives_the_byte_and_the_record(tmp_path, cut, index):
    message = refusal(tmp_path, cut)
    assert message.startswith(f"record {index}: not JSON at byte ")
    offset = int(message.split("byte ")[1].split()[0])
    assert offset <= len(cut)
    assert f"of {len(cut)} " in message
    with_mark = refusal(tmp_path, b"\xef\xbb\xbf" + cut)
    assert f"byte {offset + 3} of" in with_mark


def test_byte_offsets_count_bytes_not_characters(tmp_path):
    content = '[{"id": "ääää"}, oops]'.encode()
    assert f"record 1: not JSON at byte {content.index(b'oops')} of {len(content)}" in refusal(tmp_path, content)
    lines = '{"id": "ääää"}\n\n{"id": oops}\n'.encode()
    assert f"record 1: not JSON at byte {lines.index(b'oops')} " in refusal(tmp_path, lines, "set.jsonl")


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_a_file_cut_anywhere_is_refused_behind_its_whole_records(tmp_path, monkeypatch, piece):
    """What came before the cut has been read by then."""
    monkeypatch.setattr(json_items, "PIECE", piece)
    records = [{"id": 1}, {"id": "ä", "n": [1.5e3, True, None]}, {"id": '\\"\u2028'}]
    content, ends = b"[", []
    for record in records:
        content += json.dumps(record, ensure_ascii=False).encode()
        ends.append(len(content))
        content += b", "
    for cut in range(1, len(content)):
        path, read = write(tmp_path, content[:cut]), []
        with pytest.raises(RecordError) as caught:
            read.extend(item.value for item in JsonItems(path))
        whole = sum(end <= cut for end in ends)
        if "is not UTF-8" not in str(caught.value):
            assert f": record {whole}: not JSON" in str(caught.value), (cut, str(caught.value))
            assert read == records[:whole]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"id": "\xff"}]', "byte 9 is not UTF-8"),
        ('{"id": 1}', "the top level is an object, but a .json file is a list"),
        ('{"id": 1}\n{"id": 2}', "another JSON value begins at byte 10, so this is JSON Lines"),
        ("[]", "the list has no records"),
        ("[" * 100_000, "record 0 nests too deeply"),
        ("[" + "9" * 5000 + "]", "a number too long"),
        (b"[" + b'{"a": 1}, ' * 9 + b'{"a": "\xe4"}]', "byte 98 is not UTF-8"),
    ],
)
@pytest.mark.parametrize("piece", [16, 1 << 20])
def test_faults_of_files_are_named(tmp_path, monkeypatch, content, message, piece):
    monkeypatch.setattr(json_items, "PIECE", piece)
    assert message in refusal(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": "\xff"}\n', "byte 8 is not UTF-8"),
        ("\n \n", "the file has no records"),
        ("[" * 100_000, "record 0 nests too deeply"),
        ('{"id": 1}\n{"id": 2', "record 1: not JSON at byte 18 "),
    ],
)
def test_faults_of_lines_are_named(tmp_path, content, message):
    assert message in refusal(tmp_path, content, "set.jsonl")


def test_a_mark_out_of_place_is_found_without_reading_on(tmp_path):
    """Guards memory: what is wrong in the middle of a large file is told there, and the rest is not read."""
    good = json.dumps({"id": "x" * 1000})
    path = write(tmp_path, f"[{good}, {good} {good}, " + ", ".join([good] * 40_000) + "]")
    tracemalloc.start()
    with pytest.raises(RecordError, match="record 2: not JSON at byte"):
        list(JsonItems(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 40e6
    assert peak < 10e6


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Guards sets of gigabytes: forty megabytes pass through ten at most."""
    path = write(tmp_path, "[" + ", ".join([json.dumps({"id": "x" * 1000})] * 40_000) + "]")
    tracemalloc.start()
    assert sum(1 for _ in JsonItems(path)) == 40_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


@pytest.mark.parametrize("piece", range(1, 12))
def test_numbers_that_a_piece_cuts_are_whole(tmp_path, monkeypatch, piece):
    """They are no records; what is wrong with them is told by whoever reads records."""
    monkeypatch.setattr(json_items, "PIECE", piece)
    items = list(JsonItems(write(tmp_path, "[1, 2, 3, 45678, 9.25e2, true]")))
    assert [item.value for item in items] == [1, 2, 3, 45678, 925.0, True]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    """Guards places: other bytes lie there now."""
    path = write(tmp_path, '[{"id": 1}, {"id": 2}]')
    source = JsonItems(path)
    first, _ = source
    write(tmp_path, '[{"id": "other"}, {"id": 2}]')
    with pytest.raises(RecordError, match="has changed since its records were counted"):
        source.at(first)


def test_suffixes_of_any_case(tmp_path):
    assert len(list(JsonItems(write(tmp_path, '{"id": 1}\n{"id": 2}\n', "SET.JSONL")))) == 2


def test_a_record_longer_than_many_pieces(tmp_path, monkeypatch):
    """Guards an answer of a hundred thousand tokens."""
    monkeypatch.setattr(json_items, "PIECE", 64)
    long = {"id": "long", "value": "word " * 100_000}
    items = list(JsonItems(write(tmp_path, json.dumps([{"id": 1}, long, {"id": 2}]))))
    assert [item.value for item in items] == [{"id": 1}, long, {"id": 2}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("set.json", '[{"id": 0}, {"id": 1, "open": "' + "a" * 3000),
        ("set.jsonl", '{"id": 0}\n[' + ", ".join(['{"id": 1}'] * 300) + "]"),
    ],
    ids=["a text that is never closed", "a list in one line"],
)
def test_a_record_without_an_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch, name, text):
    monkeypatch.setattr(json_items, "MAX_RECORD", 1000)
    monkeypatch.setattr(json_items, "PIECE", 64)
    (tmp_path / name).write_text(text)
    items = iter(JsonItems(tmp_path / name))
    assert next(items).value == {"id": 0}
    with pytest.raises(RecordError, match=r"record 1, which begins at byte \d+, has no end within"):
        next(items)
