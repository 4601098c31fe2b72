"""What a program does with a run: the commands' results, for runs of objects and of distrain's own parts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import distrain
from distrain.cli.commands import evaluate as evaluate_command
from tests.api.models import SETTINGS, Skip, samples, skip_net


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> distrain.Run:
    """A trained run of objects."""
    folder = tmp_path_factory.mktemp("objects") / "run"
    return distrain.fit(skip_net(), samples(), **{**SETTINGS, "epochs": 8, "run_dir": folder})


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> distrain.Run:
    """A run of distrain's own model and images, whose model is no object."""
    folder = tmp_path_factory.mktemp("named") / "run"
    keys = {"data.channels": 1, "data.height": 6, "data.width": 6, "data.train_size": 64, "data.test_size": 30}
    return distrain.fit("simple_cnn", "synthetic", **{**SETTINGS, "epochs": 1, "run_dir": folder}, keys=keys)


def test_a_run_is_read_from_its_folder(run: distrain.Run) -> None:
    again = distrain.read_run(run.run_dir)
    assert (again.config, again.metrics, again.summary) == (run.config, run.metrics, run.summary)
    assert again.config["model"] | {"kwargs": {}} == again.config["model"]
    assert again.config["trainer"]["epochs"] == 8
    assert again.curve("train_loss")[0] == [6, 12, 18, 24, 30, 36, 42, 48]
    assert distrain.read_run(again) is again
    with pytest.raises(distrain.ConfigError, match=r"model.name=python_object: .*distrain.evaluate\(run, model=…\)"):
        again.model  # noqa: B018


def test_a_model_object_is_loaded_with_the_weights_of_the_run(run: distrain.Run) -> None:
    untrained = skip_net(seed=9)
    before = next(untrained.parameters()).clone()
    for loaded in (distrain.load_model(run.run_dir, untrained), distrain.load_model(run, skip_net)):
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), run.model.parameters(), strict=True))
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(before, next(untrained.parameters())), "the module that was passed stays as it was"
    with pytest.raises(distrain.ConfigError, match=r"checkpoint=.*(missing|unexpected|conv)"):
        distrain.load_model(run, Skip(4))


def test_the_evaluation_is_that_of_the_training(run: distrain.Run, images: distrain.Run) -> None:
    inputs, labels = samples()
    result = distrain.evaluate(run.run_dir, (inputs, labels), model=skip_net)
    assert result["count"] == 50
    with torch.no_grad():
        assert result["correct"] == int((run.model(torch.from_numpy(inputs)).argmax(1).numpy() == labels).sum())
    assert distrain.evaluate(run, (inputs[:9], labels[:9]))["count"] == 9
    named = distrain.evaluate(images)
    assert named["accuracy"] == images.summary["test_accuracy"]
    assert named["loss"] == pytest.approx(images.summary["test_loss"])
    assert named == distrain.evaluate(images.run_dir, split="test")
    assert not list(images.run_dir.glob("evaluation*"))


def test_other_samples_are_weighted_as_those_of_the_training(tmp_path: Path) -> None:
    inputs, labels = samples()
    train, test = (inputs[:30], labels[:30]), (inputs[30:], np.zeros_like(labels[30:]))
    settings = {**SETTINGS, "epochs": 1, "run_dir": tmp_path / "run", "data.balance": "loss"}
    weighted = distrain.fit(skip_net(), train, test=test, **settings)
    assert distrain.evaluate(weighted, test)["loss"] == pytest.approx(weighted.summary["test_loss"])


def test_predictions_are_those_of_the_model(run: distrain.Run) -> None:
    inputs, _ = samples()
    rows = distrain.predict(run, inputs, top=2, batch_size=7)
    with torch.no_grad():
        probabilities = run.model(torch.from_numpy(inputs)).double().softmax(1)
    assert [row["class"] for row in rows] == [str(number) for number in probabilities.argmax(1).tolist()]
    assert [row["probability"] for row in rows] == pytest.approx(probabilities.max(1).values.tolist())
    assert [len(row["top"]) for row in rows] == [2] * 50
    assert distrain.predict(run.run_dir, torch.from_numpy(inputs), model=skip_net)[3]["class"] == rows[3]["class"]


def test_files_and_arrays_have_the_same_predictions(images: distrain.Run, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 1, 6, 6), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image[0]).save(tmp_path / f"{number}.png")
    from_files = distrain.predict(images, tmp_path)
    assert [Path(row.pop("path")).name for row in from_files] == ["0.png", "1.png", "2.png"]
    assert from_files == distrain.predict(images, pixels)


