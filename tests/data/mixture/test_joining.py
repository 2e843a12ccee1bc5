"""Guards what is drawn and joined: exact shares of every stratum, the same bytes for a seed, records as they are."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing_experts.data.mixture.joining import Part, join
from routing_experts.data.mixture.strata import Drawing, Strata, shares
from routing_experts.data.readers.items import Item
from routing_experts.data.readers.json_items import JsonItems
from routing_experts.errors import ConfigError, RecordError

COUNTS = st.dictionaries(st.tuples(st.sampled_from("abc"), st.integers(1, 3)), st.integers(1, 30), min_size=1).map(
    Counter
)


def item_of(number: int, source: str = "coco", turns: int = 1) -> dict:
    spoken = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "ä"}] * turns
    return {"id": f"r{number}", "image": f"{source}/{number}.jpg", "conversations": spoken}


def write(path: Path, items: list, indent: int | None = None) -> JsonItems:
    path.write_text(json.dumps(items, indent=indent, ensure_ascii=False))
    return JsonItems(path)


@given(COUNTS, st.floats(0.01, 0.99))
def test_shares_are_exact_in_total_and_within_one_in_each(counts: Counter, share: float) -> None:
    wanted = shares(counts, share, "0")
    assert sum(wanted.values()) == round(share * counts.total())
    for stratum, count in counts.items():
        assert abs(wanted[stratum] - share * count) < 1
        assert wanted[stratum] <= count


@given(COUNTS, st.floats(0.01, 0.99), st.randoms(use_true_random=False))
def test_a_drawing_meets_its_counts_in_any_order(counts: Counter, share: float, draw) -> None:
    """Whatever order strata come in, each gives what was wanted of it."""
    wanted = shares(counts, share, "0")
    records = list(counts.elements())
    draw.shuffle(records)
    drawing = Drawing(counts, wanted, seed=str(draw.random()))
    kept = [stratum for n, stratum in enumerate(records) if drawing(Item(n, item_of(n, *stratum)), stratum)]
    assert Counter(kept) == Counter({stratum: count for stratum, count in wanted.items() if count})


def test_every_record_is_as_likely_as_any_other() -> None:
    """Over two thousand seeds each of ten records is drawn 600 times, within five deviations."""
    counts = Counter({("coco", 1): 10})
    times = Counter()
    for seed in range(2000):
        drawing = Drawing(counts, shares(counts, 0.3, "0"), seed=str(seed))
        times.update(n for n in range(10) if drawing(Item(n, item_of(n)), ("coco", 1)))
    assert all(abs(times[n] - 600) < 5 * (2000 * 0.3 * 0.7) ** 0.5 for n in range(10))


def test_the_same_seed_gives_the_same_bytes_and_another_other_ones(tmp_path) -> None:
    records = [item_of(n, ("coco", "gqa")[n % 2], 1 + n % 3) for n in range(200)]
    source = write(tmp_path / "all.json", records, indent=1)
    made = [join([Part(source, 0.5)], tmp_path / f"{n}.json", seed) for n, seed in enumerate((3, 3, 4))]
    first, second, third = ((tmp_path / f"{n}.json").read_bytes() for n in range(3))
    assert first == second != third
    assert made[0].sha256 == made[1].sha256
    assert made[0].records == 100
    assert {(one.source, one.turns) for one in made[0].strata} == {(s, t) for s in ("coco", "gqa") for t in (1, 2, 3)}
    assert sum(one.written for one in made[0].strata) == 100
    kept = json.loads(first)
    assert kept == [record for record in records if record in kept]  # in their order, unchanged
    assert not list(tmp_path.glob("*.tmp"))


def test_the_authors_rule_is_theirs(tmp_path) -> None:
    source = write(tmp_path / "all.json", [item_of(n) for n in range(25)])
    manifest = join([Part(source, None)], tmp_path / "sub.jsonl")
    kept = [item.value["id"] for item in JsonItems(tmp_path / "sub.jsonl")]
    assert kept == [f"r{n}" for n in range(25) if n % 10 < 6]
    assert (manifest.parts[0].rule, manifest.parts[0].weight) == ("authors", None)


def test_weights_repeat_whole_and_draw_the_rest(tmp_path) -> None:
    """Records that come again have ids of their own; image folders go before paths."""
    first = write(tmp_path / "first.json", [item_of(n) for n in range(10)])
    second = write(tmp_path / "second.json", [{"conversations": [], "file_names": ["a.png", "b.png"]}], indent=2)
    manifest = join([Part(first, 2.5), Part(second, 1.0, "more/pictures")], tmp_path / "mix.jsonl", seed=1)
    records = [item.value for item in JsonItems(tmp_path / "mix.jsonl")]
    assert len(records) == manifest.records == 26
    names = [record["id"] for record in records if "id" in record]
    drawn = {name for name in names if name.endswith("#3")}
    assert len(drawn) == 5
    by_number = [name for n in range(10) for name in (f"r{n}", f"r{n}#2", f"r{n}#3")]
    assert names == [name for name in by_number if not name.endswith("#3") or name in drawn]  # copies are neighbours
    assert {"conversations": [], "file_names": ["more/pictures/a.png", "more/pictures/b.png"]} in records
    assert [part.records for part in manifest.parts] == [25, 1]


def test_parts_are_mingled(tmp_path) -> None:
    """Guards held-out records, which are a set's last: of all parts, and none of them a copy of one that trains."""
    large = write(tmp_path / "large.json", [item_of(n) for n in range(60)])
    small = write(tmp_path / "small.json", [item_of(n, "gqa") | {"id": f"s{n}"} for n in range(20)])
    join([Part(large), Part(small, 3)], tmp_path / "mix.json")
    names = [record["id"].partition("#")[0] for record in json.loads((tmp_path / "mix.json").read_text())]
    for start in range(0, 120, 24):
        assert abs(sum(name.startswith("r") for name in names[start : start + 24]) - 12) <= 2
    held_out = set(names[96:])
    assert len(held_out) > 12
    assert len(held_out & set(names[:96])) <= 1  # the one at the border


