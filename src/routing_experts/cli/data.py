"""``roe data``: instruction sets checked, drawn from and joined; the digits in forms that other tools read."""

from pathlib import Path
from typing import Annotated

import typer

from routing_experts.cli.output import AsJson

app = typer.Typer(no_args_is_help=True, help="Check, draw from and join instruction sets; write the digits as one.")

MAX_LENGTH = 2048  # tokens, as recipes have it

SetName = Annotated[
    str,
    typer.Argument(
        help="A .json or .jsonl file, a folder with metadata.jsonl, parquet files, or a set's name on the hub."
    ),
]
Images = Annotated[Path | None, typer.Option(help="The folder that image paths start from; the file's own by default.")]
Seed = Annotated[int, typer.Option(help="Of what is drawn.")]
Target = Annotated[Path, typer.Option(help="The .json or .jsonl file to write; its manifest goes beside it.")]


@app.command("check")
def check(
    records: SetName,
    images: Images = None,
    verify_images: Annotated[
        bool, typer.Option("--verify-images", help="Decode every picture to its last byte.")
    ] = False,
    lengths: Annotated[str | None, typer.Option(help="Count tokens as this model's processor does.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="With --lengths: more tokens are a fault; 2048 by default.")
    ] = None,
    prompt_format: Annotated[
        str | None, typer.Option(help="With --lengths: how dialogues are laid out; chat_template by default.")
    ] = None,
    list_faults: Annotated[
        Path | None, typer.Option("--list", help="Write every fault to this .jsonl file, a line each.")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Of a set on the hub: one of its configurations.")] = None,
    split: Annotated[str, typer.Option(help="Of a set on the hub.")] = "train",
    first: Annotated[int | None, typer.Option(min=1, help="Only so many of the first records.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that look at pictures and count tokens.")] = 2,
    json: AsJson = False,
) -> None:
    """Look at every record and picture of a set before anything is trained on it; exit code 1 if something is wrong.

    Example: roe data check mix665k.json --images data/images
    """
    from routing_experts.cli.mixture import checked, counting
    from routing_experts.cli.output import print_json, start
    from routing_experts.data.mixture.looking import Look
    from routing_experts.data.readers.json_items import LINES
    from routing_experts.data.readers.sources import open_source
    from routing_experts.reports import print_check

    say = start()
    if lengths is None and (max_length is not None or prompt_format is not None):
        raise typer.BadParameter("--max-length and --prompt-format are of --lengths MODEL, which counts. Give it too.")
    if list_faults is not None and list_faults.suffix.lower() not in LINES:
        raise typer.BadParameter(f"--list {list_faults}: faults are written a line each. Give a .jsonl file.")
    counts = None if lengths is None else counting(lengths, prompt_format or "chat_template")
    look = Look(verify_images, counts, None if counts is None else max_length or MAX_LENGTH)
    source = open_source(records, images, subset, split, once=True)
    found = checked(source, look, workers, first, list_faults, say.progress)
    if json:
        print_json(found.to_dict(), say)
    else:
        print_check(found, say.results)
    if not found.is_sound:
        raise typer.Exit(1)


@app.command("subset")
def subset(
    records: Annotated[Path, typer.Argument(help="A .json or .jsonl file.")],
    output: Target,
    share: Annotated[
        float | None, typer.Option(help="Of the records of every source and number of turns; 0.5 by default.")
    ] = None,
    rule: Annotated[
        str | None, typer.Option(help="authors: six records of every ten, by their numbers, as RoE's authors did.")
    ] = None,
    seed: Seed = 0,
    json: AsJson = False,
) -> None:
    """Draw a share of a set: the same seed gives the same bytes.

    Example: roe data subset mix665k.json --output half.json --share 0.5
    """
    from routing_experts.cli.mixture import joined
    from routing_experts.cli.output import start
    from routing_experts.data.mixture.joining import Part
    from routing_experts.data.readers.json_items import JsonItems

    say = start()
    if rule not in (None, "authors"):
        raise typer.BadParameter(f"--rule {rule}: there is one, authors. Leave it out to draw a share.")
    if rule is not None and share is not None:
        raise typer.BadParameter("--rule and --share: each says which records are kept. Give one.")
    weight = None if rule else 0.5 if share is None else share
    if weight is not None and weight >= 1:
        raise typer.BadParameter(f"--share {weight}: a share of a set lies below 1. `roe data mix` repeats records.")
    joined([Part(JsonItems(records), weight)], output, seed, say, json)


@app.command("mix")
def mix(
    parts: Annotated[
        list[str], typer.Argument(help="Files, each with a weight if it is not 1: mine.json=2, big.json=0.5.")
    ],
    output: Target,
    images: Annotated[
        Path | None,
        typer.Option(
            help="The folder above all sets' image folders, which paths will start from; without it, paths stay."
        ),
    ] = None,
    seed: Seed = 0,
    json: AsJson = False,
) -> None:
    """Join sets by weight: 2 takes all records twice, 0.5 draws half of them.

    An image folder that is not a file's own is named behind @.

    Example: roe data mix mix665k.json@images=0.5 mine/mine.json=2 --output mix.json --images .
    """
    from routing_experts.cli.mixture import joined, part_of
    from routing_experts.cli.output import start

    say = start()
    joined([part_of(part, images) for part in parts], output, seed, say, json)


export = typer.Typer(no_args_is_help=True, help="Write the digits in forms that other tools read.")
app.add_typer(export, name="export")


@export.command("digits")
def export_digits(
    folder: Annotated[Path, typer.Argument(help="Where the set, or the task, goes.")],
    layout: Annotated[
        str,
        typer.Option(
            help="llava: training data like LLaVA's mixture; lmms-eval: held-out questions as a task of its own."
        ),
    ],
    records: Annotated[int | None, typer.Option(min=1, help="How many; 10,000 of llava, 2,000 of lmms-eval.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the questions; 3 of llava, 1000 of lmms-eval.")] = None,
    json: AsJson = False,
) -> None:
    """Write the digits as a training set or as a task.

    Example: roe data export digits data/digits --layout llava --records 10000
    """
    from routing_experts.cli.mixture import digits_as_mixture, digits_as_task
    from routing_experts.cli.output import print_json, start

    say = start()
    written = {"llava": digits_as_mixture, "lmms-eval": digits_as_task}
    if layout not in written:
        raise typer.BadParameter(f"--layout {layout}: it is one of {', '.join(written)}.")
    found = written[layout](folder, records, seed, say.progress)
    if json:
        print_json(found, say)
    else:
        say.results.print(", ".join(f"{name} {value}" for name, value in found.items()))
