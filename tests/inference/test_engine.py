"""The engine: what a request gets is what it gets alone, whoever else is there; what is wrong fails alone."""

import gc
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from routing_experts.data.encode import Encoded
from routing_experts.errors import RequestError, RouteError
from routing_experts.inference.engine import Engine, EngineSettings, Token
from routing_experts.inference.requests import Completion, Request, Sampling, choose
from routing_experts.inference.schedule import StepCost
from routing_experts.models.cache import RoutedCache
from routing_experts.models.options import KEEP_ALL, RoutingOptions
from routing_experts.nn.losses import IGNORED
from tiny import NUM_LAYERS, prompt, route_everywhere, tiny_llama, tiny_llava


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
@settings(max_examples=25)
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


def test_what_memory_held_before_never_counts(llama):
    """Guards rows shorter than their company: torch fills fresh memory with NaN here, as another process may have."""
    lengths = (3, 9, 5)
    built = [Request(encoded(prompt(n, images=0, words=n).ids), sampling=Sampling(5)) for n in lengths]
    torch.use_deterministic_algorithms(True)
    try:
        got = Engine(llama, None, EngineSettings(capacity=8)).generate(built)
    finally:
        torch.use_deterministic_algorithms(False)
    for n, one in zip(lengths, got, strict=True):
        assert list(one.token_ids) == alone(llama, prompt(n, images=0, words=n).ids, 5)[0]


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


WRONG = [
    {"messages": ["What?"]},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "video"}]}]},
    {"messages": [{"role": "assistant", "content": "Two."}]},
    {"messages": None},
    {"images": None},
    {"images": [7]},
    {"sampling": Sampling(2, seed=2**80)},
    {"routing": RoutingOptions(route=[True])},  # type: ignore[arg-type]
    {"messages": encoded([])},
    {"messages": encoded([1, 10**6])},
    {"messages": encoded([1, 5], pixel_values=torch.zeros(1, 3, 32, 32))},
]


@pytest.mark.parametrize("wrong", WRONG, ids=[f"{number} {next(iter(one))}" for number, one in enumerate(WRONG)])
def test_senseless_requests_fail_alone(pocket, wrong):
    """Guards the others against whatever a request may hold: each is answered with what is wrong with it."""
    model, processor = pocket
    good = Request("Count to three.", sampling=Sampling(2))
    got = Engine(model, processor).generate([good, replace(good, **wrong), good])
    assert [one.error is None for one in got] == [True, False, True]
    assert len(got[1].error) > 20


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


def test_a_failed_prefill_is_let_go_before_its_halves_are_tried(llama, monkeypatch):
    """Guards memory: an error in hand would hold the tensors of the call that did not fit, and halves fail, too."""
    engine = Engine(llama)
    run, held, alive = engine._prefiller.run, [], []

    def run_or_fail(prompts):
        activations = torch.empty(8)
        alive.extend(tensor() is not None for tensor in held)
        held.append(weakref.ref(activations))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return run(prompts)

    monkeypatch.setattr(engine._prefiller, "run", run_or_fail)
    got = engine.generate([Request(encoded(prompt(n, images=0).ids), sampling=Sampling(2)) for n in range(4)])
    assert [one.error for one in got] == [None] * 4
    assert len(alive) > 6
    assert not any(alive)


def test_eager_attention_and_rows_of_different_lengths():
    """Guards masks: eager attention adds what others read as true and false. What takes no mask is refused."""
    model = forever(route_everywhere(tiny_llama(attention="eager"), num_unrouted_layers=0))
    asked = [(seed, 1 + 5 * seed) for seed in range(4)]
    built = [Request(encoded(prompt(seed, images=0, words=n).ids), sampling=Sampling(6)) for seed, n in asked]
    got = Engine(model).generate(built)
    for (seed, n), one in zip(asked, got, strict=True):
        assert list(one.token_ids) == alone(model, prompt(seed, images=0, words=n).ids, 6)[0]
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(RouteError, match="flash_attention_2"):
        Engine(model)


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


def asking(seed: int, count: int = 4) -> Request:
    return Request(encoded(prompt(seed, images=0).ids), sampling=Sampling(count), id=str(seed))


