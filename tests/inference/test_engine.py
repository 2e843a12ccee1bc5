"""The engine: what a request gets is what it gets alone, whoever else is there; what is wrong fails alone."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routing_experts.data.encode import Encoded
from routing_experts.errors import RequestError
from routing_experts.inference.engine import Engine, EngineSettings, Token
from routing_experts.inference.requests import Completion, Request, Sampling
from routing_experts.models.cache import RoutedCache
from routing_experts.models.options import KEEP_ALL, RoutingOptions
from routing_experts.nn.losses import IGNORED
from tiny import IMAGE, NUM_LAYERS, prompt, route_everywhere, tiny_llama, tiny_llava

NO_IMAGES = {"suppress_tokens": [IMAGE]}


@pytest.fixture(scope="module")
def llama() -> Any:
    return forever(route_everywhere(tiny_llama(dtype=torch.float64), num_unrouted_layers=0))


def forever(model: Any) -> Any:
    """No token ends an answer, so that all answers have the length that was asked for."""
    model.generation_config.eos_token_id = None
    return model


def encoded(ids: list[int], **vision: torch.Tensor) -> Encoded:
    ids_T = torch.tensor(ids)
    return Encoded("", ids_T, torch.full_like(ids_T, IGNORED), torch.ones_like(ids_T), vision)


def alone(model: Any, ids: list[int], count: int, routing: RoutingOptions | None = None) -> tuple[list[int], Any]:
    """What ``model.generate`` gives to one request, and its route."""
    cache = RoutedCache(model.config, routing)
    got = model.generate(torch.tensor([ids]), past_key_values=cache, do_sample=False, max_new_tokens=count)
    return got[0, len(ids) :].tolist(), tuple(cache.route[0].tolist())


requests = st.lists(
    st.tuples(
        st.integers(0, 40),  # the prompt's seed
        st.integers(1, 9),  # words
        st.integers(1, 7),  # new tokens
        st.one_of(st.none(), st.lists(st.booleans(), min_size=NUM_LAYERS, max_size=NUM_LAYERS)),
    ),
    min_size=1,
    max_size=9,
)


@given(requests, st.integers(1, 4), st.integers(1, 6), st.sampled_from([24, 64, 4096]))
@settings(max_examples=25, deadline=None)
def test_each_request_gets_what_it_gets_alone(llama, asked, max_rows, max_waiting, max_prefill_tokens):
    """Contract 3, with requests that come and go: routes, lengths, layer 0 skipped, any bounds."""
    bounds = EngineSettings(
        max_rows=max_rows, max_waiting=max_waiting, max_prefill_tokens=max_prefill_tokens, capacity=8
    )
    built, expected = [], []
    for seed, words, count, flags in asked:
        routing = None if flags is None else RoutingOptions(route=torch.tensor(flags))
        ids = prompt(seed, images=0, words=words).ids
        built.append(Request(encoded(ids), sampling=Sampling(max_new_tokens=count), routing=routing))
        expected.append(alone(llama, ids, count, routing))
    got = Engine(llama, None, bounds).generate(built)
    assert [(list(one.token_ids), one.route) for one in got] == expected
    assert [one.finish for one in got] == ["length"] * len(got)


def test_pictures_and_padding():
    """Guards prompts of one and two pictures and of none in one prefill call."""
    model = forever(route_everywhere(tiny_llava(dtype=torch.float64)))
    prompts = [prompt(seed, images=seed % 3, words=2 + seed) for seed in range(5)]
    built = [
        Request(
            encoded(p.ids, **({"pixel_values": p.pictures.double()} if len(p.pictures) else {})),
            sampling=Sampling(max_new_tokens=3),
        )
        for p in prompts
    ]
    got = Engine(model, None, EngineSettings(max_rows=3)).generate(built)
    for p, one in zip(prompts, got, strict=True):
        pictures = {"pixel_values": p.pictures.double()} if len(p.pictures) else {}
        ids = model.generate(torch.tensor([p.ids]), **pictures, do_sample=False, max_new_tokens=3)
        assert one.error is None
        assert ids[0, len(p.ids) :].tolist() == list(one.token_ids)


def test_skipped_layers_hold_nothing(llama):
    """Contract 4: what waits holds keys and values of kept layers only."""
    ids = prompt(1, images=0).ids
    held = {}
    for skipped in (0, 3):
        route = torch.tensor([False] * skipped + [True] * (NUM_LAYERS - skipped))
        engine = Engine(llama)
        engine.generate([Request(encoded(ids), sampling=Sampling(4), routing=RoutingOptions(route=route))])
        held[skipped] = engine.statistics.waiting_bytes
        assert engine.statistics.layer_rows == engine.statistics.steps * (NUM_LAYERS - skipped)
    assert held[3] * NUM_LAYERS == held[0] * (NUM_LAYERS - 3)


def test_draws_do_not_depend_on_company(llama):
    """Guards a seed's draws: alone, in a batch, in another order."""
    built = [
        Request(encoded(prompt(seed, images=0).ids), sampling=Sampling(6, temperature=1.0, top_p=0.9, seed=seed))
        for seed in range(5)
    ]
    together = Engine(llama).generate(built)
    backwards = Engine(llama, None, EngineSettings(max_rows=2, max_waiting=2)).generate(built[::-1])[::-1]
    alone_each = [Engine(llama).generate([one])[0] for one in built]
    texts = [[list(one.token_ids) for one in got] for got in (together, backwards, alone_each)]
    assert texts[0] == texts[1] == texts[2]
    assert len({tuple(one.token_ids) for one in together}) > 1


