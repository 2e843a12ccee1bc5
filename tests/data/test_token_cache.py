"""Guards tokens on disk: what they give is what the encoder gives, in every family, and stale ones are never used."""

import copy
import threading

import pytest
import torch
from filelock import FileLock
from PIL import Image

from routing_experts.data import token_cache, token_settings
from routing_experts.data.encode import Encoded, Encoder
from routing_experts.data.records import Record, Turn
from routing_experts.data.token_cache import TokenCache, Tokenise, build, cache_name
from routing_experts.data.token_settings import TokenSettings
from routing_experts.errors import RecordError, TrainingError
from routing_experts.models.load import load_processor
from tiny_processors import PROCESSORS

ASK = Turn("<image>\nWhat is it?", "A kite.")


def assert_same(found: Encoded, expected: Encoded) -> None:
    for name in ("input_ids", "labels", "segment_ids", "token_types"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None and other is None) or torch.equal(one, other), name
        assert one is None or one.dtype == other.dtype
    assert found.vision.keys() == expected.vision.keys()
    for name, value in expected.vision.items():
        assert torch.equal(found.vision[name], value), name


class AtOnce:
    """A pool that does its work here: processors that tests build cannot be loaded elsewhere."""

    def submit(self, do, block):
        from concurrent.futures import Future

        future = Future()
        future.set_result(do(block))
        return future


@pytest.fixture
def here(monkeypatch):
    """Caches are built in this process, by the processor that is given."""
    from contextlib import nullcontext

    def use(processor):
        monkeypatch.setattr(token_cache, "processes", lambda count: nullcontext(AtOnce()))
        monkeypatch.setattr(token_settings, "load_processor", lambda model: processor)
        token_settings._made.cache_clear()

    yield use
    token_settings._made.cache_clear()


@pytest.mark.parametrize("family", PROCESSORS)
def test_a_cache_gives_what_the_encoder_gives(family, here, monkeypatch, tmp_path):
    """Several parts, several pictures, none, and turns; from a second reader as from the first."""
    processor = PROCESSORS[family](monkeypatch)
    here(processor)
    monkeypatch.setattr(token_cache, "PART", 2)
    wide, tall = Image.new("RGB", (60, 20), "red"), Image.new("RGB", (20, 60), "blue")
    records = [
        Record("one", (ASK, Turn("Sure?", "yes")), (wide,)),
        Record("text", (Turn("Add 3 and 4.", "7"),)),
        Record("two", (Turn("First <image>, then <image>: same?", "no"),), (tall, wide)),
        Record("later", (ASK, Turn("<image>\nAnd this?", "no")), (wide, tall)),
        Record("last", (ASK,), (tall,)),
    ]
    build(tmp_path / "cache", records, len(records), Tokenise(TokenSettings(family)), workers=1)
    assert TokenCache.is_complete(tmp_path / "cache")
    encoder = Encoder(processor)
    for _ in range(2):
        cache = TokenCache(tmp_path / "cache", encoder)
        for index in (4, 0, 3, 1, 2):
            assert_same(cache.encode(index, records[index]), encoder(records[index]))
            assert cache.length(index, records[index]) == len(encoder(records[index]).input_ids)


def test_in_processes_of_its_own_from_files(tmp_path):
    """The pocket model's processor; one record cannot be read, and is refused when it is used as ever."""
    picture = tmp_path / "a.png"
    Image.new("RGB", (40, 30), "green").save(picture)
    records = [Record(str(n), (ASK,), (picture,)) for n in range(3)]
    records.append(Record("gone", (ASK,), (tmp_path / "none.png",)))
    build(tmp_path / "cache", records, 4, Tokenise(TokenSettings("pocket", "vicuna_v1")), workers=1)
    encoder = Encoder(load_processor("pocket"), "vicuna_v1")
    cache = TokenCache(tmp_path / "cache", encoder)
    assert_same(cache.encode(1, records[1]), encoder(records[1]))
    with pytest.raises(RecordError, match=r"record gone: picture .* is not there"):
        cache.encode(3, records[3])


