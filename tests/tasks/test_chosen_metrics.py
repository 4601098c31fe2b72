"""``metrics=[…]``: on three ranks with ragged batches as scikit-learn on one process, to 1e-12; and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from distrain.cli.run_folder import RunFolder
from distrain.errors import ConfigError
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.tasks import chosen_metrics
from distrain.tasks.base import Task
from tests.harness import run_ranks
from tests.runs import small
from tests.tasks.chosen_on_ranks import CHOSEN, CLASSES, COUNT, on_each_rank, samples, tasks
from tests.tasks.helpers import task_for


def averaged(true: Any, decided: Any) -> dict[str, float]:
    found = {}
    scores = {"f1": reference.f1_score, "precision": reference.precision_score, "recall": reference.recall_score}
    for name, score in scores.items():
        for average in ("macro", "weighted"):
            found[f"{name}_{average}"] = score(true, decided, average=average, zero_division=0)
    return found


def of_classes() -> tuple[dict[str, float], dict[str, list[float | None]]]:
    outputs, targets = samples("class")
    probabilities, true = outputs.double().softmax(1).numpy(), targets.numpy()
    decided = outputs.argmax(1).numpy()
    aurocs = [float(reference.roc_auc_score(true == each, probabilities[:, each])) for each in range(CLASSES - 1)]
    precisions = [float(reference.average_precision_score(true == each, probabilities[:, each])) for each in range(3)]
    f1 = reference.f1_score(true, decided, average=None, labels=range(CLASSES), zero_division=0)
    tables = reference.multilabel_confusion_matrix(true, decided, labels=range(CLASSES))
    specificities = [table[0, 0] / table[0].sum() for table in tables]
    distances = 2 * (1 - probabilities[np.arange(COUNT), true])
    values = {
        **averaged(true, decided),
        **{f"top{k}": reference.top_k_accuracy_score(true, probabilities, k=k, labels=range(CLASSES)) for k in (2, 3)},
        "cohen_kappa": reference.cohen_kappa_score(true, decided),
        "matthews": reference.matthews_corrcoef(true, decided),
        "auroc": math.fsum(aurocs) / 3,
        "average_precision": math.fsum(precisions) / 3,
        "distances": distances.mean() + distances.max() + distances.min(),
        "MulticlassSpecificity": np.mean(specificities),
    }
    per_class = {
        "f1": f1.tolist(),
        "auroc": [*aurocs, None],
        "average_precision": [*precisions, None],
        "MulticlassSpecificity": specificities,
    }
    return values, per_class


def of_labels() -> dict[str, float]:
    outputs, targets = samples("labels")
    probabilities, true = outputs.double().sigmoid().numpy(), targets.numpy()
    return {
        **averaged(true, (probabilities >= 0.5).astype(int)),
        "auroc": reference.roc_auc_score(true, probabilities, average="macro"),
        "average_precision": reference.average_precision_score(true, probabilities, average="macro"),
    }


def of_masks() -> dict[str, float]:
    outputs, targets = samples("mask")
    known = targets != 255
    return {"dice": reference.f1_score(targets[known], outputs.argmax(1)[known], average="macro", zero_division=0)}


def of_numbers() -> dict[str, float]:
    outputs, targets = samples("numbers")
    given, true = outputs.double().numpy(), targets.double().numpy()
    return {
        "rmse": math.sqrt(reference.mean_squared_error(true, given)),
        "mape": reference.mean_absolute_percentage_error(true, given),
        "explained_variance": reference.explained_variance_score(true, given),
    }


def test_three_ranks_with_ragged_batches_give_what_scikit_learn_gives_for_all_samples(tmp_path: Path) -> None:
    values, per_class = of_classes()
    expected = [values, of_labels(), of_masks(), of_numbers()]
    for found in run_ranks(on_each_rank, 3, small("strategy=ddp", f"run_dir={tmp_path}"), tasks()):
        for chosen, wanted in zip(found, 2 * expected, strict=True):
            assert chosen.values == pytest.approx(wanted, rel=1e-12, abs=1e-12)
        for chosen in (found[0], found[4]):
            for name, row in per_class.items():
                known = list(zip(chosen.per_class[name], row, strict=True))
                assert [mine is None for mine, _ in known] == [wanted is None for _, wanted in known]
                assert all(
                    mine == pytest.approx(wanted, rel=1e-12, abs=1e-12) for mine, wanted in known if wanted is not None
                )


@pytest.mark.parametrize("target", CHOSEN)
def test_every_named_metric_is_listed_tried_and_tested(target: str) -> None:
    task = task_for(target, *CHOSEN[target])
    directions = chosen_metrics.check(task)
    lists = [
        name for name in chosen_metrics.names(task) if name not in (*task.validated_by_task, *task.further_results)
    ]
    assert set(lists) <= directions.keys()
    assert [name for name, better in directions.items() if better is False] == (
        ["rmse", "mape"] if target == "numbers" else []
    )
    assert "distances" not in directions or directions["distances"] is None


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (("metrics=[f1_marco]",), r"metrics=f1_marco: no such metric of task=classification; .*did you mean f1_macro"),
        (("metrics=[top5]",), r"metrics=top5: no such metric"),
        (("task=segmentation", "metrics=[f1_macro]"), r"metrics=f1_macro: .*; choices: pixel_accuracy, mean_iou, dice"),
        (("metrics=[{_target_: torchmetrics.Nothing}]",), r"metrics=torchmetrics\.Nothing: module torchmetrics has no"),
        (("metrics=[{_target_: torch.nn.ReLU}]",), r"metrics=torch\.nn\.ReLU: is not a class of torchmetrics\.Metric"),
        (
            ("metrics=[{_target_: torchmetrics.classification.MulticlassF1Score, kwargs: {classes: 4}}]",),
            r"metrics=.*MulticlassF1Score.*",
        ),
        (
            ("metrics=[{_target_: torchmetrics.classification.MulticlassConfusionMatrix, kwargs: {num_classes: 4}}]",),
            r"MulticlassConfusionMatrix: fails .*a tensor of shape \[4, 4\]; a number, or one for each class, is",
        ),
        (("metrics=[{_target_: tests.tasks.own_metrics.MeanOfMeans}]",), r"MeanOfMeans: is 0\.\d+ for 32 .*add up"),
        (("metrics=[{_target_: tests.tasks.own_metrics.Stateless}]",), r"Stateless: has no state of its own"),
        (
            ("metrics=[{_target_: tests.tasks.own_metrics.Distances, name: loss}]",),
            r"metrics=loss: can't be a metric's",
        ),
        (
            ("metrics=[{_target_: tests.tasks.own_metrics.Distances, name: accuracy}]",),
            r"metrics=accuracy: is the name",
        ),
        (("metrics=[{name: top2, kwargs: {k: 2}}]",), r"metrics=top2: takes no kwargs"),
    ],
)
def test_a_metric_that_can_not_be_used_is_refused_in_one_line(options: tuple[str, ...], shown: str) -> None:
    target = "mask" if "task=segmentation" in options else "class"
    with pytest.raises(ConfigError, match=shown) as error:
        chosen_metrics.check(task_for(target, *options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ("metrics=[3]", r"metrics=3: each is a name, or a mapping"),
        ("metrics=[top2,top2]", r"metrics=top2: is named twice"),
        ("metrics=[{kwargs: {}}]", r"metrics=.*: needs a name, or a _target_"),
        ("metrics=[{name: top2, nme: x}]", r"metrics\[0\]\.nme: no such key; .*did you mean name"),
        ("metrics=[{name: top2, input: x}]", r"metrics\[0\]\.input=x: unknown choice"),
    ],
)
def test_a_list_that_is_no_list_of_metrics_is_refused(option: str, shown: str) -> None:
    with pytest.raises(ConfigError, match=shown):
        small(option)


def test_torchmetrics_is_asked_for_only_if_a_metric_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics", None)
    assert chosen_metrics.check(task_for("class", "metrics=[accuracy]")) == {}
    with pytest.raises(ConfigError, match=r"metrics=top2: needs torchmetrics .*pip install 'distrain\[metrics\]'"):
        chosen_metrics.check(task_for("class", "metrics=[top2]"))


def test_a_single_name_is_a_list_of_one() -> None:
    assert small("metrics=top2").metrics == small("metrics=[top2]").metrics


def test_a_number_that_is_not_defined_is_no_number() -> None:
    task: Task = task_for("class", "metrics=[auroc,f1_macro]")
    accumulator = chosen_metrics.Accumulator(task, torch.device("cpu"))
    accumulator.update(torch.randn(3, CLASSES), torch.ones(3, dtype=torch.int64))
    with Runtime(small(), World.from_environment(), keep_logs=False) as runtime:
        found = accumulator.finish(runtime.communicator(), torch.device("cpu"))
    assert math.isnan(found.values["auroc"])
    assert found.per_class["auroc"] == [None] * CLASSES


def test_a_run_folder_may_name_torchmetrics_and_nothing_else_unless_it_is_allowed(tmp_path: Path) -> None:
    from distrain.config.load import to_container
    from distrain.files.writing import to_yaml

    def open_with(path: str, *allow: str) -> None:
        config = small(f"metrics=[{{_target_: {path}}}]")
        (tmp_path / "config.yaml").write_text(to_yaml(to_container(config)))
        RunFolder.open(str(tmp_path), allow)

    with pytest.raises(ConfigError, match=r"metrics=tests\.tasks\.own_metrics\.Distances: is not below"):
        open_with("tests.tasks.own_metrics.Distances")
    for path, allow in (
        ("torchmetrics.classification.MulticlassF1Score", ()),
        ("tests.tasks.own_metrics.Distances", ("tests.tasks",)),
    ):
        # What is missing is the file that is read next.
        with pytest.raises(ConfigError, match=r"has no data\.json"):
            open_with(path, *allow)