def test_what_is_wrong_fails_alone(llama):
    """Guards the other requests of a batch against a route of the wrong length and a prompt that is too long."""
    good = Request(encoded(prompt(0, images=0).ids), sampling=Sampling(2), id="good")
    short = Request(encoded(prompt(0, images=0).ids), routing=RoutingOptions(route=torch.ones(3)), id="short route")
    long = Request(encoded([5] * 300), id="too long")
    late = Request(encoded(prompt(1, images=0).ids), sampling=Sampling(300), id="too much")
    unread = Request("What?", id="no processor")
    got = {one.id: one for one in Engine(llama).generate([good, short, long, good, late, unread])}
    assert got["good"].finish == "length"
    assert [one for one in got if got[one].finish == "error"] == ["short route", "too long", "too much", "no processor"]
    assert "needs [5]" in str(got["short route"].error)
    assert "knows 256 positions" in str(got["too long"].error)
    assert "no processor" in str(got["no processor"].error)


def test_a_broken_picture_fails_alone(pocket, tmp_path):
    """Guards good requests against a file that is no picture."""
    from PIL import Image

    model, processor = pocket
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    Image.new("L", (32, 32), 255).save(tmp_path / "good.png")
    asked = [
        Request("Which digits are there?", images=[str(tmp_path / name)], sampling=Sampling(4), id=name)
        for name in ("good.png", "broken.png", "missing.png")
    ]
    good, broken, missing = Engine(model, processor).generate(asked)
    assert good.finish in ("stop", "length")
    assert good.text
    assert broken.finish == missing.finish == "error"
    assert "broken.png" in str(broken.error)
    assert "missing.png" in str(missing.error)


def test_out_of_memory_halves_the_batch(llama, monkeypatch):
    """Guards a prefill that does not fit: halves are tried, and one that never fits names what to lower."""
    engine = Engine(llama, None, EngineSettings(max_rows=4))
    run = engine._prefiller.run
    sizes = []

    def run_or_fail(prompts):
        sizes.append(len(prompts))
        if len(prompts) > 1 or prompts[0].length > 12:
            raise torch.OutOfMemoryError("out of memory")
        return run(prompts)

    monkeypatch.setattr(engine._prefiller, "run", run_or_fail)
    lengths = (3, 4, 12, 5)
    got = engine.generate(
        [Request(encoded(prompt(0, images=0, words=words).ids), sampling=Sampling(2)) for words in lengths]
    )
    assert sizes[0] == 4
    assert [one.finish for one in got] == ["length", "length", "error", "length"]
    assert "max_prefill_tokens" in str(got[2].error)


