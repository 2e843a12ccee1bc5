"""Records that training left out: every process knows of all, one writes them down, and too many end the run."""

import json
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from routing_experts.data.collate import FAULTS
from routing_experts.data.faults import Fault
from routing_experts.errors import TrainingError
from routing_experts.training.processes import is_main_process


class FaultLog:
    """The faulty records of a run, each once, in ``faults.jsonl``.

    Args:
        path: of the file; what an earlier part of the run wrote there counts.
        records: of the run's data, faulty ones included.
        max_share: of them that may be faulty.
    """

    def __init__(self, path: Path, records: int, max_share: float) -> None:
        self.path, self.records, self.max_share = path, records, max_share
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self._known = {json.loads(line)["record"] for line in lines}
        self._new: list[Fault] = []

    def take(self, batch: MutableMapping[str, Any]) -> None:
        """Takes a batch's faults out of it."""
        self._new += batch.pop(FAULTS, ())

    def add(self, faults: Sequence[Fault]) -> None:
        """What all processes found alike, before the first step.

        Raises:
            TrainingError: if they are too many.
        """
        self._write(faults)

    def close_step(self, accelerator: Any) -> None:
        """Shares what a step's batches brought.

        Raises:
            TrainingError: in all processes, if too many records are faulty by now.
        """
        count = torch.tensor(float(len(self._new)), device=accelerator.device)
        if float(accelerator.reduce(count, reduction="sum")):
            found: list[Fault] = gather_object(self._new)
            self._new = []
            self._write(found)

    def _write(self, faults: Sequence[Fault]) -> None:
        new = {fault.record: fault for fault in faults if fault.record not in self._known}
        self._known |= new.keys()
        if is_main_process() and new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                for fault in new.values():
                    line = {"record": fault.record, "problem": fault.problem}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if len(self._known) > self.max_share * self.records:
            raise TrainingError(
                f"{len(self._known):,} of {self.records:,} records cannot be used, more than data.max_faulty="
                f"{self.max_share:g} of them: {self.path} lists each. Mend them, or raise the share if so many may be "
                "left out."
            )
