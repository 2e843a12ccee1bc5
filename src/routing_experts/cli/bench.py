"""``roe bench``: measured seconds of dense, routed and static twin, side by side."""

from pathlib import Path
from typing import Annotated

import typer

from routing_experts.cli.common import Device


def bench(
    preset: Annotated[str, typer.Option(help="What to time: cpu-100m, pocket, llava-1.5-7b or llava-1.5-13b.")],
    model: Annotated[
        str | None, typer.Option(help="A run's or routed model's folder to time instead of random weights.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Timed runs a case; the preset's by default.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where record and report go; runs/bench/PRESET.")] = None,
    device: Device = "auto",
    json: Annotated[
        Path | None, typer.Option(help="Where the record goes as well as into the folder; - for standard output.")
    ] = None,
) -> None:
    """Time prefill, decode and whole answers, rows alike and mixed, all sides in turn.

    Example: roe bench --preset cpu-100m
    """
    from routing_experts.cli.common import model_folder
    from routing_experts.cli.output import start, write_json
    from routing_experts.evaluation.bench.models import real_sides
    from routing_experts.evaluation.bench.presets import preset_named
    from routing_experts.evaluation.bench.run import run_bench
    from routing_experts.evaluation.bench.work import keep_freed_memory
    from routing_experts.models.device import pick_device
    from routing_experts.models.load import from_pretrained
    from routing_experts.records import BENCH_NAME
    from routing_experts.reports import print_bench, write_bench_report

    say, plan, place = start(), preset_named(preset, repeats), pick_device(device)
    keep_freed_memory()
    sides = real_sides(from_pretrained(model_folder(model)).to(place).eval()) if model else None
    record = run_bench(plan, place, sides, model or "random", say.progress.print)
    folder = output or Path("runs") / "bench" / preset
    if str(json) != "-":
        print_bench(record, say.results)
    write_json(record.to_dict(), folder / BENCH_NAME, say, "bench")  # where `roe report` looks for it
    if json is not None:
        write_json(record.to_dict(), json, say, "bench")
    say.progress.print(f"report: {write_bench_report(folder)}")