def test_an_exported_model_is_the_trained_one(run: distrain.Run, tmp_path: Path) -> None:
    file = distrain.export(run.run_dir, tmp_path / "model.safetensors")
    tensors = load_file(file)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in run.model.state_dict().items())
    folder = distrain.export(run, tmp_path / "folder", format="folder", license="mit")
    assert "model.load_state_dict(load_file" in (folder / "README.md").read_text()
    program = distrain.export(run, tmp_path / "model.pt2", format="torch_export", data=samples(), check=20)
    inputs = torch.from_numpy(samples()[0])
    found = torch.export.load(program).module()(inputs)
    with torch.no_grad():
        assert torch.allclose(found["probabilities"], run.model(inputs).softmax(1), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda run: distrain.evaluate(run.run_dir, samples()),
            r"model.name=python_object: this run's model was an ob",
        ),
        (distrain.evaluate, r"data=python_object: stands for arrays .* distrain.evaluate\(run, data"),
        (lambda run: distrain.evaluate(run, (samples()[0], samples()[1] + 1)), r"classes=4: is too few: .* up to 4"),
        (
            lambda run: distrain.evaluate(run, (samples()[0][:, :, 1:], samples()[1])),
            r"images: are \[1, 5, 6\]; the run",
        ),
        (lambda run: distrain.evaluate(run, 3), r"data: is a int; pass a pair"),
        (lambda run: distrain.evaluate(run, samples(), split="tset"), r"split=tset: .*\(did you mean test\?\)"),
        (lambda run: distrain.evaluate(run, samples(), model=3), r"model: is a int; pass an nn.Module"),  # type: ignore[arg-type]
        (lambda run: distrain.evaluate(run, samples(), batch_size=0), r"batch_size=0: must be a whole number of at"),
        (lambda run: distrain.evaluate("nowhere"), r"run=nowhere: is not a folder"),
        (
            lambda run: distrain.predict(run, "photo.png"),
            r"run=.*trained on floating-point arrays, and files give bytes",
        ),
        (lambda run: distrain.predict(run, np.uint8(samples()[0])), r"images: are uint8 numbers; .* on float numbers"),
        (lambda run: distrain.predict(run, samples()[0], top=9), r"top=9: the run has 4 classes"),
        (lambda run: distrain.predict(run, samples()[0], device="tpu"), r"device=tpu: unknown choice"),
        (lambda run: distrain.export(run, "m", format="onnx", check=-1), r"check=-1: must be at least 0"),
        (lambda run: distrain.export(run, "m", format="onnx", opset=1), r"opset=1: must be at least 18"),
        (lambda run: distrain.export(run, "/nowhere/model"), r"output=/nowhere/model: there is no folder /nowhere"),
        (lambda run: distrain.export(run, "model", format="pickle"), r"format=pickle: unknown choice"),
        (lambda run: distrain.load_model(run, checkpoint="bset"), r"checkpoint=bset: is not a checkpoint's folder"),
        (lambda run: distrain.read_run(Path(__file__).parent), r"run=.* has no config.yaml; is it a run's folder\?"),
    ],
)
def test_a_mistake_is_refused_in_one_line(run: distrain.Run, call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(distrain.ConfigError) as refused:
        call(run)
    assert re.search(message, str(refused.value)), refused.value
    assert "\n" not in str(refused.value)


def test_a_command_says_in_one_line_that_it_lacks_the_object(
    run: distrain.Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate.py"])
    with pytest.raises(SystemExit) as ended:
        evaluate_command.main([f"run={run.run_dir}"])
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "model.name=python_object: this run's model was an object in a Python program" in said


def test_a_metrics_file_that_is_being_written_is_read_up_to_its_last_line(images: distrain.Run, tmp_path: Path) -> None:
    for name in ("config.yaml", "data.json"):
        (tmp_path / name).write_text((images.run_dir / name).read_text())
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    run = distrain.read_run(tmp_path)
    assert (run.metrics, run.summary) == ([{"step": 1, "loss": 2.0}], {})
    assert "not ended" in repr(run)
    (tmp_path / "metrics.jsonl").write_text("{\n")
    with pytest.raises(distrain.ConfigError, match=r"run=.*: metrics.jsonl can't be read"):
        distrain.read_run(tmp_path)
