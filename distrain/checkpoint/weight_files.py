"""Reads weights that others trained: a run, a checkpoint, or a file of safetensors or of torch.save; no code is run."""

from __future__ import annotations

import logging
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distrain.checkpoint import reader
from distrain.checkpoint.format import DamagedCheckpoint, checkpoints_folder
from distrain.errors import first_line

log = logging.getLogger(__name__)

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
#: Keys under which training programs save a model's state, the more usual ones first.
_MODEL_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "state_dict_ema")
#: Most keys of a file that a message shows.
_MOST_KEYS = 12
#: Most characters of an error of torch that a message shows.
_LONGEST_REASON = 100


def read(path: Path) -> dict[str, Tensor]:
    """Reads a model's tensors.

    Args:
        path: The folder of a run (its newest valid checkpoint is read) or of a checkpoint; a ``.safetensors`` file; or
            a file that ``torch.save`` wrote, of a state dict or of a dictionary that holds one under a usual key.

    Returns:
        Parameters and buffers by name, on the CPU. They may still be on the disk until they are used.

    Raises:
        DamagedCheckpoint: There is no such file, or it holds something else; one line says what.
        OSError: It can't be read.
    """
    if path.is_dir():
        tensors = dict(reader.load_model(_checkpoint_in(path)))
    elif not path.exists():
        raise DamagedCheckpoint("there is no such file or folder; of the Hugging Face hub type hf://USER/NAME")
    elif path.is_file() and path.suffix == ".safetensors":
        tensors = reader.load_tensors(path)
    elif path.is_file() and path.suffix in _TORCH_SUFFIXES:
        tensors = _read_torch_file(path)
    else:
        suffixes = ", ".join((".safetensors", *_TORCH_SUFFIXES))
        raise DamagedCheckpoint(f"is neither the folder of a run or a checkpoint nor a file of weights ({suffixes})")
    if not tensors:
        raise DamagedCheckpoint("holds no tensor")
    return tensors


def _checkpoint_in(folder: Path) -> Path:
    """A checkpoint's folder, or the newest one of a run's folder."""
    if (folder / "manifest.json").exists():
        return folder
    checkpoints = checkpoints_folder(folder)
    newest = reader.newest_valid(checkpoints) if checkpoints.is_dir() else None
    if newest is None:
        raise DamagedCheckpoint("is neither a checkpoint nor a run with a complete checkpoint")
    return newest


def _read_torch_file(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            # About the kind of file; if that matters, an error follows.
            warnings.simplefilter("ignore", UserWarning)
            # Only files of torch 1.6 and later can be mapped; then tensors that aren't needed are never read.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises errors of many types for a file that is not its own
        way_out = "in the program that made it, save tensors alone: torch.save(model.state_dict(), FILE)"
        raise DamagedCheckpoint(f"can't be read as tensors alone ({_reason(error)}); {way_out}") from error
    state = _model_state(content)
    return {str(name): value.detach() for name, value in state.items() if isinstance(value, Tensor)}


def _model_state(content: Any) -> Mapping[Any, Any]:
    """The model's state in the content of a file: the whole, or what is under a usual key."""
    if not isinstance(content, Mapping):
        raise DamagedCheckpoint(f"holds a {type(content).__name__}, not a model's state (a dictionary of tensors)")
    if _has_tensors(content):
        return content
    for key in _MODEL_KEYS:
        if _has_tensors(content.get(key)):
            log.info("of what the file of weights holds, %r is read", key)
            return content[key]  # type: ignore[no-any-return]
    keys = ", ".join(repr(key) for key in list(content)[:_MOST_KEYS]) or "nothing"
    raise DamagedCheckpoint(f"holds {keys}, and no tensors under one of the keys {', '.join(_MODEL_KEYS)}")


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())


def _reason(error: Exception) -> str:
    # What torch refuses stands behind an explanation of its own options.
    refused = re.search(r"GLOBAL \S+|Unsupported \w+ \S+", str(error))
    reason = refused[0] if refused else first_line(error) or "no message"
    return f"{type(error).__name__}: {reason[:_LONGEST_REASON]}"
