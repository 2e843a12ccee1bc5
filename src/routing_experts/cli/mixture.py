"""What the verbs of ``roe data`` do with sets: bars over bytes, faults to a file, manifests beside what is written."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from routing_experts.cli.output import Output, print_json
from routing_experts.data.digits import DigitsTask
from routing_experts.data.mixture.check import check_mixture
from routing_experts.data.mixture.export import TEXT_SHARE, export_digits
from routing_experts.data.mixture.joining import Part, join
from routing_experts.data.mixture.looking import Look
from routing_experts.data.readers.items import Item
from routing_experts.data.readers.json_items import JsonItems
from routing_experts.data.readers.sources import Source
from routing_experts.data.writing import RecordWriter
from routing_experts.errors import ConfigError
from routing_experts.records import MixtureCheck, RecordFault
from routing_experts.reports import print_manifest

MANIFEST_SUFFIX = ".manifest.json"
EVERY = 256  # records between two moves of a bar


@contextmanager
def bytes_bar(console: Console, title: str, total: int) -> Iterator[Callable[[Item], None]]:
    """A bar over files that are read one after the other, some of them twice; told of each record."""
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(title, total=total or None)
        last = 0

        def advance(item: Item) -> None:
            nonlocal last
            if item.index % EVERY == 0:
                last = last if item.end > last else 0  # another file, or this one again
                progress.advance(task, item.end - last)
                last = item.end

        yield advance


def checked(source: Source, look: Look, workers: int, faults: Path | None, console: Console) -> MixtureCheck:
    """Checks a set with a bar; every fault goes to a file if one is given."""
    if (
        faults is not None
        and faults.exists()
        and Path(source.items.name).exists()
        and faults.samefile(source.items.name)
    ):
        raise ConfigError(f"--list {faults}: that is the set itself. Give another file.")
    size = _size(source.items) if isinstance(source.items, JsonItems) else 0
    with ExitStack() as held:
        advance = held.enter_context(bytes_bar(console, "reading", size))
        writer = held.enter_context(RecordWriter(faults)) if faults is not None else None

        def write(fault: RecordFault) -> None:
            if writer is not None:
                writer.add(fault.to_dict())

        return check_mixture(source, look, workers, advance, write)


def part_of(text: str, above: Path | None) -> Part:
    """``FILE[@IMAGES][=WEIGHT]`` as a part; its paths start from the folder above all image folders, if one is given.

    Raises:
        ConfigError: if the weight is no number, or the image folder does not lie below the one above.
    """
    named, has_weight, weight = text.rpartition("=")
    named = named if has_weight else text
    name, _, images = named.partition("@")
    try:
        times = float(weight) if has_weight else 1.0
    except ValueError as error:
        raise ConfigError(f"{text}: weight {weight!r} is no number. Write FILE=0.5 or FILE=2.") from error
    path = Path(name)
    if above is None:
        if images:
            raise ConfigError(f"{text}: its image folder is named, but not the one above all (--images). Give both.")
        return Part(JsonItems(path), times)
    folder, top = (Path(images) if images else path.parent).resolve(), above.resolve()
    if not folder.is_relative_to(top):
        raise ConfigError(
            f"{text}: its image folder {folder} does not lie below {top}, so no path from there could name its "
            "pictures. Give --images a folder above all of them, or name the set's behind @."
        )
    prefix = folder.relative_to(top).as_posix()
    return Part(JsonItems(path), times, "" if prefix == "." else prefix)


def joined(parts: list[Part], target: Path, seed: int, say: Output, as_json: bool) -> None:
    """Joins with a bar, writes the manifest beside the file, and tells what was taken."""
    total = sum(_size(part.items) * part.passes for part in parts)
    with bytes_bar(say.progress, "reading", total) as advance:
        manifest = join(parts, target, seed, advance)
    beside = target.with_name(target.name + MANIFEST_SUFFIX)
    manifest.save(beside)
    if as_json:
        print_json(manifest.to_dict(), say)
    else:
        print_manifest(manifest, say.results)
    say.progress.print(f"{target}\nmanifest: {beside}")


def _size(items: JsonItems) -> int:
    return items.path.stat().st_size if items.path.is_file() else 0


def digits_as_mixture(folder: Path, records: int | None, seed: int | None, console: Console) -> dict[str, Any]:
    """The digits in the layout of LLaVA's mixture."""
    from routing_experts.cli.common import progress_bar

    count, seed = records or 10_000, 3 if seed is None else seed
    with progress_bar(console, "writing", count) as advance:
        path = export_digits(folder, count, DigitsTask(seed=seed, text_share=TEXT_SHARE), advance)
    return {"file": str(path), "records": count, "seed": seed}


def digits_as_task(folder: Path, records: int | None, seed: int | None, console: Console) -> dict[str, Any]:
    """The held-out digits questions as a task of lmms-eval."""
    from routing_experts.evaluation.lmms.digits import TASK, write_task
    from routing_experts.evaluation.questions import digits_questions

    count, seed = records or 2000, 1000 if seed is None else seed
    write_task(folder, digits_questions(count, seed))
    return {"folder": str(folder), "task": TASK, "questions": count, "seed": seed}
