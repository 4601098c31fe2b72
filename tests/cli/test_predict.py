"""Predictions for files are those that evaluation makes for the same images."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distrain.cli import evaluate, hydra_entry, predict
from distrain.cli.predict import PredictSettings
from distrain.cli.run_folder import RunFolder
from distrain.cli.run_model import RunModel
from distrain.config.load import load_settings
from distrain.data.base import Images, data_source
from distrain.data.loader import Loader
from distrain.errors import ConfigError
from distrain.runtime.world import World
from distrain.tools.predicting.result_files import Prediction
from tests.data.helpers import images_of, write_image
from tests.harness import RankFailed, run_ranks
from tests.runs import CONF
from tests.trained import change_config, save_test_images


def predicted(run: Path, images: object, **changes: Any) -> list[Prediction]:
    composed = hydra_entry.compose(CONF, "predict", [f"run={run}"])
    options = {"output": str(run.parent / "result.json"), **changes, "input": images}
    for key, value in options.items():
        composed[key] = value
    predict.run(load_settings(PredictSettings, composed))
    written = Path(options["output"] or "-")
    return json.loads(written.read_text()) if written.suffix == ".json" else []


def refused(run: Path, images: object, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        predicted(run, images, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def images(run: Path, tmp_path: Path) -> tuple[Path, list[int]]:
    """The run's test images as files, and their labels."""
    folder = tmp_path / "images"
    return folder, save_test_images(RunFolder.open(str(run)).config, folder)


def classes(prediction: dict[str, Any]) -> list[str]:
    """The classes, the most probable first."""
    return [answer["class"] for answer in prediction.get("top", [prediction])]


def probabilities(prediction: dict[str, Any]) -> list[float]:
    return [answer["probability"] for answer in prediction.get("top", [prediction])]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_predictions_for_files_equal_those_of_evaluation(
    run: Path, images: tuple[Path, list[int]], batch_size: int
) -> None:
    folder, labels = images
    predictions = predicted(run, str(folder), batch_size=batch_size)
    assert [one["path"] for one in predictions] == [str(path) for path in sorted(folder.iterdir())]
    right = sum(one["class"] == str(label) for one, label in zip(predictions, labels, strict=True))
    assert right == json.loads((run / "summary.json").read_text())["test_correct"]


def test_probabilities_are_the_softmax_of_the_logits(run: Path, images: tuple[Path, list[int]]) -> None:
    opened = RunFolder.open(str(run))
    test = data_source(opened.config.data).load().test
    loader = Loader(
        Images(images_of(test), test.targets),
        batch_size=31,
        shard=(0, 1),
        mean=opened.mean,
        std=opened.std,
        device=torch.device("cpu"),
        dtype=torch.float32,
        memory_format=torch.contiguous_format,
    )
    (batch,) = loader.epoch(0)
    expected = opened.model(opened.weights("newest"))(batch.inputs).softmax(1)
    for one, row in zip(predicted(run, str(images[0]), top=4), expected, strict=True):
        assert classes(one) == [str(index) for index in row.argsort(descending=True).tolist()]
        assert probabilities(one) == pytest.approx(row.sort(descending=True).values.tolist(), rel=1e-4)


