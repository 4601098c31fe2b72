"""Exports a run's model for use without distrain."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

import distrain
from distrain.checkpoint.module_state import is_extra_state
from distrain.cli import output
from distrain.cli.run_folder import LAST, RunFolder, Weights
from distrain.cli.settings import RunSettings, require_one_process
from distrain.config.setting import setting
from distrain.errors import ConfigError
from distrain.files.terminal import show
from distrain.runtime.world import World


@dataclass
class ExportSettings(RunSettings):
    """Keys of ``distrain export``."""

    format: str = setting("File format.", choices=("safetensors",))
    output: str = setting("File to write.", path=True)
    allow: list[str] = setting(
        "Dotted prefixes, besides distrain's, from which the run's choices may be imported; their code runs."
    )


def run(settings: ExportSettings, world: World | None = None) -> Path:
    """Writes the model of a run as :func:`export_run` does, says so, and returns the file's path.

    Raises:
        ConfigError: The run or the output can't be used.
    """
    require_one_process("export", world or World.from_environment())
    target, weights = export_run(RunFolder.open(settings.run, settings.allow), settings)
    of = "" if settings.weights == LAST else f" ({settings.weights})"
    show(f"{weights.path.name}{of} as {settings.format}: {target}")
    return target


def export_run(folder: RunFolder, settings: ExportSettings) -> tuple[Path, Weights]:
    """Writes the unsplit model's ``state_dict`` to a file; the model is not built.

    Parameters and buffers of floating point are converted to float32, and all tensors are contiguous. The metadata in
    the file's header describe the model. All values are text; those marked JSON must be parsed:

    ==================== ===============================================================================
    ``format``           ``pt``, which other tools expect
    ``model``            name of the model in the configuration
    ``model_config``     JSON: the class and its arguments
    ``task``             name of the task, which says what the outputs are: logits of classes, numbers …
    ``classes``          JSON: names of the classes, labels or numbers in the order of the outputs
    ``input_shape``      JSON: channels, height, width of an image
    ``mean``, ``std``    JSON: one value per channel; the input is ``(pixel / 255 - mean) / std``
    ``step``             number of updates
    ``weights``          ``last``, or the average of the model: ``ema`` or ``swa``
    ``extra_state``      JSON: what modules returned from ``get_extra_state()``, by name; only if there is any
    ``distrain_version`` release that wrote the file
    ==================== ===============================================================================

    Returns:
        The file, and what was written.

    Raises:
        ConfigError: The run or the output can't be used.
    """
    target = Path(settings.output)
    output.check_writable(target)
    weights = folder.weights(settings.checkpoint, settings.weights)
    tensors = {name: _plain(name, tensor) for name, tensor in weights.tensors.items()}

    def make(path: Path) -> None:
        try:
            save_file(tensors, path, {**_metadata(folder, weights), "weights": settings.weights})
        except safetensors.SafetensorError as error:
            raise ConfigError("output", target, f"can't be written ({error})") from error

    output.write(target, make)
    return target, weights


def _plain(name: str, tensor: Tensor) -> Tensor:
    if is_extra_state(name):  # its type is the module's own business
        return tensor.contiguous()
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype).contiguous()


def _metadata(folder: RunFolder, weights: Weights) -> dict[str, str]:
    spec = folder.spec
    extra_state = (weights.plain or {}).get("extra_state", {})
    extra = {name: json.loads(text) for name, text in extra_state.items()}
    return {
        **({"extra_state": json.dumps(extra)} if extra else {}),
        "format": "pt",
        "model": folder.config.model.name,
        "model_config": json.dumps(dataclasses.asdict(folder.config.model)),
        "task": folder.config.task.name,
        "classes": json.dumps(spec.classes),
        "input_shape": json.dumps([spec.channels, spec.height, spec.width]),
        "mean": json.dumps(folder.mean),
        "std": json.dumps(folder.std),
        "step": str(weights.step),
        "distrain_version": distrain.__version__,
    }
