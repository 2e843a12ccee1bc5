"""Guards tables: parquet files and sets of the hub give the same records, pictures and errors as files do."""

import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from routing_experts.data.images import load_image
from routing_experts.data.mixture.check import check_mixture
from routing_experts.data.mixture.looking import Look
from routing_experts.data.readers.sources import contents_of, load_records, open_source
from routing_experts.data.records import Turn
from routing_experts.errors import ConfigError, MissingExtraError, RecordError

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquets = pytest.importorskip("pyarrow.parquet")

TALK = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A kite."}]
TEXT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
RED = Image.new("RGB", (6, 4), "red")
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def encoded(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def table(rows: list[dict], several: bool = True):
    kind = datasets.List(datasets.Image()) if several else datasets.Image()
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    name = "images" if several else "image"
    return datasets.Dataset.from_list(
        rows, features=datasets.Features({"messages": datasets.List(message), name: kind})
    )


def stream_of(whole, passed: list):
    """A stream of a table's rows that notes what was asked of it."""

    def rows():
        for row in whole:
            passed.append(row)
            yield row

    return datasets.IterableDataset.from_generator(rows, features=whole.features)


ROWS = [{"messages": TALK, "images": [RED]}, {"messages": TEXT, "images": []}]


@pytest.fixture
def parquet(tmp_path) -> Path:
    """Two files of one row each, in a folder."""
    for number, row in enumerate(ROWS):
        table([row]).to_parquet(str(tmp_path / f"part-{number}.parquet"))
    return tmp_path


def test_parquet_files_and_folders_of_them_are_records(parquet):
    first, second = load_records(parquet)
    assert first.turns == (Turn("<image>What?", "A kite."),)
    assert np.array_equal(np.asarray(load_image(first.images[0], "r")), np.asarray(RED))
    assert (second.turns, second.images, second.id) == ((Turn("Hi", "Ho"),), (), "1")
    (alone,) = load_records(parquet / "part-1.parquet")
    assert alone.turns == second.turns
    assert len(load_records(parquet, limit=1)) == 1


def test_a_column_of_single_pictures_and_paths_below_the_folder(tmp_path):
    """A table may name its pictures instead of holding them; names may not leave the folder."""
    table([{"messages": TALK, "image": RED}], several=False).to_parquet(str(tmp_path / "held.parquet"))
    (held,) = load_records(tmp_path / "held.parquet")
    assert load_image(held.images[0], "r").size == (6, 4)
    (tmp_path / "pictures").mkdir()
    RED.save(tmp_path / "pictures" / "red.png")
    rows = [{"messages": TALK, "image": {"path": name, "bytes": None}} for name in ("pictures/red.png", "../red.png")]
    parquets.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "named.parquet")
    records = load_records(tmp_path / "named.parquet")
    assert records[0].images == (tmp_path / "pictures" / "red.png",)
    with pytest.raises(RecordError, match=r"named\.parquet: record 1 .* leaves the image folder"):
        records[1]


def test_faulty_rows_are_named_when_they_are_used_and_counted_by_check(tmp_path):
    bad = {"messages": TALK[::-1], "images": [RED]}
    no_picture = {"messages": TALK, "images": [{"bytes": b"no picture", "path": None}]}
    cut = {"messages": TALK, "images": [{"bytes": encoded(NOISE)[:1500], "path": None}]}
    table([ROWS[0], bad, no_picture, cut]).to_parquet(str(tmp_path / "set.parquet"))
    records = load_records(tmp_path / "set.parquet")
    with pytest.raises(RecordError, match=r"set\.parquet: record 1 \(id '1'\), messages\[0\]\.role"):
        records[1]
    with pytest.raises(RecordError, match="picture given in memory cannot be read"):
        load_image(records[2].images[0], records[2].id)
    for verify, unreadable in ((False, 1), (True, 2)):
        found = check_mixture(open_source(tmp_path / "set.parquet", once=True), Look(verify), workers=1)
        (source,) = found.sources
        assert (source.records, source.faulty, source.unreadable) == (4, 1, unreadable)
        told = {fault.record: fault.problem for fault in found.faults}
        assert told[2].startswith(f"{tmp_path / 'set.parquet'}: record 2: its picture 1 ")