def test_logits_of_views_are_averaged_as_in_evaluation(run: Path, images: tuple[Path, list[int]]) -> None:
    plain = predicted(run, str(images[0]))
    change_config(run, trainer={"test_views": "flip"})
    flipped = predicted(run, str(images[0]))
    assert [probabilities(one) for one in flipped] != [probabilities(one) for one in plain]
    composed = hydra_entry.compose(CONF, "evaluate", [f"run={run}", "split=test"])
    result = evaluate.run(load_settings(evaluate.EvaluateSettings, composed))
    right = sum(one["class"] == str(label) for one, label in zip(flipped, images[1], strict=True))
    assert right == result["correct"]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("cross_entropy", [0.25, 0.25, 0.25, 0.25]),
        ("binary_cross_entropy", [0.5, 0.5, 0.5, 0.5]),
        ("mean_squared_error", [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_the_loss_determines_how_logits_become_probabilities(
    run: Path, images: tuple[Path, list[int]], monkeypatch: pytest.MonkeyPatch, loss: str, expected: list[float]
) -> None:
    change_config(run, loss={"name": loss})
    if loss != "cross_entropy":
        content = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(content.replace("  label_smoothing: 0.0\n", ""))
    monkeypatch.setattr(RunModel, "outputs", lambda self, pixels: torch.zeros(len(pixels), 4, dtype=torch.float64))
    (one,) = predicted(run, str(images[0] / "0000.png"), top=4)
    # Classes of equal probability keep their order, as with argmax.
    assert classes(one) == ["0", "1", "2", "3"]
    assert probabilities(one) == pytest.approx(expected)


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_the_precision_of_the_run_is_used(run: Path, images: tuple[Path, list[int]], precision: str) -> None:
    single = predicted(run, str(images[0]))
    change_config(run, trainer={"precision": precision})
    other = predicted(run, str(images[0]))
    assert [probabilities(one) for one in other] != [probabilities(one) for one in single]
    for one, two in zip(single, other, strict=True):
        assert probabilities(two) == pytest.approx(probabilities(one), abs=0.05 if precision == "bf16" else 1e-5)


def test_files_and_folders_keep_the_given_order(run: Path, tmp_path: Path) -> None:
    pixels = np.zeros((9, 20, 3), dtype=np.uint8)
    for name in (
        "folder/b/2.PNG",
        "folder/a.jpeg",
        "folder/b/10.jpg",
        "folder/.hidden/x.png",
        "folder/.x.png",
        "z.png",
    ):
        write_image(tmp_path / name, pixels)
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    predictions = predicted(run, [str(tmp_path / "z.png"), str(tmp_path / "folder")])
    names = ["z.png", "folder/a.jpeg", "folder/b/10.jpg", "folder/b/2.PNG"]
    assert [one["path"] for one in predictions] == [str(tmp_path / name) for name in names]


def test_json_and_csv_have_the_same_content(run: Path, images: tuple[Path, list[int]], tmp_path: Path) -> None:
    one_of_each: dict[str, Any] = {}
    for top in (1, 3):
        predictions = predicted(run, str(images[0]), top=top, output=str(tmp_path / "r.json"))
        predicted(run, str(images[0]), top=top, output=str(tmp_path / "r.CSV"))
        rows = json.loads((tmp_path / "r.json").read_text())
        table = list(csv.DictReader((tmp_path / "r.CSV").open(newline="")))
        assert len(rows) == len(table) == len(predictions) == 31
        one_of_each[str(top)] = (rows[0], list(table[0]))
        for row, cells, one in zip(rows, table, predictions, strict=True):
            assert (row["path"], row["class"], row["probability"]) == (one["path"], one["class"], one["probability"])
            assert (cells["path"], cells["class"], float(cells["probability"])) == tuple(list(row.values())[:3])
    assert list(one_of_each["1"][0]) == one_of_each["1"][1] == ["path", "class", "probability"]
    assert [list(entry) for entry in one_of_each["3"][0]["top"]] == [["class", "probability"]] * 3
    assert one_of_each["3"][1][3:] == ["class_2", "probability_2", "class_3", "probability_3"]


@pytest.mark.parametrize("output", [None, "-"])
def test_without_a_file_json_goes_to_standard_output(
    run: Path, images: tuple[Path, list[int]], output: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    predicted(run, str(images[0] / "0003.png"), output=output)
    (row,) = json.loads(capfd.readouterr().out)
    assert row["path"] == str(images[0] / "0003.png")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse names that are no UTF-8")
def test_names_that_are_not_utf8_are_written_unchanged(run: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "in" / "x.png", np.zeros((8, 8, 3), dtype=np.uint8))
    name = os.fsencode(tmp_path / "in") + b"/caf\xe9,1.png"
    (tmp_path / "in" / "x.png").rename(os.fsdecode(name))
    predicted(run, str(tmp_path / "in"), output=str(tmp_path / "r.csv"))
    assert b'"' + name + b'",' in (tmp_path / "r.csv").read_bytes()


def test_an_undecodable_image_is_recorded_skipped_or_refused(
    run: Path, images: tuple[Path, list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    bad = images[0] / "0005.png"
    bad.write_bytes(bad.read_bytes()[:60])
    message = refused(run, str(images[0]), batch_size=4, on_error="stop")
    assert message.startswith(f"input={bad}: can't be decoded (")
    assert message.endswith("on_error=record names such files in the output")
    assert not (run.parent / "result.json").exists()
    predictions = predicted(run, str(images[0]), batch_size=1, on_error="skip")
    assert len(predictions) == 30
    assert str(bad) not in [one["path"] for one in predictions]
    assert "none of 1 images can be decoded" in refused(run, [str(bad)], on_error="skip")
    recorded = predicted(run, str(images[0]), batch_size=4)
    assert [row["path"] for row in recorded if "error" in row] == [str(bad)]
    assert "truncated" in recorded[5]["error"]
    assert len(recorded) == 31
    assert sorted(path.name for path in run.parent.iterdir()) == ["images", "result.json", "run"]


@pytest.mark.parametrize(
    ("images", "changes", "message"),
    [
        ("nowhere.png", {}, "input=nowhere.png: is neither a file nor a folder"),
        ([], {}, "input=[]: must be an image file, a folder, or a list of them"),
        ({"a": 1}, {}, "must be an image file"),
        ("EMPTY", {}, "the folder has no .jpg, .jpeg, .png, .webp"),
        ("IMAGE", {"top": 5}, "top=5: the run has 4 classes"),
        ("IMAGE", {"top": 0}, "top=0: must be at least 1"),
        (
            "IMAGE",
            {"output": "result.txt"},
            "output=result.txt: the ending must name the format; choices: .json, .jsonl",
        ),
        ("IMAGE", {"output": "nowhere/result.csv"}, "there is no folder nowhere"),
        ("IMAGE", {"on_error": "ignore"}, "on_error=ignore: unknown choice; choices: record, skip"),
        ("IMAGE", {"checkpoint": "oldest"}, "checkpoint=oldest: is not a checkpoint's folder"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(
    run: Path, tmp_path: Path, images: object, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    write_image(tmp_path / "image.png", np.zeros((8, 8, 3), dtype=np.uint8))
    paths = {"EMPTY": tmp_path / "empty", "IMAGE": tmp_path / "image.png"}
    images = str(paths.get(images, images)) if isinstance(images, str) else images
    assert message in refused(run, images, **changes)


def test_a_model_with_outputs_that_are_not_finite_is_refused(
    run: Path, images: tuple[Path, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(self: object, pixels: torch.Tensor) -> torch.Tensor:
        return torch.where(
            torch.arange(len(pixels))[:, None] == 2, torch.nan, torch.zeros(len(pixels), 4, dtype=torch.float64)
        )

    monkeypatch.setattr(RunModel, "outputs", diverged)
    assert f"the model's output for {images[0] / '0002.png'} is not finite" in refused(run, str(images[0]))


def test_a_run_with_images_of_two_channels_is_refused(run: Path, images: tuple[Path, list[int]]) -> None:
    data = json.loads((run / "data.json").read_text())
    data |= {"channels": 2, "mean": data["mean"][:2], "std": data["std"][:2]}
    (run / "data.json").write_text(json.dumps(data))
    assert "its images have 2 channels; files give 1 or 3" in refused(run, str(images[0]))


def on_each_rank(overrides: list[str], parts: int | None = None) -> None:
    """Predicts; is killed, in effect, after a number of parts."""
    # Sums of several threads may have another order.
    torch.set_num_threads(1)
    predict_part, calls = predict.Predictor.predict, []

    def dies(self: predict.Predictor, *arguments: Any) -> Any:
        calls.append(1)
        if parts is not None and len(calls) > parts:
            os._exit(0)
        return predict_part(self, *arguments)

    predict.Predictor.predict = dies  # type: ignore[method-assign, assignment]
    predict.run(load_settings(PredictSettings, hydra_entry.compose(CONF, "predict", overrides)))


def test_a_killed_prediction_goes_on_with_three_ranks_and_gives_the_same_file(
    run: Path, images: tuple[Path, list[int]], tmp_path: Path
) -> None:
    (images[0] / "0007.png").write_text("no image")
    options = [f"run={run}", f"input={images[0]}", "batch_size=3", "top=2", "device=cpu"]
    run_ranks(on_each_rank, 1, [*options, f"output={tmp_path}/undisturbed.csv"])
    killed = [*options, f"output={tmp_path}/killed.csv"]
    with pytest.raises(RankFailed, match="died"):
        run_ranks(on_each_rank, 1, killed, 4)
    assert len(list((tmp_path / "killed.csv.parts").glob("part_*"))) == 4
    assert not (tmp_path / "killed.csv").exists()
    run_ranks(on_each_rank, 3, killed)
    assert (tmp_path / "killed.csv").read_bytes() == (tmp_path / "undisturbed.csv").read_bytes()
    assert not (tmp_path / "killed.csv.parts").exists()


def test_several_ranks_need_a_file(run: Path, images: tuple[Path, list[int]]) -> None:
    composed = hydra_entry.compose(CONF, "predict", [f"run={run}", f"input={images[0]}"])
    with pytest.raises(ConfigError, match=r"output=null: 2 ranks need a file for the result; choices: .json, .jsonl"):
        predict.run(load_settings(PredictSettings, composed), World(0, 2, 0, 2, "here"))
