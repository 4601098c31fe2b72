"""What a Python program does with a run: evaluate, predict, export, load the model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from distrain.api.arrays import one_part
from distrain.api.run import Run, check_images
from distrain.api.surroundings import restored_surroundings
from distrain.checkpoint.format import AVERAGES
from distrain.cli import evaluate as evaluation
from distrain.cli import export as exporting
from distrain.cli import predict as prediction
from distrain.cli.run_folder import LAST, RunFolder
from distrain.cli.settings import require_one_process
from distrain.config.groups import DataConfig
from distrain.config.schema import DEVICES
from distrain.data.python_object import DataObject, PythonObjectDataConfig, offered_data
from distrain.errors import ConfigError, config_error
from distrain.models.python_object import ModelObject, offered_model
from distrain.runtime.garbage_collection import free_finished_trainings
from distrain.runtime.world import World
from distrain.tasks import base as tasks

_SPLITS = ("train", "val", "test")
_WEIGHTS = (LAST, *AVERAGES)


def evaluate(
    run: str | os.PathLike[str] | Run,
    data: Any = None,
    *,
    split: str = "test",
    model: ModelObject | None = None,
    checkpoint: str | os.PathLike[str] = "newest",
    weights: str = "last",
    batch_size: int | None = None,
    device: str = "auto",
    data_root: str | os.PathLike[str] | None = None,
    allow: Sequence[str] = (),
) -> dict[str, Any]:
    """Computes the metrics of a run's model, as the command ``evaluate``; under torchrun all ranks share the work.

    Args:
        run: The run's folder, or what :func:`distrain.fit` returned.
        data: Samples, as for :func:`distrain.fit`; by default those of the run, if it was trained on one of distrain's
            data sets.
        split: Which of the run's samples: ``train``, ``val`` or ``test``.
        model: The run's model, if that was an object: a module, or a class or function that makes one. Its own
            parameters are neither used nor changed.
        checkpoint: ``newest``, ``best`` by validation score, or the folder of a checkpoint.
        weights: ``last``, or an average of the model that the run keeps: ``ema`` or ``swa``.
        batch_size: Samples per step over all ranks; by default the run's ``data.eval_batch_size``.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        data_root: Folder that contains the run's data set on this machine.
        allow: Dotted prefixes of a model and of parts outside distrain that the run's configuration may name.

    Returns:
        ``loss``, ``count``, the metrics of the task (such as ``accuracy``), and its details.

    Raises:
        ConfigError: The run, the model or the samples can't be used.
        Failed: The evaluation failed; the reason was printed.
    """
    settings = evaluation.EvaluateSettings(
        run=os.fspath(_path(run)),
        checkpoint=os.fspath(checkpoint),
        weights=_choice("weights", weights, _WEIGHTS),
        split=_choice("split", split, _SPLITS),
        data_root=None if data_root is None else os.fspath(data_root),
        batch_size=_count("batch_size", batch_size),
        device=_choice("device", device, DEVICES),
        output="-",
        allow=list(allow),
    )
    folder, samples = _folder(run, allow), None
    if data is not None:
        folder, samples = _with_samples(folder, data)
    with restored_surroundings(), offered_model(_model(run, model)), offered_data(samples):
        result = evaluation.evaluate_run(folder, settings, World.from_environment())[0]
    free_finished_trainings()
    return result


def predict(
    run: str | os.PathLike[str] | Run,
    images: Any,
    *,
    top: int = 1,
    on_error: str = "stop",
    model: ModelObject | None = None,
    checkpoint: str | os.PathLike[str] = "newest",
    weights: str = "last",
    batch_size: int = 64,
    device: str = "auto",
    allow: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Predicts the class and its probability for each image, as the command ``predict``.

    Args:
        run: As for :func:`evaluate`.
        images: An array or tensor [N, C, H, W] of the type that the run was trained on; or an image file, a folder, or
            a list of these.
        top: Number of classes per image, the most probable first.
        on_error: If a file can't be decoded: ``stop``, ``skip`` it with a warning, or ``record`` the reason: its entry
            then has ``path`` and ``error``.
        model: As for :func:`evaluate`.
        checkpoint: As for :func:`evaluate`.
        weights: As for :func:`evaluate`.
        batch_size: Images per forward pass.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        allow: As for :func:`evaluate`.

    Returns:
        A dictionary for each image, in their order; for files with ``path``. By the task: ``class``, ``probability``,
        with ``top`` > 1 also ``top``; ``labels`` and ``probabilities``; ``numbers``; ``pixels`` of each class and
        ``mask``, a uint8 array [H, W] of class numbers.

    Raises:
        ConfigError: The run, the model or an image can't be used.
    """
    world = World.from_environment()
    require_one_process("predict", world)
    is_files = isinstance(images, str | os.PathLike) or (
        isinstance(images, list | tuple) and all(isinstance(item, str | os.PathLike) for item in images)
    )
    settings = prediction.PredictSettings(
        run=os.fspath(_path(run)),
        checkpoint=os.fspath(checkpoint),
        weights=_choice("weights", weights, _WEIGHTS),
        input=[os.fspath(item) for item in _listed(images)] if is_files else None,
        output=None,
        masks=None,
        top=_count("top", top) or 1,
        on_error=_choice("on_error", on_error, prediction.ON_ERROR),
        batch_size=_count("batch_size", batch_size) or 1,
        device=_choice("device", device, DEVICES),
        allow=list(allow),
    )
    folder = _folder(run, allow)
    task = tasks.build(folder.config, folder.spec)
    prediction.check_top(task, top)
    with restored_surroundings(), offered_model(_model(run, model)):
        if is_files:
            return prediction.predict_files(folder, task, settings, world)
        split = check_images(folder, images)
        rows = prediction.Predictor(folder, task, settings, world).predict_arrays(split)
        return [{name: value for name, value in row.items() if name != "path"} for row in rows]


