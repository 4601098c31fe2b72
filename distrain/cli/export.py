"""Exports a run's model for use without distrain."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import distrain
from distrain.checkpoint import safetensors_writer
from distrain.checkpoint.module_state import is_extra_state
from distrain.checkpoint.saved_tensors import ConvertedTensors
from distrain.cli import output
from distrain.cli.evaluate import load_test_images, loaded_splits
from distrain.cli.export_int8 import Int8Maker, Int8Program
from distrain.cli.run_folder import LAST, TRUSTED_PREFIXES, RunFolder, Weights
from distrain.cli.run_model import decoded_spec
from distrain.cli.settings import RunSettings, require_one_process
from distrain.config.setting import setting
from distrain.errors import ConfigError, config_error_from_line
from distrain.files.terminal import show
from distrain.files.writing import to_json
from distrain.models.arguments import DataShape
from distrain.models.build import model_arguments
from distrain.models.tensors import convert
from distrain.runtime.world import World
from distrain.tasks import base as tasks
from distrain.tools.exporting import agreement, model_folder, program_files
from distrain.tools.exporting.described_model import DescribedModel
from distrain.tools.exporting.own_model import OwnModel
from distrain.tools.exporting.program import INSIDE, OUTSIDE, PREPROCESS, Program, random_images
from distrain.tools.exporting.program_files import Runner

FORMATS = ("safetensors", "torch_export", "onnx", "folder")
#: The oldest version of ONNX's operators that torch.onnx writes.
OLDEST_OPSET = 18
PREPROCESS_CHOICES = ("auto", *PREPROCESS)
#: Formats that hold what the model computes, and not only its weights.
_PROGRAMS = ("torch_export", "onnx")
#: Random images that a program is compared on with ``check=0``.
_RANDOM_IMAGES = 16
#: The file in a folder of ``format=folder quantize=int8``.
_INT8_FILE = "model_int8.onnx"


@dataclass
class ExportSettings(RunSettings):
    """Keys of ``distrain export``."""

    format: str = setting(
        "safetensors: the weights. onnx, torch_export: a program that needs neither distrain nor the model's code. "
        "folder: weights, configuration and a model card, for timm, huggingface_hub and the Hub.",
        choices=FORMATS,
    )
    output: str = setting("File to write. format=folder: a folder that is new.", path=True)
    preprocess: str = setting(
        "Where images are normalised, and outputs become probabilities. inside: in the program of format=onnx or "
        "torch_export. outside: by who uses it; OUTPUT.json says how. auto: inside if it is a program.",
        choices=PREPROCESS_CHOICES,
    )
    opset: int = setting(
        "format=onnx: version of ONNX's operators; runtimes read their own and older ones.", at_least=OLDEST_OPSET
    )
    check: int = setting(
        "format=onnx and torch_export: test images of the run's data for which the written file must give what the "
        "run's model gives; 0: random images instead, which need no data.",
        at_least=0,
    )
    quantize: str | None = setting(
        "int8: convolutions and linear layers of format=onnx compute with 8-bit numbers; format=folder gets such a "
        "file too. Score, size and speed are measured beside float32. null: all in float32.",
        choices=(None, "int8"),
        default=None,
    )
    calibration_images: int = setting(
        "quantize=int8: training images on which the ranges of numbers are measured.", at_least=1, default=256
    )
    max_drop: float = setting(
        "quantize=int8: how much worse the test score may be than in float32, as 0.01: an accuracy of one point less, "
        "or an error of one percent more. Beyond that no file is left.",
        at_least=0,
        default=0.01,
    )
    data_root: str | None = setting(
        "Folder that contains the run's data on this machine, for check and quantize; null: the run's data.root.",
        path=True,
    )
    license: str | None = setting("format=folder: licence of the weights for the model card, such as apache-2.0.")
    push: str | None = setting(
        "format=folder: USER/NAME on the Hugging Face Hub to upload the folder to; the token comes from HF_TOKEN."
    )
    private: bool = setting("A repository that push makes is private.")
    allow: list[str] = setting(
        "Dotted prefixes, besides distrain's, from which the run's model and choices may be imported; their code runs."
    )


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The file or folder.
        weights: The checkpoint it was made of.
        lines: What a user should know of it, a line each.
    """

    path: Path
    weights: Weights
    lines: tuple[str, ...] = ()


def run(settings: ExportSettings, world: World | None = None) -> Path:
    """Writes the model of a run as :func:`export_run` does, says so, and returns the path.

    Raises:
        ConfigError: The run or the output can't be used, or the file would not give what the run's model gives.
    """
    require_one_process("export", world or World.from_environment())
    exported = export_run(RunFolder.open(settings.run, settings.allow), settings)
    of = "" if exported.weights.kind == LAST else f" ({exported.weights.kind})"
    show(f"{exported.weights.path.name}{of} as {settings.format}: {exported.path}")
    for line in exported.lines:
        show(line)
    return exported.path


