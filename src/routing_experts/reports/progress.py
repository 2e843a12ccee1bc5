"""The page of a run that still trains: how far it is and how it goes, from its log alone."""

import math
from datetime import datetime
from pathlib import Path

from routing_experts.errors import ReportError
from routing_experts.records import LOG_NAME, LogLine, read_log, seconds_left, write_text
from routing_experts.reports.html import training_drawing
from routing_experts.reports.page import FIGURES_FOLDER, REPORT_NAME, render
from routing_experts.reports.summary import NONE, duration, percent

PACE_LINES = 20  # of the latest stage: what the time left is told from


class ProgressPage:
    """``report.html`` of a run that has no results yet.

    An open browser tab reads the file again by itself: nothing listens, and no script runs.

    Args:
        run_dir: the run's folder; its log may be still to come.
        every: seconds after which an open page is read again.
    """

    def __init__(self, run_dir: Path, every: float) -> None:
        self.run_dir, self.every = run_dir, every
        self.path = run_dir / REPORT_NAME
        self._drawn: tuple[int, int] | None = None

    @property
    def is_written(self) -> bool:
        """Whether there was a line to show yet."""
        return self._drawn is not None

    def renew(self) -> bool:
        """Writes the page if the log is another than it last showed.

        Returns:
            Whether it did.

        Raises:
            ReportError: if the log cannot be read; a last line that is still being written is left out.
        """
        state = self._log_state()
        if state is None:
            self._drawn = None  # a run that is begun anew has none yet
        if state is None or state == self._drawn or not (log := self._lines()):
            return False
        note = f"This page follows the log and looks for more every {self.every:g} s."
        self._write(log, state, note, refresh=math.ceil(self.every))
        self._drawn = state
        return True

    def close(self, is_finished: bool) -> bool:
        """Writes the last page, which no longer renews itself.

        Args:
            is_finished: whether the run came to its end.

        Returns:
            Whether there was a line to show.
        """
        state = self._log_state()
        if state is None or not (log := self._lines()):
            return False
        finished = "The run is finished; roe evaluate and roe report put what it reached in this page's place."
        self._write(log, state, finished if is_finished else "This page follows the run no longer.", refresh=None)
        return True

    def _log_state(self) -> tuple[int, int] | None:
        """When the log was written last, in nanoseconds, and its bytes; None without a log."""
        try:
            status = (self.run_dir / LOG_NAME).stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_size

    def _lines(self) -> list[LogLine]:
        """The log's; none if it has gone meanwhile, as when its run is begun anew."""
        path = self.run_dir / LOG_NAME
        try:
            return read_log(path)
        except ReportError:
            if path.is_file():
                raise
            return []

    def _write(self, log: list[LogLine], state: tuple[int, int], note: str, refresh: int | None) -> None:
        last, logged = log[-1], datetime.fromtimestamp(state[0] / 1e9)
        page = render(
            "progress.html.jinja",
            title=self.run_dir.resolve().name,
            date=f"step {last.step:,} was logged at {logged:%Y-%m-%d %H:%M:%S}",
            headline=f"{last.stage.replace('_', ' ').capitalize()}: step {last.step:,} of {_steps(last):,}",
            done=last.progress,
            refresh=refresh,
            tiles=_tiles(log),
            note=note,
            drawing=training_drawing(self.run_dir / FIGURES_FOLDER, log),
        )
        write_text(self.path, page)


def _steps(line: LogLine) -> int:
    """Of the whole run."""
    return round(line.step / line.progress) if line.progress else line.step


def _clock(seconds: float) -> str:
    """As ``123:05:09``: a tile has no room for words."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _tiles(log: list[LogLine]) -> list[tuple[str, str, str]]:
    """What the last line says; what it has no value for has no tile."""
    last = log[-1]
    pace = [(line.step, line.seconds) for line in log[-PACE_LINES:] if line.stage == last.stage]
    left = seconds_left(pace, _steps(last))
    left_words = "time left not known yet" if left is None else f"about {duration(left)} left"
    tiles = [
        ("done", percent(last.progress), left_words if last.progress < 1 else "all steps"),
        ("elapsed", _clock(last.seconds), "training alone"),
        ("cross-entropy", NONE if last.ce is None else f"{last.ce:.3f}", "nats"),
    ]
    if last.skip_rate is not None and last.target_skip_ratio is not None:
        tiles.append(("layers skipped", percent(last.skip_rate), f"target {percent(last.target_skip_ratio)}"))
    if last.annealed_temperature is not None:
        tiles.append(("gate temperature", f"{last.annealed_temperature:.2g}", "annealed"))
    if last.tokens_per_second is not None:
        tiles.append(("tokens a second", f"{last.tokens_per_second:,.0f}", "of all processes"))
    return tiles