def export(
    run: str | os.PathLike[str] | Run,
    output: str | os.PathLike[str],
    *,
    format: str = "safetensors",
    preprocess: str = "auto",
    opset: int = 18,
    check: int = 256,
    data: Any = None,
    model: ModelObject | None = None,
    checkpoint: str | os.PathLike[str] = "newest",
    weights: str = "last",
    data_root: str | os.PathLike[str] | None = None,
    license: str | None = None,
    allow: Sequence[str] = (),
) -> Path:
    """Writes the run's model so that it can be used without distrain, as the command ``export``.

    Args:
        run: As for :func:`evaluate`.
        output: The file to write; with ``format="folder"`` a folder that is new.
        format: ``safetensors``: the weights. ``onnx``, ``torch_export``: a program that needs neither distrain nor the
            model's code. ``folder``: weights, configuration and a model card.
        preprocess: Where a program's images are normalised and its outputs become probabilities: ``inside`` or
            ``outside`` of it; ``auto``: inside.
        opset: Version of ONNX's operators.
        check: Images on which a program must give what the run's model gives; 0: random images.
        data: Samples for ``check``, as for :func:`distrain.fit`; by default the run's test split.
        model: As for :func:`evaluate`; ``safetensors`` needs none.
        checkpoint: As for :func:`evaluate`.
        weights: As for :func:`evaluate`.
        data_root: As for :func:`evaluate`.
        license: Name of the licence for the model card, such as apache-2.0.
        allow: As for :func:`evaluate`.

    Returns:
        The file or folder.

    Raises:
        ConfigError: The run or the output can't be used, or a program would not give what the run's model gives.
    """
    require_one_process("export", World.from_environment())
    for name, value, smallest in (("opset", opset, exporting.OLDEST_OPSET), ("check", check, 0)):
        if value < smallest:
            raise ConfigError(name, value, f"must be at least {smallest}")
    settings = exporting.ExportSettings(
        run=os.fspath(_path(run)),
        checkpoint=os.fspath(checkpoint),
        weights=_choice("weights", weights, _WEIGHTS),
        format=_choice("format", format, exporting.FORMATS),
        output=os.fspath(output),
        preprocess=_choice("preprocess", preprocess, exporting.PREPROCESS_CHOICES),
        opset=opset,
        check=check,
        data_root=None if data_root is None else os.fspath(data_root),
        license=license,
        push=None,
        private=True,
        allow=list(allow),
    )
    folder, samples = _folder(run, allow), None
    if data is not None:
        folder, samples = _with_samples(folder, data)
    with restored_surroundings(), offered_model(_model(run, model)), offered_data(samples):
        return exporting.export_run(folder, settings).path


def load_model(
    run: str | os.PathLike[str] | Run,
    model: ModelObject | None = None,
    *,
    checkpoint: str | os.PathLike[str] = "newest",
    weights: str = "last",
    allow: Sequence[str] = (),
) -> nn.Module:
    """Builds the run's model with the weights of a checkpoint.

    Args:
        run: As for :func:`evaluate`.
        model: As for :func:`evaluate`.
        checkpoint: As for :func:`evaluate`.
        weights: As for :func:`evaluate`.
        allow: As for :func:`evaluate`.

    Returns:
        A new module on the CPU, in evaluation mode, with parameters that need no gradient. It takes images that
        ``read_run(run).normalise(…)`` has normalised.

    Raises:
        ConfigError: There is no such checkpoint, or the weights don't fit the model.
    """
    folder = _folder(run, allow)
    with restored_surroundings(), offered_model(_model(run, model)):
        kind = _choice("weights", weights, _WEIGHTS)
        return folder.model(folder.weights(os.fspath(checkpoint), kind), allow)


def _path(run: str | os.PathLike[str] | Run) -> Path:
    return run.run_dir if isinstance(run, Run) else Path(run).expanduser()


def _folder(run: str | os.PathLike[str] | Run, allow: Sequence[str]) -> RunFolder:
    return run._folder if isinstance(run, Run) else RunFolder.open(os.fspath(_path(run)), allow)


def _model(run: str | os.PathLike[str] | Run, model: ModelObject | None) -> ModelObject | None:
    """The model object: the given one, else the one that :func:`distrain.fit` was given."""
    if model is not None and not callable(model):
        raise config_error("model", f"is a {type(model).__name__}; pass an nn.Module, or what makes one")
    return run._object if model is None and isinstance(run, Run) else model


def _with_samples(folder: RunFolder, data: Any) -> tuple[RunFolder, DataObject]:
    """The run with other samples as its data."""
    old = folder.config.data
    samples = one_part(data, folder.spec.target, folder.spec.classes, old.memory_limit_mb)
    check_images(folder, samples.train.images)
    shared = {field.name: getattr(old, field.name) for field in dataclasses.fields(DataConfig)}
    changed = PythonObjectDataConfig(
        **{**shared, "name": "python_object", "limit": None, "fold": None, "balance": "none"},
        fingerprint=samples.fingerprint,
    )
    return dataclasses.replace(folder, config=dataclasses.replace(folder.config, data=changed)), samples


def _choice(name: str, value: object, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ConfigError(name, value, "unknown choice", choices)
    return str(value)


def _count(name: str, value: object) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(name, value, "must be a whole number of at least 1")
    return value


def _listed(images: Any) -> list[Any]:
    return list(images) if isinstance(images, list | tuple) else [images]
