"""What happens beside the steps: the JSONL log, the progress bar, stage ends, and Ctrl-C."""

import signal
import threading
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from routing_experts.records import LogLine, TrainingLog
from routing_experts.training.recipe import Recipe


class JsonLog(TrainerCallback):
    """Writes ``log.jsonl`` from the main process."""

    def __init__(self, log: TrainingLog, recipe: Recipe, seconds_before: float = 0.0) -> None:
        self.journal, self.recipe, self.seconds_before = log, recipe, seconds_before

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """One line for each log of losses; the Trainer's closing summary is none."""
        if not state.is_world_process_zero or not logs or "total_loss" not in logs:
            return
        routed = "skip_rate" in logs
        self.journal.append(
            LogLine(
                step=state.global_step,
                progress=min(1.0, state.global_step / self.recipe.training.steps),
                stage=logs["stage"],
                loss=logs["total_loss"],
                ce=logs["ce"],
                skip_rate=min(1.0, logs["skip_rate"]) if routed else None,
                target_skip_ratio=self.recipe.roe.target_skip_ratio if routed else None,
                temperature=logs.get("temperature"),
                gate_bias=logs.get("gate_bias"),
                learning_rate=float(logs.get("learning_rate", 0.0)),
                layer_skip_rates=[min(1.0, rate) for rate in logs["layer_skip_rates"]] if routed else None,
                seconds=self.seconds_before + logs["seconds"],
            )
        )


class ProgressBar(TrainerCallback):
    """One bar over the whole run, with stage, cross-entropy and skip rate."""

    def __init__(self, console: Console, total: int, title: str) -> None:
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self.title = title
        self.task = self.progress.add_task(title, total=total, note="")

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Shows the bar; a resumed run's starts where it was."""
        if state.is_world_process_zero:
            self.progress.update(self.task, completed=state.global_step)
            self.progress.start()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves it."""
        self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Says how it goes."""
        if logs and "ce" in logs:
            skipping = f" · skips {logs['skip_rate']:.1%}" if "skip_rate" in logs else ""
            stage = logs["stage"].replace("_", " ")
            self.progress.update(self.task, note=f"{stage} · CE {logs['ce']:.3f}{skipping}")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leaves the last state on the screen."""
        self.progress.refresh()

    def close(self) -> None:
        """Gives the terminal back."""
        self.progress.stop()


class StopAt(TrainerCallback):
    """Ends a stage's trainer at the stage's last step, with a checkpoint to go on from."""

    def __init__(self, step: int, keep: bool) -> None:
        self.step, self.keep = step, keep

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Saves and stops once the step is reached."""
        if state.global_step >= self.step:
            control.should_training_stop = True
            control.should_save = self.keep
        return control


class InterruptGuard(TrainerCallback):
    """Ctrl-C ends training after the step in hand, with a checkpoint; a second one ends it at once.

    A context manager: the signal handler stands only while training runs, and only in the main thread.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._before: Any = None

    def __enter__(self) -> "InterruptGuard":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Saves and stops if asked to."""
        if self.interrupted:
            control.should_training_stop = control.should_save = True
        return control
