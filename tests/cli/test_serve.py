"""``distrain serve`` answers as ``distrain predict`` does, and refuses what it can't serve."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from distrain.checkpoint import format as checkpoint_format
from distrain.cli import export, hydra_entry, predict, serve
from distrain.cli.export import ExportSettings
from distrain.cli.predict import PredictSettings
from distrain.cli.run_folder import RunFolder
from distrain.cli.serve import ServeSettings
from distrain.cli.served_run import RunSource, ServedRun, check_task
from distrain.config.load import load_settings
from distrain.data.decode import decode
from distrain.errors import ConfigError
from distrain.runtime.world import World
from distrain.tasks import base as tasks
from distrain.tasks.base import Task
from tests.harness import HANG_SECONDS
from tests.runs import CONF
from tests.trained import replace_section, save_test_images


def configured(*overrides: str) -> ServeSettings:
    return load_settings(ServeSettings, hydra_entry.compose(CONF, "serve", overrides))


@pytest.fixture
def images(run: Path, tmp_path: Path) -> list[Path]:
    """The run's test images as files."""
    folder = RunFolder.open(str(run))
    save_test_images(folder.config, tmp_path / "images")
    return sorted((tmp_path / "images").iterdir())


def predicted(run: Path, images: list[Path], top: int) -> list[dict[str, Any]]:
    """What ``distrain predict`` says of images."""
    keys = [f"run={run}", f"input={images[0].parent}", f"top={top}", "device=cpu"]
    settings = load_settings(PredictSettings, hydra_entry.compose(CONF, "predict", keys))
    folder = RunFolder.open(str(run))
    rows = predict.predict_files(folder, tasks.build(folder.config, folder.spec), settings, World(0, 1, 0, 1, ""))
    return [{name: value for name, value in row.items() if name != "path"} for row in rows]


def assert_equal(found: list[Any], expected: list[dict[str, Any]]) -> None:
    """Compares answers: the same classes in the same order, and probabilities up to rounding."""
    for one, other in zip(found, expected, strict=True):
        assert [entry["class"] for entry in one["top"]] == [entry["class"] for entry in other["top"]]
        values = [entry["probability"] for entry in other["top"]]
        assert [entry["probability"] for entry in one["top"]] == pytest.approx(values, abs=1e-6)


def test_a_server_answers_as_predict_does_until_sigterm(run: Path, images: list[Path]) -> None:
    pytest.importorskip("fastapi")
    command = [sys.executable, "-m", "distrain", "serve", f"run={run}", "checkpoint=newest", "port=0", "device=cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            address = next(word for word in said.split() if word.startswith("http://"))
            found = []
            for image in images[:8]:
                request = urllib.request.Request(f"{address}/predict?top=4", image.read_bytes())
                request.add_header("content-type", "image/png")
                with urllib.request.urlopen(request, timeout=HANG_SECONDS) as answer:
                    found += json.load(answer)["predictions"]
            process.send_signal(signal.SIGTERM)
            assert process.wait(HANG_SECONDS) == 0
        finally:
            process.kill()
    last = checkpoint_format.list_checkpoints(run / "checkpoints")[-1]
    assert said.startswith(f"serving {last.name} (simple_cnn, 4 classes) at http://127.0.0.1:")
    assert_equal(found, predicted(run, images, 4)[:8])


def test_run_and_exported_files_answer_as_predict_does_also_with_a_crop(
    run: Path, images: list[Path], tmp_path: Path
) -> None:
    data = "data=image_folder", f"data.root={images[0].parent}", "data.height=8", "data.width=8"
    replace_section(run, "data", *data, "data.cache_scale=1.5", "data.eval_crop=0.75")
    served = RunSource(str(run), "newest", "last", "cpu", []).load()
    models = [served]
    for name, kind, *trusted in (("m.onnx", "onnx"), ("m.pt2", "torch_export", "trust_file=true")):
        keys = [f"run={run}", f"format={kind}", f"output={tmp_path / name}", "check=0"]
        export.run(load_settings(ExportSettings, hydra_entry.compose(CONF, "export", keys)))
        models.append(serve.source_of(configured(f"run={tmp_path / name}", *trusted)).load())
    pixels = np.stack([decode(path, 12, 12, 3) for path in images])
    expected = predicted(run, images, 3)
    for model in models:
        assert model.about.shape == (3, 12, 12)
        assert_equal(model.answer(pixels, 3), expected)


def test_an_output_that_is_not_finite_is_no_answer(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = ServedRun(RunFolder.open(str(run)), "newest", "last", "cpu", [])
    pixels = np.zeros((3, 3, 8, 8), np.uint8)
    outputs = served._model.outputs

    def second_is_broken(images: Any) -> Any:
        found = outputs(images).clone()
        found[1, 0] = float("nan")
        return found

    monkeypatch.setattr(served._model, "outputs", second_is_broken)
    first, second, third = served.answer(pixels, 1)
    assert second is None
    assert first is not None
    assert first == third


def test_a_newer_checkpoint_is_noticed(run: Path) -> None:
    source = RunSource(str(run), "newest", "last", "cpu", [])
    last = checkpoint_format.list_checkpoints(run / "checkpoints")[-1]
    moved = shutil.move(last, run / "elsewhere")
    before, newest = source.state(), source.newest()
    assert (source.state(), source.newest()) == (before, newest)
    shutil.move(moved, last)
    assert source.state() != before
    assert source.newest() != newest
    assert source.load().about.name == last.name


def test_what_cannot_be_served_is_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").touch()
    (tmp_path / "model.onnx").touch()
    (tmp_path / "model.json").touch()
    for keys, problem in {
        ("run=nowhere",): "is neither a run's folder nor a file",
        (f"run={tmp_path}/model.pt2",): "trust_file=true if you trust .* export format=onnx",
        (f"run={tmp_path}/model.pt2", "trust_file=true"): "torch can't read it",
        (f"run={tmp_path}/model.onnx", "trust_file=true"): "trust_file=true: is for a .pt2 file",
        (f"run={tmp_path}/model.json",): "serve reads a run's folder, or an .onnx or .pt2 file",
        (f"run={tmp_path}/model.onnx", "weights=ema"): "weights=ema: is for a run's folder",
        (f"run={tmp_path}/model.onnx", "checkpoint=newest"): "checkpoint=newest: is for a run's folder",
        (f"run={tmp_path}/model.onnx", "device=cuda"): "run on the CPU",
    }.items():
        with pytest.raises(ConfigError, match=problem):
            serve.source_of(configured(*keys)).load()
    pytest.importorskip("fastapi")
    with socket.create_server(("127.0.0.1", 0)) as occupied, pytest.raises(ConfigError, match=r"port=.*in use"):
        serve.run(configured(f"run={run}", f"port={occupied.getsockname()[1]}"))
    task = tasks.build(RunFolder.open(str(run)).config, RunFolder.open(str(run)).spec)
    pictures = SimpleNamespace(output_shape=(4, 8, 8), config=task.config)
    with pytest.raises(ConfigError, match="gives a class for each pixel"):
        check_task(cast(Task, pictures))


def test_without_its_packages_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r"serve: needs prometheus_client .* pip install 'distrain\[serve\]'"):
        serve.run(configured("run=anywhere"))
