"""What a run came to, as a table for the terminal, from the content of ``summary.json``."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrain.files.escaping import escaped
from distrain.files.live_text import cut
from distrain.files.untrusted import finite_number

_INDENT = "  "
#: Narrower terminals wrap.
_NARROWEST = 30
#: Title of the last row.
_FOLDER = "files"
#: Numbers of ``summary.json`` that begin with ``test_`` and are no metric.
_COUNTS = frozenset({"test_count", "test_correct"})


def end_table(summary: Mapping[str, Any], run_dir: Path | str, width: int) -> list[str]:
    """The lines of the table.

    Args:
        summary: Content of ``summary.json``; may come from a stranger.
        run_dir: The run's folder.
        width: Columns of the terminal; no line is longer, if it has 30 or more, but the last one, which names the
            folder: a path that is broken can't be copied.
    """
    rows = [(title, text) for title, text in _rows(summary, str(run_dir)) if text]
    titles = max(len(title) for title, _ in rows) + len(_INDENT)
    lines = []
    for title, text in rows:
        room = max(width, _NARROWEST) - titles - len(_INDENT)
        for place, line in enumerate([text] if title == _FOLDER else _wrapped(text, room)):
            lines.append(f"{_INDENT}{'' if place else title:{titles}}{line}")
    return lines


def _wrapped(text: str, room: int) -> list[str]:
    """The text's parts, which end with a comma, on as few lines as possible."""
    # Blanks within a part don't break.
    joined = text.replace(" ", "\0").replace(",\0", ", ")
    lines = textwrap.wrap(joined, room, break_on_hyphens=False) or [""]
    return [cut(line.replace("\0", " "), room) for line in lines]


def _rows(summary: Mapping[str, Any], run_dir: str) -> list[tuple[str, str]]:
    number = _Numbers(summary)
    names = [name.removeprefix("test_") for name in summary if name.startswith("test_") and name not in _COUNTS]
    # The loss last, as in the lines of epochs.
    names.sort(key=lambda name: name == "loss")
    last, best = (number.listed(prefix, names) for prefix in ("test_", "best_test_"))
    validation = number.listed("val_", [name for name in names if name != "loss"])
    return [
        ("test", last),
        ("test of the best", best if best != last else ""),
        ("validation", validation),
        ("best validation", _best(summary, number)),
        ("training loss", number.text("train_loss", "{:.4f}")),
        ("steps", _steps(number)),
        (
            "speed",
            _joined(
                number.text("images_per_second", "{:,.0f} images/s"),
                number.text("step_ms.p50", "{:,.3g} ms a step"),
                number.text("step_ms.p95", "{:,.3g} ms the slowest 5 %"),
            ),
        ),
        ("time", _shares(summary.get("time_share"))),
        ("memory", _memory(number)),
        (_FOLDER, escaped(run_dir)),
    ]


def _best(summary: Mapping[str, Any], number: _Numbers) -> str:
    monitor = str(summary.get("monitor") or "").removeprefix("val/")
    value = number.text(f"best_val_{monitor}", "{:.4f}")
    if not value:
        return ""
    when = number.text("best_epoch", ", after epoch {:,.0f}") or number.text("best_step", ", at step {:,.0f}")
    return f"{escaped(monitor)} {value}{when}" + (", stopped early" if summary.get("stopped_early") else "")


def _steps(number: _Numbers) -> str:
    resumed_at = number.value("resumed_at_step")
    done = number.text("steps", "{:,.0f}")
    if resumed_at:
        done += f", {(number.value('steps') or 0) - resumed_at:,.0f} of them since it was resumed"
    return _joined(done, number.text("epochs", "{:,.0f} epochs"), number.text("wall_seconds", "{:,.1f} s"))


def _memory(number: _Numbers) -> str:
    kinds = ("parameters", "gradients", "optimizer", "activations", "buckets")
    parts = [number.text(f"memory_by_kind_mb.measured.{kind}", kind + " {:,.0f}") for kind in kinds]
    return _joined(number.text("peak_memory_mb", "{:,.0f} MB"), *parts)


def _shares(shares: object) -> str:
    if not isinstance(shares, dict):
        return ""
    found = {str(name): finite_number(share) for name, share in shares.items()}
    return ", ".join(f"{escaped(name)} {share:.0%}" for name, share in found.items() if share is not None)


def _joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


class _Numbers:
    """The finite numbers of a summary.

    Args:
        summary: Its content.
    """

    def __init__(self, summary: Mapping[str, Any]) -> None:
        self._summary = summary

    def value(self, path: str) -> float | None:
        """A number by its dotted path."""
        value: Any = self._summary
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        return finite_number(value)

    def text(self, path: str, form: str) -> str:
        """A number in a format; empty if there is none."""
        value = self.value(path)
        return "" if value is None else form.format(value)

    def listed(self, prefix: str, names: list[str]) -> str:
        """Metrics with their names; those that are missing are left out."""
        found = [(name, finite_number(self._summary.get(prefix + name))) for name in names]
        return ", ".join(f"{escaped(name)} {value:.4f}" for name, value in found if value is not None)
