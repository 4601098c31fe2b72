"""An exported model can be read with safetensors and torch alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import distrain
from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint import writer as checkpoint_writer
from distrain.cli import export, hydra_entry
from distrain.cli.export import ExportSettings
from distrain.config.load import load_settings
from distrain.errors import ConfigError
from distrain.runtime.world import World
from tests.runs import CONF
from tests.trained import change_config


def configured(run: Path, *overrides: str) -> ExportSettings:
    return load_settings(ExportSettings, hydra_entry.compose(CONF, "export", [f"run={run}", *overrides]))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - no iterator


def test_the_file_has_the_state_dict_and_metadata_to_use_it(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = export.run(configured(run, f"output={tmp_path}/model.safetensors"))
    tensors, metadata = read(path)
    last = checkpoint_format.list_checkpoints(run / "checkpoints")[-1]
    saved = checkpoint_reader.load_model(last)
    assert tensors.keys() == saved.keys()
    assert all(tensor.equal(saved[name]) for name, tensor in tensors.items())
    data = json.loads((run / "data.json").read_text())
    assert metadata["format"] == "pt"
    assert metadata["model"] == "simple_cnn"
    assert json.loads(metadata["model_config"]) == {"name": "simple_cnn", "_target_": "distrain.models.cnn.SimpleCNN"}
    assert json.loads(metadata["classes"]) == ["0", "1", "2", "3"]
    assert json.loads(metadata["input_shape"]) == [3, 8, 8]
    assert [json.loads(metadata["mean"]), json.loads(metadata["std"])] == [data["mean"], data["std"]]
    assert (int(metadata["step"]), metadata["distrain_version"]) == (int(last.name[5:]), distrain.__version__)
    assert capfd.readouterr().out == f"{last.name} as safetensors: {path}\n"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.safetensors", "run"]


def test_the_chosen_checkpoint_is_exported(run: Path, tmp_path: Path) -> None:
    first = checkpoint_format.list_checkpoints(run / "checkpoints")[0]
    tensors, metadata = read(export.run(configured(run, f"output={tmp_path}/m", f"checkpoint={first}")))
    assert metadata["step"] == str(int(first.name[5:]))
    assert all(tensor.equal(tensors[name]) for name, tensor in checkpoint_reader.load_model(first).items())


def test_floating_point_tensors_become_float32_and_integers_stay(run: Path, tmp_path: Path) -> None:
    last = checkpoint_format.list_checkpoints(run / "checkpoints")[-1]
    state, progress = checkpoint_reader.load(last)
    model = {
        "double": torch.rand(3, 2, dtype=torch.float64),
        "half": torch.rand(3, dtype=torch.bfloat16),
        "batches": torch.tensor(7),
    }
    checkpoint_writer.save(last.parent, {**state, "model": model, "compressor": {}, "local": {}}, progress)
    tensors, _ = read(export.run(configured(run, f"output={tmp_path}/m")))
    assert tensors["double"].equal(model["double"].float())
    assert tensors["half"].equal(model["half"].float())
    assert tensors["batches"].equal(model["batches"])


def test_the_model_is_not_built(run: Path, tmp_path: Path) -> None:
    change_config(run, model={"name": "custom", "_target_": "nowhere.to_be_found.Net", "kwargs": {}})
    _, metadata = read(export.run(configured(run, f"output={tmp_path}/m")))
    assert json.loads(metadata["model_config"])["_target_"] == "nowhere.to_be_found.Net"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["output=m", "format=onnx"], "format=onnx: unknown choice; choices: safetensors"),
        (["output=nowhere/m"], "output=nowhere/m: there is no folder nowhere"),
        (["output=."], "output=.: is not a plain file"),
        ([], "output: "),
    ],
)
def test_invalid_settings_are_refused_in_one_line(run: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        export.run(configured(run, *overrides))
    assert str(caught.value).startswith(message)


def test_more_than_one_process_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="WORLD_SIZE=2: export runs on one process"):
        export.run(configured(run, "output=m"), World(0, 2, 0, 2, "here"))
