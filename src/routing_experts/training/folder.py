"""A run's folder: where its parts lie, whose it is, who is writing in it, and which of its checkpoints are whole.

A checkpoint is whole once its marker stands, which is written last and in one step; what a killed process left
without one is never read. Imports no torch: the command line asks here for paths, too.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from routing_experts.errors import TrainingError, shown
from routing_experts.records import GALLERY_NAME, LOG_NAME, RESULTS_NAME, save_json

MARKER = "complete.json"
RUN_NAME = "run.json"
LOCK_NAME = ".lock"
FAULTS_NAME = "faults.jsonl"
RUN_FORMAT = 1
# How a step's records are divided changes rounding alone; their number is a fact of the run.
DIVIDED = ("training.batch_size", "training.accumulation", "training.records_a_step")
# What may differ between a run and its continuation: nothing that a weight depends on.
HARMLESS = (
    "output",
    *("training.save_steps", "training.save_total_limit", "training.logging_steps", "training.report_to"),
    *("training.eval_steps", "data.keep_encoded", "data.workers", "data.token_cache"),
    "data.max_faulty",
    *("training.gradient_checkpointing", "training.sharding", *DIVIDED),
)

CONTENTS = "contents of data.source"
# What settings were that older runs do not tell of.
AS_BEFORE = {
    "roe.router_input": "routing_tokens",
    "training.length_window": 1,
    "data.split": "train",
    "data.digits.cell": 16,
    "data.on_fault": "error",
}
# What a run may be mended by on its way, if that is said; anything of its data as well.
MENDABLE = (CONTENTS, "training.learning_rate", "training.base_learning_rate", "training.max_grad_norm")


class RunFolder:
    """A run's folder on disk.

    Args:
        path: made when the run begins.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.model = self.path / "model"
        self.checkpoints = self.path / "checkpoints"
        self.log = self.path / LOG_NAME
        self.tensorboard = self.path / "tensorboard"
        self.faults = self.path / FAULTS_NAME
        self._run = self.path / RUN_NAME

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out; the system gives the lock back however this process ends.

        Raises:
            TrainingError: if another process trains here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCK_NAME)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise TrainingError(
                f"{self.path} is in use: another process trains there, and two would overwrite each other. Wait for "
                "it, or give another output folder (--output)."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def begin(
        self,
        recipe: Mapping[str, Any],
        facts: Mapping[str, Any] | None = None,
        restart: bool = False,
        accept: bool = False,
    ) -> None:
        """Makes the folder this recipe's, or goes on with what is there of it; incomplete checkpoints are removed.

        A run that left neither a whole checkpoint nor a model claims nothing: any recipe may take its place.

        Args:
            recipe: plain settings.
            facts: what its weights depend on beside it: records a step, files' contents. A finished run's stay.
            restart: throw away what an earlier run of whatever recipe left.
            accept: go on although records or rates are others now.

        Raises:
            TrainingError: if the folder holds a run of another recipe, or something that is no run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._check_is_a_run()
        started = None if restart else self._read()
        wanted, facts = json.loads(json.dumps(recipe)), dict(facts or {})
        if started is not None and (started["finished"] or last_complete(self.checkpoints) is not None):
            known = started["facts"]
            facts = known if started["finished"] else known | facts
            differing = [*_differences(started["recipe"], wanted), *_differences(_those_of(known, facts), facts)]
            changes = self._changes(differing, accept and not started["finished"])
            if changes:
                started |= {"recipe": wanted, "changes": [*started["changes"], *changes]}
            if changes or facts != known:
                self._write(started | {"facts": facts})
        else:
            self._clear()
            self.log.unlink(missing_ok=True)
            self.faults.unlink(missing_ok=True)
            self._write({"format": RUN_FORMAT, "recipe": wanted, "facts": facts, "finished": False, "changes": []})
        remove_incomplete(self.checkpoints)

    def check_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Raises ``TrainingError`` if the folder holds a run of another recipe than these plain settings."""
        if self.recipe is not None:
            self._changes(list(_differences(self.recipe, json.loads(json.dumps(recipe)))))

    def check_facts(self, facts: Mapping[str, Any], accept: bool = False) -> None:
        """Holds a run to what is known only once its model or records are loaded, and notes it the first time.

        Args:
            facts: by name.
            accept: go on with other records.

        Raises:
            TrainingError: if a fact was another one when the run began.
        """
        started = self._read()
        assert started is not None
        known = started["facts"]
        changes = self._changes(list(_differences(_those_of(known, facts), dict(facts))), accept)
        if changes or facts.keys() - known.keys():
            told = {"facts": known | dict(facts), "changes": [*started["changes"], *changes]}
            self._write(started | told)

    def _changes(self, differing: list[tuple[str, str]], accept: bool = False) -> list[dict[str, Any]]:
        """What is other now, to be noted with the step from which it holds, if a run may go on by that."""
        told = [f"{name}: {difference}" for name, difference in differing]
        are_mendable = all(name in MENDABLE or name.startswith("data.") for name, _ in differing)
        if differing and not (accept and are_mendable):
            raise TrainingError(
                f"{self.path} holds another run: {'; '.join(sorted(told)[:4])}. Going on would mix the two. Give "
                "another output folder (--output), or throw that run away (--restart)"
                + ("; or go on with the change from its last checkpoint (--accept-changes)." if are_mendable else ".")
            )
        last = last_complete(self.checkpoints)
        return [{"step": step_of(last) if last else 0, "change": change} for change in told]

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The plain settings of the run that the folder holds, if it holds one."""
        run = self._read()
        return (run or {}).get("recipe") or None  # a clearing that was killed leaves an empty one

    @property
    def is_finished(self) -> bool:
        """Whether the run that the folder holds came to its end and wrote its model."""
        run = self._read()
        return bool(run and run["finished"] and self.model.is_dir())

    def finish(self) -> None:
        """Notes that the model is written."""
        run = self._read()
        assert run is not None
        self._write(run | {"finished": True})

    def _check_is_a_run(self) -> None:
        folders = [folder for folder in (self.checkpoints, self.tensorboard, self.model) if folder.exists()]
        if folders and not self._run.exists():
            raise TrainingError(
                f"{self.path} has {', '.join(f'{folder.name}/' for folder in folders)} but no {RUN_NAME} that says of "
                "which recipe: something else made it, or another version. Give another output folder (--output), or "
                "delete it yourself."
            )

    def _clear(self) -> None:
        """Removes the run, if there is one. Whatever a clearing that is killed leaves, the next run clears."""
        if not self._run.exists():
            return
        for checkpoint in self.checkpoints.glob("checkpoint-*"):
            (checkpoint / MARKER).unlink(missing_ok=True)
        self._write({"format": RUN_FORMAT, "recipe": {}, "finished": False})
        for file in (self.log, self.faults, self.path / RESULTS_NAME, self.path / GALLERY_NAME):
            file.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.tensorboard, self.model):
            if folder.exists():
                shutil.rmtree(folder)
        self._run.unlink()

    def _read(self) -> dict[str, Any] | None:
        if not self._run.is_file():
            return None
        try:
            run = json.loads(self._run.read_text(encoding="utf-8"))
            found = {
                "format": run.get("format", RUN_FORMAT),
                "recipe": dict(run["recipe"]),
                "facts": dict(run.get("facts", {})),
                "changes": list(run.get("changes", [])),
                "finished": bool(run["finished"]),
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TrainingError(
                f"{self._run} does not say which recipe was run ({error}). Restore it, or begin anew (--restart)."
            ) from error
        if found["format"] != RUN_FORMAT:
            raise TrainingError(
                f"{self._run} has format {found['format']!r}, this library reads {RUN_FORMAT}: another version began "
                "the run. Go on with that version, or give another output folder (--output)."
            )
        return found

    def _write(self, run: dict[str, Any]) -> None:
        save_json(self._run, run)


def last_complete(checkpoints: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    whole = _whole(checkpoints)
    return whole[-1] if whole else None


def _whole(checkpoints: Path) -> list[Path]:
    """The checkpoints that were written to their end, the newest last."""
    return sorted((path for path in checkpoints.glob("checkpoint-*") if read_state(path) is not None), key=step_of)


def unwritten(folder: Path, checkpoints: Path, error: Exception) -> TrainingError:
    """What to raise where a checkpoint or the model could not be written: what is left, and what to do."""
    whole = last_complete(checkpoints)
    cause = error.__cause__ or error  # a CheckpointError wraps what the system said in a message of its own
    return TrainingError(
        f"{folder} could not be written ({cause}). "
        + (f"{whole.name} is whole and stays. " if whole else "")
        + "Make room or mend the folder, then run the same command again."
    )


def step_of(checkpoint: Path) -> int:
    """The optimiser step after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def mark_complete(checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Puts the marker in place, with what the run must remember beside weights and optimiser."""
    for file in checkpoint.rglob("*"):  # on disk before the marker is: a power cut must not leave it alone
        if file.is_file():
            _sync(file)
    save_json(checkpoint / MARKER, state)
    _sync(checkpoint / MARKER)


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """What ``mark_complete`` was given; None for a checkpoint that is not whole."""
    try:
        state = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # no marker, or one that a power cut emptied
    return state if isinstance(state, dict) else None


def keep_newest(checkpoints: Path, limit: int) -> None:
    """Removes whole checkpoints but the newest ``limit``; each loses its marker first."""
    for path in _whole(checkpoints)[:-limit]:
        (path / MARKER).unlink()
        shutil.rmtree(path)


def remove_incomplete(checkpoints: Path) -> None:
    """Removes what killed saves and removals left."""
    for path in checkpoints.glob("checkpoint-*"):
        if read_state(path) is None:
            shutil.rmtree(path)


def _sync(file: Path) -> None:
    with file.open("rb") as written:
        os.fsync(written.fileno())


def _differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Settings that are not the same: the dotted name, and what was there and what is asked for."""
    if where in HARMLESS:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        prefix = f"{where}." if where else ""
        for name in sorted(set(old) | set(new)):
            # A setting that came with a later version, and says what was always done, changes nothing.
            if name in old or (new[name] and AS_BEFORE.get(prefix + name) != new[name]):
                yield from _differences(old.get(name), new.get(name), prefix + name)
    elif old != new:
        yield where, f"{shown(old)} there, {shown(new)} asked for"


def _those_of(known: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What was noted, and of what was not, what is said now: new facts are no differences."""
    return {name: known.get(name, value) for name, value in facts.items()}
