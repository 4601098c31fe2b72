"""Weights are read from every usual kind of file, as tensors alone; anything else is refused in one line."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from distrain.checkpoint import weight_files
from distrain.checkpoint.format import DamagedCheckpoint
from tests.checkpoint.helpers import save_steps, state

WEIGHTS = {"conv.weight": torch.arange(8.0).reshape(2, 4), "conv.count": torch.tensor(3)}


def lightning(folder: Path) -> Path:
    path = folder / "last.ckpt"
    torch.save({"epoch": 3, "state_dict": WEIGHTS, "optimizer_states": [{"state": {}}]}, path)
    return path


def checkpoint_with_model(folder: Path) -> Path:
    path = folder / "best.pth"
    torch.save({"optimizer": {"state": {0: {"step": torch.ones(())}}}, "model": WEIGHTS}, path)
    return path


def before_torch_1_6(folder: Path) -> Path:
    path = folder / "old.pth"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    return path


def parameters(folder: Path) -> Path:
    path = folder / "pytorch_model.bin"
    torch.save({name: nn.Parameter(value, value.is_floating_point()) for name, value in WEIGHTS.items()}, path)
    return path


def safe(folder: Path) -> Path:
    path = folder / "model.safetensors"
    safetensors.torch.save_file(WEIGHTS, path)
    return path


@pytest.mark.parametrize("write", [lightning, checkpoint_with_model, before_torch_1_6, parameters, safe])
def test_a_file_of_weights_is_read(write: Callable[[Path], Path], tmp_path: Path) -> None:
    found = weight_files.read(write(tmp_path))
    assert found.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert torch.equal(found[name], value)
        assert not found[name].requires_grad


def test_a_run_means_its_newest_valid_checkpoint(tmp_path: Path) -> None:
    older, newest = save_steps(tmp_path / "checkpoints", 10, 20)
    expected = state()["model"]
    for path in (tmp_path, older):
        assert torch.equal(weight_files.read(path)["kernel"], expected["kernel"])
    (newest / "model.safetensors").write_bytes(b"damaged")
    assert torch.equal(weight_files.read(tmp_path)["kernel"], expected["kernel"])
    with pytest.raises(DamagedCheckpoint, match=f"{newest.name}/model.safetensors has 7 bytes"):
        weight_files.read(newest)


class RunsCode:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self._folder / "ran"),)


def written(name: str, content: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(content(folder), folder / name)
        return folder / name

    return write


def raw(name: str, content: Callable[[Path], bytes]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content(folder))
        return folder / name

    return write


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "weights.safetensors")
    return folder / "weights.safetensors"


def scripted(folder: Path) -> Path:
    torch.jit.script(nn.Linear(2, 2)).save(str(folder / "scripted.pt"))
    return folder / "scripted.pt"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "missing.pt", "there is no such file or folder"),
    "an empty folder": (lambda folder: folder, "is neither a checkpoint nor a run with a complete checkpoint"),
    "another kind of file": (raw("model.onnx", lambda _: b"x"), "nor a file of weights (.safetensors, .pt"),
    "a pipe": (pipe, "nor a file of weights"),
    "text": (raw("text.pt", lambda _: b"hello"), "can't be read as tensors alone"),
    "an empty file": (raw("empty.pth", lambda _: b""), "can't be read as tensors alone"),
    "text named safetensors": (raw("text.safetensors", lambda _: b"hello, this is text"), "safetensors"),
    "a cut file": (raw("cut.safetensors", lambda folder: safe(folder).read_bytes()[:-4]), "safetensors"),
    "code in a zip": (written("code.pt", lambda folder: {**WEIGHTS, "x": RunsCode(folder)}), "posix.mkdir"),
    "code in a pickle": (raw("code.bin", lambda folder: pickle.dumps(RunsCode(folder), 2)), "posix.mkdir"),
    "a whole module": (written("module.pt", lambda _: nn.Linear(2, 2)), "save tensors alone: torch.save(model.state_d"),
    "a script": (scripted, "TorchScript"),
    "a list": (written("list.pt", lambda _: [torch.ones(2)]), "holds a list, not a model's state"),
    "no model": (written("none.pt", lambda _: {"optimizer": {"state": {}}, "epoch": 3}), "holds 'optimizer', 'epoch'"),
    "no tensor": (raw("none.safetensors", lambda _: safetensors.torch.save({})), "holds no tensor"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(("write", "problem"), REFUSED.values(), ids=REFUSED)
def test_anything_else_is_refused_in_one_line(
    write: Callable[[Path], Path], problem: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = write(tmp_path)
    recwarn.clear()
    with pytest.raises(DamagedCheckpoint) as caught:
        weight_files.read(path)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert not (tmp_path / "ran").exists()
    assert not recwarn.list


def test_a_tensor_that_is_not_needed_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.pt"
    torch.save({"large": torch.zeros(1 << 20), "small": torch.ones(2)}, path)
    found: dict[str, Tensor] = weight_files.read(path)
    path.unlink()  # what is mapped stays readable
    assert found["small"].tolist() == [1.0, 1.0]
    assert float(found["large"].sum()) == 0
