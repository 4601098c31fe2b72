"""The model card of an exported folder: README.md with what a stranger must know before using the model."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import distrain
from distrain.config.load import to_container
from distrain.config.schema import Config
from distrain.data.base import DataSpec
from distrain.files.untrusted import UnreadableFile, read_json
from distrain.files.writing import to_yaml
from distrain.models.python_object import PythonObjectModelConfig
from distrain.models.timm import TimmConfig
from distrain.tools.exporting.described_model import DescribedModel
from distrain.verification import certificate

#: What the Hub calls the tasks that it has a page for.
_PIPELINES = {"classification": "image-classification", "segmentation": "image-segmentation"}
#: Sections of the configuration that say what was trained.
_SHOWN = ("model", "data", "task", "loss", "optimizer", "scheduler", "strategy", "compression", "trainer", "seed")
_MAX_SUMMARY_BYTES = 1 << 26
#: Classes that the card names.
_SHOWN_CLASSES = 100

#: What a card says of an average of the model.
_AVERAGES = {"ema": ", an exponential moving average of the model", "swa": ", the mean of models of the last epochs"}


def text(model: DescribedModel, licence: str | None) -> str:
    """The card.

    Args:
        model: What is known of the model.
        licence: Name of the licence; ``None``: none is named.
    """
    config = model.config
    summary = _read(model.run / "summary.json")
    metrics = _test_metrics(summary, model.step, model.kind)
    name = model.run.resolve().name
    parts = [
        f"---\n{to_yaml(_front_matter(name, config, metrics, licence))}---",
        f"# {_plain(name)}",
        f"`{_model_name(config)}` for {config.task.name} of images, exported by distrain {distrain.__version__}; the "
        f"weights after {model.step:,} updates{_AVERAGES.get(model.kind, '')}.",
        _usage(model),
        _data(config, model.spec),
        _metrics(metrics),
        _certificate(_read(model.run / certificate.FILE)),
        _configuration(config),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(name: str, config: Config, metrics: Mapping[str, float], licence: str | None) -> dict[str, Any]:
    task = _PIPELINES.get(config.task.name)
    results = [{"type": metric, "value": value, "name": f"test {metric}"} for metric, value in metrics.items()]
    entry = {
        "task": {"type": task or config.task.name},
        "dataset": {"type": config.data.name, "name": config.data.name, "split": "test"},
        "metrics": results,
    }
    return {
        **({"license": licence} if licence else {}),
        "library_name": "timm" if isinstance(config.model, TimmConfig) else "pytorch",
        **({"pipeline_tag": task} if task else {}),
        "tags": ["distrain", *([task] if task else [])],
        **({"model-index": [{"name": name, "results": [entry]}]} if results else {}),
    }


def _usage(model: DescribedModel) -> str:
    config, spec = model.config, model.spec
    if isinstance(config.model, TimmConfig):
        code = (
            "import timm\n\n"
            "# A folder: local-dir:FOLDER; on the Hub: hf-hub:USER/NAME\n"
            'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
        )
    elif isinstance(config.model, PythonObjectModelConfig):
        code = (
            "from safetensors.torch import load_file\n\n"
            f"# model: as it was made for the training, by {_plain(config.model._target_)}\n"
            'model.load_state_dict(load_file("model.safetensors"))'
        )
    else:
        module, _, target = config.model._target_.rpartition(".")
        given = ", ".join(f"{key}={value!r}" for key, value in model.arguments.items())
        code = (
            "from safetensors.torch import load_file\n\n"
            f"from {module} import {target}\n\n"
            f"model = {target}({given}).eval()\n"
            'model.load_state_dict(load_file("model.safetensors"))'
        )
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (model.mean, model.std))
    return (
        f"## Use\n\n```python\n{code}\n```\n\n"
        f"It takes images [N, {spec.channels}, {spec.height}, {spec.width}], scaled until they just cover "
        f"{spec.height}x{spec.width} pixels and cropped in the middle, as `(x - mean) / std` with x from 0 to 1, mean "
        f"= ({mean}), std = ({std}); for arrays of floating point x is the number itself. `config.json` has the full "
        "numbers and the names of the outputs."
    )


def _data(config: Config, spec: DataSpec) -> str:
    names = [f"`{_plain(name)}`" for name in spec.classes[:_SHOWN_CLASSES]]
    more = f" and {len(spec.classes) - _SHOWN_CLASSES} more" if len(spec.classes) > _SHOWN_CLASSES else ""
    shape = f"{spec.channels}x{spec.height}x{spec.width}"
    return f"## Data\n\n`data={config.data.name}`, {shape} images. Outputs in this order: {', '.join(names)}{more}."


def _test_metrics(summary: Mapping[str, Any], step: int, kind: str) -> dict[str, float]:
    """Metrics of the test split, if the run has measured them for these weights."""
    if step == summary.get("steps"):
        prefix = "test_"
    elif step == summary.get("best_step"):
        prefix = "best_test_"
    else:
        return {}
    if kind in _AVERAGES:
        prefix += f"{kind}_"
    found = {name.removeprefix(prefix): value for name, value in summary.items() if name.startswith(prefix)}
    others = ("count", "correct")
    averages = tuple(f"{average}_" for average in _AVERAGES)
    return {
        name: value
        for name, value in found.items()
        if _is_number(value) and name not in others and not name.startswith(averages)
    }


def _metrics(metrics: Mapping[str, float]) -> str:
    if not metrics:
        return "## Metrics\n\nThe run has not tested this checkpoint; `distrain evaluate` does."
    rows = [f"| {_plain(name)} | {value:.4f} |" for name, value in metrics.items()]
    return "\n".join(["## Metrics\n\n| test | |\n| --- | --- |", *rows])


def _certificate(content: Mapping[str, Any]) -> str:
    """What ``distrain verify`` has found, if its certificate lies in the run's folder."""
    if not isinstance(content.get("verdict"), str):
        return ""
    ranks, steps = content.get("ranks"), content.get("steps")
    return (
        f"## Certificate\n\n`distrain verify` compared {steps} steps of this configuration on {ranks} ranks with one "
        f"process: {_plain(content['verdict'])}."
    )


def _configuration(config: Config) -> str:
    """What was trained, without keys that name places on a machine."""
    content = {name: value for name, value in to_container(config).items() if name in _SHOWN}
    for name, section in content.items():
        if isinstance(section, dict):
            for spec in dataclasses.fields(getattr(config, name)):
                if spec.metadata.get("path"):
                    section.pop(spec.name, None)
    return f"## Configuration\n\n```yaml\n{to_yaml(content).replace('```', '~~~')}```"


def _model_name(config: Config) -> str:
    model = config.model
    return _plain(
        model.arch if isinstance(model, TimmConfig) else model._target_ if model.name == "custom" else model.name
    )


def _read(path: Path) -> dict[str, Any]:
    """A JSON file that a run may have; empty if it has none or it can't be read."""
    with contextlib.suppress(OSError, UnreadableFile):
        return read_json(path, _MAX_SUMMARY_BYTES)
    return {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: str) -> str:
    """Text on one line, without the characters that Markdown takes for its own."""
    return "".join(letter for letter in " ".join(value.split()) if letter not in "`|<>[]")
