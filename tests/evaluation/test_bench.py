"""The benchmark: sides of equal weights do equal work, what is counted is what torch counts, records read back."""

import json
import subprocess
import sys
from functools import partial
from statistics import median
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from routing_experts.cli.app import app
from routing_experts.errors import ConfigError, ReportError
from routing_experts.evaluation.bench.cases import routes_of
from routing_experts.evaluation.bench.models import Sides, real_sides, twin_of
from routing_experts.evaluation.bench.presets import PRESETS, BenchPreset, Serving, Work, fitted, preset_named
from routing_experts.evaluation.bench.run import run_bench
from routing_experts.evaluation.bench.serving import authors_routes
from routing_experts.evaluation.bench.work import filled_cache, interleave, prefilled_cache
from routing_experts.evaluation.cost import decoder_sizes
from routing_experts.models.cache import cache_bytes
from routing_experts.models.options import RoutingOptions
from routing_experts.records import BenchRecord
from routing_experts.reports import bench_markdown, write_bench_report
from tiny import HIDDEN, NUM_LAYERS, route_everywhere, text_config, tiny_llama

ROUTE = torch.tensor([True, False, True, False, True])
TINY = BenchPreset(
    "tiny",
    text_config(num_hidden_layers=32).to_diff_dict() | {"model_type": "llama"},
    "float32",
    prompt=12,
    new_tokens=3,
    work=(
        Work("prefill", 1, 9),
        Work("prefill", 2, 9, mixed=True),
        Work("prefill", 2, asks=True),
        Work("decode", 2, 9),
        Work("generate", 1, 9),
        Work("engine", 2, 9, mixed=True),
    ),
    serving=Serving(requests=6, max_rows=2, waiting=(2, 4), repeats=2, prefilled=4),
    repeats=2,
    large_repeats=2,
)


@pytest.fixture(scope="module")
def sides() -> Sides:
    return real_sides(route_everywhere(tiny_llama(dtype=torch.float64), num_unrouted_layers=0))


@pytest.mark.parametrize("route", [ROUTE, torch.tensor([False, False, True, True, False])])
def test_the_twin_is_the_routed_model(sides, route):
    """Guards the ideal: same logits, prompt and decoding, layer 0 replaced as well."""
    ids = torch.randint(3, 50, (2, 9))
    twin = twin_of(sides.routed, route)
    options = RoutingOptions(route=route)
    caches = [prefilled_cache(twin, {"input_ids": ids}), prefilled_cache(sides.routed, {"input_ids": ids}, options)]
    position = torch.full((2, 1), 9)
    step = {"input_ids": ids[:, :1], "position_ids": position, "use_cache": True}
    with torch.inference_mode():
        logits = [m(**step, past_key_values=c).logits for m, c in zip((twin, sides.routed), caches, strict=True)]
    assert torch.allclose(*logits, atol=1e-12)
    assert not hasattr(twin, "roe_config")
    shared = {p.data_ptr() for p in sides.routed.parameters()}
    assert {p.data_ptr() for p in twin.parameters()} <= shared


def test_a_twin_without_adapters_is_one_whose_adapters_add_nothing():
    """Guards early exits: what is gone leaves nothing behind, in the decoder, its configuration or the cache."""
    routed = route_everywhere(tiny_llama(dtype=torch.float64), num_unrouted_layers=0)
    for layer in routed.model.layers:
        torch.nn.init.zeros_(layer.skip_up.weight)
    ids = torch.randint(3, 50, (2, 9))
    bare = twin_of(routed, ROUTE, adapters=False)
    logits = [model(input_ids=ids, use_cache=False).logits for model in (bare, twin_of(routed, ROUTE))]
    assert torch.equal(*logits)
    assert bare.config.num_hidden_layers == len(bare.model.layers) == len(prefilled_cache(bare, {"input_ids": ids}))
    assert routed.config.num_hidden_layers == len(routed.model.layers) == NUM_LAYERS


