"""What a run trains on: its records as datasets, those that are left out, and their tokens on disk."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from routing_experts.data.dataset import EncodedDataset
from routing_experts.data.digits import DIGITS
from routing_experts.data.encode import Encoder
from routing_experts.data.faults import Fault
from routing_experts.data.readers.sources import Records, load_records
from routing_experts.data.token_cache import TokenCache, Tokenise, build, cache_name
from routing_experts.errors import TrainingError
from routing_experts.training.faults import FaultLog
from routing_experts.training.processes import num_processes, on_main
from routing_experts.training.recipe import DataSettings, Recipe


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
    records, numbers = _records(settings, faults if leaves_out else None)
    size = len(numbers)
    num_trained = max(0, size - settings.held_out)
    if num_trained < a_step:
        raise TrainingError(
            f"{num_trained} records to train on for steps of {a_step} (batch_size times accumulation times processes): "
            "not one step would be full. Lower training.batch_size, or give more records."
        )
    size_trained = num_trained - num_trained % a_step
    trained = EncodedDataset(records, size_trained, encoder, settings.keep_encoded, leaves_out, numbers)
    if not settings.held_out:
        return trained, None
    behind = [records[index] for index in range(num_trained, size)]
    held_out = numbers[num_trained:]
    return trained, EncodedDataset(behind, len(behind), encoder, settings.keep_encoded, leaves_out, held_out)


def open_fault_log(recipe: Recipe, path: Path, trained: EncodedDataset, faults: Sequence[Fault]) -> FaultLog | None:
    """The list of records that are left out; None where a fault ends the run.

    Args:
        recipe: of the run.
        path: of the list.
        trained: the run's records.
        faults: those that were found when they were read.

    Raises:
        TrainingError: if they are too many already.
    """
    if recipe.data.on_fault != "skip":
        return None
    log = FaultLog(path, len(trained.numbers) + len(faults), recipe.data.max_faulty)
    log.add(faults)
    return log


def use_token_cache(recipe: Recipe, trained: EncodedDataset, console: Console) -> None:
    """Has the records' tokens read from the recipe's cache, which the main process writes if it is not there."""
    settings, encoder = recipe.data, trained.encoder
    if settings.token_cache is None:
        return
    folder = Path(settings.token_cache) / cache_name(_contents(settings, trained.records), encoder)

    def write() -> None:
        if TokenCache.is_complete(folder):
            return
        tokenise = Tokenise(recipe.model, encoder.prompt_format, encoder.max_length)
        with console.status(f"tokens of {len(trained):,} records …"):
            build(folder, trained.records, len(trained), tokenise, max(1, settings.workers))

    on_main(write)
    trained.tokens = TokenCache(folder, encoder)


def _contents(settings: DataSettings, records: Any) -> str:
    """Which records of which bytes a run trains on."""
    if not isinstance(records, Records):
        return f"{settings.digits} {settings.records}"
    numbers = hashlib.sha256(records.numbers.tobytes()).hexdigest()
    return f"{records.source.items.digest()} {records.source.root.resolve()} {numbers}"


def _records(settings: DataSettings, faults: list[Fault] | None) -> tuple[Any, Sequence[int]]:
    """What is trained on by index, and the records' numbers in their source."""
    if settings.source == DIGITS:
        assert settings.records is not None
        return settings.digits, range(settings.records)
    records = load_records(
        settings.source, settings.images, settings.records, settings.subset, settings.split, faults=faults
    )
    return records, records.numbers
