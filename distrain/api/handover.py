"""Objects on their way from a Python program to the ranks that it starts, through a folder that only its user can read.

This is the only place where distrain reads a pickle: its own, written a moment before by the process that starts the
ranks. Model and configuration are pickled by cloudpickle, which takes classes of a script or a notebook by value, so
that a rank need not run the script again. Samples lie in plain files, which all ranks map into memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn

from distrain.api.arrays import byte_chunks
from distrain.api.training import Training
from distrain.data.base import Images
from distrain.data.python_object import DataObject
from distrain.errors import config_error

_PICKLE, _PATHS, _RESULT = "training.pickle", "paths.json", "result.json"
_VERIFICATION = "verification.json"
_PARTS = ("train", "val", "test")


def write(training: Training, folder: Path) -> None:
    """Writes what :func:`read` reads.

    Args:
        training: What the ranks are to do.
        folder: A new folder that only this user can read.

    Raises:
        ConfigError: An object can't be sent to another process, or the disk is full.
    """
    (folder / _PATHS).write_text(json.dumps(sys.path))
    data, shapes = training.data, {}
    try:
        for name in _PARTS if data is not None else ():
            part: Images | None = getattr(data, name)
            if part is not None:
                shapes[name] = [_write_tensor(tensor, folder / f"{name}_{place}") for place, tensor in _tensors(part)]
    except OSError as error:
        problem = (
            f"the samples can't be written to {folder} for the ranks ({error.strerror}); TMPDIR names another place"
        )
        raise config_error("train", problem) from error
    model = training.model
    if isinstance(model, nn.Module) and any(not tensor.is_cpu for tensor in model.state_dict().values()):
        problem = "has tensors on a device that each rank would take into use; pass model.cpu(), or what makes it"
        raise config_error("model", problem)
    for name, callback in training.callbacks.items():
        try:
            cloudpickle.dumps(callback)
        except Exception as error:  # a user's object may raise anything
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            problem = f"{name} can't be sent to other processes ({reason}); open files and the like in on_fit_start"
            raise config_error("callbacks", problem) from error
    content = training.config, model, data and (data.spec, data.fingerprint), shapes, dict(training.callbacks)
    try:
        (folder / _PICKLE).write_bytes(cloudpickle.dumps(content))
    except OSError as error:
        raise config_error("model", f"can't be written to {folder} for the ranks ({error.strerror})") from error
    except Exception as error:  # a user's object may raise anything
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        problem = f"{_culprit(model)} can't be sent to other processes ({reason})"
        way_out = "make it where it is used, pass a class or function that makes the model, or start under torchrun"
        raise config_error("model", f"{problem}; {way_out}") from error


def import_as_parent(folder: Path) -> None:
    """Lets this process find the modules that its parent finds."""
    sys.path[:] = json.loads((folder / _PATHS).read_text())


def read(folder: Path) -> Training:
    """What the parent wrote.

    Raises:
        PermissionError: Another user could have written it.
    """
    for path in (folder, folder / _PICKLE):
        status = path.stat()
        if hasattr(os, "getuid") and (status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022):
            raise PermissionError(f"{path} may have been written by another user")
    config, model, description, shapes, callbacks = cloudpickle.loads((folder / _PICKLE).read_bytes())
    if description is None:
        return Training(config, model, None, callbacks)
    spec, fingerprint = description
    parts = {
        name: Images(*(_read_tensor(folder / f"{name}_{place}", *kind) for place, kind in enumerate(kinds)))
        for name, kinds in shapes.items()
    }
    data = DataObject(spec, parts["train"], parts.get("val"), parts.get("test"), fingerprint)
    return Training(config, model, data, callbacks)


def write_verification(folder: Path, options: Mapping[str, Any]) -> None:
    """Tells the ranks to verify the training instead of doing it."""
    (folder / _VERIFICATION).write_text(json.dumps(options))


def read_verification(folder: Path) -> dict[str, Any] | None:
    """How the ranks verify the training; ``None``: they train."""
    path = folder / _VERIFICATION
    return json.loads(path.read_text()) if path.exists() else None


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Leaves what rank 0 tells the parent."""
    (folder / _RESULT).write_text(json.dumps(result))


def read_result(folder: Path) -> dict[str, Any]:
    """What rank 0 has left; empty if it has not come so far."""
    path = folder / _RESULT
    return json.loads(path.read_text()) if path.exists() else {}


def _tensors(part: Images) -> list[tuple[int, Tensor]]:
    return list(enumerate((part.images, part.targets)))


def _write_tensor(tensor: Tensor, path: Path) -> tuple[torch.dtype, list[int]]:
    with path.open("wb") as file:
        for chunk in byte_chunks(tensor):
            file.write(chunk)
    return tensor.dtype, list(tensor.shape)


def _read_tensor(path: Path, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """The tensor in a file, mapped; what is written into it stays in this process."""
    return torch.from_file(str(path), shared=False, size=torch.Size(shape).numel(), dtype=dtype).view(shape)


def _culprit(model: Any) -> str:
    """The part of the model that can't be pickled, in words."""
    if isinstance(model, nn.Module):
        parts = [
            (f"{prefix}.{name}".lstrip("."), value)
            for prefix, module in model.named_modules()
            for name, value in vars(module).items()
            if name != "_modules"
        ]
    else:
        function = getattr(model, "func", model)
        code, scope = getattr(function, "__code__", None), getattr(function, "__globals__", {})
        closure = getattr(function, "__closure__", None) or ()
        parts = []
        for name, cell in zip(getattr(code, "co_freevars", ()), closure, strict=True):
            with contextlib.suppress(ValueError):  # the variable has no value yet
                parts.append((name, cell.cell_contents))
        parts += [(name, scope[name]) for name in getattr(code, "co_names", ()) if name in scope]
    for name, value in parts:
        try:
            cloudpickle.dumps(value)
        except Exception:  # a user's object may raise anything
            return f"its {name}, a {type(value).__name__},"
    return f"{type(model).__name__}"