def test_a_filled_cache_is_a_prefilled_one(sides):
    """Guards decoding behind noise: as many keys and values, of the same shapes, as a prefill leaves."""
    route_BL = torch.stack([ROUTE, ~ROUTE])
    ids = torch.randint(3, 50, (2, 7))
    models = ((sides.dense, None, torch.ones_like(route_BL)), (sides.routed, RoutingOptions(route=route_BL), route_BL))
    for model, options, flags in models:
        real = prefilled_cache(model, {"input_ids": ids}, options)
        filled = filled_cache(model, flags, 7)
        for one, other in zip(real.layers, filled.layers, strict=True):
            assert (one.keys is None) == (other.keys is None)
            assert one.keys is None or one.keys.shape == other.keys.shape
        assert cache_bytes(real) == cache_bytes(filled)
    assert cache_bytes(filled) * 2 == cache_bytes(filled_cache(sides.dense, torch.ones_like(route_BL), 7))


@pytest.mark.parametrize("route", [torch.ones(NUM_LAYERS, dtype=torch.bool), ROUTE])
def test_counted_operations_are_torch_s(route):
    """Guards the counts against torch's own counter, for a prefill and a step, attention's causal half aside."""
    length, rows = 16, 2
    route_BL = route.expand(rows, -1)
    model = route_everywhere(tiny_llama(attention="eager"), num_unrouted_layers=0)  # torch does not count a CPU's SDPA
    sizes = decoder_sizes(model)
    ids = torch.randint(3, 50, (rows, length))
    options = RoutingOptions(route=route)
    with FlopCounterMode(display=False) as counter:
        cache = prefilled_cache(model, {"input_ids": ids}, options)
    causal_half = 2 * length * length * HIDDEN * int(route_BL.sum())  # torch counts masked pairs as well
    assert counter.get_total_flops() == sizes.prefill(route_BL, length).flops + causal_half
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=ids[:, :1], position_ids=torch.full((rows, 1), length), past_key_values=cache, use_cache=True)
    assert counter.get_total_flops() == sizes.decode(route_BL, length, 1).flops


def test_counted_bytes_by_hand(sides):
    """Guards bytes: a layer is read if any row keeps it, an adapter if any skips; keys and values a kept row."""
    sizes = decoder_sizes(sides.routed)
    both = torch.stack([ROUTE, ~ROUTE])  # every layer is kept by one row and skipped by the other
    weights = NUM_LAYERS * (sizes.layer + sizes.adapter) + sizes.head
    assert sizes.prefill(both, 10).bytes == 8 * weights
    assert sizes.decode(both, 10, 1).bytes == 8 * (weights + NUM_LAYERS * 11 * sizes.key_value)
    assert sum(p.numel() for p in sides.routed.model.layers[1].self_attn.parameters()) < sizes.layer


def test_the_authors_routes():
    """Guards what is drawn from the logged routes: so many layers, the same each time, layer 0 first."""
    routes = authors_routes((8, 12), 256)
    counts = [32 - int(route.sum()) for route in routes]
    assert min(counts) >= 8
    assert max(counts) <= 12
    assert sum(counts) / len(counts) / 32 == pytest.approx(0.31, abs=0.01)
    assert all(bool(route[0]) for route in routes)
    assert torch.equal(torch.stack(routes), torch.stack(authors_routes((8, 12), 256)))


def test_drawn_routes_skip_as_many_as_asked(sides):
    """Guards a case's routes: rows alike, or each another."""
    alike, mixed = (routes_of(Work("prefill", 8, 2, mixed=mixed), sides) for mixed in (False, True))
    assert (~alike).sum(1).tolist() == (~mixed).sum(1).tolist() == [2] * 8
    assert len({tuple(row) for row in alike.tolist()}) == 1
    assert len({tuple(row) for row in mixed.tolist()}) > 3


