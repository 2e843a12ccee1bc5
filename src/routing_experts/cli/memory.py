"""``roe train --estimate``: what each stage of a recipe takes on one device."""

from dataclasses import asdict

from routing_experts.cli.output import Output, print_json
from routing_experts.reports.summary import Grid
from routing_experts.reports.table import print_grids
from routing_experts.training.memory import StageMemory, estimate, own_method
from routing_experts.training.recipe import Recipe

UNITS = {"GiB": 2**30, "MiB": 2**20}
PARTS = ("weights", "gradients", "optimizer", "activations", "total")


def say_memory(recipe: Recipe, processes: int, tokens: int | None, as_json: bool, say: Output) -> None:
    """Prints the table; the way that the recipe tunes is marked.

    Args:
        recipe: complete.
        processes: that train together.
        tokens: of a dialogue; the data's longest by default.
        as_json: print it for programs.
        say: where.
    """
    with say.progress.status("counting"):
        rows = list(estimate(recipe, processes, tokens))
    if as_json:
        stages = [asdict(row) | {"total": row.total} for row in rows]
        print_json({"method": own_method(recipe), "processes": processes, "bytes": stages}, say)
        return
    print_grids([_grid(rows, recipe, processes, tokens or recipe.data.max_length)], say.results)


def _grid(rows: list[StageMemory], recipe: Recipe, processes: int, tokens: int) -> Grid:
    own, training = own_method(recipe), recipe.training
    shared = f", {training.sharding} over {processes} processes" if training.sharding else ""
    unit = "GiB" if max(row.total for row in rows) > UNITS["GiB"] else "MiB"
    lines = []
    for row in rows:
        sizes = (f"{getattr(row, part) / UNITS[unit]:.1f}" for part in PARTS)
        lines.append((f"{row.method} *" if row.method == own else row.method, row.stage, *sizes))
    return Grid(
        f"{unit} on each device: batch {training.batch_size}, {tokens} tokens, {training.precision}"
        f"{', layers recomputed' if training.gradient_checkpointing else ''}{shared}",
        ("tuned", "stage", *PARTS),
        tuple(lines),
        num_texts=2,
        note=f"* this recipe ({own}). Counted, not measured; a CUDA context adds about 1 GiB, fragments some percent.",
    )
