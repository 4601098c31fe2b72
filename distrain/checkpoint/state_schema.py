"""What ``state.json`` of a checkpoint may hold; it is checked whenever the file is read, since it is not trusted.

The limits are far beyond what a run reaches. They keep a number that a file says from filling the memory, running a
loop for ever or overflowing.
"""

from __future__ import annotations

import json
import reprlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distrain.checkpoint.format import CHECKPOINT_NAME, MAX_JSON_BYTES, DamagedCheckpoint, unreadable
from distrain.files.untrusted import read_json

#: Raises :class:`_Wrong` if a value is not what a field holds. The first argument is the field's dotted name.
Rule = Callable[[str, object], None]

#: Most ranks, steps and samples of a run.
_MAX_RANKS, _MAX_COUNT = 1 << 16, 1 << 53
#: Most samples of a batch.
_MAX_BATCH = 1 << 32
#: Deepest nesting of the file; a run's configuration has about six levels.
_MAX_DEPTH = 64
#: Longest part of a value that a message shows.
_SHOWN = 60


class _Wrong(ValueError):
    """A field has a wrong value."""

    def __init__(self, name: str, value: object, expected: str) -> None:
        super().__init__(f"{name}={shorten(value)} {expected}")


class _Missing:
    pass


_MISSING = _Missing()


def shorten(value: object) -> str:
    """A value in a few characters, without converting all of it to text."""
    shown = reprlib.Repr()
    shown.maxlevel, shown.maxstring, shown.maxother, shown.maxlong = 3, _SHOWN, _SHOWN, _SHOWN
    # Python refuses to write a longer number in decimal digits.
    if isinstance(value, int) and value.bit_length() > 4096:
        return f"a number of {value.bit_length()} bits"
    try:
        text = shown.repr(value)
    except ValueError:  # such a number is inside
        return f"a {type(value).__name__}"
    return text if len(text) <= 2 * _SHOWN else f"{text[: 2 * _SHOWN]}…"


def _whole(low: int = 0, high: int = _MAX_COUNT) -> Rule:
    def check(name: str, value: object) -> None:
        if type(value) is not int or not low <= value <= high:
            raise _Wrong(name, value, f"must be a whole number from {low} to {high}")

    return check


def _number(low: float = -sys.float_info.max, high: float = sys.float_info.max) -> Rule:
    def check(name: str, value: object) -> None:
        # Python compares a whole number of any size with a float; NaN is not in any range.
        if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
            limits = "a finite number" if high == sys.float_info.max else f"a number from {low:g} to {high:g}"
            raise _Wrong(name, value, f"must be {limits}")

    return check


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise _Wrong(name, value, "must be text")


def _scalar(name: str, value: object) -> None:
    """Text, a truth value, null, or a number of a size that arithmetic can handle."""
    if value is None or isinstance(value, bool | str):
        return
    (_whole(-_MAX_COUNT) if isinstance(value, int) else _number())(name, value)


def _plain(name: str, value: object) -> None:
    """Anything, as long as its numbers are of a size that arithmetic can handle."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            _plain(f"{name}[{index}]", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _plain(f"{name}.{key}", item)
    else:
        _scalar(name, value)


def _json_text(name: str, value: object) -> None:
    _text(name, value)
    try:
        json.loads(str(value))
    except (ValueError, RecursionError) as error:
        raise _Wrong(name, value, "must be JSON") from error


def _or_null(rule: Rule) -> Rule:
    def check(name: str, value: object) -> None:
        if value is not None:
            rule(name, value)

    return check


def _all_of(*rules: Rule) -> Rule:
    def check(name: str, value: object) -> None:
        for rule in rules:
            rule(name, value)

    return check


def _list_of(rule: Rule) -> Rule:
    def check(name: str, value: object) -> None:
        if not isinstance(value, list):
            raise _Wrong(name, value, "must be a list")
        for index, item in enumerate(value):
            rule(f"{name}[{index}]", item)

    return check


def _entries(rule: Rule) -> Rule:
    """A mapping of any names to values of one kind."""

    def check(name: str, value: object) -> None:
        for key, item in _mapping(name, value).items():
            rule(f"{name}.{key}", item)

    return check


def _fields(required: Mapping[str, Rule], optional: Mapping[str, Rule] | None = None) -> Rule:
    """A mapping of known names; others may stand beside them, such as those that a strategy of the user's adds."""

    def check(name: str, value: object) -> None:
        content = _mapping(name, value)
        for key, rule in {**required, **(optional or {})}.items():
            path = f"{name}.{key}" if name else key
            if key in content:
                rule(path, content[key])
            elif key in required:
                raise ValueError(f"{path} is missing")

    return check


def _empty_or(rule: Rule) -> Rule:
    def check(name: str, value: object) -> None:
        if value != {}:
            rule(name, value)

    return check