def test_sides_take_turns():
    """Guards interleaving: one warm-up each, then rounds, in which each side comes first as often as last."""
    order: list[str] = []
    times = interleave([lambda: order.append("a") or 1.0, lambda: order.append("b") or 2.0], 4)  # type: ignore[func-returns-value]
    assert "".join(order) == "ab" + "ab" + "ba" + "ba" + "ab"
    assert times == [[1.0] * 4, [2.0] * 4]


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries keep freed memory in ways of their own")
def test_freed_memory_is_kept():
    """Guards timings against page faults: a block that is freed and asked for again costs none."""
    count = (
        "import resource, sys, torch\n"
        "from routing_experts.evaluation.bench.work import keep_freed_memory\n"
        "if sys.argv[1] == 'keep': keep_freed_memory()\n"
        "for _ in range(2): torch.ones(1 << 23)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): torch.ones(1 << 23)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    run = partial(subprocess.run, capture_output=True, text=True, check=True)
    kept, given = (int(run([sys.executable, "-c", count, how]).stdout) for how in ("keep", "give"))
    assert kept * 10 < given


def test_a_bench_from_the_command_to_the_page(tmp_path, monkeypatch):
    """Guards `roe bench`: every case with raw lists, serving among them, a record that reads back, a page."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.chdir(tmp_path)
    got = CliRunner().invoke(app, ["bench", "--preset", "tiny", "--device", "cpu", "--json", "bench.json"])
    assert got.exit_code == 0, got.output
    values = json.loads((tmp_path / "bench.json").read_text())
    assert {"name", "phase", "batch", "skip_rate", "mixed", "dense_seconds", "routed_seconds", "twin_seconds"} <= set(
        values["cases"][0]
    )
    record = BenchRecord.load(tmp_path / "runs" / "bench" / "tiny" / "bench.json")
    assert [len(case.dense_seconds) for case in record.cases] == [2] * 8
    alike, mixed, asked, decode, generate, engine, arrival, waiting = record.cases
    assert alike.twin_seconds
    assert mixed.mixed
    assert mixed.twin_seconds is None
    assert asked.skip_rate == 0
    assert engine.twin_seconds is None
    assert decode.skip_rate == generate.skip_rate == engine.skip_rate == pytest.approx(9 / 32)
    assert alike.routed
    assert alike.dense
    assert alike.routed.cache_bytes / alike.dense.cache_bytes == pytest.approx(23 / 32)
    slots = alike.dense.cache_bytes * engine.batch * (TINY.prompt + TINY.new_tokens) / TINY.prompt
    assert engine.routed
    layers = engine.routed.cache_bytes / slots * 32  # that any of two rows keeps
    assert 23 < layers == round(layers) <= 32
    assert arrival.served
    assert waiting.served
    assert waiting.served.weight_cap >= arrival.served.weight_cap > 1
    assert waiting.served.first_token_seconds
    assert waiting.served.first_token_seconds[1] >= waiting.served.first_token_seconds[0] > 0
    page = (tmp_path / "runs" / "bench" / "tiny" / "report.html").read_text()
    assert "2 waiting" in page or "4 waiting" in page
    assert "of the twin" in bench_markdown(record)
    gain = median(alike.dense_seconds) / median(alike.routed_seconds)
    assert f"{gain:.2f}" in bench_markdown(record)
    values["cases"][0]["routed_seconds"] = []
    (tmp_path / "runs" / "bench" / "tiny" / "bench.json").write_text(json.dumps(values))
    with pytest.raises(ReportError, match=r"cases\[0\]"):
        write_bench_report(tmp_path / "runs" / "bench" / "tiny")


def test_presets_fit_real_models(sides):
    """Guards a preset on another depth: the same shares, no logged routes, and a prompt that is too long is refused."""
    config: Any = sides.dense.config
    work = fitted(TINY, config, NUM_LAYERS)
    assert [one.skipped for one in work.work] == [1, 1, 0, 1, 1, 1]
    assert work.serving is None
    with pytest.raises(ConfigError, match="knows 256 positions"):
        run_bench(PRESETS["cpu-100m"], torch.device("cpu"), sides)
    with pytest.raises(ConfigError, match="cpu-100m"):
        preset_named("gpu-100m")


def test_every_preset_can_be_built():
    """Guards the shapes: transformers takes them, and cases fit their positions."""
    from transformers import LlamaConfig

    for preset in PRESETS.values():
        config = LlamaConfig(**preset.shape)
        assert fitted(preset, config, config.num_hidden_layers - 1).work == preset.work
        assert preset.serving is None or config.num_hidden_layers == len(authors_routes((8, 12), 1)[0])
        assert {one.phase for one in preset.work} <= {"prefill", "decode", "generate", "engine"}
