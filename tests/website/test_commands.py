"""Each command that the documentation shows is one that a user can type: its program, files, choices and keys exist."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from omegaconf import OmegaConf

from distrain.cli import (
    chaos,
    completion,
    doctor,
    evaluate,
    export,
    find,
    hosts,
    hydra_entry,
    key_help,
    plan,
    predict,
    serve,
    sweep,
    testnet,
    verify,
)
from distrain.cli.config_files import ConfigFiles
from distrain.cli.dispatch import COMMANDS
from distrain.config import registry
from distrain.config.load import load_config, load_settings
from distrain.config.schema import Config
from distrain.tools.launching import launch_keys
from tests.runs import CONF
from tests.website import documented
from tests.website.documented import PAGES, ROOT

#: Languages of blocks. One without a language could hold a command that no test sees.
LANGUAGES = {"bash", "python", "yaml", "json", "text"}
#: Commands whose keys are in a file of their own.
SETTINGS: dict[str, tuple[Path, type[Any]]] = {
    "evaluate": (CONF, evaluate.EvaluateSettings),
    "predict": (CONF, predict.PredictSettings),
    "export": (CONF, export.ExportSettings),
    "serve": (CONF, serve.ServeSettings),
    "doctor": (CONF, doctor.DoctorSettings),
    "hosts": (CONF, hosts.HostsSettings),
    "chaos": (CONF, chaos.ChaosSettings),
    "verify": (CONF, verify.VerifySettings),
    "plan": (CONF, plan.PlanSettings),
    "find": (CONF, find.FindSettings),
    "testnet": (testnet.CONF, testnet.NetworkSettings),
}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXTRAS = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
#: The mark of a command that shows what a mistake looks like.
REFUSED = "it is refused"
#: Endings of files; such a word is no key.
FILES = (".csv", ".json", ".jsonl", ".png", ".safetensors", ".yaml", ".py", ".log")
#: Programs that distrain has nothing to say about.
FOREIGN = {
    *("tensorboard", "wandb", "mktemp", "twine", "py-spy", "git", "apt-get", "curl"),
    *("ss", "dmesg", "grep", "timedatectl", "ethtool", "scontrol"),
}


def check(words: Sequence[str]) -> None:
    """Refuses a program with arguments that can't be right.

    Raises:
        Exception: What the command line would say, or an assertion that names what does not exist.
    """
    program, *arguments = words
    name = Path(program).name
    if name == "distrain":
        _check_distrain(arguments)
    elif name in ("python", "python3", "torchrun", "srun"):
        _check_script(arguments)
    elif program == "sbatch":
        script = next((place for place, word in enumerate(arguments) if word.endswith(".sbatch")), None)
        assert script is not None, "sbatch needs a script"
        _check_files(arguments[script])
        _check_training(arguments[script + 1 :])
    elif program == "make":
        _check_make(arguments)
    elif name == "pip":
        for extra in re.findall(r"distrain\[([\w,]+)\]", " ".join(arguments)):
            assert set(extra.split(",")) <= EXTRAS, f"no extra {extra}"
    elif program in ("docker", "buildah", "podman", "kubectl"):
        _check_files(*arguments)
        if "/app/launch/train.py" in arguments:
            _check_training(arguments[arguments.index("/app/launch/train.py") + 1 :])
    else:
        assert name in FOREIGN, f"nothing checks what {program} does"


def _check_script(arguments: Sequence[str]) -> None:
    """``python`` or ``torchrun`` with options, then a script or module, then what is for that one."""
    for place, word in enumerate(arguments):
        behind = list(arguments[place + 1 :])
        if word in ("-m", "--module"):
            if behind[0] == "distrain":
                _check_distrain(behind[1:])
            elif behind[0] in ("benchmarks", "website") or behind[0].startswith(("benchmarks.", "website.")):
                _check_files(behind[0].replace(".", "/") + ".py")
            else:
                assert behind[0] in ("venv", "pip", "http.server", "torch.distributed.run"), f"no module {behind[0]}"
            return
        if word.endswith(".py"):
            _check_files(word)
            if word.startswith("launch/"):
                _check_distrain([Path(word).stem, *behind])
            return


def _check_files(*words: str) -> None:
    for word in words:
        if "COMMAND" not in word and re.match(r"(docker|launch|benchmarks|website|tests|docs)/", word):
            assert (ROOT / word.split("::")[0]).exists(), f"no {word}"


def _check_make(arguments: Sequence[str]) -> None:
    target, *settings = arguments
    assert target in TARGETS, f"no target {target}"
    for setting in settings:
        name, _, value = setting.partition("=")
        assert name in ("ARGS", "PYTHON", "NPROC", "STRATEGY", "TORCH", "VENV", "DIST"), f"make knows no {name}"
        if name == "ARGS" and target == "train":
            _check_training(shlex.split(value))
        elif name == "ARGS":
            _check_files(*shlex.split(value))


def _check_distrain(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("--help", "--version"):
        return
    command, *rest = arguments
    if command == "COMMAND":
        return  # stands for any of them
    if command == "--completion":
        assert completion.script(*rest)
        return
    assert command in COMMANDS, f"no command {command}"
    if command in ("train", "sweep"):
        _check_training(rest)
    elif command in SETTINGS:
        own, _, behind = " ".join(map(shlex.quote, rest)).partition(" -- ")
        parts = [shlex.split(part) for part in behind.split(" -- ")] if behind else []
        _check_settings(command, shlex.split(own))
        for part in parts:
            if command in ("hosts", "chaos", "verify", "plan", "find"):
                _check_training(part)
            else:
                check(part)


def _check_settings(command: str, arguments: list[str]) -> None:
    folder, schema = SETTINGS[command]
    if command == "find":
        arguments = [f"what={word}" if word == "lr" else word for word in arguments]
    if command in ("evaluate", "predict", "doctor", "verify", "plan", "find"):
        launch_keys.check(launch_keys.pop(arguments), arguments, {})
    elif command == "testnet":
        arguments = [f"action={word}" if word in ("up", "on", "down") else word for word in arguments]
    options = get_args_parser().parse_args(arguments)
    composed = ConfigFiles.of_command(folder, command, arguments).compose(options.overrides)
    if not options.help:
        needed = [key for key in schema.__dataclass_fields__ if OmegaConf.is_missing(composed, key)]
        assert not needed, f"{command} needs {needed}"
        load_settings(schema, composed)


def _check_training(arguments: Sequence[str]) -> None:
    """Composes and checks the keys of a training; of a key with several values, the first one."""
    arguments = list(arguments)
    jobs = [word for word in arguments if word.startswith(("sweep.", "hydra.", "hydra/"))]
    for word in jobs:
        arguments.remove(word)
        key = word.partition("=")[0]
        fields = {f"sweep.{name}" for name in (*sweep.SweepSettings.__dataclass_fields__, "folder")}
        assert key in fields or key.startswith("hydra"), f"no such key: {key}"
    launch_keys.check(launch_keys.pop(arguments), arguments, {})
    options = get_args_parser().parse_args(arguments)
    if options.shell_completion:
        return
    names = [word for word in options.overrides if "=" not in word]
    overrides = [_first_value(word) for word in options.overrides if "=" in word]
    composed = ConfigFiles.of_command(CONF, "config", arguments).compose(overrides)
    if options.help:
        for name in names:
            assert name in launch_keys.docs() or key_help.explain(name, Config, composed, {})
        return
    assert not names, f"not of the form key=value: {names}"
    load_config(composed)


def _first_value(override: str) -> str:
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return override
    interval = parsed.value()
    value: Any
    if isinstance(interval, IntervalSweep):
        value = interval.start
    else:
        value = next(iter(parsed.sweep_string_iterator()))
    return f"{override.partition('=')[0]}={value}"


@pytest.fixture
def other_choices_stay() -> Iterator[None]:
    """What a page's own package registers is no choice for the tests that follow."""
    yield
    for choices in registry._CHOICES.values():
        for name in [name for name, choice in choices.items() if choice.target.__module__ == "my_package"]:
            del choices[name]


