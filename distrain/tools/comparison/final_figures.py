"""The figures that runs came to: which there are, how they are written, and the order of runs by one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distrain.errors import ConfigError
from distrain.tools.comparison.run import Run, shortened

#: Prefixes of a curve's name, and of the same metric in ``summary.json``.
_VALIDATION, _BEST = "epoch/val_", "best_val_"
#: Numbers of ``summary.json`` that begin with ``test_`` and are no metric.
_COUNTS = frozenset({"test_count", "test_correct"})
_LONGEST_TEXT = 40
#: Ends of the names of metrics that are to be made small.
_SMALL_IS_GOOD = (
    *("loss", "error", "perplexity", "mse", "mae"),
    *("seconds", "_ms", "ms_per_step", "bytes_sent_per_step", "per_rank", "memory_mb"),
)


@dataclass(frozen=True)
class Figure:
    """A number that runs are compared by.

    Attributes:
        label: What it is called, with its unit.
        value: Its value in a run; ``None`` if the run doesn't have it.
        relative: Whether a difference is shown in percent.
        decimals: Digits behind the point; ``None``: whole numbers with separators, or four significant digits.
        better: 1 if more is better, -1 if less is, 0 if neither.
    """

    label: str
    value: Callable[[Run], float | None]
    relative: bool = True
    decimals: int | None = None
    better: int = 0

    def show(self, number: float | None) -> str:
        """A value as text."""
        return "–" if number is None else show_number(number, self.decimals)

    def show_difference(self, number: float | None, baseline: float | None) -> str:
        """How a value differs from the baseline's; empty where there is nothing to say."""
        if number is None or baseline is None or number == baseline:
            return ""
        if not self.relative:
            difference = number - baseline
            text = show_number(abs(difference), self.decimals)
            return f"{'+' if difference > 0 else '−'}{text}"
        if baseline == 0:
            return ""
        percent = 100 * (number - baseline) / abs(baseline)
        if abs(percent) >= 1000:
            return f"×{show_number(number / baseline)}"
        return f"{'+' if percent > 0 else '−'}{abs(percent):.1f} %"


def show_number(number: float, decimals: int | None = None) -> str:
    """A number as a person writes it."""
    if decimals is not None and abs(number) < 1e6:
        return f"{number:,.{decimals}f}" if number == 0 or abs(number) >= 10.0**-decimals else f"{number:.2g}"
    if number == int(number) and abs(number) < 1e15:
        return f"{int(number):,}"
    if 1000 <= abs(number) < 1e9:
        return f"{number:,.0f}"
    return f"{number:.4g}"


def show_bytes(number: float | None) -> str:
    """Bytes with a decimal unit."""
    if number is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if abs(number) < 1000 or unit == "PB":
            return f"{number:.0f} B" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError


def lower_is_better(metric: str) -> bool:
    """Whether a metric is one to be made small: a loss, an error, or a cost such as time, bytes and memory."""
    return metric.startswith("step_ms.") or metric.endswith(_SMALL_IS_GOOD)


def _sign(metric: str) -> int:
    return -1 if lower_is_better(metric) else 1


def last_validation(run: Run, name: str) -> float | None:
    """The last value of a validation metric."""
    curve = run.metrics.curves.get(f"{_VALIDATION}{name}")
    return curve.last[1] if curve is not None and curve.last is not None else run.number(f"val_{name}")


def best_validation(run: Run, name: str) -> float | None:
    """The best value of a validation metric."""
    curve = run.metrics.curves.get(f"{_VALIDATION}{name}")
    if curve is None or curve.last is None:
        return run.number(f"{_BEST}{name}")
    return curve.lowest if lower_is_better(name) else curve.highest


def train_loss(run: Run) -> float | None:
    """The training loss of the last epoch, else of the last logged steps."""
    for name in ("epoch/train_loss", "train/loss"):
        curve = run.metrics.curves.get(name)
        if curve is not None and curve.last is not None:
            return curve.last[1]
    return run.number("train_loss")


def steps(run: Run) -> float | None:
    """Number of updates, as far as is known."""
    return run.number("steps") if run.summary else (run.metrics.last_step or None)


def bytes_sent(run: Run) -> float | None:
    """Bytes sent by all ranks together since the run's last start."""
    per_step, last, first = run.number("bytes_sent_per_step"), run.number("steps"), run.number("resumed_at_step")
    return None if per_step is None or last is None else per_step * (last - (first or 0))


