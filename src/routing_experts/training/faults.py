"""Records that training left out: every process knows of all, one writes them down, and too many end the run."""

import json
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from routing_experts.data.collate import FAULTS
from routing_experts.data.faults import Fault
from routing_experts.errors import RecordError, TrainingError
from routing_experts.records import write_text
from routing_experts.training.processes import on_main


class FaultLog:
    """The faulty records of a run, each once, in ``faults.jsonl``.

    Args:
        path: of the file.
        records: of the run's data, faulty ones included.
        max_share: of them that may be faulty.
    """

    def __init__(self, path: Path, records: int, max_share: float) -> None:
        self.path, self.records, self.max_share = path, records, max_share
        self._known: dict[int, str] = {}
        self._new: list[Fault] = []

    def begin(self, found: Sequence[Fault], is_mended: Callable[[int], bool]) -> None:
        """Takes what was found when the records were read, and what an earlier part of the run listed.

        Args:
            found: by the main process; others may see other files.
            is_mended: whether a record that was listed can be used now.

        Raises:
            TrainingError: in all processes, if they are too many.
        """

        def write() -> dict[int, str]:
            listed = {number: problem for number, problem in _listed(self.path).items() if not is_mended(number)}
            known = listed | {fault.record: fault.problem for fault in found}
            if known or self.path.is_file():
                self._write(known)
            return known

        self._known = on_main(write)
        self._check()

    def take(self, batch: MutableMapping[str, Any]) -> None:
        """Takes a batch's faults out of it; those that all processes know already are left."""
        self._new += [fault for fault in batch.pop(FAULTS, ()) if fault.record not in self._known]

    def close_step(self, accelerator: Any) -> None:
        """Shares what a step's batches brought.

        Raises:
            TrainingError: in all processes, if too many records are faulty by now.
        """
        count = torch.tensor(float(len(self._new)), device=accelerator.device)
        if not float(accelerator.reduce(count, reduction="sum")):
            return
        found: list[Fault] = gather_object(self._new)
        self._new = []
        self._known |= {fault.record: fault.problem for fault in found if fault.record not in self._known}
        if accelerator.is_main_process:
            self._write(self._known)
        self._check()

    def _write(self, known: dict[int, str]) -> None:
        """The whole list anew: there are few, and a list that is cut short would be none."""
        lines = (json.dumps({"record": number, "problem": problem}) for number, problem in known.items())
        write_text(self.path, "".join(line + "\n" for line in lines))

    def _check(self) -> None:
        if len(self._known) > self.max_share * self.records:
            raise TrainingError(
                f"{len(self._known):,} of {self.records:,} records cannot be used, more than data.max_faulty="
                f"{self.max_share:g} of them, such as {next(iter(self._known.values()))} {self.path} lists each. Mend "
                "them, or raise the share if so many may be left out."
            )


class Refusal:
    """The first faulty record that a worker met ends the run, in the record's own words.

    An error that a worker raises would arrive wrapped in its traceback.
    """

    def take(self, batch: MutableMapping[str, Any]) -> None:
        """Takes a batch's faults out of it; raises ``RecordError`` for the first."""
        for fault in batch.pop(FAULTS, ()):
            raise RecordError(fault.problem)

    def close_step(self, accelerator: Any) -> None:
        """Nothing is left to share."""


Faults = FaultLog | Refusal


def _listed(path: Path) -> dict[int, str]:
    if not path.is_file():
        return {}
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)
    return {line["record"]: line["problem"] for line in lines}
