"""Routes as data: what is recorded is what is forced again, and lines that do not fit are named."""

import json
import re
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from routing_experts.errors import RouteError
from routing_experts.inference.generate import Answer
from routing_experts.inference.routes import (
    RouteLine,
    draw_routes,
    read_routes,
    recorded,
    refuse_repeated,
    routes_for,
    write_routes,
)
from routing_experts.models.cache import RoutedCache
from routing_experts.models.options import RoutingOptions
from tiny import GREEDY, NUM_LAYERS, batch_of, for_generate, prompt, route_everywhere, tiny_llama

GOOD = '{"id": "1", "route": "11011"}'


@pytest.fixture(scope="module")
def model():
    return route_everywhere(tiny_llama(), seed=1)


@st.composite
def files(draw):
    ids = draw(st.lists(st.text(), min_size=1, max_size=6, unique=True))
    flags = st.lists(st.booleans(), min_size=(layers := draw(st.integers(1, 40))), max_size=layers)
    return [RouteLine(name, tuple(draw(flags)), draw(st.sampled_from(["", "a0b1"]))) for name in ids]


@given(lines=files())
def test_what_is_written_is_read_back(lines, tmp_path_factory):
    """Guards ids of any characters, line ends among them, and routes of any length."""
    path = tmp_path_factory.getbasetemp() / "routes.jsonl"
    write_routes(path, lines)
    assert read_routes(path) == lines


def test_recorded_routes_forced_again_give_the_same_tokens(model, tmp_path):
    """Guards the round trip through a file: mixed routes of a batch, in another order, token for token."""
    prompts = [prompt(seed, images=0, words=1 + seed % 7) for seed in range(24)]

    def write(which, options=None):
        cache = RoutedCache(model.config, options)
        batch = for_generate(batch_of([prompts[row] for row in which]))
        return model.generate(**batch, **GREEDY, past_key_values=cache)[:, -GREEDY["max_new_tokens"] :], cache.route

    tokens, route = write(range(24))
    assert len({tuple(row) for row in route.tolist()}) > 2
    answers = [Answer(str(row), "", tuple(flags)) for row, flags in enumerate(route.tolist())]
    write_routes(tmp_path / "routes.jsonl", recorded(model, answers))
    order = [(7 * row + 3) % 24 for row in range(24)]
    forced = routes_for(model, read_routes(tmp_path / "routes.jsonl"), [str(row) for row in order])
    again, taken = write(order, RoutingOptions(route=forced))
    assert torch.equal(taken, route[order])
    assert torch.equal(again, tokens[order])
    backwards, _ = write(order, RoutingOptions(route=forced.flip(0)))
    assert not torch.equal(backwards, tokens[order])  # or the routes would not matter


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("", None, "holds no routes"),
        ("\n", None, "holds no routes"),
        (f"{GOOD}\n\n{GOOD}", 2, "not JSON"),
        (f'{GOOD}\n{{"id": "2", "rout', 2, "not JSON"),
        ("[1, 2]", 1, r"is \[1, 2\]"),
        ('{"id": "1"}', 1, "expected"),
        ('{"id": "1", "route": "11", "skip": 1}', 1, "expected"),
        ('{"id": 1, "route": "11011"}', 1, "id is 1, not a text"),
        ('{"id": "1", "route": [1, 1]}', 1, "not a text"),
        ('{"id": "1", "route": "11x11"}', 1, "route is '11x11'"),
        ('{"id": "1", "route": ""}', 1, "route is ''"),
        (f'{GOOD}\n{{"id": "2", "route": "1111"}}', 2, "4 layers, but line 1 has 5"),
        (f"{GOOD}\n{GOOD}", None, "id '1' stands at 1 and at 2"),
    ],
)
def test_lines_that_do_not_fit_are_named(text, line, expected, tmp_path):
    """Guards against guesses: file, line, what stands there and what was expected."""
    path = tmp_path / "routes.jsonl"
    path.write_text(text)
    with pytest.raises(RouteError, match=expected) as told:
        read_routes(path)
    assert str(path) in str(told.value)
    assert line is None or f"line {line}" in str(told.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    """Guards missing files and those that are no text."""
    (tmp_path / "picture").write_bytes(b"\xff\xd8\xff")
    for name in ("none", "picture"):
        with pytest.raises(RouteError, match=name):
            read_routes(tmp_path / name)


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    """Guards an older file against lines that would spoil it."""
    path = tmp_path / "routes.jsonl"
    write_routes(path, [RouteLine("1", (True, False))])
    before = path.read_text()
    for wrong in ([], [RouteLine("1", (True,))] * 2, [RouteLine("1", ())]):
        with pytest.raises(RouteError):
            write_routes(path, wrong)
        assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["routes.jsonl"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (RouteLine("2", (True,) * 5), "no route for request '1': there are routes for 2"),
        (RouteLine("1", (True,) * 4), "request '1': a route of shape"),
        (RouteLine("1", (False, True, True, True, True)), r"request '1': a route that skips layers \[0\]"),
        (RouteLine("1", (True,) * 5, "0123456789abcdef"), "recorded on a base model with fingerprint 0123456789abcdef"),
    ],
)
def test_routes_that_do_not_fit_the_model_are_refused(line, expected, model):
    """Guards replays: every request has a line, of as many layers, of routed ones, of this base."""
    with pytest.raises(RouteError, match=expected):
        routes_for(model, [line], ["1"])


def test_repeated_ids_are_found_before_anything_is_asked():
    """Guards data sets whose records share ids."""
    refuse_repeated(["a", "b"], "data")
    with pytest.raises(RouteError, match=re.escape("data: id 'a' stands at 1 and at 3")):
        refuse_repeated(["a", "b", "a"], "data")


@given(skipped=st.lists(st.integers(0, 4), max_size=20), seed=st.integers(0, 3))
def test_random_routes_skip_as_many_layers_as_asked(skipped, seed):
    """Guards routes for benchmarks: each row's number, routed layers only, the same for the same seed."""
    routes = draw_routes(skipped, (1, 2, 3, 4), NUM_LAYERS, seed)
    assert routes.shape == (len(skipped), NUM_LAYERS)
    assert (~routes).sum(1).tolist() == skipped
    assert routes[:, 0].all()
    assert torch.equal(routes, draw_routes(skipped, (1, 2, 3, 4), NUM_LAYERS, seed))


def test_random_routes_take_any_layer_and_no_more_than_there_are():
    """Guards against a draw that prefers layers, and one that cannot be."""
    drawn = Counter(map(tuple, draw_routes([1] * 400, (1, 2, 3, 4), NUM_LAYERS, 0).tolist()))
    assert len(drawn) == 4
    assert min(drawn.values()) > 60
    with pytest.raises(RouteError, match="skips 5 layers: 4 are routed"):
        draw_routes([1, 5], (1, 2, 3, 4), NUM_LAYERS, 0)


def test_a_line_is_short_and_readable(tmp_path):
    """Guards the format that other programs read."""
    write_routes(tmp_path / "r", [RouteLine("7", (True, True, False), "a0")])
    assert json.loads((tmp_path / "r").read_text()) == {"id": "7", "route": "110", "model": "a0"}
