"""Reads the folder of a run. It may come from an untrusted source, so nothing in it can run code.

``config.yaml`` is read by YAML's safe loader as plain data, without interpolations, and checked like a command line.
``data.json`` and the JSON of a checkpoint are plain data, and tensors are in safetensors. Only distrain's own models
and choices, and those that the user allows by name, are imported and built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import module_state
from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint.format import DamagedCheckpoint
from distrain.checkpoint.state_schema import read_state
from distrain.config.effects import ARGUMENTS
from distrain.config.load import load_config
from distrain.config.registry import check_allowed
from distrain.config.schema import Config
from distrain.data import manifest
from distrain.data.base import TARGETS, DataSpec
from distrain.data.decode import LARGEST_PIXELS
from distrain.errors import ConfigError
from distrain.files.untrusted import UnreadableFile, read_json, read_yaml
from distrain.models import lora, pruning
from distrain.models.build import instantiate_model
from distrain.optim import custom_loss
from distrain.optim.losses import CustomLossConfig
from distrain.tasks import base as tasks
from distrain.tasks import chosen_metrics

T = TypeVar("T")

#: Dotted prefixes that a run's configuration may name unless the user allows more.
TRUSTED_PREFIXES = ("distrain.models",)
_NEWEST, _BEST = "newest", "best"
#: The weights of a checkpoint's step, not an average.
LAST = "last"
#: Largest accepted files, in bytes.
_MAX_CONFIG_BYTES = 1 << 17
#: Largest number of values in an image, over all channels.
_MAX_IMAGE_VALUES = 3 * LARGEST_PIXELS
#: Attempts to read a checkpoint; a run in progress may remove one while it is read.
_ATTEMPTS = 3


@dataclass(frozen=True)
class Weights:
    """The weights in a checkpoint.

    Attributes:
        path: Folder of the checkpoint.
        step: Number of updates when it was saved.
        tensors: Parameters and buffers by name in the unsplit model, on the CPU; they may be read when they are used.
        plain: The rest of the model's state, for :func:`distrain.checkpoint.module_state.load`.
        kind: ``last``, or the average of the model: ``ema`` or ``swa``.
    """

    path: Path
    step: int
    tensors: Mapping[str, Tensor]
    plain: dict[str, Any] | None
    kind: str = LAST


@dataclass(frozen=True)
class RunFolder:
    """The checked description of a run.

    Attributes:
        path: The folder.
        config: The run's configuration.
        spec: Shape and classes of the training images.
        mean: Channel means with which images are normalised, for pixel values in [0, 1].
        std: Channel standard deviations with which images are normalised, for pixel values in [0, 1].
        class_weights: Factor of the loss of each class; ``None`` if ``data.balance`` didn't set them.
    """

    path: Path
    config: Config
    spec: DataSpec
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_weights: tuple[float, ...] | None

    @classmethod
    def open(cls, path: str, allow: Sequence[str] = ()) -> RunFolder:
        """Reads ``config.yaml`` and ``data.json``.

        Args:
            path: The folder.
            allow: Dotted prefixes of allowed choices outside distrain (such as ``task.name: my_package.MyTask``). Their
                modules are imported, so their code runs.

        Raises:
            ConfigError: There is no such folder, a file is missing, or a file has content that no run writes.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ConfigError("run", path, "is not a folder")
        config = _read_config(folder / "config.yaml", allow)
        return cls(folder, config, *_read_data(folder / manifest.FILE))

    def weights(self, which: str, kind: str = LAST) -> Weights:
        """Reads the weights of a checkpoint after verifying it against its manifest.

        Args:
            which: ``newest`` (damaged ones are skipped), ``best`` by validation score, or the folder of a checkpoint.
            kind: ``last``, or the average that is taken instead: ``ema`` or ``swa``.

        Raises:
            ConfigError: There is no such checkpoint, it is damaged, or it has no such average.
        """
        for _ in range(_ATTEMPTS):
            path = None
            try:
                path = self.find_checkpoint(which)
                state = read_state(path)
                kept = state["scalars"].get("averages", {})
                if kind != LAST and kind not in kept:
                    raise ConfigError("weights", kind, f"{path} holds no such average", [LAST, *kept])
                tensors = checkpoint_reader.load_model(path, None if kind == LAST else kind)
                merged = lora.merged(self.config.lora, pruning.merged(tensors))
                return Weights(path, state["progress"]["step"], merged, state["scalars"].get("module"), kind)
            except (DamagedCheckpoint, OSError) as error:
                if which not in (_NEWEST, _BEST) or (path is not None and path.is_dir()):
                    raise ConfigError("checkpoint", which, str(error)) from error
        raise ConfigError(
            "checkpoint", which, f"was removed while it was read, {_ATTEMPTS} times in a row; make a copy of the run"
        )

    def find_checkpoint(self, which: str) -> Path:
        """The folder of a checkpoint, for a name as in :meth:`weights`.

        Raises:
            ConfigError: There is no such checkpoint.
        """
        folder = checkpoint_format.checkpoints_folder(self.path)
        if which not in (_NEWEST, _BEST):
            if not Path(which).is_dir():
                paths = [str(path) for path in checkpoint_format.list_checkpoints(folder)]
                raise ConfigError("checkpoint", which, "is not a checkpoint's folder", [_NEWEST, _BEST, *paths])
            return Path(which)
        newest = checkpoint_reader.newest_valid(folder)
        if newest is None:
            raise ConfigError("run", self.path, "has no complete checkpoint yet")
        if which == _NEWEST:
            return newest
        best = read_state(newest)["progress"]["best_step"]
        if best is None:
            raise ConfigError("checkpoint", _BEST, "the run has no validation score to choose by", [_NEWEST])
        path = checkpoint_format.checkpoint_path(folder, best)
        if not path.is_dir():
            raise ConfigError("checkpoint", _BEST, f"{path} was removed", [_NEWEST])
        return path

    def model(self, weights: Weights, allow: Sequence[str] = ()) -> nn.Module:
        """Builds the model and loads weights into it.

        Args:
            weights: Result of :meth:`weights`.
            allow: Dotted prefixes of allowed model classes (``_target_``), in addition to distrain's own models. As in
                training, the current folder is importable.

        Returns:
            The model in evaluation mode on the CPU, in float32, with frozen parameters.

        Raises:
            ConfigError: The model class is not allowed or can't be built, or the weights do not fit it.
        """
        model = instantiate_model(
            self.config.model,
            in_channels=self.spec.channels,
            num_classes=tasks.build(self.config, self.spec).output_size,
            image_size=(self.spec.height, self.spec.width),
            allowed=[*TRUSTED_PREFIXES, *allow],
        )
        try:
            module_state.load(model, weights.tensors, weights.plain)
        except ValueError as error:
            raise ConfigError("checkpoint", weights.path, str(error)) from error
        return model.requires_grad_(False).eval()


