"""A user's own choices, in the folder of ``--config-dir``."""

from __future__ import annotations

from pathlib import Path

import pytest

from distrain.cli import hydra_entry
from distrain.cli.config_files import ConfigFiles
from distrain.config.folder import CONF
from distrain.config.schema import Config
from distrain.errors import ConfigError
from tests.trained import Refusal

FILES = {
    "model/net.yaml": "name: custom\n_target_: net.Net\n",
    "data/big.yaml": "defaults: [digits]\nbatch_size: 640\n",
    "optimizer/quick.yaml": "name: adam\nlr: 0.5\n",
    "optimizer/broken.yaml": "name: sgd\n\tlr: 0.1\n",
    "experiment/quick.yaml": "# @package _global_\ndefaults:\n  - override /data: big\ntrainer:\n  epochs: 1\n",
}
#: The optimizers of both folders.
OPTIMIZERS = sorted([*(path.stem for path in (CONF / "optimizer").iterdir()), "broken", "quick"])


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mine"
    for name, content in FILES.items():
        folder.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        folder.joinpath(name).write_text(content)
    monkeypatch.chdir(tmp_path)
    return folder


def test_choices_of_both_folders_are_composed(mine: Path) -> None:
    composed = hydra_entry.compose(
        CONF, "config", ["--config-dir", "mine", "model=net", "optimizer=quick", "experiment=quick"]
    )
    assert (composed.model._target_, composed.data.batch_size, composed.data.name) == ("net.Net", 640, "digits")
    assert (composed.trainer.epochs, composed.optimizer.lr, composed.strategy.name) == (1, 0.5, "single")


def test_keys_of_a_choice_with_an_error_in_it_are_not_known(mine: Path) -> None:
    files = ConfigFiles.of_command(CONF, "config", ["--config-dir=mine"])
    assert files.choices("optimizer") == OPTIMIZERS
    keys = files.keys_of_choices()
    assert keys["optimizer.momentum"].endswith("optimizer=muon or optimizer=sgd")
    assert "optimizer.betas" in keys


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["model=ne"], "model=ne: no such choice; choices: airbench_cnn, cifar_cnn, custom, dilated_cnn, net,"),
        (["model=1"], "model=1: needs the name of a choice; choices: airbench_cnn, cifar_cnn, custom, dilated_cnn,"),
        (["experiment=quik"], "(did you mean quick?)"),
        (["optimizer=broken"], "mine/optimizer/broken.yaml"),
        (["model=net", "model.wdth=1"], "model.wdth: no such key; choices: name, _target_"),
        (["data=big", "data.rooot=1"], "data.rooot: no such key"),
    ],
)
@pytest.mark.parametrize("command", ["train", "hosts", "sweep"])
def test_errors_list_ones_own_choices_too(
    command: str, arguments: list[str], line: str, mine: Path, refusal: Refusal
) -> None:
    before = {"train": [], "hosts": ["hosts=[a]", "ssh=false", "--"], "sweep": ["trainer.epochs=1,2"]}[command]
    # Between settings, where Hydra itself reads no option.
    assert line in refusal(command, *before, "seed=3", "--config-dir", "mine", *arguments)


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("nowhere", "--config-dir=nowhere: there is no such folder"),
        ("mine/model/net.yaml", "--config-dir=mine/model/net.yaml: must be the folder that your groups are in"),
    ],
)
def test_a_folder_that_is_none_is_refused(folder: str, line: str, mine: Path, refusal: Refusal) -> None:
    assert refusal("train", "--config-dir", folder, "model=net") == line
    assert refusal("hosts", "hosts=[a]", "--", "--config-dir", folder, "model=net") == line
    with pytest.raises(ConfigError, match=line):
        hydra_entry.compose(CONF, "config", ["--config-dir", folder])


@pytest.mark.parametrize("file", ["config.yaml", "model/custom.yaml"])
def test_a_file_that_would_not_be_read_is_refused(file: str, mine: Path, refusal: Refusal) -> None:
    mine.joinpath(file).write_text("name: custom\n")
    line = f"--config-dir=mine: distrain has a {file} too; give yours another name"
    assert refusal("train", "--config-dir", "mine", "model=net") == line


def test_help_of_a_group_shows_ones_own_choices(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config-dir", "mine", "--help", "optimizer", "optimizer=quick"]
    files = ConfigFiles.of_command(CONF, "config", arguments)
    assert hydra_entry.explain_keys(arguments, files, lambda: Config)
    printed = capsys.readouterr().out
    assert printed.startswith(f"optimizer=adam; choices: {', '.join(OPTIMIZERS)}\n")
    assert "optimizer.lr=0.5" in printed