def _mapping(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong(name, value, "must be a mapping of names to values")
    return value


_PROGRESS = _fields(
    {
        "step": _whole(),
        "epoch": _whole(),
        "epoch_samples": _whole(),
        "samples": _whole(),
        "epoch_sums": _list_of(_number()),
        "train_loss": _or_null(_number()),
        "best_step": _or_null(_whole()),
    },
    {
        "val_score": _or_null(_number()),
        "val_metrics": _entries(_or_null(_number())),
        "monitor": _or_null(_text),
        "best_epoch": _or_null(_whole()),
        "patience_score": _or_null(_number()),
        "epochs_without_improvement": _whole(),
        "stopped_of_epochs": _or_null(_whole()),
        "lr_factor": _number(0, 1),
        "lr_score": _or_null(_number()),
        "lr_bad_epochs": _whole(),
        "lr_cooldown": _whole(),
        "best_score": _or_null(_number()),
        "skipped_updates": _whole(),
        "rewinds": _whole(),
        # Of release 0.1.
        "val_accuracy": _or_null(_number()),
        "best_accuracy": _or_null(_number()),
    },
)

_SCALARS = _fields(
    {
        "optimizer_name": _text,
        "optimizer": _entries(_plain),
        "precision": _empty_or(_fields({"scale": _number(1e-30, 1e30), "good_steps": _whole()})),
    },
    {
        "averages": _entries(_whole()),
        "measured_averages": _entries(_whole()),
        "callbacks": _entries(_entries(_plain)),
        "copies": _whole(1, _MAX_RANKS),
        "local_sgd": _fields({"step": _whole(), "warmup_steps": _whole()}),
        "buckets": _or_null(
            _fields({"latency": _number(0, 1e6), "a_byte": _number(1e-30, 1e6), "busy": _number(0, 1)})
        ),
        "module": _fields({"extra_state": _entries(_json_text), "versions": _entries(_whole(-_MAX_COUNT))}),
    },
)

_LAYOUT = _fields(
    {"strategy": _text, "world_size": _whole(1, _MAX_RANKS), "mesh": _entries(_whole(1, _MAX_RANKS))},
    {"travels": _text, "boundaries": _list_of(_text)},
)

_CONFIG = _fields(
    {},
    {
        section: _fields({}, {"name": _text})
        for section in ("strategy", "compression", "model", "data", "optimizer", "scheduler", "loss", "trainer")
    },
)

_DATA = _fields(
    {},
    {
        "samples": _fields({}, {"train": _whole(), "val": _whole(), "test": _whole()}),
        **dict.fromkeys(("channels", "height", "width"), _whole(1)),
        "classes": _list_of(_text),
        **dict.fromkeys(("mean", "std", "class_weights"), _list_of(_number())),
    },
)

_STATE = _fields(
    {"progress": _PROGRESS, "scalars": _SCALARS, "layout": _LAYOUT},
    # Old checkpoints were saved without these.
    {"config": _or_null(_all_of(_entries(_plain), _CONFIG)), "data": _or_null(_DATA)},
)


def check_data(content: Mapping[str, Any]) -> None:
    """Checks what a checkpoint, or ``data.json`` of its run, says of the data.

    Raises:
        ValueError: A field has a value that no run writes; the message names both.
    """
    _DATA("data", content)


def read_state(path: Path) -> dict[str, Any]:
    """Reads and checks the ``state.json`` of a checkpoint.

    Args:
        path: The checkpoint's folder.

    Raises:
        DamagedCheckpoint: It is missing, is not JSON, or a field has a value that no run writes; the message names the
            file, the field and the value.
    """
    file = path / "state.json"
    try:
        content = read_json(file, MAX_JSON_BYTES)
        _check_depth(content)
        _STATE("", content)
        _check_position(path.name, content["progress"])
        _check_names(content["scalars"], content["layout"], content.get("config") or {})
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{file} is missing") from None
    except OSError as error:
        raise unreadable(file, error) from error
    except ValueError as error:
        raise DamagedCheckpoint(f"{file}: {error}") from error.__cause__ or error
    return content


def _check_depth(content: object) -> None:
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise ValueError(f"is nested more than {_MAX_DEPTH} deep")
        inner = [value for value in level if isinstance(value, dict | list)]
        level = [item for value in inner for item in (value.values() if isinstance(value, dict) else value)]


def _check_position(folder: str, progress: Mapping[str, Any]) -> None:
    """Compares fields with each other: every epoch has a step and every step a sample."""
    step, samples = progress["step"], progress["samples"]
    named = CHECKPOINT_NAME.fullmatch(folder)
    if named and int(named[1]) != step:
        raise _Wrong("progress.step", step, f"is not the step of the folder {folder}")
    if progress["epoch"] > step:
        raise _Wrong("progress.epoch", progress["epoch"], f"is more than progress.step={step}")
    if not step <= samples <= step * _MAX_BATCH:
        raise _Wrong("progress.samples", samples, f"is not possible after progress.step={step}")
    if progress["epoch_samples"] > samples:
        raise _Wrong("progress.epoch_samples", progress["epoch_samples"], f"is more than progress.samples={samples}")
    if (progress["best_step"] or 0) > step:
        raise _Wrong("progress.best_step", progress["best_step"], f"is later than progress.step={step}")
    for name, old_name in (("val_score", "val_accuracy"), ("best_score", "best_accuracy")):
        if name not in progress and old_name not in progress:
            raise ValueError(f"progress.{name} is missing")


def _check_names(scalars: Mapping[str, Any], layout: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Compares the names of choices with the configuration of the run that saved them."""
    for path, name, section in (
        ("layout.strategy", layout["strategy"], "strategy"),
        ("scalars.optimizer_name", scalars["optimizer_name"], "optimizer"),
    ):
        configured = config.get(section, {}).get("name", name)
        if name != configured:
            raise _Wrong(path, name, f"is not config.{section}.name={shorten(configured)}")
    if layout["strategy"] == "local_sgd" and "local_sgd" not in scalars:
        raise ValueError("scalars.local_sgd is missing")
