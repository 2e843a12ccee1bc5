"""What the verbs of ``roe data`` do with sets: bars over bytes, faults to a file, manifests beside what is written."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from routing_experts.cli.common import model_folder, progress_bar
from routing_experts.cli.output import Output, print_json
from routing_experts.data.mixture.check import Told, check_mixture
from routing_experts.data.mixture.joining import Part, join
from routing_experts.data.mixture.looking import CountTokens, Look
from routing_experts.data.readers.json_items import JsonItems
from routing_experts.data.readers.sources import Source
from routing_experts.data.writing import RecordWriter
from routing_experts.errors import ConfigError
from routing_experts.records import MixtureCheck, RecordFault
from routing_experts.reports import print_manifest

MANIFEST_SUFFIX = ".manifest.json"
EVERY = 0.1  # seconds between two moves of a bar


class Bars:
    """How far sets are read, and how many of their pictures were looked at, each with its own rate.

    Args:
        progress: that shows them.
        title: of what is read.
        total: its bytes, counted as often as it is read; 0 where that is not known.
    """

    def __init__(self, progress: Progress, title: str, total: int) -> None:
        self.progress = progress
        self._reading = progress.add_task(title, total=total or None, said="")
        self._looking: TaskID | None = None
        self._bytes = self._records = self._pictures = 0
        self._began = self._moved = time.monotonic()

    def read(self, count: int) -> None:
        """Told of each record with its bytes."""
        self._bytes, self._records = self._bytes + count, self._records + 1
        if time.monotonic() - self._moved > EVERY:
            self.move()

    def looked(self, count: int) -> None:
        """Told of so many pictures, once they were looked at."""
        if count and self._looking is None:
            self._looking = self.progress.add_task("pictures", total=None, said="")
        self._pictures += count
        self.move()

    def move(self) -> None:
        """Shows what was counted so far."""
        self._moved = time.monotonic()
        seconds = max(self._moved - self._began, 1e-9)
        read = f"{self._bytes / 1e6:,.0f} MB, {self._bytes / 1e6 / seconds:,.0f} MB/s, " if self._bytes else ""
        said = f"{read}{self._records:,} records, {self._records / seconds:,.0f} a second"
        self.progress.update(self._reading, completed=self._bytes, said=said)
        if self._looking is not None:
            said = f"{self._pictures:,}, {self._pictures / seconds:,.0f} a second"
            self.progress.update(self._looking, said=said)


@contextmanager
def bars(console: Console, title: str, total: int) -> Iterator[Bars]:
    """Bars over files of so many bytes."""
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        shown = Bars(progress, title, total)
        yield shown
        shown.move()


def checked(
    source: Source, look: Look, workers: int, limit: int | None, faults: Path | None, console: Console
) -> MixtureCheck:
    """Checks a set with bars; every fault goes to a file if one is given."""
    if (
        faults is not None
        and faults.exists()
        and Path(source.items.name).exists()
        and faults.samefile(source.items.name)
    ):
        raise ConfigError(f"--list {faults}: that is the set itself. Give another file.")
    size = _size(source.items) if isinstance(source.items, JsonItems) and limit is None else 0
    with ExitStack() as held:
        shown = held.enter_context(bars(console, "reading", size))
        writer = held.enter_context(RecordWriter(faults)) if faults is not None else None

        def write(fault: RecordFault) -> None:
            if writer is not None:
                writer.add(fault.to_dict())

        return check_mixture(source, look, workers, limit, Told(shown.read, shown.looked, write))


def counting(model: str, prompt_format: str) -> CountTokens:
    """Counts tokens as they would be for a run's or a model's folder, or a hub name; tried out here, before others are.

    Raises:
        CheckpointError: if there is no such processor.
        PromptError: if it cannot lay dialogues out so.
    """
    from routing_experts.data.token_settings import TokenSettings  # torch comes with it: other checks do without

    settings = TokenSettings(model_folder(model), prompt_format)
    settings.try_out()
    return settings.count_tokens


def part_of(text: str, above: Path | None) -> Part:
    """``FILE[@IMAGES][=WEIGHT]`` as a part; its paths start from the folder above all image folders, if one is given.

    Raises:
        ConfigError: if the weight is no number, or the image folder does not lie below the one above.
    """
    path, images, times = _pieces(text)
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


def _pieces(text: str) -> tuple[Path, str, float]:
    """File, image folder and weight; names of files that are there may hold both signs."""
    if Path(text).is_file():
        return Path(text), "", 1.0
    named, sign, weight = text.rpartition("=")
    if not sign:
        return *_divided(text), 1.0
    try:
        return *_divided(named), float(weight)
    except ValueError as error:
        if "/" not in weight and _divided(named)[0].is_file():  # else the sign is in a folder's name
            raise ConfigError(f"{text}: weight {weight!r} is no number. Write FILE=0.5 or FILE=2.") from error
        return *_divided(text), 1.0


def _divided(text: str) -> tuple[Path, str]:
    """A file and what stands behind its ``@``: the last that ends the name of a file that is there."""
    ends = [place for place, sign in enumerate(text) if sign == "@"]
    if Path(text).is_file() or not ends:
        return Path(text), ""
    there = [end for end in ends if Path(text[:end]).is_file()]
    end = there[-1] if there else ends[0]
    return Path(text[:end]), text[end + 1 :]


def joined(parts: list[Part], target: Path, seed: int, say: Output, as_json: bool) -> None:
    """Joins with a bar, writes the manifest beside the file, and tells what was taken."""
    total = sum(_size(part.items) * part.passes for part in parts)
    with bars(say.progress, "reading", total) as shown:
        manifest = join(parts, target, seed, shown.read)
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
    from routing_experts.data.digits import DigitsTask
    from routing_experts.data.mixture.export import TEXT_SHARE, export_digits

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