def test_a_picture_of_another_size_is_encoded_anew(here, monkeypatch, tmp_path):
    """Where tokens depend on the size, as Qwen's do, those of the cache would be of another picture."""
    processor = PROCESSORS["qwen2_5_vl"](monkeypatch)
    here(processor)
    before, after = (Record("r", (ASK,), (Image.new("RGB", size),)) for size in ((28, 28), (112, 56)))
    build(tmp_path / "cache", [before], 1, Tokenise(TokenSettings("qwen")), workers=1)
    encoder = Encoder(processor)
    assert len(encoder(before).input_ids) != len(encoder(after).input_ids)
    cache = TokenCache(tmp_path / "cache", encoder)
    assert_same(cache.encode(0, after), encoder(after))
    assert cache.length(0, before) == len(encoder(before).input_ids)
    assert cache.length(0, after) is None


def test_a_name_says_all_that_tokens_depend_on(processor):
    """Guards against stale tokens: another of anything is another cache."""
    other = copy.deepcopy(processor)
    other.tokenizer.add_tokens(["<new>"])
    template = copy.deepcopy(processor)
    template.chat_template += " "
    scaled = copy.deepcopy(processor)
    scaled.image_processor.size = {"height": 7, "width": 7}
    names = {
        cache_name(contents, encoder)
        for contents, encoder in (
            ("a", Encoder(processor)),
            ("b", Encoder(processor)),
            ("a", Encoder(processor, "vicuna_v1")),
            ("a", Encoder(processor, max_length=9)),
            ("a", Encoder(other)),
            ("a", Encoder(template)),
            ("a", Encoder(scaled)),
        )
    }
    assert len(names) == 7
    assert cache_name("a", Encoder(processor)) == cache_name("a", Encoder(copy.deepcopy(processor)))


def test_what_was_left_unfinished_is_no_cache(here, tmp_path, monkeypatch):
    """A build that is killed leaves nothing where a cache is looked for: the next one begins anew."""
    here(load_processor("pocket"))
    folder, record = tmp_path / "cache", Record("r", (Turn("Hi", "Ho"),))
    with monkeypatch.context() as killed:
        killed.setattr(token_cache, "save_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(folder, [record], 1, Tokenise(TokenSettings("pocket", "vicuna_v1")), workers=1)
    assert not folder.exists()
    longer = Record("r", (Turn("Hi", "Good morning"),))
    told: list[int] = []
    build(folder, [longer], 1, Tokenise(TokenSettings("pocket", "vicuna_v1")), workers=1, advance=told.append)
    assert told == [1]
    encoder = Encoder(load_processor("pocket"), "vicuna_v1")
    assert_same(TokenCache(folder, encoder).encode(0, longer), encoder(longer))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["cache"]


def test_a_cache_is_waited_for_and_not_written_again(here, tmp_path):
    """Guards runs that start together: whoever waited for another finds its cache, and leaves it alone."""
    here(load_processor("pocket"))
    folder, record = tmp_path / "cache", Record("r", (Turn("Hi", "Ho"),))

    def never(block):
        raise AssertionError("written again")

    def build_too():
        build(folder, [record], 1, never, workers=1)
        done.append(TokenCache.is_complete(folder))

    done: list[bool] = []
    with FileLock(tmp_path / ".cache.lock"):  # as another run holds it while it writes
        waiting = threading.Thread(target=build_too)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        folder.mkdir()
        (folder / "complete.json").write_text("{}")
    waiting.join(10)
    assert done == [True]


def test_lost_and_damaged_parts_are_said(here, tmp_path):
    here(load_processor("pocket"))
    folder, record = tmp_path / "cache", Record("r", (Turn("Hi", "Ho"),))
    build(folder, [record], 1, Tokenise(TokenSettings("pocket", "vicuna_v1")), workers=1)
    encoder = Encoder(load_processor("pocket"), "vicuna_v1")
    (part,) = folder.glob("*.safetensors")
    part.write_bytes(b"no tensors")
    with pytest.raises(TrainingError, match=r"is damaged .* Delete"):
        TokenCache(folder, encoder).encode(0, record)
    part.unlink()
    with pytest.raises(TrainingError, match=r"is not there any more\. Run the same command again"):
        TokenCache(folder, encoder).encode(0, record)
    with pytest.raises(TrainingError, match=r"this machine does not see that folder\. .* one that all machines share"):
        TokenCache.check(tmp_path / "another")
