"""Reading a run's folder, which may come from a stranger: nothing in it can run code.

``config.yaml`` is read by YAML's safe loader as plain data, in which nothing is looked up or computed, and is checked
like a command line. ``data.json`` and a checkpoint's JSON are data, tensors lie in safetensors. The model is built only
from distrain's own models and from what the user allows by name; nothing else is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from torch import Tensor, nn

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import named_state
from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint.format import DamagedCheckpoint
from distrain.config.load import load_config
from distrain.config.registry import check_allowed
from distrain.config.schema import Config
from distrain.data.base import DataSpec
from distrain.data.decode import LARGEST_PIXELS
from distrain.errors import ConfigError
from distrain.files.untrusted import UnreadableFile, read_json, read_text
from distrain.models.build import instantiate_model
from distrain.tasks import base as tasks

T = TypeVar("T")

#: What a run may build unless the user allows more.
TRUSTED = ("distrain.models",)
_NEWEST, _BEST = "newest", "best"
_LARGEST_CONFIG = 1 << 17
_LARGEST_DATA = 1 << 24
#: Levels of a configuration; a run writes about six.
_DEEPEST = 32
_OPENS = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
_CLOSES = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)
#: Numbers of an image, over all channels.
_LARGEST_IMAGE = 3 * LARGEST_PIXELS
#: A running run may remove a checkpoint while it is read; it does not do so again and again.
_ATTEMPTS = 3


@dataclass(frozen=True)
class Weights:
    """A checkpoint's model.

    Attributes:
        path: The checkpoint's folder.
        step: Updates done when it was saved.
        tensors: Parameters and buffers by the unsplit model's names, on the CPU.
    """

    path: Path
    step: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class RunFolder:
    """What a run's folder says, checked.

    Attributes:
        path: The folder.
        config: The run's configuration.
        spec: Shape and classes of the images it was trained on.
        mean: Channel means that images are normalised by, with pixel values in [0, 1].
        std: Channel standard deviations, likewise.
    """

    path: Path
    config: Config
    spec: DataSpec
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def open(cls, path: str, allow: Sequence[str] = ()) -> RunFolder:
        """Reads ``config.yaml`` and ``data.json``.

        Args:
            path: The folder.
            allow: Dotted prefixes below which choices outside distrain may lie (``task.name: my_package.MyTask``);
                their modules are imported, so they run code.

        Raises:
            ConfigError: No such folder, a file is missing, or it holds anything but what a run writes.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise ConfigError("run", path, "is not a folder")
        config = _read_config(folder / "config.yaml", allow)
        spec, mean, std = _read_data(folder / "data.json")
        return cls(folder, config, spec, mean, std)

    def weights(self, which: str) -> Weights:
        """Reads the model of a checkpoint, after comparing it with its manifest.

        Args:
            which: ``newest`` (damaged ones are left out), ``best`` by validation accuracy, or a checkpoint's folder.

        Raises:
            ConfigError: There is no such checkpoint, or it is damaged.
        """
        for _ in range(_ATTEMPTS):
            path = None
            try:
                path = self._find(which)
                progress = checkpoint_progress(path)
                return Weights(path, progress["step"], checkpoint_reader.load_model(path))
            except (DamagedCheckpoint, OSError) as error:
                if which not in (_NEWEST, _BEST) or (path is not None and path.is_dir()):
                    raise ConfigError("checkpoint", which, str(error)) from error
        raise ConfigError("checkpoint", which, f"is removed while it is read, {_ATTEMPTS} times in a row; copy the run")

    def _find(self, which: str) -> Path:
        folder = checkpoint_format.checkpoints_folder(self.path)
        if which not in (_NEWEST, _BEST):
            if not Path(which).expanduser().is_dir():
                there = [str(path) for path in checkpoint_format.list_checkpoints(folder)]
                raise ConfigError("checkpoint", which, "is not a checkpoint's folder", [_NEWEST, _BEST, *there])
            return Path(which).expanduser()
        newest = checkpoint_reader.newest_valid(folder)
        if newest is None:
            raise ConfigError("run", self.path, "has no complete checkpoint yet")
        if which == _NEWEST:
            return newest
        best = checkpoint_progress(newest)["best_step"]
        if best is None:
            raise ConfigError("checkpoint", _BEST, "the run has no validation accuracy to choose by", [_NEWEST])
        path = checkpoint_format.checkpoint_path(folder, best)
        if not path.is_dir():
            raise ConfigError("checkpoint", _BEST, f"{path} is gone", [_NEWEST])
        return path

    def model(self, weights: Weights, allow: Sequence[str] = ()) -> nn.Module:
        """Builds the model and gives it its weights.

        Args:
            weights: What :meth:`weights` read.
            allow: Dotted prefixes that the model's ``_target_`` may have, besides distrain's own models; the current
                folder is importable then, as it is in training.

        Returns:
            The model in evaluation mode on the CPU, in float32, without gradients.

        Raises:
            ConfigError: The target is not allowed or fails to build, or the weights are another model's.
        """
        model = instantiate_model(
            self.config.model,
            in_channels=self.spec.channels,
            num_classes=tasks.build(self.config, self.spec).output_size,
            image_size=(self.spec.height, self.spec.width),
            allowed=[*TRUSTED, *allow],
        )
        try:
            named_state.load_model(model, weights.tensors)
        except ValueError as error:
            raise ConfigError("checkpoint", weights.path, str(error)) from error
        return model.requires_grad_(False).eval()


