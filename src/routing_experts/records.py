"""What runs leave behind: ``results.json`` and ``log.jsonl``. Typed, checked when written and when read; no torch.

Every JSON object here is an ``Entry``. Reading names the file and the field of whatever does not fit; keys that this
version does not know are kept in ``extra``, so that a newer run's records pass through an older library unharmed.
"""

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Self, TextIO, TypeVar, Union, get_args, get_origin, get_type_hints

from routing_experts.errors import ReportError

RESULTS_NAME = "results.json"
LOG_NAME = "log.jsonl"
REPORTED_PACKAGES = ("routing-experts", "torch", "transformers")
T = TypeVar("T")

# A number's lowest and highest value, and what messages call it.
Share = Annotated[float, 0.0, 1.0, "a share from 0 to 1"]
Seconds = Annotated[float, 0.0, math.inf, "seconds, 0 or more"]
Count = Annotated[int, 0, math.inf, "a count, 0 or more"]
Positive = Annotated[int, 1, math.inf, "a count of at least 1"]


@dataclass(frozen=True)
class Entry:
    """A JSON object with known fields; ``extra`` holds the other keys that stood beside them."""

    extra: dict[str, Any] = field(default_factory=dict, kw_only=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        known = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "extra"}
        return known | self.extra

    @classmethod
    def from_dict(cls, values: Any, where: str = "") -> Self:
        """The inverse of ``to_dict``; ``where`` is the object's own place in its file, for messages.

        Raises:
            ReportError: if a field is missing or has a value of another kind; the field is named.
        """
        if not isinstance(values, dict):
            raise _misfit(where, values, "an object with named fields")
        hints = get_type_hints(cls, include_extras=True)
        prefix = f"{where}." if where else ""
        names = [f.name for f in fields(cls) if f.name != "extra"]
        missing = [name for name in names if name not in values]
        if missing:
            raise ReportError(
                f"{', '.join(prefix + name for name in missing)} missing: {cls.__name__} needs {', '.join(names)}. "
                "The run may have been cut short, or written by another version; evaluate it again."
            )
        known = {name: _read(hints[name], values[name], prefix + name) for name in names}
        return cls(**known, extra={key: value for key, value in values.items() if key not in known})


@dataclass(frozen=True)
class Score(Entry):
    """A model's share of right answers."""

    accuracy: Share


@dataclass(frozen=True)
class Dense(Score):
    """The unrouted model that routing is held against: the better of the base model and the tuned one."""

    source: Literal["base", "tuned"]


@dataclass(frozen=True)
class Skipping(Score):
    """The accuracy of a model that skips this share of its decoder layers (for random routes: at random)."""

    skip_rate: Share


@dataclass(frozen=True)
class Routed(Skipping):
    """The routed model; ``layer_skip_rates`` has one share per decoder layer."""

    layer_skip_rates: list[Share]


@dataclass(frozen=True)
class Static(Skipping):
    """The same layers skipped for every question, as many as the routers skip on average."""

    skipped_layers: list[Count]


@dataclass(frozen=True)
class SpeedCase(Entry):
    """Repeated timings of one piece of work, dense and routed.

    Attributes:
        model: "this" is the run's own; "larger" one of random weights, where layers cost what they cost in practice.
        mixed: whether the rows of the batch took different routes.
    """

    name: str
    phase: Literal["prefill", "decode", "generate"]
    batch: Positive
    model: Literal["this", "larger"]
    skip_rate: Share
    mixed: bool
    dense_seconds: list[Seconds]
    routed_seconds: list[Seconds]


@dataclass(frozen=True)
class Speed(Entry):
    """Medians of the headline case, all cases, and in ``note`` why routed is not faster where it is not."""

    dense_seconds: Seconds
    routed_seconds: Seconds
    cases: list[SpeedCase]
    note: str


@dataclass(frozen=True)
class TaskResult(Entry):
    """One task's questions: accuracy dense and routed, and what the routers skipped."""

    questions: Positive
    dense: Share
    routed: Share
    skip_rate: Share
    layer_skip_rates: list[Share]


@dataclass(frozen=True)
class SweepPoint(Skipping):
    """Accuracy and skip rate with ``keep_bias`` added to every keep logit."""

    keep_bias: float