@pytest.mark.parametrize("where", ["joining", "growing", "step"])
def test_out_of_memory_while_decoding_fails_one(llama, monkeypatch, where):
    """Guards the others: one request is given up with what to lower, the rest get what they get alone."""
    asked = [(seed, 4 + seed) for seed in range(4)]
    built = [Request(encoded(prompt(seed, images=0).ids), sampling=Sampling(count)) for seed, count in asked]
    expected = [alone(llama, prompt(seed, images=0).ids, count)[0] for seed, count in asked]
    engine = Engine(llama, None, EngineSettings(max_rows=4, capacity=8))
    owner, name = {
        "joining": (engine._slots.layers[3], "admit"),
        "growing": (engine._slots.layers[2], "grow"),
        "step": (engine, "_step_logits"),
    }[where]
    real, calls = getattr(owner, name), []

    def fail_once(*arguments):
        calls.append(arguments)
        if len(calls) == 3 or (where == "growing" and len(calls) == 1):
            raise torch.OutOfMemoryError("out of memory")
        return real(*arguments)

    monkeypatch.setattr(owner, name, fail_once)
    got = engine.generate(built)
    assert [one.finish for one in got].count("error") == 1
    assert all(
        (one.error and "max_rows" in one.error) or list(one.token_ids) == tokens
        for one, tokens in zip(got, expected, strict=True)
    )


def test_a_stop_text_ends_an_answer(pocket):
    """Guards stop texts: the answer ends before them, and its tokens were really generated."""
    model, processor = pocket
    whole = Engine(model, processor).generate([Request("Count to three.", sampling=Sampling(8, ignore_eos=True))])[0]
    cut = whole.text[len(whole.text) // 2 :]
    got = Engine(model, processor).generate(
        [Request("Count to three.", sampling=Sampling(8, ignore_eos=True, stop=(cut,)))]
    )[0]
    assert got.finish == "stop"
    assert cut not in got.text
    assert whole.text.startswith(got.text)


def test_tokens_stream_as_they_come(llama):
    """Guards the stream: every token once, in order, before its completion; sources are read as there is room."""
    taken = []

    def source():
        for seed in range(6):
            taken.append(seed)
            yield Request(encoded(prompt(seed, images=0).ids), sampling=Sampling(3 + seed))

    engine = Engine(llama, None, EngineSettings(max_rows=2, max_waiting=2))
    tokens: dict[int, list[int]] = {}
    finished: dict[int, Completion] = {}
    for event in engine.stream(source()):
        if isinstance(event, Token):
            assert event.index not in finished
            tokens.setdefault(event.index, []).append(event.token_id)
            if len(tokens) == 1:
                assert len(taken) < 6
        else:
            finished[event[0]] = event[1]
    assert sorted(finished) == list(range(6))
    assert all(tokens[index] == list(one.token_ids) for index, one in finished.items())
    assert all(0 < one.seconds_to_first <= one.seconds for one in finished.values())


def test_statistics_say_where_skipping_did_not_pay(llama):
    """Guards the note: rows that skip different layers read all weights; rows alike do not."""

    def note(routes: list[list[int]]) -> str:
        flags = [[float(layer not in skipped) for layer in range(NUM_LAYERS)] for skipped in routes]
        engine = Engine(llama, None, EngineSettings(max_waiting=2))
        engine.generate(
            [
                Request(encoded([1, 5, 6]), sampling=Sampling(4), routing=RoutingOptions(route=torch.tensor(one)))
                for one in flags
            ]
        )
        return engine.statistics.note

    assert "max_waiting" in note([[0, 1], [2, 3]])
    assert not note([[0, 1], [0, 1]])
    assert not note([[], []])


def test_no_requests_and_senseless_bounds():
    """Guards the messages for what cannot be meant."""
    model = route_everywhere(tiny_llama())
    with pytest.raises(RequestError, match="nothing to answer"):
        Engine(model).generate([])
    with pytest.raises(RequestError, match="max_rows=0"):
        EngineSettings(max_rows=0)
    with pytest.raises(RequestError, match="max_new_tokens=0"):
        Sampling(max_new_tokens=0)
    with pytest.raises(RequestError, match="temperature"):
        Sampling(temperature=-1)
    with pytest.raises(RequestError, match="top_p"):
        Sampling(top_p=0)


def test_a_dense_model_and_all_layers_kept():
    """Guards the dense model in the engine, and that keeping all layers gives the same tokens."""
    base = forever(tiny_llama(dtype=torch.float64))
    built = [Request(encoded(prompt(seed, images=0).ids), sampling=Sampling(5)) for seed in range(3)]
    dense = Engine(base).generate(built)
    routed = forever(route_everywhere(base))
    kept = [Request(one.messages, sampling=one.sampling, routing=KEEP_ALL) for one in built]
    assert [one.token_ids for one in Engine(routed).generate(kept)] == [one.token_ids for one in dense]
    assert all(all(one.route) for one in dense)