def checkpoint_progress(path: Path) -> dict[str, Any]:
    """Where a run was when a checkpoint was saved; ``step`` is an integer, ``best_step`` one or ``None``.

    Raises:
        DamagedCheckpoint: ``state.json`` is missing or says something else.
    """
    file = path / "state.json"
    try:
        progress = read_json(file, checkpoint_format.MAX_JSON_BYTES)["progress"]
        found = {"step": progress["step"], "best_step": progress["best_step"]}
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{file} is missing") from None
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpoint(f"{file} can't be read") from error
    if not _whole(found["step"]) or not (found["best_step"] is None or _whole(found["best_step"])):
        raise DamagedCheckpoint(f"{file} has steps that are no whole numbers")
    return found


def _whole(value: object, at_least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _read(read: Callable[[Path, int], T], path: Path, largest: int) -> T:
    try:
        return read(path, largest)
    except FileNotFoundError:
        raise ConfigError("run", path.parent, f"has no {path.name}; is it a run's folder?") from None
    except UnreadableFile as error:
        raise ConfigError("run", path.parent, str(error)) from error


def _read_config(path: Path, allow: Sequence[str]) -> Config:
    text = _read(read_text, path, _LARGEST_CONFIG)
    try:
        _refuse_yaml_bombs(path, text)
        content = yaml.safe_load(text)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date, say
        raise ConfigError("run", path.parent, f"{path.name} is not plain YAML ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError("run", path.parent, f"{path.name} is not a mapping of keys to values")
    try:
        _refuse_all_but_data(path.name, content)
        _check_choices("", content, [*TRUSTED, *allow])
        return load_config(content)
    except ConfigError as error:
        raise ConfigError("run", path.parent, f"{path.name} says {error}") from error


def _refuse_yaml_bombs(path: Path, text: str) -> None:
    """A few lines of aliases of aliases fill any memory, and deep nesting takes the scanner time by its square."""
    depth = 0
    # Lazily, so that nothing behind the first one too many is scanned.
    for token in yaml.scan(text):
        depth += isinstance(token, _OPENS) - isinstance(token, _CLOSES)
        if isinstance(token, yaml.AliasToken):
            raise ConfigError("run", path.parent, f"{path.name} has YAML aliases, which no run writes")
        if depth > _DEEPEST:
            raise ConfigError("run", path.parent, f"{path.name} is nested more than {_DEEPEST} deep")


def _check_choices(key: str, section: Mapping[str, object], allowed: Sequence[str]) -> None:
    """Refuses choices that would be imported from elsewhere: the ``name`` of a section, at any depth, with dots."""
    for name, value in section.items():
        if isinstance(value, dict) and name != "kwargs":
            _check_choices(f"{key}{name}.", value, allowed)
        elif name == "name" and isinstance(value, str) and "." in value:
            check_allowed(f"{key}name", value, allowed)


def _refuse_all_but_data(key: str, value: object) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise ConfigError(key, name, "is no name of a key")
            _refuse_all_but_data(key, name)
            _refuse_all_but_data(f"{key}:{name}", item)
    elif isinstance(value, list):
        for item in value:
            _refuse_all_but_data(key, item)
    elif isinstance(value, str):
        if "${" in value:
            raise ConfigError(key, value, "would look up or compute something; a run writes resolved values only")
    elif value is not None and not isinstance(value, bool | int | float):
        raise ConfigError(key, value, f"is a {type(value).__name__}, and a run writes text, numbers and lists only")


def _read_data(path: Path) -> tuple[DataSpec, tuple[float, ...], tuple[float, ...]]:
    content = _read(read_json, path, _LARGEST_DATA)

    def refuse(problem: str) -> ConfigError:
        return ConfigError("run", path.parent, f"{path.name} {problem}")

    for name in ("channels", "height", "width"):
        if not _whole(content.get(name), at_least=1):
            raise refuse(f"needs {name}, a whole number of at least 1")
    if content["channels"] * content["height"] * content["width"] > _LARGEST_IMAGE:
        raise refuse(f"has images of more than {_LARGEST_IMAGE} numbers")
    classes = content.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise refuse("needs classes, a list of names")
    for name in ("mean", "std"):
        values = content.get(name)
        if not isinstance(values, list) or len(values) != content["channels"] or not all(map(_finite, values)):
            raise refuse(f"needs {name}, a list of {content['channels']} numbers")
    if not all(value > 0 for value in content["std"]):
        raise refuse("has a std that is not above 0")
    spec = DataSpec(content["channels"], content["height"], content["width"], tuple(classes))
    return spec, tuple(map(float, content["mean"])), tuple(map(float, content["std"]))


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
