"""``log.jsonl``: what training tells as it goes, a line a time."""

import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from routing_experts.errors import ReportError
from routing_experts.records.entry import Count, Entry, Seconds, Share, write_text

LOG_NAME = "log.jsonl"


@dataclass(frozen=True)
class LogLine(Entry):
    """One line of the training log. What a dense stage does not have is None, and so is a value that was not finite.

    Attributes:
        tokens_per_second: ordinary tokens of all processes, padding left out, over the wall time since the stage's
            line before, or since the stage began; None in older logs.
        distillation: distance to the dense path, before its weight; None where it is not asked for.
    """

    step: Count
    progress: Share
    stage: str
    loss: float | None
    ce: float | None
    skip_rate: Share | None
    target_skip_ratio: Share | None
    temperature: float | None
    gate_bias: float | None
    learning_rate: float
    layer_skip_rates: list[Share] | None
    seconds: Seconds
    tokens_per_second: float | None = None
    distillation: float | None = None

    @property
    def annealed_temperature(self) -> float | None:
        """The gate's temperature where one is annealed; that of hard gates stays 1, which says nothing."""
        return None if self.temperature == 1.0 else self.temperature


def seconds_left(marks: Sequence[tuple[int, float]], steps: int) -> float | None:
    """What is left of a run at the pace of its latest steps.

    Args:
        marks: steps and the seconds at which they were done, the latest last.
        steps: of the whole run.

    Returns:
        Seconds; None while the marks span no step.
    """
    if not marks or marks[-1][0] <= marks[0][0]:
        return None
    (first, began), (last, ended) = marks[0], marks[-1]
    return (ended - began) / (last - first) * max(0, steps - last)


class TrainingLog(AbstractContextManager["TrainingLog"]):
    """Appends to ``log.jsonl``, one flushed line a time; for the main process alone.

    The first line appended drops what an older attempt wrote of that step and later ones, so that a resumed run's log
    reads like an uninterrupted one. Until then the file stays as it is.

    Raises:
        ReportError: when built, if there already is a log that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._older = read_log(path) if path.exists() else []
        self._file: TextIO | None = None

    def append(self, line: LogLine) -> None:
        """Writes a line and flushes it."""
        if self._file is None:
            write_text(self.path, "".join(_log_text(older) for older in self._older if older.step < line.step))
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(_log_text(line))
        self._file.flush()

    def close(self) -> None:
        """Closes the file, for good."""
        if self._file is not None:
            self._file.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_log(path: Path) -> list[LogLine]:
    """Reads a training log. A last line that a crash tore is left out.

    Raises:
        ReportError: if the file is missing, or a line other than a torn last one does not fit; its number is named.
    """
    try:
        texts = path.read_bytes().rstrip().split(b"\n")
    except OSError as error:
        raise ReportError(f"{path} cannot be read ({error.strerror}). Give the folder of a training run.") from error
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(LogLine.from_dict(json.loads(text)))
        except ReportError as error:
            raise ReportError(f"{path}, line {number}: {error}") from error
        except ValueError as error:
            if number == len(texts):
                break
            raise ReportError(f"{path}, line {number} is not JSON ({error}). Take that line out.") from error
    return lines


def _log_text(line: LogLine) -> str:
    values = line.to_dict()
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
