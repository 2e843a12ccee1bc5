"""What a run trains on: its records as datasets, those that are left out, and their tokens on disk."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from routing_experts.data.dataset import EncodedDataset
from routing_experts.data.digits import DIGITS
from routing_experts.data.encode import Encoder
from routing_experts.data.faults import UNUSABLE, Fault
from routing_experts.data.readers.sources import Records, load_records
from routing_experts.data.readers.table_items import TableItems
from routing_experts.data.token_cache import TokenCache, Tokenise, build, cache_name
from routing_experts.data.token_settings import TokenSettings
from routing_experts.errors import TrainingError
from routing_experts.training.faults import FaultLog, Faults, Refusal
from routing_experts.training.processes import num_processes, on_main
from routing_experts.training.recipe import DataSettings, Recipe

MOST_WORKERS = 8  # that write a cache unless the recipe says how many: each holds a tokenizer and its libraries


def build_datasets(
    recipe: Recipe, processor: Any, faults: list[Fault] | None = None
) -> tuple[EncodedDataset, EncodedDataset | None]:
    """The recipe's records, encoded on first use: those that train, and the held-out ones behind them.

    Those that would begin another step at an epoch's end are left out: how a step's records are divided among batches
    and processes would decide where the next epoch begins.

    Args:
        recipe: of the run.
        processor: the base's.
        faults: takes those of records that are left out, where the recipe says so.

    Raises:
        RecordError: if the records cannot be read.
        TrainingError: if they do not fill one step.
    """
    settings, a_step = recipe.data, recipe.training.dialogues_on(num_processes())
    encoder, leaves_out = Encoder(processor, settings.prompt_format, settings.max_length), settings.on_fault == "skip"
    records = _records(settings, faults if leaves_out else None)
    size = _count(settings, records)
    num_trained = max(0, size - settings.held_out)
    if num_trained < a_step:
        raise TrainingError(
            f"{num_trained} records to train on for steps of {a_step} (batch_size times accumulation times processes): "
            "not one step would be full. Lower training.batch_size, or give more records."
        )
    size_trained = num_trained - num_trained % a_step
    stands_in = leaves_out or settings.workers > 0  # see ``Refusal``
    trained = EncodedDataset(records, size_trained, encoder, settings.keep_encoded, stands_in)
    if not settings.held_out:
        return trained, None
    behind = EncodedDataset(records, settings.held_out, encoder, settings.keep_encoded, leaves_out, first=num_trained)
    return trained, behind


def open_fault_log(recipe: Recipe, path: Path, trained: EncodedDataset, faults: Sequence[Fault]) -> Faults:
    """The list of records that are left out, or what ends the run at the first.

    Args:
        recipe: of the run.
        path: of the list.
        trained: the run's records.
        faults: those that were found when they were read.

    Raises:
        TrainingError: if they are too many already.
    """
    if recipe.data.on_fault != "skip":
        return Refusal()

    count = _count(recipe.data, trained.records)

    def is_mended(number: int) -> bool:
        if number >= count:  # there are fewer records now
            return True
        try:
            trained.encoder(trained.records[number])
        except UNUSABLE:
            return False
        return True

    log = FaultLog(path, count, recipe.data.max_faulty)
    log.begin(faults, is_mended)
    return log


def use_token_cache(recipe: Recipe, trained: EncodedDataset, console: Console) -> None:
    """Has the records' tokens read from the recipe's cache, which the main process writes if it is not there.

    The others wait for it, at most as long as processes wait for each other (half an hour, left to itself): of a large
    set the cache is best made by a run on one process, which may be stopped then.
    """
    settings, encoder = recipe.data, trained.encoder
    if settings.token_cache is None:
        return
    contents = on_main(lambda: _contents(settings, trained.records))
    folder = Path(settings.token_cache) / cache_name(contents, encoder)

    def write() -> None:
        if TokenCache.is_complete(folder):
            return
        made = TokenSettings(recipe.model, encoder.prompt_format, encoder.max_length, settings.pad_to_square)
        count, workers = _count(settings, trained.records), settings.workers or min(os.cpu_count() or 1, MOST_WORKERS)
        with Progress(*Progress.get_default_columns(), console=console) as progress:
            told = progress.add_task(f"tokens of {count:,} records", total=count)
            build(folder, trained.records, count, Tokenise(made), workers, partial(progress.advance, told))

    on_main(write)
    TokenCache.check(folder)
    trained.tokens = TokenCache(folder, encoder)


def fetched_contents(recipe: Recipe, trained: EncodedDataset) -> str | None:
    """What tells a set of the hub, as it was fetched, from another; None for other sources, see ``contents_of``."""
    items = None if recipe.data.source == DIGITS else trained.records.source.items
    return items.digest() if isinstance(items, TableItems) and not items.files else None


def _contents(settings: DataSettings, records: Any) -> str:
    """Which records of which bytes a run trains on."""
    if not isinstance(records, Records):
        return f"{settings.digits} {settings.records}"
    return f"{records.source.items.digest()} {records.source.root.resolve()} {len(records)}"


def _count(settings: DataSettings, records: Any) -> int:
    """How many records there are, held-out ones included."""
    if settings.source == DIGITS:
        assert settings.records is not None
        return settings.records
    return len(records)


def _records(settings: DataSettings, faults: list[Fault] | None) -> Any:
    """What is trained on, by number."""
    if settings.source == DIGITS:
        return settings.digits
    return load_records(
        settings.source, settings.images, settings.records, settings.subset, settings.split, faults=faults
    )
