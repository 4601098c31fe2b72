"""An exported model can be read with safetensors and torch alone."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import distrain
from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint import writer as checkpoint_writer
from distrain.cli import export, hydra_entry
from distrain.cli.export import ExportSettings
from distrain.cli.run_folder import RunFolder
from distrain.config.load import load_settings
from distrain.data.base import data_source
from distrain.errors import ConfigError
from distrain.models.cnn import SimpleCNN
from distrain.runtime.world import World
from distrain.tools.exporting import costs, program_files
from distrain.tools.exporting.program import Program
from tests.harness import HANG_SECONDS
from tests.runs import CONF
from tests.trained import change_config, replace_section, save_test_images


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
        (["output=m", "format=pickle"], "format=pickle: unknown choice; choices: safetensors"),
        (["output=m", "preprocess=inside"], "preprocess=inside: format=safetensors holds weights, and no program"),
        (["output=m", "format=onnx", "opset=9"], "opset=9: must be at least 18"),
        (["output=m", "format=onnx", "push=me/mine"], "push=me/mine: is for format=folder"),
        (["output=.", "format=folder"], "output=.: is there already; name a folder that is new"),
        (["output=m", "format=folder", "push=mine"], "push=mine: is not of the form USER/NAME"),
        (["output=m", "quantize=int8"], "quantize=int8: is for format=onnx, and for format=folder, which then holds"),
        (["output=m", "format=onnx", "quantize=int4"], "quantize=int4: unknown choice; choices: null, int8"),
        (["output=nowhere/m"], "output=nowhere/m: there is no folder nowhere"),
        (["output=."], "output=.: is not a plain file"),
        ([], "output: "),
    ],
)
def test_invalid_settings_are_refused_in_one_line(run: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        export.run(configured(run, *overrides))
    assert str(caught.value).startswith(message)


#: Counts the right answers of exported programs for the images of a folder, with onnxruntime, then with torch alone.
SCORE = """
import json, pathlib, sys
import numpy, onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession(sys.argv[1])
(given,) = session.get_inputs()
assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["batch", 3, 8, 8])
about = session.get_modelmeta().custom_metadata_map
names = json.loads(about["classes"])
paths = sorted(pathlib.Path(sys.argv[3]).iterdir())
images = numpy.stack([numpy.array(Image.open(path)).transpose(2, 0, 1) for path in paths])
probabilities, chosen = session.run(["probabilities", "class"], {"images": images})
assert abs(probabilities.sum(1) - 1).max() < 1e-5 and (probabilities.argmax(1) == chosen).all()
import torch
inside = {"distrain.json": ""}
program = torch.export.load(sys.argv[2], extra_files=inside).module()
results = program(torch.from_numpy(images))
assert (results["class"].numpy() == chosen).all()
assert abs(results["probabilities"].numpy() - probabilities).max() < 1e-5
assert json.loads(inside["distrain.json"])["classes"] == names and "distrain" not in sys.modules
print(json.dumps([names[index] for index in chosen]))
"""


def test_programs_give_the_same_classes_in_a_process_without_distrain(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    onnx, archive = tmp_path / "out" / "m.onnx", tmp_path / "out" / "m.pt2"
    change_config(run, trainer={"precision": "bf16"})
    export.run(configured(run, "format=onnx", f"output={onnx}"))
    said = capfd.readouterr().out
    assert "compared with the run's model on 31 test images: the same class in 31 of 31, largest difference" in said
    assert re.search(r"computes in fp32, and the run in bf16: both decide the same for \d\d of 31\n", said)
    # A checkpoint's class names and normalisation, for a program that leaves both to its caller.
    export.run(configured(run, "format=torch_export", "preprocess=outside", "check=0", f"output={archive}"))
    described = json.loads(archive.with_name("m.pt2.json").read_text())
    assert described["inputs"]["images"]["values"] == "(pixel / 255 - mean) / std"
    assert described["outputs"] == {"logits": {"dtype": "float32", "shape": ["batch", 4]}}
    assert "16 random images" in capfd.readouterr().out
    export.run(configured(run, "format=torch_export", f"output={archive}"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["m.onnx", "m.pt2", "m.pt2.json"]
    for content in (onnx.read_bytes(), b"".join(zipfile.ZipFile(archive).read(name) for name in names(archive))):
        assert str(Path(export.__file__).parent.parent).encode() not in content  # no paths of this machine
    labels = save_test_images(RunFolder.open(str(run)).config, tmp_path / "images")
    command = [sys.executable, "-I", "-W", "ignore", "-c", SCORE, str(onnx), str(archive), str(tmp_path / "images")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, timeout=HANG_SECONDS)
    right = sum(name == str(label) for name, label in zip(json.loads(done.stdout), labels, strict=True))
    assert right == json.loads((run / "summary.json").read_text())["test_correct"]


def names(archive: Path) -> list[str]:
    return zipfile.ZipFile(archive).namelist()


def test_a_program_that_differs_leaves_no_file(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(program: Program, *_: object) -> Any:
        return lambda images: {name: tensor + 1 for name, tensor in program(images).items()}

    monkeypatch.setattr(program_files, "write_torch_export", wrong)
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=r"format=torch_export: the exported program differs .* no file is left"):
        export.run(configured(run, "format=torch_export", f"output={tmp_path}/out/m"))
    assert not list((tmp_path / "out").iterdir())


#: Reads a file in int8 without distrain: which types its weights have, and its classes for the images of an array.
INT8 = """
import json, sys
import numpy, onnx, onnxruntime
model = onnx.load(sys.argv[1])
sizes = {}
for tensor in model.graph.initializer:
    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    sizes[kind] = sizes.get(kind, 0) + int(numpy.prod(tensor.dims))