def test_calls_do_not_take_each_other_s_answers(llama):
    """Guards an engine that is asked while it streams: each caller gets its own events, all of them, in order."""
    expected = [alone(llama, prompt(seed, images=0).ids, 4)[0] for seed in range(4)]
    engine = Engine(llama, None, EngineSettings(max_rows=2))
    first, second = (engine.stream([asking(seed), asking(seed + 1)]) for seed in (0, 2))
    events: list[list[Any]] = [[next(first)], [next(second)]]
    (between,) = engine.generate([asking(1)])
    assert list(between.token_ids) == expected[1]
    for found, rest in zip(events, (first, second), strict=True):
        found.extend(rest)
    for seed, found in zip((0, 2), events, strict=True):
        completions = {event[1].id: list(event[1].token_ids) for event in found if isinstance(event, tuple)}
        assert completions == {str(seed): expected[seed], str(seed + 1): expected[seed + 1]}
        assert sum(isinstance(event, Token) for event in found) == 8


def test_what_was_broken_off_leaves_nothing_behind(llama, monkeypatch):
    """Guards the next call against rows, keys and values of a stream that was closed or a call that was stopped."""
    engine = Engine(llama, None, EngineSettings(max_rows=2))
    stream = engine.stream(asking(seed, 9) for seed in range(5))
    next(stream)
    assert not engine.is_idle
    stream.close()
    assert engine.is_idle
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_step_logits", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.generate([asking(seed) for seed in range(3)])
    assert engine.is_idle
    assert engine._slots.lengths == []
    (got,) = engine.generate([asking(1)])
    assert list(got.token_ids) == alone(llama, prompt(1, images=0).ids, 4)[0]


def test_an_odd_route_gets_its_turn_while_others_keep_coming(llama):
    """Guards against waiting for ever: a stream without end of like routes, and one that shares no layer with them."""

    def flow():
        for number in itertools.count():
            flags = [True, False, False, True, True] if number == 2 else [False, True, True, False, False]
            routing = RoutingOptions(route=torch.tensor(flags))
            yield replace(asking(0, 4 if number else 3), id=str(number), routing=routing)  # never two ends at once

    bounds = EngineSettings(max_rows=2, max_waiting=6, cost=StepCost(row=0.0, fixed=0.0))
    finished = (event[1].id for event in Engine(llama, None, bounds).stream(flow()) if isinstance(event, tuple))
    assert "2" in itertools.islice(finished, 30)


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
    with pytest.raises(RequestError, match="temperature"):
        Sampling(temperature=float("nan"))
    with pytest.raises(RequestError, match="top_p"):
        Sampling(top_p=0)
    for stop in ("###", ("",)):
        with pytest.raises(RequestError, match="stop="):
            Sampling(stop=stop)  # type: ignore[arg-type]
    (unread,) = Engine(model).generate([Request(encoded([1, 5]), sampling=Sampling(stop=("no",)))])
    assert "without a processor" in str(unread.error)


def test_a_temperature_near_nothing_is_greedy():
    """Guards draws against logits that exceed every float once they are divided."""
    logits = torch.tensor([1.0, 30.0, -7.0])
    for temperature in (1e-6, 1e-39, 1e-300):
        assert choose(logits, (30.0, 1), Sampling(temperature=temperature), torch.Generator()) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("after", [0, 2])