def validation_metrics(runs: Sequence[Run]) -> list[str]:
    """Names of validation metrics, the scores before the losses."""
    names = [
        name.removeprefix(_VALIDATION) for run in runs for name in run.metrics.curves if name.startswith(_VALIDATION)
    ]
    names += [name.removeprefix(_BEST) for run in runs for name in run.summary if name.startswith(_BEST)]
    return sorted(dict.fromkeys(names), key=lower_is_better)


def test_metrics(runs: Sequence[Run]) -> list[str]:
    """Names of test metrics in ``summary.json``, the scores before the losses."""
    names = [name for run in runs for name in run.summary if name.startswith("test_") and name not in _COUNTS]
    return sorted(dict.fromkeys(names), key=lower_is_better)


def figures_of(runs: Sequence[Run]) -> list[Figure]:
    """The figures that at least one run has, the most important first."""

    def of_validation(read: Callable[[Run, str], float | None], name: str) -> Callable[[Run], float | None]:
        return lambda run: read(run, name)

    def of_summary(path: str) -> Callable[[Run], float | None]:
        return lambda run: run.number(path)

    figures = []
    for name in validation_metrics(runs):
        shown, better = shortened(name.replace("_", " "), _LONGEST_TEXT), _sign(name)
        for which, read in (("best", best_validation), ("last", last_validation)):
            figures.append(Figure(f"{which} validation {shown}", of_validation(read, name), False, 4, better))
    for name in test_metrics(runs):
        shown = shortened(name.replace("_", " "), _LONGEST_TEXT)
        figures.append(Figure(shown, of_summary(name), False, 4, _sign(name)))
    figures += [
        Figure("train loss", train_loss, False, 4, -1),
        Figure("steps", steps),
        Figure("epochs", of_summary("epochs")),
        Figure("seconds of training", lambda run: run.training_seconds, decimals=1, better=-1),
        Figure("seconds in all", of_summary("wall_seconds"), decimals=1, better=-1),
        Figure("images/s", of_summary("images_per_second"), decimals=0, better=1),
        Figure("ms per step", of_summary("step_ms.mean"), decimals=2, better=-1),
        Figure("parameters", of_summary("parameters.count")),
        Figure("peak memory, MiB", of_summary("peak_memory_mb"), decimals=0, better=-1),
        Figure("skipped updates", of_summary("skipped_updates"), False),
        Figure("resumed at step", of_summary("resumed_at_step"), False),
    ]
    present = [figure for figure in figures if any(figure.value(run) is not None for run in runs)]
    # These two are nearly always 0, which says nothing.
    rare = ("skipped updates", "resumed at step")
    return [figure for figure in present if figure.label not in rare or any(figure.value(run) for run in runs)]


def metric_value(run: Run, metric: str) -> float | None:
    """The number of a run that ``metric=`` names: of ``summary.json``, or the same of an unfinished run's curves."""
    if metric.startswith(_BEST):
        return best_validation(run, metric.removeprefix(_BEST))
    if metric.startswith("val_"):
        return last_validation(run, metric.removeprefix("val_"))
    if metric == "train_loss":
        return train_loss(run)
    return run.number(metric)


def ordered(runs: Sequence[Run], metric: str) -> list[Run]:
    """Runs by a metric, the best first; those without it come last, in their order.

    Raises:
        ConfigError: No run has this number.
    """
    values = [metric_value(run, metric) for run in runs]
    if all(value is None for value in values):
        raise ConfigError("metric", metric, "is no number in any run's summary.json", _metrics_to_order_by(runs))
    numbered = sorted(
        zip(values, runs, strict=True), key=lambda pair: (pair[0] is None, -_sign(metric) * (pair[0] or 0.0))
    )
    return [run for _, run in numbered]


def _metrics_to_order_by(runs: Sequence[Run]) -> list[str]:
    validation = [prefix + name for name in validation_metrics(runs) for prefix in (_BEST, "val_")]
    rest = ["train_loss", "images_per_second", "step_ms.mean", "wall_seconds", "bytes_sent_per_step", "peak_memory_mb"]
    names = [*validation, *test_metrics(runs), *rest]
    return [name for name in names if any(metric_value(run, name) is not None for run in runs)][:20]
