"""Each command's YAML file has all keys of its schema, and wrong settings are refused in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from distrain.cli import hydra_entry
from distrain.cli.evaluate import EvaluateSettings
from distrain.cli.export import ExportSettings
from distrain.cli.predict import PredictSettings
from distrain.cli.serve import ServeSettings
from distrain.config.load import load_settings
from distrain.errors import ConfigError
from tests.runs import CONF

SCHEMAS = {
    "evaluate": EvaluateSettings,
    "export": ExportSettings,
    "predict": PredictSettings,
    "serve": ServeSettings,
}


@pytest.mark.parametrize("command", SCHEMAS)
def test_file_has_each_key_of_its_schema_and_keeps_hydra_from_making_a_folder(command: str) -> None:
    content = yaml.safe_load((CONF / f"{command}.yaml").read_text())
    keys = set(content) - {"defaults", "hydra"}
    assert keys == {field.name for field in dataclasses.fields(SCHEMAS[command])}
    train = yaml.safe_load((CONF / "config.yaml").read_text())["hydra"]
    for key in ("output_subdir", "run", "sweep", "job"):
        assert content["hydra"][key] == train[key]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("top=many", "top=many: must be a whole number"),
        ("+tpo=3", "tpo: no such key; choices: "),
        ("allow=mine", "allow=mine: must be a list"),
        ("device=tpu", "device=tpu: unknown choice; choices: auto, cpu, cuda, mps"),
        ("batch_size=0", "batch_size=0: must be at least 1"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(override: str, expected: str) -> None:
    composed = hydra_entry.compose(CONF, "predict", ["run=r", "input=i", override])
    with pytest.raises(ConfigError) as caught:
        load_settings(PredictSettings, composed)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_values_are_plain_python_objects(tmp_path: Path) -> None:
    composed = hydra_entry.compose(
        CONF, "predict", [f"run={tmp_path}", "input=[a.png,b c.png]", "top=3", "allow=[mine]"]
    )
    loaded: Any = load_settings(PredictSettings, composed)
    assert (type(loaded), loaded.run, loaded.top) == (PredictSettings, str(tmp_path), 3)
    assert (type(loaded.input), loaded.input, loaded.allow) == (list, ["a.png", "b c.png"], ["mine"])