def test_logits_that_are_no_numbers_fail_one_request(llama, monkeypatch, temperature, after):
    """Guards company against a request whose numbers overflow, at its first token or later."""
    built = [
        Request(encoded(prompt(seed, images=0, words=1 + seed).ids), sampling=Sampling(4, temperature))
        for seed in range(3)
    ]
    expected = Engine(llama).generate(built)
    engine = Engine(llama)
    forward = llama.forward
    marked = built[1].messages.input_ids  # type: ignore[union-attr]

    def overflowing(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        prefilling = kwargs["input_ids"].shape[1] > 1
        if prefilling and not after:
            rows = [row for row, ids in enumerate(kwargs["input_ids"]) if torch.equal(ids[-len(marked) :], marked)]
        else:
            late = not prefilling and engine.statistics.steps >= after
            rows = [row for row, active in enumerate(engine._rows) if late and active.index == 1]
        found.logits[rows] = float("nan")
        return found

    monkeypatch.setattr(llama, "forward", overflowing)
    got = engine.generate(built)
    assert "logit is nan" in str(got[1].error)
    assert [got[n].token_ids for n in (0, 2)] == [expected[n].token_ids for n in (0, 2)]


@pytest.mark.parametrize("failing", [1, 2])
def test_numbers_that_overflow_stay_with_their_request(llama, failing):
    """Guards who takes the slot of a request that failed, the last row or a new one: NaN times a mask's 0 is NaN."""
    engine = Engine(llama, None, EngineSettings(max_rows=3, capacity=64))
    asked = [(0, 9, 12), (1, 5, 8), (2, 2, 9), (3, 1, 6)]  # shorter and shorter: the first reaches farther than NaNs
    built = [Request(encoded(prompt(n, images=0, words=w).ids), sampling=Sampling(c)) for n, w, c in asked]
    step, layer = engine._step_logits, engine._slots.layers[2]

    @torch.inference_mode()
    def overflowing() -> torch.Tensor:
        logits = step()
        for row, active in enumerate(engine._rows):
            if active.index == failing and len(active.tokens) == 5:
                layer._keys[row, :, engine._slots.lengths[row]] = float("nan")
                layer._values[row, :, engine._slots.lengths[row]] = float("nan")
                logits[row] = float("nan")
        return logits

    engine._step_logits = overflowing
    got = engine.generate([replace(one, routing=KEEP_ALL) for one in built])
    assert "logit is nan" in str(got[failing].error)
    for (seed, words, count), one in zip(asked, got, strict=True):
        if one.error is None:
            assert list(one.token_ids) == alone(llama, prompt(seed, images=0, words=words).ids, count, KEEP_ALL)[0]
    assert sum(one.error is None for one in got) == 3


def test_an_engine_s_slots_are_freed_with_it(llama):
    """Guards memory: slots of gigabytes must not wait for the garbage collector."""
    engine = Engine(llama)
    engine.generate([asking(0)])
    slots = weakref.ref(engine._slots)
    gc.disable()
    try:
        del engine
        assert slots() is None
    finally:
        gc.enable()


def test_a_source_may_ask_the_engine_itself(llama):
    """Guards the rest of a source against what else is submitted meanwhile; one that raises takes nothing along."""
    engine = Engine(llama, None, EngineSettings(max_rows=2, max_waiting=2))

    def source(fails: bool = False) -> Iterator[Request]:
        for number in range(6):
            if number == 2:
                assert engine.generate([asking(number)])[0].error is None
            if fails and number == 4:
                raise KeyError("the source's own")
            yield asking(number)

    assert [one.id for one in engine.generate(source())] == [str(number) for number in range(6)]
    with pytest.raises(KeyError):
        engine.generate(source(fails=True))
    assert engine.is_idle


def test_the_first_batch_is_chosen_among_all_that_may_wait(llama):
    """Guards the choice of company: short prompts, which one prefill takes at once, wait for those behind them."""
    engine = Engine(llama, None, EngineSettings(max_rows=2, max_waiting=8))
    routes = [torch.tensor([number % 2, 1, 1, 1, 1 - number % 2], dtype=torch.bool) for number in range(8)]
    engine.generate(
        [replace(asking(number), routing=RoutingOptions(route=route)) for number, route in enumerate(routes)]
    )
    assert engine.statistics.layers_read == engine.statistics.steps * 4


def test_requests_are_taken_as_there_is_room(llama):
    """Guards memory: a long source is not read, and its pictures not decoded, before the first is answered."""
    taken: list[int] = []
    engine = Engine(llama, None, EngineSettings(max_rows=2, max_waiting=2))

    def source() -> Iterator[Request]:
        for number in range(40):
            taken.append(engine.statistics.prefills)
            yield Request(encoded(prompt(number, images=0).ids), sampling=Sampling(2), id=str(number))

    assert [one.id for one in engine.generate(source())] == [str(number) for number in range(40)]
    assert taken[:2] == [0, 0]
    assert taken[8] > 0


def test_a_dense_model_and_all_layers_kept():
    """Guards the dense model in the engine, and that keeping all layers gives the same tokens."""
    base = forever(tiny_llama(dtype=torch.float64))
    built = [Request(encoded(prompt(seed, images=0).ids), sampling=Sampling(5)) for seed in range(3)]
    dense = Engine(base).generate(built)
    routed = forever(route_everywhere(base))
    kept = [Request(one.messages, sampling=one.sampling, routing=KEEP_ALL) for one in built]
    assert [one.token_ids for one in Engine(routed).generate(kept)] == [one.token_ids for one in dense]
    assert all(all(one.route) for one in dense)
