"""The YAML files below conf: every choice has one, with exactly the keys of its schema."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from distrain.cli import hydra_entry
from distrain.config import schema as config
from distrain.config.load import fingerprint, load_config, to_container
from distrain.config.registry import choices
from tests.runs import CONF, compose

GROUPS = ("task", "strategy", "compression", "model", "data", "loss", "optimizer", "scheduler", "logger")
FILES = sorted(path for group in GROUPS for path in (CONF / group).glob("*.yaml"))
#: Keys without a default, which the user must set.
NEEDED = {
    "model=custom": ["model._target_=distrain.models.cnn.SimpleCNN"],
    "model=timm": ["model.arch=resnet18"],
    "loss=custom": ["loss._target_=torch.nn.CrossEntropyLoss"],
    "optimizer=custom": ["optimizer._target_=torch.optim.RAdam"],
    "scheduler=custom": ["scheduler._target_=torch.optim.lr_scheduler.StepLR", "scheduler.kwargs={step_size: 2}"],
    "data=image_folder": ["data.root=images"],
    "data=numpy": ["data.root=arrays.npz"],
    "data=webdataset": ["data.root=shards"],
    "data=table": ["data.root=images.csv"],
    "data=hf": ["data.path=user/name"],
    "logger=custom": ["logger._target_=distrain.reporting.loggers.base.InMemoryLogger"],
    "data=custom": ["data._target_=my_package.Scans"],
}


def name(path: Path) -> str:
    return f"{path.parent.name}={path.stem}"


def read(path: Path) -> Any:
    content = yaml.safe_load(path.read_text())
    # Hydra's list of other files is not a key of the choice.
    content.pop("defaults", None)
    return content


def keys_of(schema: type[Any]) -> dict[str, Any]:
    """Nested names of a dataclass's fields."""
    kinds = typing.get_type_hints(schema)
    return {name: keys_of(kind) if hasattr(kind, "__dataclass_fields__") else None for name, kind in kinds.items()}


def keys_in(content: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Nested names of a file's keys, as deep as the schema goes."""
    return {
        key: keys_in(value, like[key]) if isinstance(like.get(key), dict) else None for key, value in content.items()
    }


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_has_a_file_and_every_file_a_choice(group: str) -> None:
    assert {path.stem for path in (CONF / group).glob("*.yaml")} == set(choices(group))


def test_every_folder_is_a_group() -> None:
    folders = {path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml") if path.parent != CONF}
    assert folders - {"experiment", "hydra/launcher"} == set(GROUPS)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_each_file_has_the_name_and_the_keys_of_its_choice(path: Path) -> None:
    content = read(path)
    expected = keys_of(choices(path.parent.name)[path.stem].schema)
    assert content["name"] == path.stem
    assert keys_in(content, expected) == expected


@pytest.mark.parametrize("section", ["trainer", "checkpoint", "runtime"])
def test_config_yaml_has_each_key_of_its_sections(section: str) -> None:
    schema = {"trainer": config.TrainerConfig, "checkpoint": config.CheckpointConfig, "runtime": config.RuntimeConfig}
    assert list(read(CONF / "config.yaml")[section]) == [field.name for field in dataclasses.fields(schema[section])]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_each_choice_composes_and_is_restored_from_yaml(path: Path) -> None:
    loaded = compose(name(path), *NEEDED.get(name(path), []))
    container = to_container(loaded)
    text = yaml.safe_dump(container, sort_keys=False)
    again = load_config(yaml.safe_load(text))
    assert again == loaded
    assert type(getattr(again, path.parent.name)) is choices(path.parent.name)[path.stem].schema
    assert fingerprint(to_container(again)) == fingerprint(container)


def test_a_run_writes_down_every_key() -> None:
    container = to_container(compose())
    composed = OmegaConf.to_container(hydra_entry.compose(CONF, "config"))
    assert isinstance(composed, dict)
    assert {**composed, "experiment": None} == container


def test_an_experiment_may_set_values_of_any_group(tmp_path: Path) -> None:
    folder = tmp_path / "conf"
    folder.joinpath("experiment").mkdir(parents=True)
    for path in CONF.rglob("*.yaml"):
        copy = folder / path.relative_to(CONF)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    folder.joinpath("experiment", "quick.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /optimizer: sgd\nexperiment: quick\noptimizer:\n  lr: 0.5\n"
    )
    loaded = load_config(hydra_entry.compose(folder, "config", ["experiment=quick"]))
    assert (loaded.experiment, loaded.optimizer.name, loaded.optimizer.lr) == ("quick", "sgd", 0.5)
