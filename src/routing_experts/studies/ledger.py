"""A study's record on disk: in its folder, where reports look for it, and wherever else it is kept."""

from collections.abc import Sequence
from pathlib import Path

from routing_experts.records import STUDY_NAME, ArmSpeed, StudyRecord, save_json
from routing_experts.studies.compare import study_record
from routing_experts.studies.contest import Contest
from routing_experts.studies.jobs import jobs_of


class Ledger:
    """Writes what a study has come to.

    Args:
        name: the study's.
        contest: the study's; runs that ``kept`` holds already count as done.
        kept: a file beside the folder's own, which other processes may write too; None for none.
    """

    def __init__(self, name: str, contest: Contest, kept: Path | None) -> None:
        self.name, self.contest, self.kept = name, contest, kept
        self._read()

    @property
    def paths(self) -> list[Path]:
        """Where the record lies; reports look for the first."""
        own = self.contest.output / STUDY_NAME
        return [own] if self.kept is None else [own, self.kept]

    def _read(self) -> None:
        if self.kept is not None and self.kept.is_file():
            self.contest.learn(StudyRecord.load(self.kept))

    def write(self, speeds: Sequence[ArmSpeed] = ()) -> StudyRecord:
        """The record of all runs that are done, those that another process has written since among them."""
        self._read()
        runs = [found for job in jobs_of(self.contest.study) if (found := self.contest.found(job)) is not None]
        record = study_record(self.name, self.contest, runs, speeds)
        values = record.to_dict()
        for path in self.paths:
            save_json(path, values)
        return record
