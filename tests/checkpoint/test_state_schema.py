"""No value in state.json hangs, fills the memory or is computed with: it is one that a run writes, or it is refused."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint.format import DamagedCheckpoint
from distrain.checkpoint.progress import Progress
from distrain.checkpoint.state_schema import read_state
from tests.checkpoint.helpers import rewrite, save_steps

#: Stands for a field that is left out.
LEFT_OUT = "left out"


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: dict[str, Any] = {
    "null": None, "true": True, "text": "1", "empty text": "", "terminal": "\x1b[2J\r\nall is well\u202e",
    "negative": -1, "half": 0.5, "2^40": 1 << 40, "2^63": 1 << 63, "10^400": 10**400, "-10^400": -(10**400),
    "5000 digits": 10**4000, "NaN": math.nan, "infinity": math.inf, "-infinity": -math.inf, "1e308": 1e308,
    "empty list": [], "list": [1, 2, 3], "long list": [0] * 10_000, "empty mapping": {}, "mapping": {"a": 1},
    "deep": nested(200), "huge inside": [[10**400]], LEFT_OUT: LEFT_OUT,
}  # fmt: skip


def full_state() -> dict[str, Any]:
    """All that a run may write, of every strategy."""
    progress = Progress(7, 1, 20, 67, [1.5, 3.0, 20.0], 1.25, 0.5, 0.5, 5)
    progress.val_metrics, progress.monitor = {"loss": 0.5}, "max val/accuracy"
    return {
        "progress": vars(progress),
        "scalars": {
            "optimizer_name": "adam",
            "optimizer": {"weight/generation": 3},
            "precision": {"scale": 65536.0, "good_steps": 7},
            "copies": 2,
            "local_sgd": {"step": 7, "warmup_steps": 2},
            "buckets": {"latency": 6e-5, "a_byte": 8e-11, "busy": 1.0},
            "module": {"extra_state": {"net._extra_state": '{"calls": 3}'}, "versions": {"net.norm": 2}},
        },
        "layout": {
            "strategy": "local_sgd",
            "world_size": 2,
            "mesh": {"data": 2},
            "travels": "differences",
            "boundaries": ["layer2", "head"],
        },
        "config": {"seed": 3, "trainer": {"epochs": 3}},
    }


def places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every field, containers before what they hold."""
    for key in value if isinstance(value, dict) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def with_value(state: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(state)
    *parents, last = place
    holder = changed
    for key in parents:
        holder = holder[key]
    if value == LEFT_OUT:
        del holder[last]
    else:
        holder[last] = value
    return changed


def numbers_in(value: Any) -> Iterator[int | float]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(item)
    elif isinstance(value, int | float):
        yield value


@pytest.mark.parametrize("place", list(places(full_state())), ids=".".join)
def test_each_field_holds_what_a_run_writes_or_is_refused_by_name(tmp_path: Path, place: tuple[str, ...]) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    refused = set()
    for name, value in HOSTILE.items():
        (folder / "state.json").write_text(json.dumps(with_value(full_state(), place, value)))
        try:
            accepted = read_state(folder)
        except DamagedCheckpoint as error:
            message = str(error)
            assert message.startswith(f"{folder / 'state.json'}: ")
            assert ".".join(place) in message or name in ("deep", "5000 digits"), message
            assert len(message) < 600
            assert message.isprintable()
            refused.add(name)
        else:
            assert all(abs(number) <= 1e308 for number in numbers_in(accepted)), name
    assert {"10^400", "-10^400", "NaN", "infinity", "-infinity", "deep", "huge inside"} <= refused
    if place[0] in ("progress", "layout") and place[-1] not in ("strategy", "travels", "monitor"):
        assert {"text", "true"} <= refused
        numbers = ("train_loss", "val_score", "best_score", "patience_score", "lr_score", "loss")
        assert {"negative", "2^63"} <= refused or place[-1] in numbers


def test_the_state_itself_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps(full_state()))
    assert read_state(tmp_path) == full_state()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"epoch": 8}, "progress.epoch=8 is more than progress.step=7"),
        ({"samples": 6}, "progress.samples=6 is not possible after progress.step=7"),
        ({"epoch_samples": 68}, "progress.epoch_samples=68 is more than progress.samples=67"),
        ({"best_step": 8}, "progress.best_step=8 is later than progress.step=7"),
        ({"step": 6}, "progress.step=6 is not the step of the folder step_00000007"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(tmp_path: Path, changes: dict[str, int], problem: str) -> None:
    folder = tmp_path / "step_00000007"
    folder.mkdir()
    state = full_state()
    state["progress"] |= changes
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(DamagedCheckpoint, match=problem):
        read_state(folder)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[" * 100_000, '{"a":' * 990 + "1" + "}" * 990, "NaN", "1e999"])
def test_json_that_no_run_writes_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(DamagedCheckpoint, match=r"state\.json") as caught:
        read_state(tmp_path)
    assert str(caught.value).isprintable()


def test_the_checkpoint_before_a_hostile_one_is_used(tmp_path: Path, warnings: list[str]) -> None:
    older, newer = save_steps(tmp_path, 40, 41)
    state = json.loads((newer / "state.json").read_text())
    for place, value in ((("layout", "world_size"), 1 << 40), (("progress", "epoch_sums"), [10**400])):
        warnings.clear()
        rewrite(newer, "state.json", json.dumps(with_value(state, place, value)).encode())
        assert checkpoint_reader.newest_valid(tmp_path) == older
        assert len(warnings) == 1
        assert f"{newer}/state.json: {'.'.join(place)}" in warnings[0]
