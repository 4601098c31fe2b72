"""Valid configurations load; all others are refused in one line."""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from distrain.config import schema
from distrain.config.effects import affected_by
from distrain.config.load import difference, fingerprint, load_config, to_container
from distrain.config.registry import choices, locate, register
from distrain.config.setting import setting
from distrain.errors import ConfigError, config_error
from tests.runs import compose


def container(**changes: Any) -> dict[str, Any]:
    """The default run as plain data, with changes; dots in keys are written as double underscores."""
    node = OmegaConf.create(to_container(compose()))
    for key, value in changes.items():
        OmegaConf.update(node, key.replace("__", "."), value)
    plain = OmegaConf.to_container(node)
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


# --- messages --------------------------------------------------------------------------------------------------------


def test_the_message_names_key_value_problem_and_choices() -> None:
    error = ConfigError("model.norm", "bach", "unknown choice", ["batch", "group"])
    assert str(error) == "model.norm=bach: unknown choice; choices: batch, group (did you mean batch?)"


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "null"), (True, "true"), (False, "false"), (0.5, "0.5"), ("a\nb", "a b")]
)
def test_values_are_shown_as_on_the_command_line(value: object, shown: str) -> None:
    assert str(ConfigError("key", value, "is wrong")) == f"key={shown}: is wrong"


def test_the_message_about_a_key_without_a_value() -> None:
    assert str(config_error("a.lrr", "no such key", ["lr", "name"])) == (
        "a.lrr: no such key; choices: lr, name (did you mean lr?)"
    )


def test_an_error_can_be_pickled() -> None:
    error = ConfigError("key", 1, "is wrong", [2])
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, ConfigError)
    assert str(again) == str(error)


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("data__batch_size", 0, "data.batch_size=0: must be at least 1"),
        ("data__val_fraction", 1.0, "data.val_fraction=1.0: must be less than 1"),
        ("data__std", [0.5, 0.0], "data.std=[0.5, 0.0]: must be greater than 0"),
        ("data__std", [float("nan")], "data.std=nan: must be a finite number"),
        ("data__augment__cutout", -1, "data.augment.cutout=-1: must be at least 0"),
        ("seed", -1, "seed=-1: must be at least 0"),
        ("seed", 2**32, "seed=4294967296: must be at most 4294967295"),
        ("trainer__grad_clip_norm", float("inf"), "trainer.grad_clip_norm=inf: must be a finite number"),
        ("trainer__precision", "half", "trainer.precision=half: unknown choice; choices: fp32, bf16, fp16, fp64, auto"),
    ],
)
def test_a_value_outside_its_limits_is_refused(key: str, value: object, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(container(**{key: value}))
    assert str(refused.value) == problem


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data__batch_size", 1),
        ("data__val_fraction", 0),
        ("data__augment__cutout", 0),
        ("seed", 0),
        ("seed", 2**32 - 1),
        ("trainer__grad_clip_norm", None),
        ("trainer__max_steps", 1),
    ],
)
def test_a_value_at_its_limit_is_accepted(key: str, value: object) -> None:
    load_config(container(**{key: value}))


@dataclass
class Limited:
    whole: int = setting("Documented.", at_most=3, default=1)
    several: list[int] = setting("A list made anew for each.", default_factory=lambda: [1], below=9)


def test_defaults_of_a_setting() -> None:
    first, second = Limited(), Limited()
    assert (first.whole, first.several) == (1, [1])
    assert first.several is not second.several


# --- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("trainer__epochs", "ten", "trainer.epochs=ten: must be a whole number"),
        ("trainer__epochs", 1.5, "trainer.epochs=1.5: must be a whole number"),
        ("trainer__epochs", None, "trainer.epochs=null: must be a whole number"),
        ("trainer__max_steps", "x", "trainer.max_steps=x: must be a whole number, or null"),
        ("trainer__compile", "perhaps", "trainer.compile=perhaps: unknown choice; choices: false, true, max"),
        ("optimizer__lr", "fast", "optimizer.lr=fast: must be a number"),
        ("optimizer__lr", [1], "optimizer.lr=[1]: must be a number"),
        ("optimizer__betas", 0.9, "optimizer.betas=0.9: must be a list, each element a number"),
        ("data__mean", ["x"], "data.mean=['x']: must be a list, each element a number, or null"),
        ("data__augment__flip", 3.5, "data.augment.flip=3.5: must be true or false or text"),
        ("data__augment", 3, "data.augment=3: must be a mapping of keys to values"),
        ("resume", None, "resume=null: must be text"),
        ("seed", {"a": 1}, "seed={'a': 1}: must be a whole number"),
        ("trainer", 3, "trainer=3: must be a mapping of keys to values"),
    ],
)
def test_a_wrong_type_is_refused_with_the_expected_type(key: str, value: object, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(container(**{key: value}))
    assert str(refused.value) == problem


def test_numbers_may_be_given_as_text() -> None:
    loaded = load_config(container(optimizer__lr="1e-2", trainer__epochs="3"))
    assert (loaded.optimizer.lr, loaded.trainer.epochs) == (0.01, 3)


# --- keys and choices ------------------------------------------------------------------------------------------------


def test_unknown_keys_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"^nonsense: no such key; choices: strategy, "):
        load_config({**container(), "nonsense": 1})
    with pytest.raises(ConfigError, match=r"^trainer\.nonsense: no such key; choices: epochs, "):
        load_config(container() | {"trainer": {**container()["trainer"], "nonsense": 1}})


