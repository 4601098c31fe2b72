"""Paths on the command line: what Hydra can't read is answered by the argument to type, which works when pasted."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from distrain.cli import hydra_entry
from distrain.cli.arguments import quote_home_folders, quoted, refuse_misread_paths, unparsable
from distrain.cli.evaluate import EvaluateSettings
from distrain.cli.predict import PredictSettings
from distrain.config.load import load_config, load_settings
from distrain.config.schema import Config
from distrain.errors import ConfigError
from tests.runs import CONF

#: What a folder may be called.
NAMES = (
    *("/x/a=b", "a,b", "a b", "$HOME/a", "a'b", 'a"b', "a\\", 'a\\"b', "[a]", "[a", "{a}", "{a", "(a)", "a(b"),
    *("a:b,c", "'a", '"a', "~x=y", "a#b", "a!b", "ä=ü", "1.10", "2026_11_29", "1e5", "true"),
    *("null", " a ", "a\tb=c"),
)


def composed_run_dir(argument: str) -> str | None:
    return load_config(hydra_entry.compose(CONF, "config", [argument, "data=synthetic"])).run_dir


@pytest.mark.parametrize("name", NAMES)
def test_quoted_argument_can_be_pasted_into_a_shell(name: str) -> None:
    (argument,) = shlex.split(quoted("run_dir", name))
    override = OverridesParser.create().parse_override(argument)
    assert (override.key_or_group, override.is_sweep_override()) == ("run_dir", False)
    if not name.startswith("~"):
        assert composed_run_dir(argument) == name


@pytest.mark.parametrize("name", ["/x/a=b", "a(b)", "'a", '"a', "[a", "{a", "a)", "a=b,c"])
def test_line_about_an_argument_that_cannot_be_read_says_what_to_type(name: str) -> None:
    argument = f"run_dir={name}"
    line = str(unparsable(argument, [argument]))
    assert line.startswith(f"argument '{argument}': is not of the form key=value")
    found = re.search("; if it is text, type (.*)$", line)
    assert found is not None
    (pasted,) = shlex.split(found[1])
    assert composed_run_dir(pasted) == name


def test_elements_of_a_list_are_quoted_one_by_one() -> None:
    argument = "input=[~/a.png,b=c.png]"
    pasted = shlex.split(str(unparsable(argument, [argument])).partition(", type ")[2])
    settings = load_settings(PredictSettings, hydra_entry.compose(CONF, "predict", ["run=r", *pasted]))
    assert settings.input == [str(Path.home() / "a.png"), "b=c.png"]


def test_a_word_that_a_space_cut_off_is_given_back_to_its_argument() -> None:
    line = str(unparsable("photos", ["data=image_folder", "data.root=/my", "photos"]))
    assert line.endswith("""type 'data.root="/my photos"'""")
    assert "type" not in str(unparsable("photos", ["photos"]))


@pytest.mark.parametrize("name", ["1.10", "2026_11_29", "1e5", "true", "False", "nan", "-3", "[a]", "{a: b}"])
def test_path_that_hydra_reads_as_something_else_is_refused_with_what_to_type(name: str) -> None:
    with pytest.raises(ConfigError, match=r"run_dir=.*would not be read as text; type ") as caught:
        refuse_misread_paths([f"run_dir={name}"], lambda: Config)
    (pasted,) = shlex.split(str(caught.value).partition(" type ")[2])
    refuse_misread_paths([pasted], lambda: Config)
    assert composed_run_dir(pasted) == name


def test_other_values_are_left_to_hydra() -> None:
    refuse_misread_paths([f"run_dir={path}" for path in (".", "..", "-", "_", "e5", "./1.10", "1a")], lambda: Config)
    arguments = ["run_dir=null", "run_dir=17", "run_dir=a1", "run_dir=", "optimizer.lr=1e-3", "optimizer.betas=[1,2]"]
    refuse_misread_paths(arguments, lambda: Config)
    refuse_misread_paths(["input=[a,b]", "run=r"], lambda: PredictSettings)
    assert quote_home_folders([*arguments, "~optimizer", "seed=~", "input=[~/a]"]) == [
        *arguments,
        "~optimizer",
        'seed="~"',
        "input=[~/a]",
    ]


@pytest.mark.parametrize("key", ["run_dir", "resume", "data.root"])
@pytest.mark.parametrize("path", ["~", "~/x", "~/a=b", "~/a b"])
def test_tilde_becomes_the_home_folder(key: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (argument,) = quote_home_folders([f"{key}={path}"])
    config = load_config(hydra_entry.compose(CONF, "config", [argument]))
    value = config.data.root if key == "data.root" else getattr(config, key)
    assert value == path.replace("~", "/home/me")


def test_settings_behind_dashes_are_read_like_those_of_a_training() -> None:
    """launch/hosts.py and launch/chaos.py compose what stands behind ``--``."""
    assert composed_run_dir("run_dir=~/x") == str(Path.home() / "x")


@pytest.mark.parametrize(
    ("command", "keys"),
    [("evaluate", ["run", "checkpoint", "output", "data_root"]), ("predict", ["run", "output", "input"])],
)
def test_tilde_becomes_the_home_folder_in_every_path_of_a_command(
    command: str, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    needed = [f"{key}=x" for key in ("run", "input") if key not in keys and command == "predict"]
    arguments = quote_home_folders([*needed, *(f"{key}=~/a.csv" for key in keys)])
    schema: type[Any] = {"evaluate": EvaluateSettings, "predict": PredictSettings}[command]
    settings: Any = load_settings(schema, hydra_entry.compose(CONF, command, arguments))
    assert {getattr(settings, key) for key in keys} == {"/home/me/a.csv"}


def test_home_folder_of_nobody_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run_dir=~nobody-of-this-name/x: has no such home folder"):
        composed_run_dir('run_dir="~nobody-of-this-name/x"')


@pytest.mark.parametrize(("value", "meant"), [("false", "off"), ("off", "off"), ("true", "auto"), ("lines", "lines")])
def test_progress_and_shared_memory_are_switched_by_truth_values(value: str, meant: str) -> None:
    assert load_config(hydra_entry.compose(CONF, "config", [f"trainer.progress={value}"])).trainer.progress == meant