def _is_whole(value: object, at_least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _read(read: Callable[[Path, int], T], path: Path, largest: int) -> T:
    try:
        return read(path, largest)
    except FileNotFoundError:
        raise ConfigError("run", path.parent, f"has no {path.name}; is it a run's folder?") from None
    except UnreadableFile as error:
        raise ConfigError("run", path.parent, str(error)) from error


def _read_config(path: Path, allow: Sequence[str]) -> Config:
    content = _read(read_yaml, path, _MAX_CONFIG_BYTES)
    try:
        _refuse_all_but_data(path.name, content)
        _check_choices("", content, [*TRUSTED_PREFIXES, *allow])
        config = load_config(content)
        if isinstance(config.loss, CustomLossConfig):
            custom_loss.check_allowed(config.loss._target_, [*TRUSTED_PREFIXES, *allow])
        for metric in config.metrics:
            chosen_metrics.check_allowed(metric, [*TRUSTED_PREFIXES, *allow])
        return config
    except ConfigError as error:
        raise ConfigError("run", path.parent, f"{path.name} says {error}") from error


def _check_choices(key: str, section: Mapping[str, object], allowed: Sequence[str]) -> None:
    """Refuses choices outside distrain that are not allowed: any ``name`` with dots, at any depth.

    Arguments, such as those of a model, are no choices.
    """
    for name, value in section.items():
        if isinstance(value, dict) and f"{key}{name}" not in ARGUMENTS:
            _check_choices(f"{key}{name}.", value, allowed)
        elif name == "name" and isinstance(value, str) and "." in value:
            check_allowed(f"{key}name", value, allowed)


def _refuse_all_but_data(key: str, value: object) -> None:
    """Refuses interpolations and values other than text, numbers, truth values, null, lists and mappings."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise ConfigError(key, name, "is not a valid key")
            _refuse_all_but_data(key, name)
            _refuse_all_but_data(f"{key}:{name}", item)
    elif isinstance(value, list):
        for item in value:
            _refuse_all_but_data(key, item)
    elif isinstance(value, str):
        if "${" in value:
            raise ConfigError(key, value, "is an interpolation; a run writes resolved values only")
    elif value is not None and not isinstance(value, bool | int | float):
        raise ConfigError(key, value, f"is a {type(value).__name__}, and a run writes text, numbers and lists only")


def _read_data(path: Path) -> tuple[DataSpec, tuple[float, ...], tuple[float, ...], tuple[float, ...] | None]:
    """The entries of a run's data after its configuration, as in :class:`RunFolder`."""
    content = _read(read_json, path, manifest.MAX_BYTES)

    def refuse(problem: str) -> ConfigError:
        return ConfigError("run", path.parent, f"{path.name} {problem}")

    for name in ("channels", "height", "width"):
        if not _is_whole(content.get(name), at_least=1):
            raise refuse(f"needs {name}, a whole number of at least 1")
    if content["channels"] * content["height"] * content["width"] > _MAX_IMAGE_VALUES:
        raise refuse(f"has images of more than {_MAX_IMAGE_VALUES} numbers")
    classes = content.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise refuse("needs classes, a list of names")
    for name in ("mean", "std"):
        values = content.get(name)
        if not isinstance(values, list) or len(values) != content["channels"] or not all(map(_is_finite, values)):
            raise refuse(f"needs {name}, a list of {content['channels']} numbers")
    if not all(value > 0 for value in content["std"]):
        raise refuse("has a std that is not above 0")
    # Releases without arrays of floating point wrote no type.
    dtype = content.get("dtype", "uint8")
    if dtype not in ("uint8", "float"):
        raise refuse("needs dtype, which is uint8 or float")
    # Releases that knew one kind of targets alone did not write it.
    target = content.get("target", "class")
    if target not in TARGETS:
        raise refuse(f"needs target, which is one of {', '.join(TARGETS)}")
    spec = DataSpec(content["channels"], content["height"], content["width"], tuple(classes), dtype, target)
    weights = content.get("class_weights")
    if weights is not None and not _are_weights(weights, len(classes)):
        raise refuse(f"needs class_weights, a list of {len(classes)} numbers of at least 0")
    mean, std = tuple(map(float, content["mean"])), tuple(map(float, content["std"]))
    return spec, mean, std, None if weights is None else tuple(map(float, weights))


def _are_weights(values: object, count: int) -> bool:
    return (
        isinstance(values, list) and len(values) == count and all(_is_finite(value) and value >= 0 for value in values)
    )


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