def export_run(folder: RunFolder, settings: ExportSettings) -> Exported:
    """Writes the unsplit model in the chosen format; numbers of floating point become float32.

    ``safetensors`` holds the ``state_dict``, and the model is not built. The file describes itself in its header. All
    values there are text; those marked JSON must be parsed:

    ==================== ===============================================================================
    ``format``           ``pt``, which other tools expect
    ``model``            name of the model in the configuration
    ``model_config``     JSON: the class and its arguments
    ``task``             name of the task, which says what the outputs are: logits of classes, numbers …
    ``classes``          JSON: names of the classes, labels or numbers in the order of the outputs
    ``input_shape``      JSON: channels, height, width of an image
    ``decoded_shape``    JSON: the same of an image file as it is decoded
    ``eval_crop``        JSON: share of each side of it that the model sees, in its centre
    ``mean``, ``std``    JSON: one value per channel; the input is ``(pixel / 255 - mean) / std``
    ``step``             number of updates
    ``weights``          ``last``, or the average of the model: ``ema`` or ``swa``
    ``extra_state``      JSON: what modules returned from ``get_extra_state()``, by name; only if there is any
    ``distrain_version`` release that wrote the file
    ==================== ===============================================================================

    ``onnx`` and ``torch_export`` hold a :class:`~distrain.tools.exporting.program.Program`, traced for batches of any
    size, and the same description besides ``format`` and ``extra_state``, with ``preprocess``, ``inputs`` and
    ``outputs``: in ONNX's ``metadata_props``, or in the archive's ``extra/distrain.json``. The file is read again as
    its users will, and compared with the run's model on test images.

    Raises:
        ConfigError: As :func:`run`.
    """
    target = Path(settings.output)
    _check(settings, target)
    weights = folder.weights(settings.checkpoint, settings.weights)
    if settings.format in _PROGRAMS:
        return _export_program(folder, settings, weights, target)
    tensors, metadata = ConvertedTensors(weights.tensors, _plain), _safetensors_metadata(folder, weights)
    if settings.format == "folder":
        described = _described_model(folder, weights, settings.allow)
        exporter = None if settings.quantize is None else _ProgramExporter(folder, settings, weights)
        lines: list[str] = []

        def make_folder(path: Path) -> None:
            model_folder.write(path, described, tensors, metadata, settings.license)
            if exporter is not None:
                _, int8 = exporter.write_int8(path / _INT8_FILE)
                model_folder.add_to_card(path, int8.section(_INT8_FILE))
                lines.extend(int8.lines())

        output.write(target, make_folder)
        if settings.push is not None:
            lines.append(f"uploaded: {model_folder.push(target, settings.push, private=settings.private)}")
        return Exported(target, weights, tuple(lines))

    output.write(target, lambda path: safetensors_writer.write_alone(path, tensors, metadata))
    if settings.preprocess == OUTSIDE:
        _write_description(target, _description(folder, weights))
    return Exported(target, weights)


def _check(settings: ExportSettings, target: Path) -> None:
    """Refuses keys that don't go together, and an output that can't be written."""
    if settings.format == "folder":
        output.check_new_folder(target)
    else:
        output.check_writable(target)
        for key in ("license", "push"):
            if getattr(settings, key) is not None:
                raise ConfigError(key, getattr(settings, key), "is for format=folder")
    if settings.preprocess == INSIDE and settings.format not in _PROGRAMS:
        problem = f"format={settings.format} holds weights, and no program that could normalise images"
        raise ConfigError("preprocess", INSIDE, problem, ["auto", OUTSIDE])
    if settings.quantize is not None and settings.format not in ("onnx", "folder"):
        problem = "is for format=onnx, and for format=folder, which then holds such a file"
        raise ConfigError("quantize", settings.quantize, problem)
    if settings.push is not None:
        model_folder.check_push(settings.push)


# --- programs --------------------------------------------------------------------------------------------------------


def _export_program(folder: RunFolder, settings: ExportSettings, weights: Weights, target: Path) -> Exported:
    exporter = _ProgramExporter(folder, settings, weights)
    lines: list[str] = []
    output.write(target, lambda path: lines.extend(exporter.write(path)))
    if exporter.program.preprocess == OUTSIDE:
        _write_description(target, exporter.description)
    return Exported(target, weights, tuple(lines))


