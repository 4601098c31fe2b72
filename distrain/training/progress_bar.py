"""The live line of a training in a terminal: what happens now, how far the run is, and the last loss and metrics."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm
from typing_extensions import override

from distrain.files.escaping import Lines, escaped
from distrain.files.live_text import CLEAR_LINE, bar, clock, cut, display_width, is_live, terminal_size
from distrain.files.terminal import TERMINAL, print_to_stderr
from distrain.health.activity import RankActivity
from distrain.health.run_status import seconds_left, shown_phase
from distrain.reporting.end_table import end_table
from distrain.training.callbacks import Callback, RunView, listed_metrics, sent_bytes

_REDRAW_SECONDS = 0.25
#: From then on a phase other than training shows how long it has taken.
_LONG_PHASE_SECONDS = 2.0
_SHORTEST_BAR, _LONGEST_BAR = 8, 30
_GAP = "  "


def shows_bar(mode: str) -> bool:
    """Whether a live line is shown; ``mode`` is ``trainer.progress``."""
    return mode == "bar" or (mode == "auto" and is_live(TERMINAL))


class ProgressBar(Callback):
    """A live line, redrawn by a thread of its own, so that it moves even in a long step and no step waits for it.

    The line is tqdm's, with a text made here: bars of downloads then stand below it, and log lines above.

    Args:
        shown: Whether there is a line at all; without one, all methods do nothing.
        stream: Where to write; by default standard error.
    """

    def __init__(self, *, shown: bool = True, stream: TextIO | None = None) -> None:
        self.shown = shown
        self._stream = stream or TERMINAL
        self._line: Any = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        #: What happens, and since when; before the ranks have met nothing else says it.
        self._doing, self._since = "", time.monotonic()
        self._activity: RankActivity | None = None
        self._run: RunView | None = None
        self._first_step, self._began = 0, self._since
        self._values: Mapping[str, float] = {}

    def say(self, doing: str) -> None:
        """Shows what happens from now on, until :meth:`follow` is called."""
        if not self.shown:
            return
        self._doing, self._since = doing, time.monotonic()
        if self._thread is None:
            self._stream.write(CLEAR_LINE if is_live(self._stream) else "")
            # Without a bar of its own, tqdm draws the description as it is.
            self._line = tqdm(bar_format="{desc}", file=self._stream, leave=False, mininterval=0)
            self._thread = threading.Thread(target=self._redraw, name="distrain-progress", daemon=True)
            self._thread.start()

    def follow(self, activity: RankActivity) -> None:
        """Shows from now on what a rank is doing."""
        self._activity = activity

    @override
    def on_fit_start(self, run: RunView) -> None:
        self._first_step, self._began = run.progress.step, time.monotonic()
        self._run = run

    @override
    def on_log(self, run: RunView, values: Mapping[str, float]) -> None:
        self._values = values

    @override
    def on_epoch_end(self, run: RunView, values: Mapping[str, float]) -> None:
        # Shorter than the line in the log, which is wider than most terminals; what was trained on is left out first.
        parts = [
            (0, f"epoch {run.progress.epoch}/{run.config.trainer.epochs}"),
            (1, f"loss {values['epoch/train_loss']:.4f}"),
            (4, listed_metrics(run.task.metrics, values, "epoch/train_", 4)),
        ]
        if "epoch/val_loss" in values:
            metrics = ", ".join(f"val {escaped(name)} {values[f'epoch/val_{name}']:.4f}" for name in run.task.validated)
            parts += [(2, f"val loss {values['epoch/val_loss']:.4f}"), (3, metrics)]
        tqdm.write(_GAP.join(_kept(parts, terminal_size()[0] - 1)), file=self._stream)

    def end(self, summary: Mapping[str, Any], run_dir: Path) -> None:
        """Replaces the line by a table of what the run came to."""
        self.close()
        print_to_stderr(Lines.of(["", *end_table(summary, run_dir, terminal_size()[0])]))

    def close(self) -> None:
        """Removes the line; does nothing if there is none."""
        self._closing.set()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()
            self._line.close()

    def _redraw(self) -> None:
        while True:
            # The last column stays free: some terminals begin a new line when it is written.
            self._line.set_description_str(self.text(terminal_size()[0] - 1))
            if self._closing.wait(_REDRAW_SECONDS):
                return

    def text(self, width: int) -> str:
        """The line, at most so many columns wide."""
        now, run = time.monotonic(), self._run
        if self._activity is not None:
            compiles = run is not None and bool(run.config.trainer.compile) and run.progress.step == self._first_step
            doing = shown_phase(self._activity.phase, compiles=compiles)
            if doing != self._doing:
                self._doing, self._since = doing, now
        doing, seconds = self._doing, now - self._since
        if doing == "evaluating" and self._activity is not None:
            doing += " {}/{}".format(*self._activity.batches)
        if doing != "training" and (run is None or seconds > _LONG_PHASE_SECONDS):
            doing += f" {clock(seconds)}"
        if run is None:
            return cut(doing, width)
        return _fitted(doing, run, self._values, self._first_step, now - self._began, width)


def _fitted(doing: str, run: RunView, values: Mapping[str, float], first_step: int, seconds: float, width: int) -> str:
    """The line of a training; what matters less is left out of a narrow one."""
    step, total, epochs = run.progress.step, run.total_steps, run.config.trainer.epochs
    share = min(step / max(total, 1), 1.0)
    left = seconds_left(seconds, step - first_step, total - step)
    # In the order of the line, each with its rank in importance.
    parts = [
        (0, f"epoch {min(run.progress.epoch + 1, epochs)}/{epochs}"),
        (1, f"{doing:10}"),
        (5, bar(share, _SHORTEST_BAR)),
        (2, f"{share:4.0%}"),
        (7, f"{step:,}/{total:,}"),
        (3, "" if left is None or step >= total else f"{clock(left)} left"),
    ]
    if values:
        parts += [
            (4, f"loss {values['train/loss']:.4f}"),
            (6, listed_metrics(run.task.metrics, values, "train/", 3)),
            (8, f"{values['speed/images_per_second']:,.0f} images/s"),
            (9, f"communication {values['time/communication']:.0%}{sent_bytes(values)}"),
        ]
    kept = _kept([(importance, text) for importance, text in parts if text], width)
    line = _GAP.join(kept)
    drawn = bar(share, _SHORTEST_BAR)
    longer = min(_LONGEST_BAR, _SHORTEST_BAR + width - display_width(line))
    return cut(line.replace(drawn, bar(share, longer), 1), width)


def _kept(parts: Sequence[tuple[int, str]], width: int) -> list[str]:
    """The most important parts that fit, in their order."""
    chosen: set[int] = set()
    room = width + len(_GAP)
    for importance, text in sorted(parts):
        room -= display_width(text) + len(_GAP)
        if room >= 0 or not chosen:
            chosen.add(importance)
        else:
            break
    return [text for importance, text in parts if importance in chosen]
