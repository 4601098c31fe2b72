"""A run's folder as an object: its configuration, its metrics as a table, its summary, and its model."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distrain.api.arrays import inputs
from distrain.cli.run_folder import RunFolder
from distrain.config.load import to_container
from distrain.data.base import Images
from distrain.data.loader import Loader
from distrain.errors import ConfigError, config_error
from distrain.files.untrusted import UnreadableFile, open_regular, read_json
from distrain.models.python_object import ModelObject, offered_model

_MAX_SUMMARY_BYTES = 1 << 26
#: Longest line of metrics.jsonl, in bytes.
_MAX_LINE_BYTES = 1 << 24


@dataclass
class Run:
    """A run that has been trained, or is still in progress.

    Attributes:
        run_dir: The run's folder. On a rank of a host that doesn't see it: a temporary copy of what a run holds.
        config: The resolved configuration as nested dictionaries; ``config["optimizer"]["lr"]``.
        metrics: What was logged, a dictionary for each row, as in ``metrics.jsonl``; ``pandas.DataFrame(run.metrics)``
            makes a table of it.
        summary: What the run came to, as in ``summary.json``; empty while the run has not ended.
    """

    run_dir: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]
    _folder: RunFolder
    _object: ModelObject | None = None
    _copy: tempfile.TemporaryDirectory[str] | None = None
    _model: nn.Module | None = field(default=None, init=False)

    def __repr__(self) -> str:
        names = [name for name in self.summary if name.startswith(("test_", "val_"))]
        scores = "".join(f", {name} {self.summary[name]:.4f}" for name in names if _is_number(self.summary[name]))
        return f"<distrain run {os.path.relpath(self.run_dir)}{scores or ', not ended'}>"

    @property
    def model(self) -> nn.Module:
        """The trained model.

        After ``fit(model, …)`` with a module it is that module. Otherwise it is built once from the newest checkpoint,
        in evaluation mode.

        Raises:
            ConfigError: There is no checkpoint, or the run's model was an object and is not known here.
        """
        if isinstance(self._object, nn.Module):
            return self._object
        if self._model is None:
            with offered_model(self._object):
                self._model = self._folder.model(self._folder.weights("newest"))
        return self._model

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, such as ``val_accuracy``, which rows call ``epoch/val_accuracy``.

        Raises:
            ConfigError: Nothing of that name was logged.
        """
        for key in (name, f"epoch/{name}"):
            rows = [row for row in self.metrics if _is_number(row.get(key))]
            if rows:
                return [row["step"] for row in rows], [row[key] for row in rows]
        names = {key for row in self.metrics for key in row if _is_number(row[key])} - {"step"}
        raise config_error(name, "no such metric was logged", sorted(names))

    def normalise(self, images: Any) -> Tensor:
        """Images as the model takes them, normalised as in training.

        Args:
            images: Array or tensor [N, C, H, W] of the type that the run was trained on: uint8 or floating point.

        Returns:
            float32 [N, C, H, W] on the CPU.

        Raises:
            ConfigError: The images have another shape or type than those of the training.
        """
        split = check_images(self._folder, images)
        loader = Loader(
            split,
            batch_size=max(1, len(split)),
            shard=(0, 1),
            mean=self._folder.mean,
            std=self._folder.std,
            device=torch.device("cpu"),
            dtype=torch.float32,
            memory_format=torch.contiguous_format,
            shown=self._folder.config.data.eval_crop,
        )
        return torch.cat([batch.inputs for batch in loader.epoch(0)])


def check_images(folder: RunFolder, images: Any) -> Images:
    """Images for a run's model, as a split with labels 0.

    Raises:
        ConfigError: They have another shape or type than those of the training.
    """
    tensor, spec = inputs("images", images), folder.spec
    expected = [spec.channels, spec.height, spec.width]
    if list(tensor.shape[1:]) != expected:
        raise config_error("images", f"are {list(tensor.shape[1:])}; the run was trained on {expected}")
    dtype = "float" if tensor.is_floating_point() else "uint8"
    if dtype != spec.dtype:
        problem = f"are {dtype} numbers; the run was trained on {spec.dtype} numbers, with which the model expects"
        raise config_error("images", f"{problem} another scale")
    return Images(tensor, tensor.new_zeros(len(tensor), dtype=torch.int64))


def read_run(run: str | os.PathLike[str] | Run, *, allow: Sequence[str] = ()) -> Run:
    """Reads the folder of a run, finished or in progress. Nothing in it can run code.

    Args:
        run: The folder.
        allow: Dotted prefixes of parts outside distrain that the configuration may name; their modules are imported.

    Raises:
        ConfigError: It is not a run's folder, or a file in it has a content that no run writes.
    """
    if isinstance(run, Run):
        return run
    return open_run(RunFolder.open(os.fspath(run), allow))


def open_run(
    folder: RunFolder, model: ModelObject | None = None, copy: tempfile.TemporaryDirectory[str] | None = None
) -> Run:
    """The object for a folder that has been checked already.

    Args:
        folder: The run's folder.
        model: The run's model, if that was an object.
        copy: Keeps the folder, if that is a copy which is removed at the end.
    """
    path = folder.path.resolve()
    try:
        summary = read_json(path / "summary.json", _MAX_SUMMARY_BYTES)
    except FileNotFoundError:
        summary = {}
    except UnreadableFile as error:
        raise ConfigError("run", path, str(error)) from error
    return Run(path, to_container(folder.config), _read_metrics(path), summary, folder, model, copy)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``; a last line that is still being written is left out."""
    rows: list[dict[str, Any]] = []
    try:
        with open_regular(path / "metrics.jsonl") as file:
            while line := file.readline(_MAX_LINE_BYTES):
                row = json.loads(line) if line.endswith(b"\n") else None
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError("run", path, f"metrics.jsonl can't be read ({error})") from error
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