class _ProgramExporter:
    """Writes the model of a run as a program, and compares the file with the run's model.

    Args:
        folder: The run.
        settings: The command's keys.
        weights: Those of the model.

    Raises:
        ConfigError: The model can't be built, or the test images can't be read.
    """

    def __init__(self, folder: RunFolder, settings: ExportSettings, weights: Weights) -> None:
        self._folder, self._settings = folder, settings
        self._task = tasks.build(folder.config, folder.spec)
        self.program = Program(
            convert(folder.model(weights, settings.allow), torch.float32),
            self._task,
            folder.spec,
            folder.mean,
            folder.std,
            INSIDE if settings.preprocess == "auto" else settings.preprocess,
        )
        self.program.eval().requires_grad_(False)
        self.description = {**_description(folder, weights), **self.program.describe()}
        if settings.check:
            try:
                self._images = load_test_images(folder, settings.data_root, settings.check, settings.allow)
            except ConfigError as error:
                raise config_error_from_line(f"{error}; check=0 compares on random images instead") from error
        else:
            self._images = random_images(folder.spec, _RANDOM_IMAGES)

    def write(self, path: Path) -> list[str]:
        """Writes the file in the format and numbers that the keys name; returns what a user should know of it."""
        if self._settings.format == "torch_export":
            runner = program_files.write_torch_export(self.program, self.description, path)
            return self._compared("torch_export", runner)
        if self._settings.quantize is None:
            return self._write_onnx(path)
        lines, int8 = self.write_int8(path)
        return [*lines, *int8.lines()]

    def write_int8(self, path: Path) -> tuple[list[str], Int8Program]:
        """Writes an ONNX file in int8, made of one in float32, of which the lines are."""
        settings = self._settings
        with tempfile.TemporaryDirectory(prefix=".distrain-", dir=path.parent) as folder:
            plain = Path(folder, "fp32.onnx")
            lines = self._write_onnx(plain)
            with loaded_splits(self._folder, settings.data_root, settings.allow) as splits:
                maker = Int8Maker(self._folder, self.program, self._task, splits)
                maker.write(plain, settings.calibration_images, self.description, path)
                return lines, maker.compare(plain, path, settings.max_drop)

    def _write_onnx(self, path: Path) -> list[str]:
        runner = program_files.write_onnx(self.program, self.description, self._settings.opset, path)
        return self._compared("onnx", runner)

    def _compared(self, name: str, runner: Runner) -> list[str]:
        """Compares a file with the run's model, and says in a line or two what that found.

        Raises:
            ConfigError: They differ.
        """
        folder, program, task, images = self._folder, self.program, self._task, self._images

        def own_model(precision: str) -> OwnModel:
            return OwnModel(program.model, task, folder.mean, folder.std, precision)

        exact = own_model("fp32")

        def with_meaning(results: dict[str, Tensor]) -> dict[str, Tensor]:
            outputs = results.get(task.output_name)
            return results if outputs is None else {**task.named_results(outputs), **results}

        def run_file(stored: Tensor) -> dict[str, Tensor]:
            given = exact.normalised(stored) if program.preprocess == OUTSIDE else stored.to(program.input_dtype)
            return with_meaning(runner(given))

        found = agreement.compare(
            name, images, lambda stored: with_meaning(program.results(exact.outputs(stored))), run_file
        )
        kind = "test" if self._settings.check else "random"
        of = "float32: " if self._settings.quantize else ""
        lines = [f"{of}read again and compared with the run's model on {found.images:,} {kind} images: {found}"]
        precision = folder.config.trainer.precision
        if precision != "fp32":
            own, decided = own_model(precision).decisions(images), exact.decisions(images)
            line = f"the file computes in fp32, and the run in {precision}"
            if own is not None and decided is not None:
                line += f": both decide the same for {int((own == decided).sum()):,} of {own.numel():,}"
            lines.append(line)
        return lines


# --- descriptions ----------------------------------------------------------------------------------------------------


def _plain(name: str, tensor: Tensor) -> Tensor:
    if is_extra_state(name):  # its type is the module's own business
        return tensor.contiguous()
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype).contiguous()


def _description(folder: RunFolder, weights: Weights) -> dict[str, Any]:
    spec, decoded = folder.spec, decoded_spec(folder)
    model = dataclasses.asdict(folder.config.model)
    # It says how the model was trained, not what it computes.
    del model["checkpoint_activations"]
    return {
        "model": folder.config.model.name,
        "model_config": model,
        "task": folder.config.task.name,
        "classes": list(spec.classes),
        "input_shape": [spec.channels, spec.height, spec.width],
        "decoded_shape": [decoded.channels, decoded.height, decoded.width],
        "eval_crop": folder.config.data.eval_crop,
        "mean": list(folder.mean),
        "std": list(folder.std),
        "step": weights.step,
        "weights": weights.kind,
        "distrain_version": distrain.__version__,
    }


def _described_model(folder: RunFolder, weights: Weights, allow: Sequence[str]) -> DescribedModel:
    spec = folder.spec
    shape = DataShape(spec.channels, len(spec.classes), (spec.height, spec.width))
    arguments = model_arguments(folder.config.model, shape, [*TRUSTED_PREFIXES, *allow])
    return DescribedModel(
        folder.path, folder.config, arguments, spec, folder.mean, folder.std, weights.step, weights.kind
    )


def _safetensors_metadata(folder: RunFolder, weights: Weights) -> dict[str, str]:
    extra_state = (weights.plain or {}).get("extra_state", {})
    extra = {name: json.loads(text) for name, text in extra_state.items()}
    described = program_files.as_text(_description(folder, weights))
    return {**({"extra_state": json.dumps(extra)} if extra else {}), "format": "pt", **described}


def _write_description(target: Path, description: dict[str, Any]) -> None:
    """Writes ``OUTPUT.json`` beside a file."""
    output.write_text(target.with_name(f"{target.name}.json"), to_json(description))