@dataclass(frozen=True)
class Results(Entry):
    """All that a run measured; the contents of ``results.json``.

    Attributes:
        tuned: the base model fine-tuned on the same records for as many steps; None if that was not trained.
    """

    base: Score
    tuned: Score | None
    dense: Dense
    routed: Routed
    static: Static
    random: Skipping
    speed: Speed
    tasks: dict[str, TaskResult]
    sweep: list[SweepPoint]
    questions: Positive
    seed: int
    environment: dict[str, Any]
    seconds_total: Seconds
    recipe: str
    num_layers: Positive

    def save(self, path: Path) -> None:
        """Writes the file whole, or raises ``ReportError`` and writes nothing if a value could not be read back."""
        try:
            write_text(path, json.dumps(self._checked(self.to_dict()).to_dict(), indent=2, allow_nan=False) + "\n")
        except (TypeError, ValueError) as error:
            raise ReportError(f"{path} was not written: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads and checks the file.

        Raises:
            ReportError: if it is missing, is not JSON, or a field is missing or does not fit; path and field are named.
        """
        return load_json(path, cls._checked)

    @classmethod
    def _checked(cls, values: Any) -> Self:
        results = cls.from_dict(values)
        rates = {f"tasks.{name}.layer_skip_rates": task.layer_skip_rates for name, task in results.tasks.items()}
        rates["routed.layer_skip_rates"] = results.routed.layer_skip_rates
        for where, by_layer in rates.items():
            if len(by_layer) != results.num_layers:
                raise _misfit(where, by_layer, f"one rate for each of num_layers={results.num_layers} layers")
        if max(results.static.skipped_layers, default=0) >= results.num_layers:
            raise _misfit("static.skipped_layers", results.static.skipped_layers, f"layers below {results.num_layers}")
        if results.dense.source == "tuned" and results.tuned is None:
            raise _misfit("dense.source", "tuned", "'base', since tuned is null")
        for i, case in enumerate(results.speed.cases):
            if not case.dense_seconds or not case.routed_seconds:
                raise _misfit(f"speed.cases[{i}]", case.name, "a timing or more in dense_seconds and routed_seconds")
        return results


@dataclass(frozen=True)
class LogLine(Entry):
    """One line of the training log. What a dense stage does not have is None, and so is a value that was not finite."""

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


def environment() -> dict[str, Any]:
    """Where and when a run took place; ``commit`` is the source tree's if there is one, "-dirty" if it was changed."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        **{name: next((d.version for d in distributions(name=name)), None) for name in REPORTED_PACKAGES},
        "commit": _source_commit(),
    }


def write_text(path: Path, text: str) -> None:
    """Writes under a temporary name and renames, so that a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_json(path: Path, parse: Callable[[Any], T]) -> T:
    """Reads a JSON file and parses its value; every ``ReportError`` names the file."""
    try:
        return parse(json.loads(path.read_bytes()))
    except ReportError as error:
        raise ReportError(f"{path}: {error}") from error
    except (OSError, ValueError) as error:
        raise ReportError(
            f"{path} cannot be read as JSON ({error}). Give the folder of a run that was evaluated to its end."
        ) from error


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        inner, low, high, meaning = arguments
        if not low <= (number := _read(inner, value, where)) <= high:
            raise _misfit(where, value, meaning)
        return number
    if origin in (Union, UnionType):
        return None if value is None else _read(arguments[0], value, where)
    if origin is Literal:
        if value not in arguments:
            raise _misfit(where, value, "one of " + ", ".join(map(repr, arguments)))
        return value
    if origin is list:
        values = _expect(value, list, "a list", where)
        return [_read(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(values)]
    if origin is dict:
        values = _expect(value, dict, "an object", where)
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in values.items()}
    if isinstance(kind, type) and issubclass(kind, Entry):
        return kind.from_dict(value, where)
    if kind is float:
        if not math.isfinite(_expect(value, (int, float), "a number", where)):
            raise _misfit(where, value, "a finite number")
        return float(value)
    names = {int: "a whole number", bool: "true or false", str: "a text"}
    return _expect(value, kind, names[kind], where)


def _expect(value: Any, kind: type | tuple[type, ...], name: str, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _misfit(where, value, name)
    return value


def _misfit(where: str, value: Any, expected: str) -> ReportError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return ReportError(
        f"{where or 'the whole file'} is {shown}: expected {expected}. Correct it, or evaluate the run again."
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Entry):
        return value.to_dict()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _log_text(line: LogLine) -> str:
    values = line.to_dict()
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    named = cpuinfo.is_file() and re.search(
        r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE
    )
    if named:
        return named[1].strip()
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def _source_commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    # Installed into an environment that lies in somebody's repository, git would answer with that repository's commit.
    if not (root / ".git").exists():
        return None
    return _output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
