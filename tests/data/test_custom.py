from __future__ import annotations

from typing import Any

import pytest
import torch

from distrain.cli import evaluate, hydra_entry
from distrain.cli.app import train
from distrain.config.load import load_settings
from distrain.data.base import Splits
from distrain.errors import ConfigError, Failed, SampleError
from tests.data.helpers import source
from tests.runs import CONF, compose

DATA = "tests.data.user_data"


def load(form: str | None = None, makes: str = "Forms", **changes: Any) -> Splits:
    kwargs = changes.pop("kwargs", {}) | ({} if form is None else {"form": form})
    path = makes if "." in makes else f"{DATA}.{makes}"
    return source("custom", _target_=path, kwargs=kwargs, **{"workers": 0, "val": {}, "test": {}, **changes}).load()


@pytest.mark.parametrize(
    ("form", "changes", "shape", "dtype", "target"),
    [
        ("picture", {"classes": 2}, (3, 8, 6), "uint8", "class"),
        ("grey picture", {"classes": 2}, (1, 8, 6), "uint8", "class"),
        ("cmyk", {"classes": ["a", "b"]}, (3, 8, 6), "uint8", "class"),
        ("array", {"kwargs": {"classes": ["a", "b"]}}, (3, 8, 6), "uint8", "class"),
        ("channels first", {"classes": 2}, (3, 8, 6), "uint8", "class"),
        ("rows and columns", {"classes": 2}, (1, 8, 6), "uint8", "class"),
        ("dictionary", {"classes": 2}, (3, 8, 6), "uint8", "class"),
        ("other keys", {"classes": 2, "keys": ["scan", "grade"]}, (3, 8, 6), "uint8", "class"),
        ("float", {"classes": 2}, (3, 8, 6), "float", "class"),
        ("float64 array", {"classes": 2}, (3, 8, 6), "float", "class"),
        ("names", {"classes": ["cat", "dog"]}, (3, 8, 6), "uint8", "class"),
        ("labels", {}, (3, 8, 6), "uint8", "labels"),
        ("number", {}, (3, 8, 6), "uint8", "numbers"),
        ("numbers", {"classes": ["x", "y"]}, (3, 8, 6), "uint8", "numbers"),
        ("mask", {"classes": 3}, (3, 8, 6), "uint8", "mask"),
        ("mask picture", {"classes": 3}, (3, 8, 6), "uint8", "mask"),
    ],
)
def test_samples_of_many_forms_are_understood(
    form: str, changes: dict[str, Any], shape: tuple[int, ...], dtype: str, target: str
) -> None:
    splits = load(form, **changes)
    spec = splits.spec
    assert (spec.channels, spec.height, spec.width, spec.dtype, spec.target) == (*shape, dtype, target)
    part = splits.train.read(torch.arange(40))
    scale = 255 if dtype == "float" else 1
    reds = torch.arange(40) if shape[0] == 1 or form != "cmyk" else part.images[:, 0, 0, 0]
    assert (part.images[:, 0, 0, 0] * scale).round().tolist() == reds.tolist()
    kinds = {"class": torch.int64, "labels": torch.uint8, "numbers": torch.float32, "mask": torch.uint8}
    assert part.targets.dtype == kinds[target]
    rows = torch.arange(40)
    expected = {"class": rows % 2, "labels": rows % 2, "numbers": rows if form == "numbers" else rows / 2}
    last = part.targets if target == "class" else part.targets[:, -1]
    assert (last if target != "mask" else part.targets[:, 0, 0]).tolist() == expected.get(target, rows % 3).tolist()
    assert splits.mean == (0, 0, 0) if dtype == "float" else splits.mean[0] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "other keys"}, r"data\.keys=\[IMAGE,TARGET\] names two of its keys: scan, grade"),
        ({"form": "other keys", "keys": ["scan", "x"]}, "a sample has no x"),
        ({"form": "picture", "keys": ["scan"]}, r"data\.keys=\['scan'\]: must be two names"),
        ({"form": "three"}, "a sample is a tuple of 3; return a pair"),
        ({"form": "whole numbers"}, "the image is of int32; return uint8"),
        ({"form": "channels last"}, r"looks like \[H, W, C\]; .*permute\(2, 0, 1\)"),
        ({"form": "unclear"}, r"neither \[H, W, C\] nor \[C, H, W\]"),
        ({"form": "no target"}, "the target is a NoneType"),
        ({"form": "raises"}, r"its first sample can't be used \(ZeroDivisionError.*\) at .*user_data\.py:\d+"),
        ({"form": "no image"}, "the image is a str; return a tensor"),
        ({"form": "names"}, r"the target is 'cat', .*data\.classes=\[cat,…\]"),
        ({"form": "picture"}, r"data\.classes=null: .*Forms has no attribute classes; type their number"),
        ({"form": "mask"}, "no attribute classes"),
        ({"form": "picture", "classes": "two"}, r"data\.classes=two: must be the number of classes, or a list"),
        ({"form": "picture", "classes": ["a", "a"]}, "the name a stands there more than once"),
        ({"form": "labels", "classes": 2}, r"data\.classes=2: is not the number of labels of a sample, 3"),
        ({"form": "labels", "target": "class", "classes": 3}, "of shape .3.; the number of a class"),
        ({"form": "picture", "classes": 1, "kwargs": {"shift": 1}}, "the class is 1; the 1 classes"),
        ({"form": "picture", "classes": 2, "kwargs": {"count": 0}}, r"data\.train=\{\}: .* has no samples"),
        ({"form": "picture", "classes": 2, "kwargs": {"size": 3}}, r"data\.kwargs=.* its arguments: form, count"),
        ({"form": "picture", "classes": 2, "fold": "1/4"}, r"data\.fold=1/4: .*validation samples of their own"),
        ({"form": "picture", "classes": 2, "held_out": {"count": 4}}, r"data\.held_out=.*makes 4 samples, and .* 40"),
        ({"form": "number", "balance": "sampler"}, r"data\.balance=sampler: needs one class a sample"),
        ({"makes": "failing"}, r"fails to build \(FileNotFoundError: scans\.csv\) at .*user_data\.py:\d+"),
        ({"makes": "Stream"}, "has no samples by number"),
        ({"makes": "red", "kwargs": {"row": 1}, "classes": 2}, "a sample is a ndarray"),
        ({"makes": "NO_CALLABLE"}, "is neither a class of data sets nor a function"),
        ({"makes": "builtins.max", "kwargs": {}}, r"fails to build \(TypeError: max expected at least 1 argument"),
        ({"makes": "Missing"}, "has no Missing"),
        ({"makes": "no_package.Missing"}, "there is no module no_package"),
    ],
)
def test_a_wrong_data_set_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        load(**changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("size", {"classes": 2}, r"train\[39\] .*the image is \[3, 7, 6\], and others are \[3, 8, 6\]"),
        ("range", {"classes": 3}, r"train\[39\] .*the class is 3; the 3 classes"),
        ("nan", {}, r"train\[39\] .*the target is NaN"),
    ],
)
def test_a_sample_unlike_the_first_is_named(form: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SampleError, match=message):
        load(form, mean=[0.5] * 3, std=[0.5] * 3, **changes).train.read(torch.arange(40))