def test_ids_that_are_none_and_paths_in_objects(tmp_path) -> None:
    """As the reader takes them: an id that is null is the record's number, and a path may stand in an object."""
    talk = item_of(0)["conversations"]
    source = write(tmp_path / "all.json", [{"id": None, "image": {"path": "a.png"}, "conversations": talk}])
    join([Part(source, 2, "pictures")], tmp_path / "mix.json")
    first, second = json.loads((tmp_path / "mix.json").read_text())
    assert (first["id"], second["id"]) == (None, "0#2")
    assert first["image"] == second["image"] == {"path": "pictures/a.png"}


def test_a_record_without_pictures_is_copied_as_it_is_written(tmp_path) -> None:
    """Guards docs' sentence: an image folder changes paths alone, and no spelling of what has none."""
    written = '{"id":1.50,  "conversations": [{"from": "human", "value": "\\u0048i"}]}'
    (tmp_path / "set.json").write_text(f"[{written}]")
    join([Part(JsonItems(tmp_path / "set.json"), 2, "pictures")], tmp_path / "mix.jsonl")
    first, second = (tmp_path / "mix.jsonl").read_text().splitlines()
    assert first == written
    assert json.loads(second)["id"] == "1.5#2"


def test_a_folder_a_picture_is_no_source_a_picture(tmp_path) -> None:
    """Guards memory: of millions of folders two hundred are named."""
    source = write(tmp_path / "all.json", [item_of(n, f"frames/{n}") for n in range(500)])
    manifest = join([Part(source, 0.5)], tmp_path / "half.json")
    assert len({one.source for one in manifest.strata}) == 201
    assert manifest.records == 250


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_weights_that_are_none_are_refused(tmp_path, weight) -> None:
    with pytest.raises(ConfigError, match="a number above 0"):
        Part(JsonItems(tmp_path / "all.json"), weight)


def test_nothing_is_written_over_or_left_half_written(tmp_path) -> None:
    source = write(tmp_path / "all.json", [item_of(n) for n in range(4)])
    with pytest.raises(ConfigError, match="is read from"):
        join([Part(source, 0.5)], tmp_path / "all.json")
    whole = (tmp_path / "all.json").read_bytes()
    (tmp_path / "cut.json").write_bytes(whole[:-9])
    (tmp_path / "old.json").write_bytes(b"old")
    with pytest.raises(RecordError, match="record 3: not JSON at byte"):
        join([Part(JsonItems(tmp_path / "cut.json"), 1.0)], tmp_path / "old.json")
    assert (tmp_path / "old.json").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json", "cut.json", "old.json"]


@pytest.mark.parametrize(
    ("value", "stratum"),
    [
        ({"conversations": [{}, {}]}, ("text only", 1)),
        ({"image": "vg/VG_100K/1.jpg", "conversations": [{"from": "system"}, {}, {}]}, ("vg/VG_100K", 1)),
        ({"images": [{"bytes": b""}], "messages": [{}, {}, {}, {}]}, ("pictures in the table", 2)),
        ({"image": ["a.jpg"]}, ("the image folder", 0)),
        ([], ("no record", 0)),
    ],
)
def test_strata(value, stratum) -> None:
    assert Strata()(value) == stratum
