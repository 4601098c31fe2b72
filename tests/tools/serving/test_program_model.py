"""What served files answer, and what is refused of ONNX files, which may come from anywhere."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from distrain.errors import ConfigError
from distrain.tools.serving import onnx_program, torch_program
from distrain.tools.serving.model import ServedModel
from distrain.tools.serving.program_model import ProgramFile

ABOUT = {
    "preprocess": "inside",
    "model": "mean",
    "task": "classification",
    "classes": json.dumps(["dark", "bright"]),
    "input_shape": "[1, 2, 2]",
    "step": "5",
}


def write(path: Path, outputs: tuple[str, ...] = ("probabilities", "class"), **about: str) -> Path:
    """A file whose model returns the shares of dark and bright in an image."""
    ones = numpy_helper.from_array(np.full((4, 2), [-1 / 1020, 1 / 1020], np.float32), "weight")
    bias = numpy_helper.from_array(np.array([1, 0], np.float32), "bias")
    nodes = [
        helper.make_node("Cast", ["images"], ["numbers_"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["numbers_"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight", "bias"], [outputs[0]]),
    ]
    values = [helper.make_tensor_value_info(outputs[0], TensorProto.FLOAT, ["batch", 2])]
    if "class" in outputs:
        nodes.append(helper.make_node("ArgMax", [outputs[0]], ["class"], axis=1, keepdims=0))
        values.append(helper.make_tensor_value_info("class", TensorProto.INT64, ["batch"]))
    if "labels" in outputs:
        half = numpy_helper.from_array(np.array(0.5, np.float32), "half")
        nodes.append(helper.make_node("Greater", [outputs[0], "half"], ["labels"]))
        values.append(helper.make_tensor_value_info("labels", TensorProto.BOOL, ["batch", 2]))
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 1, 2, 2])
    initial = [ones, bias, *([half] if "labels" in outputs else [])]
    graph = helper.make_graph(nodes, "g", [images], values, initial)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {**ABOUT, **about})
    onnx.save(model, path)
    return path


def source(path: Path) -> ProgramFile:
    return ProgramFile(path, functools.partial(onnx_program.load, threads=1))


def loaded(path: Path) -> ServedModel:
    return source(path).load()


def test_classes_are_ranked(tmp_path: Path) -> None:
    model = loaded(write(tmp_path / "m.onnx"))
    assert (model.about.step, model.about.largest_top, model.about.shape) == (5, 2, (1, 2, 2))
    images = np.array([[[[0, 0], [0, 102]]], [[[255, 255], [255, 255]]]], np.uint8)
    dark, _ = model.answer(images, 2)
    assert dark is not None
    assert dark["top"] == [
        {"class": "dark", "probability": pytest.approx(0.9)},
        {"class": "bright", "probability": pytest.approx(0.1)},
    ]
    assert model.answer(images, 1)[1] == {"class": "bright", "probability": pytest.approx(1.0)}


def test_labels_and_numbers_have_names(tmp_path: Path) -> None:
    images = np.zeros((1, 1, 2, 2), np.uint8)
    labels = loaded(write(tmp_path / "l.onnx", ("probabilities", "labels")))
    assert labels.answer(images, 1) == [{"labels": ["dark"], "probabilities": {"dark": 1.0, "bright": 0.0}}]
    numbers = loaded(write(tmp_path / "n.onnx", ("numbers",)))
    assert numbers.answer(images, 1) == [{"numbers": {"dark": 1.0, "bright": 0.0}}]


def test_a_larger_image_is_resized_to_what_the_model_sees(tmp_path: Path) -> None:
    model = loaded(write(tmp_path / "m.onnx", decoded_shape="[1, 4, 4]", eval_crop="0.5"))
    assert model.about.shape == (1, 4, 4)
    image = np.zeros((1, 1, 4, 4), np.uint8)
    image[..., 1:3, 1:3] = 255
    (answer,) = model.answer(image, 1)
    assert answer == {"class": "bright", "probability": pytest.approx(1.0)}


BROKEN: dict[str, tuple[dict[str, str], str]] = {
    "another program's": ({"preprocess": "outside"}, "must be inside"),
    "other classes": ({"classes": '["a"]'}, "for each of 1"),
    "another input": ({"input_shape": "[3, 2, 2]"}, "must be uint8 of input_shape"),
    "a shape that fills the memory": ({"decoded_shape": "[1, 100000, 100000]"}, "too many pixels"),
    "no shape": ({"decoded_shape": "[1, -4, 4]"}, "is no shape"),
    "no share": ({"eval_crop": "0"}, "eval_crop 0.0"),
    "no JSON": ({"classes": "["}, "does not say how it is used"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_says_something_impossible_is_refused(case: str, tmp_path: Path) -> None:
    about, problem = BROKEN[case]
    with pytest.raises(ConfigError, match=problem) as raised:
        loaded(write(tmp_path / "m.onnx", ("probabilities", "class"), **about))
    assert "distrain export format=onnx" in str(raised.value)


def test_a_file_cannot_have_other_files_read(tmp_path: Path) -> None:
    """Weights of ONNX may lie in other files, by any path."""
    path = write(tmp_path / "m.onnx")
    (tmp_path / "secret").write_bytes(bytes(1000))
    model = onnx.load(path)
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "secret", "offset": "0", "length": "32"}.items():
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError, match="ONNX Runtime can't read it"):
        loaded(path)


def test_noise_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"noise")
    with pytest.raises(ConfigError, match="can't read it"):
        loaded(tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match="not a regular file"):
        loaded(tmp_path)


def test_what_is_no_file_of_torch_export_is_refused(tmp_path: Path) -> None:
    (tmp_path / "noise.pt2").write_bytes(b"noise")
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.zeros(2),)), tmp_path / "other.pt2")
    for name in ("noise.pt2", "other.pt2"):
        with pytest.raises(ConfigError, match="torch can't read it, or it does not describe itself"):
            torch_program.load(tmp_path / name)


def test_a_file_that_is_replaced_is_noticed(tmp_path: Path) -> None:
    found = source(write(tmp_path / "m.onnx"))
    before = found.state()
    assert found.state() == found.newest() == before
    write(tmp_path / "new.onnx", step="6").replace(tmp_path / "m.onnx")
    assert found.state() != before
    assert found.load().about.step == 6