@pytest.mark.parametrize("key", ["strategy", "optimizer", "trainer", "seed", "resume", "run_dir"])
def test_missing_keys_are_refused(key: str) -> None:
    content = container()
    del content[key]
    with pytest.raises(ConfigError, match=rf"^{key}\b"):
        load_config(content)


def test_a_configuration_without_experiment_loads() -> None:
    content = container()
    del content["experiment"]
    assert load_config(content).experiment is None


def test_an_unknown_choice_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"^optimizer\.name=adagrad: unknown choice; choices: .*adam.*sgd|sgd.*adam"):
        load_config(container(optimizer__name="adagrad"))


def test_interpolations_may_refer_to_any_key() -> None:
    assert load_config(container(scheduler__warmup_epochs="${seed}", seed=2)).scheduler.warmup_epochs == 2.0


def test_an_interpolation_of_a_missing_key_is_refused() -> None:
    node = OmegaConf.create(container())
    OmegaConf.update(node, "optimizer.lr", "${nowhere}")
    with pytest.raises(ConfigError, match=r"^optimizer\.lr: Interpolation key 'nowhere' not found$"):
        load_config(node)


def test_a_name_can_not_be_registered_twice() -> None:
    choices("logger")
    with pytest.raises(ValueError, match="logger=none is registered twice"):
        register("logger", "none", schema.LoggerConfig)(object)


# --- effects ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "effects"),
    [
        ("data.limit", {"sample_order", "schedule"}),
        ("seed", {"sample_order"}),
        ("optimizer.lr", {"schedule"}),
        ("scheduler.gamma", {"schedule"}),
        ("runtime.threads", {"execution"}),
        ("trainer.progress", {"execution"}),
        ("run_dir", {"identity"}),
        ("optimizer.weight_decay", set()),
        ("model.kwargs.norm", set()),
    ],
)
def test_a_key_has_the_effects_of_its_field_and_section(key: str, effects: set[str]) -> None:
    assert affected_by(compose("scheduler=step"), key) == effects


# --- comparing runs --------------------------------------------------------------------------------------------------


def test_difference_shows_each_key_with_both_values() -> None:
    one, other = container(optimizer__lr=0.25, seed=0), container(optimizer__lr=0.5, seed=3)
    assert difference(one, other) == ["optimizer.lr: 0.25 ≠ 0.5", "seed: 0 ≠ 3"]
    assert difference(one, one) == []
    assert difference({"a": None}, {}) == ["a: null ≠ ???"]


def test_the_fingerprint_depends_on_values_but_not_on_their_order() -> None:
    content = container()
    turned = dict(reversed(content.items()))
    assert fingerprint(content) == fingerprint(turned)
    assert fingerprint(content) != fingerprint(container(data__augment__cutout=1))


# --- targets ---------------------------------------------------------------------------------------------------------


def test_locate_imports_the_named_object() -> None:
    assert locate("key", "pathlib.Path") is Path


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("Path", "is not a dotted path"),
        ("", "is not a dotted path"),
        ("pathlib.", "is not a dotted path"),
        ("os.system('x')", "is not a dotted path"),
        ("no_such_package.Net", "can't be imported"),
        ("pathlib.Nothing", "module pathlib has no Nothing"),
    ],
)
def test_locate_refuses_invalid_paths(path: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"^key=.*{problem}"):
        locate("key", path)


def test_a_path_that_is_not_allowed_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.joinpath("strangers_module.py").write_text("raise SystemExit('code of a stranger ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="is not below distrain, and a run folder may build nothing else"):
        locate("model._target_", "strangers_module.Net", allowed=["distrain"])
    assert "strangers_module" not in sys.modules


@pytest.mark.parametrize("path", ["distrain_evil.models.Net", "distrainmodels.Net", "os.path.distrain.models"])
def test_an_allowed_prefix_must_end_at_a_dot(path: str) -> None:
    with pytest.raises(ConfigError, match="is not below"):
        locate("key", path, allowed=["distrain"])


def test_paths_below_an_allowed_prefix_are_imported() -> None:
    found = locate("key", "distrain.models.cnn.SimpleCNN", allowed=["distrain.models"])
    assert found.__name__ == "SimpleCNN"


def test_the_current_folder_is_searched_last_and_only_for_packages_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.joinpath("json.py").write_text("raise SystemExit('hides the standard library')\n")
    tmp_path.joinpath("lies_beside_the_user.py").write_text("Net = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    locate("key", "distrain.models.cnn.SimpleCNN")
    assert str(tmp_path) not in sys.path
    assert locate("key", "lies_beside_the_user.Net") == 3
    assert sys.path[-1] == str(tmp_path)


def test_a_module_that_fails_on_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.joinpath("breaks_on_import.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"breaks_on_import\.Net: can't be imported \(ZeroDivisionError"):
        locate("key", "breaks_on_import.Net")