@pytest.mark.usefixtures("other_choices_stay")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_of_a_page_can_be_typed(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, inline = documented.read(path)
    monkeypatch.chdir(tmp_path)
    # A module that an earlier page showed is another one.
    monkeypatch.syspath_prepend(tmp_path)
    documented.write_files(blocks, tmp_path)
    monkeypatch.delitem(sys.modules, "my_package", raising=False)
    wrong = []
    for block in blocks:
        if block.language not in LANGUAGES:
            wrong.append(f"{block.page}:{block.line}: a block of '{block.language}'; say which of {sorted(LANGUAGES)}")
    commands: list[documented.Block | documented.Inline] = [block for block in blocks if block.language == "bash"]
    commands += [code for code in inline if code.is_command]
    for code in commands:
        problem = ""
        try:
            for words in documented.simple_commands(code.text):
                check(words)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if code.not_run == REFUSED and not problem:
            wrong.append(f"{code.page}:{code.line}: nothing refuses this command")
        elif code.not_run != REFUSED and problem:
            wrong.append(f"{code.page}:{code.line}: {problem}")
    assert not wrong, "\n".join(wrong)


KEYS = re.compile(r"(?P<key>[a-z]+(\.[a-z_0-9]+)+)(=(?P<value>[^\s]*))?")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_key_that_a_page_names_exists(path: Path, known_keys: set[str]) -> None:
    sections = {key.partition(".")[0] for key in known_keys}
    wrong = []
    for code in documented.read(path)[1]:
        named = KEYS.fullmatch(code.text)
        if not named or named["key"] in known_keys or named["key"].endswith(FILES):
            continue
        first, second, *_ = named["key"].split(".")
        is_code = (ROOT / "distrain" / first / f"{second}.py").exists()
        if first in sections and not is_code:
            wrong.append(f"{code.page}:{code.line}: {named['key']}")
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def known_keys() -> set[str]:
    """All keys of all choices, and the sections that they are in."""
    files = ConfigFiles.of_command(CONF, "config", ())
    leaves = {*hydra_entry.all_keys(files, ()), *files.keys_of_choices()}
    leaves |= {f"sweep.{field.name}" for field in dataclasses.fields(sweep.SweepSettings)} | {"sweep.folder"}
    above = {key[:place] for key in leaves for place, letter in enumerate(key) if letter == "."}
    return leaves | above


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("distrain train optimizer.lrr=0.1", "lrr"),
        ("distrain train strategy=dpp", "dpp"),
        ("distrain train trainer.epochs=0", "trainer.epochs"),
        ("distrain train nproc=0", "nproc"),
        ("distrain train --help optimizer.lrr", "optimizer.lrr"),
        ("distrain trian", "no command trian"),
        ("distrain sweep sweep.minuts=3 optimizer.lr=1,2", "sweep.minuts"),
        ("distrain sweep optimizer.lrr=1,2", "lrr"),
        ("distrain evaluate rnu=DIR", "rnu"),
        ("distrain evaluate split=val", "evaluate needs ['run']"),
        ("distrain hosts hosts=[a,b] -- strategy=dpp", "dpp"),
        ("distrain testnet hosts=2 -- distrain train strategy=dpp", "dpp"),
        ("torchrun --nproc-per-node 2 launch/trian.py strategy=ddp", "launch/trian.py"),
        ("torchrun -m distrain train sed=1", "sed"),
        ("python launch/train.py seed=-1", "seed"),
        ("for rank in 0 1; do RANK=$rank python launch/train.py strategy=dpp & done; wait", "dpp"),
        ('eval "$(distrain doctor adress=HOST)"', "adress"),
        ("sbatch --nodes=2 launch/slurm/train.sbatch strategy=dpp", "dpp"),
        ("make tets", "no target tets"),
        ('make train ARGS="trainer.epoch=1"', "epoch"),
        ("pip install 'distrain[digit]'", "no extra digit"),
        ("kubectl apply -f launch/kubernetes/jobs.yaml", "launch/kubernetes/jobs.yaml"),
        ("rm -rf /", "nothing checks what rm does"),
    ],
)
def test_a_command_that_is_wrong_is_found(command: str, problem: str) -> None:
    with pytest.raises(Exception, match=re.escape(problem)):  # noqa: PT012
        for words in documented.simple_commands(command):
            check(words)