def test_splits_have_arguments_of_their_own_or_are_held_out() -> None:
    kwargs = {"form": "picture"}
    own = load(kwargs=kwargs, classes=2, val={"count": 7, "shift": 50}, test={"count": 9})
    assert [len(part) for part in (own.train, own.val, own.test)] == [40, 7, 9]
    assert own.val.read(torch.tensor([0])).images[0, 0, 0, 0] == 50
    held = load(kwargs=kwargs, classes=2, val=None, test=None, held_out={"shift": 100}, fold="2/4")
    assert [len(part) for part in (held.train, held.val, held.test)] == [27, 9, 4]
    reds = [part.pick(torch.arange(len(part)))[:, 0, 0, 0] for part in (held.train, held.val, held.test)]
    assert sorted([*reds[0].tolist(), *(reds[1] - 100).tolist(), *(reds[2] - 100).tolist()]) == list(range(40))


@pytest.mark.parametrize("wrong", [False, True])
def test_classes_are_known_from_the_attribute_targets_if_it_agrees_with_the_samples(wrong: bool) -> None:
    if wrong:
        with pytest.raises(ConfigError, match="no attribute classes"):
            load(makes="Counted", kwargs={"wrong": True})
        return
    train_split = load(makes="Counted").train
    assert len(train_split.subset(torch.arange(4)).class_numbers()) == 4
    assert train_split.class_numbers().tolist() == [row % 3 for row in range(40)]
    assert load(makes="Named").train.class_numbers().tolist() == [row % 2 for row in range(40)]


def run_options(folder: Any, target: str, *more: str) -> tuple[str, ...]:
    return (
        "data=custom",
        f"data._target_={DATA}.{target}",
        "data.kwargs={form: drawn}",
        "data.classes=3",
        "data.batch_size=8",
        "trainer.max_steps=4",
        "trainer.progress=off",
        "logger=none",
        f"run_dir={folder}",
        *more,
    )


def test_a_run_is_evaluated_if_its_data_set_is_allowed(tmp_path: Any) -> None:
    summary = train(compose(*run_options(tmp_path, "Forms", "data.workers=2")))
    settings = load_settings(evaluate.EvaluateSettings, hydra_entry.compose(CONF, "evaluate", [f"run={tmp_path}"]))
    with pytest.raises(ConfigError, match=r"data\._target_=.* is not below distrain\.data, .* allow="):
        evaluate.run(settings)
    settings.allow = [DATA]
    result = evaluate.run(settings)
    assert result["loss"] == pytest.approx(summary["test_loss"], rel=1e-6)
    # An allowed module may not lead to what another one defines.
    settings.allow = ["tests.data.test_items"]
    with pytest.raises(ConfigError, match="is not below"):
        evaluate.run(settings)


def test_a_sample_that_cannot_be_read_ends_the_run_in_one_line(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    options = run_options(tmp_path, "Late", "data.workers=0", "data.mean=[0.5]", "data.std=[0.5]", "data.test={}")
    with pytest.raises(Failed):
        train(compose(*options, "data.val={count: 8}"))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "SampleError: train[30] can't be read (OSError: scan 30 is torn) at " in last
    assert (tmp_path / "failure.json").exists()