session = onnxruntime.InferenceSession(sys.argv[1])
about = session.get_modelmeta().custom_metadata_map
chosen = session.run(["class"], {"images": numpy.load(sys.argv[2])})[0]
assert "distrain" not in sys.modules
print(json.dumps([sizes, about["quantized"], json.loads(about["classes"]), chosen.tolist()]))
"""


def test_int8_is_measured_beside_float32_and_computes_with_whole_numbers(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    keys = ("format=folder", "quantize=int8", "calibration_images=20", "max_drop=0.1")
    folder = export.run(configured(run, f"output={tmp_path}/made", *keys))
    files = ["README.md", "config.json", "model.safetensors", "model_int8.onnx"]
    assert sorted(path.name for path in folder.iterdir()) == files
    # ONNX Runtime's advice to its developers.
    assert not [record for record in caplog.records if record.name == "root"]
    _, measured, heading, *rows = capfd.readouterr().out.splitlines()
    assert re.fullmatch(r"on 31 test images, calls on \d+ CPU threads?:", measured)
    assert re.split("  +", heading.strip()) == ["accuracy", "bytes", "ms for 1 image", "ms for 32 images"]
    plain, int8 = (row.split() for row in rows)
    accuracy = json.loads((run / "summary.json").read_text())["test_accuracy"]
    assert (plain[:2], int8[0]) == (["fp32", f"{accuracy:.4f}"], "int8")
    file = folder / "model_int8.onnx"
    assert int8[2] == f"{file.stat().st_size:,}"
    card = (folder / "README.md").read_text()
    assert all(f"| {' | '.join(cells)} |" in card for cells in (plain, int8))
    # The file itself, by ONNX Runtime alone.
    test = data_source(RunFolder.open(str(run)).config.data).load().test
    np.save(tmp_path / "images.npy", test.read(torch.arange(31)).images.numpy())
    command = [sys.executable, "-I", "-W", "ignore", "-c", INT8, str(file), str(tmp_path / "images.npy")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, timeout=HANG_SECONDS)
    sizes, quantized, classes, chosen = json.loads(done.stdout)
    weights = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values() if tensor.dim() > 1)
    assert sizes["INT8"] >= weights > 20 * sizes["FLOAT"]
    assert (quantized, classes) == ("int8", ["0", "1", "2", "3"])
    right = sum(found == int(label) for found, label in zip(chosen, test.class_numbers(), strict=True))
    assert int8[1] == f"{right / 31:.4f}"


def test_int8_that_is_much_worse_leaves_no_file(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    measured = iter([0.9, 0.88])
    monkeypatch.setattr(costs, "score", lambda *_: next(measured))
    problem = (
        "max_drop=0.01: the test accuracy is 0.9000 in fp32 and 0.8800 in int8, worse by 0.0200; .* no file is left"
    )
    with pytest.raises(ConfigError, match=problem):
        export.run(configured(run, "format=onnx", f"output={tmp_path}/out/m", "quantize=int8"))
    assert not list((tmp_path / "out").iterdir())


def test_data_that_are_not_here_are_named_with_the_ways_out(run: Path, tmp_path: Path) -> None:
    replace_section(run, "data", "data=image_folder", f"data.root={tmp_path}/gone")
    with pytest.raises(
        ConfigError, match=r"data_root=FOLDER names the run's data .*; check=0 compares on random images"
    ):
        export.run(configured(run, "format=onnx", f"output={tmp_path}/m"))


def test_what_onnx_needs_is_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"format=onnx: needs onnx, .* pip install 'distrain\[onnx\]'"):
        export.run(configured(run, "format=onnx", f"output={tmp_path}/m"))


def test_a_folder_holds_what_loads_the_model_and_a_card(run: Path, tmp_path: Path) -> None:
    (run / "certificate.json").write_text(json.dumps({"verdict": "equal", "ranks": 2, "steps": 20}))
    folder = export.run(configured(run, "format=folder", f"output={tmp_path}/made", "license=mit"))
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "distrain.models.cnn.SimpleCNN"
    assert config["distrain"]["classes"] == ["0", "1", "2", "3"]
    # As huggingface_hub does: entries that the constructor knows are its arguments.
    known = {name: config[name] for name in inspect.signature(SimpleCNN).parameters}
    model = SimpleCNN(**known)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    card = (folder / "README.md").read_text()
    front, _, text = card.removeprefix("---\n").partition("---\n")
    described = yaml.safe_load(front)
    assert (described["license"], described["pipeline_tag"]) == ("mit", "image-classification")
    (entry,) = described["model-index"][0]["results"]
    summary = json.loads((run / "summary.json").read_text())
    assert {metric["type"]: metric["value"] for metric in entry["metrics"]} == {
        "accuracy": summary["test_accuracy"],
        "loss": summary["test_loss"],
    }
    for word in ("from distrain.models.cnn import SimpleCNN", "20 steps", "2 ranks", "noise: 0.6"):
        assert word in text
    assert str(run) not in card


def test_a_folder_is_uploaded_with_the_token_of_the_environment(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hub: Any = ModuleType("huggingface_hub")
    calls: list[Any] = []

    class Api:
        def __init__(self, token: str) -> None:
            calls.append(token)

        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
            calls.append((name, private))

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
            if calls[-1][0] == "me/full":
                raise OSError("disk\nquota")
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    hub.HfApi = Api
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="push=me/mine: needs a token with write access in the variable HF_TOKEN"):
        export.run(configured(run, "format=folder", f"output={tmp_path}/made", "push=me/mine"))
    assert not (tmp_path / "made").exists()
    monkeypatch.setenv("HF_TOKEN", "secret")
    export.run(configured(run, "format=folder", f"output={tmp_path}/made", "push=me/mine"))
    assert calls == ["secret", ("me/mine", True), ("me/mine", ["README.md", "config.json", "model.safetensors"])]
    assert "uploaded: https://huggingface.co/me/mine" in capfd.readouterr().out
    with pytest.raises(ConfigError, match=r"push=me/full: can't be uploaded \(OSError: disk\); .*/full is complete"):
        export.run(configured(run, "format=folder", f"output={tmp_path}/full", "push=me/full"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="push=me/mine: needs the library huggingface_hub"):
        export.run(configured(run, "format=folder", f"output={tmp_path}/again", "push=me/mine"))


def test_more_than_one_process_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="WORLD_SIZE=2: export runs on one process"):
        export.run(configured(run, "output=m"), World(0, 2, 0, 2, "here"))