def test_a_check_keeps_no_copy_and_an_empty_table_is_no_set(tmp_path, monkeypatch):
    """Guards disks against a second copy of all pictures, and users against a set without records called sound."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table(ROWS).to_parquet(str(tmp_path / "set.parquet"))
    assert check_mixture(open_source(tmp_path / "set.parquet", once=True), Look(), workers=1).is_sound
    assert not any((tmp_path / "cache").rglob("*.arrow"))
    table(ROWS).select([]).to_parquet(str(tmp_path / "empty.parquet"))
    found = check_mixture(open_source(tmp_path / "empty.parquet", once=True), Look(), workers=1)
    assert found.cut is not None
    assert "it has no records" in found.cut


def test_other_columns_are_not_read(tmp_path):
    """Guards folders: a column of pictures that nobody asked for may name any file."""
    rows = [{"messages": TEXT, "thumbnail": {"path": "/etc/hostname", "bytes": None}}]
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features({"messages": datasets.List(message), "thumbnail": datasets.Image()})
    parquets.write_table(datasets.Dataset.from_list(rows, features=features).data.table, tmp_path / "set.parquet")
    (only,) = load_records(tmp_path / "set.parquet")
    assert only.turns == (Turn("Hi", "Ho"),)


def test_a_set_of_the_hub_is_streamed_as_far_as_it_is_asked_for(monkeypatch, tmp_path):
    """With a limit only so many rows are fetched; without one the whole split is loaded."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    asked, passed = [], []

    revision = "a"

    class Builder:
        hash = revision

        def __init__(self, name, subset):
            self.asked, self.hash = (name, subset), revision

        def as_streaming_dataset(self, split):
            asked.append((*self.asked, split, True))
            return stream_of(table([*ROWS, ROWS[0], ROWS[0]]), passed)

    def load(name, subset=None, split=None, streaming=False):
        asked.append((name, subset, split, streaming))
        whole = table([*ROWS, ROWS[0], ROWS[0]])
        return stream_of(whole, passed) if streaming else whole

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
    first, second = load_records("owner/talks", limit=2, subset="small", split="validation")
    assert load_image(first.images[0], "r").size == (6, 4)
    assert second.turns == (Turn("Hi", "Ho"),)
    assert asked == [("owner/talks", "small", "validation", True)]
    assert len(passed) <= 3
    assert len(load_records("owner/talks")) == 4
    assert asked[1] == ("owner/talks", None, "train", False)
    known = open_source("owner/talks", limit=2).items.digest()
    assert open_source("owner/talks", limit=2).items.digest() == known
    revision = "b"  # the set was mended on the hub: what was fetched of the old one is not it
    assert open_source("owner/talks", limit=2).items.digest() != known
    found = check_mixture(open_source("owner/talks", once=True), Look(True), workers=1, limit=3)
    assert asked[-1] == ("owner/talks", None, "train", True)
    assert (sum(one.records for one in found.sources), found.is_sound) == (3, True)


def test_streams_that_break_or_do_not_tell_their_columns(monkeypatch):
    """What the hub does on the way is said by the set's name; a check keeps what came before."""

    def broken():
        yield ROWS[1]
        raise datasets.exceptions.DatasetGenerationError("the connection was lost")

    streams = iter([datasets.IterableDataset.from_generator(broken)] * 2)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: next(streams))
    found = check_mixture(open_source("owner/talks", once=True), Look(), workers=1)
    assert sum(one.records for one in found.sources) == 1
    assert found.cut is not None
    assert found.cut.startswith("owner/talks: the table cannot be loaded (the connection was lost)")
    with pytest.raises(RecordError, match="owner/talks: the table cannot be loaded"):
        list(open_source("owner/talks", once=True).items)


def test_a_stream_whose_rows_have_columns_of_their_own(monkeypatch, tmp_path):
    """Guards pictures that come after a record without any: no row speaks for the others."""
    RED.save(tmp_path / "a.png")
    rows = [{"id": "0", "messages": TEXT}, {"messages": TALK, "images": ["a.png"], "more": 1}]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    assert stream.column_names is None
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    source = open_source("owner/talks", images=tmp_path, once=True)
    found = check_mixture(source, Look(True), workers=1)
    assert (found.is_sound, sum(one.pictures for one in found.sources)) == (True, 1)
    assert all("more" not in item.value for item in source.items)


def test_the_hub_is_not_asked_before_its_errors_are_told(monkeypatch):
    def broken():
        raise ConnectionError("nobody there")
        yield

    def load(*_, **__):
        raise ConnectionError("nobody there")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(broken))
    with pytest.raises(RecordError, match="owner/talks: the table cannot be loaded"):
        list(open_source("owner/talks", once=True).items)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(RecordError, match=r"cannot be loaded \(nobody there\)"):
        open_source("owner/talks", once=True)


def test_another_table_is_another_digest_and_folders_are_no_files(parquet):
    """Guards resumed runs: parts that are added or changed are told, and what Spark leaves beside them is not read."""
    before = contents_of(parquet)
    assert before == open_source(parquet).items.digest()
    (parquet / "folder.parquet").mkdir()
    assert contents_of(parquet) == before
    table([ROWS[1], ROWS[1]]).to_parquet(str(parquet / "part-1.parquet"))
    assert contents_of(parquet) != before
    assert contents_of("owner/talks") is None


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for limit in (None, 2):
        with pytest.raises(MissingExtraError, match=r"routing-experts\[data\]"):
            open_source("owner/talks", limit=limit)


def test_a_hub_s_settings_are_refused_of_files(parquet):
    with pytest.raises(ConfigError, match="these are of sets on the hub"):
        open_source(parquet, split="validation")
    with pytest.raises(ConfigError, match="these are of sets on the hub"):
        open_source(parquet / "part-0.parquet", subset="small")


def test_what_cannot_be_loaded_is_said(tmp_path, monkeypatch):
    (tmp_path / "set.parquet").write_bytes(b"no table")
    with pytest.raises(RecordError, match=r"set\.parquet: the table cannot be loaded"):
        load_records(tmp_path / "set.parquet")
    with pytest.raises(RecordError, match=r"none\.parquet: there is no such file"):
        load_records(tmp_path / "none.parquet")
    with pytest.raises(RecordError, match=r"owner/none: the table cannot be loaded"):
        load_records("owner/none")
    with pytest.raises(RecordError, match="nothing: there is no such file"):
        load_records("nothing")
