"""``launch/chaos.py`` injects a real fault into a real training, and refuses wrong settings in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.harness import HANG_SECONDS
from tests.runs import launched
from tests.trained import Refusal

if sys.platform != "linux":
    pytest.skip("needs /proc", allow_module_level=True)

#: One rank without a launcher. RANK is set, because ranks are recognised by it.
ALONE = 'launcher="env RANK=0 {python} {train} {keys}"'


@pytest.mark.soak
def test_training_with_a_damaged_checkpoint_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    arguments = ["nproc=1", "faults=1", "kinds=[flip_bit]", ALONE]
    arguments += [f"folder={tmp_path / 'runs'}", f"json={tmp_path / 'results'}"]
    training = ["experiment=chaos", "strategy=single", "trainer.max_steps=150"]
    done = launched(tmp_path, "chaos", *arguments, "--", *training, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "single, run 1 ended as the undisturbed run" in done.stdout
    results = json.loads(tmp_path.joinpath("results").read_text())
    assert (results["faults"], results["recovered"], results["identical"]) == (1, 1, 1)
    (recovery,) = results["recoveries"]
    assert recovery["fault"]["kind"] == "flip_bit"
    assert recovery["resumed"] not in recovery["done"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "training: none is given; write its keys after --, as in: -- strategy=ddp"),
        (["falts=3", "--", "strategy=ddp"], "falts: no such key"),
        (["faults=0", "--", "strategy=ddp"], "faults=0: must be at least 1"),
        (["kinds=[kill_rnk]", "--", "strategy=ddp"], "kinds=kill_rnk: unknown choice; choices: kill_rank"),
        (["--", "strategy=dpd"], "strategy=dpd: no such choice"),
        (["--", "strategy=ddp", "optimizer.lrr=1"], "optimizer.lrr: no such key"),
        (["--", "strategy=ddp", "run_dir=here"], "run_dir=here: is chosen by this command"),
        (["nproc=3", "--", "strategy=pipeline"], "strategy.stages=2: "),
        (["launcher=train", "--", "strategy=ddp"], "launcher=train: needs {keys}"),
        (["nproc=1", "kinds=[cut_link]", "--", "strategy=single"], "kinds=cut_link: "),
        (["folder=.", "--", "strategy=ddp"], "folder=.: is not empty"),
    ],
)
def test_wrong_setting_is_refused_in_one_line(
    arguments: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    tmp_path.joinpath("something").touch()
    monkeypatch.chdir(tmp_path)
    assert line in refusal("chaos", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


@pytest.mark.parametrize(
    ("user", "ranks", "problem"),
    [(1000, 2, "a test network needs root"), (0, 155, "a test network has 1 to 154 hosts, not 155")],
)
def test_network_faults_are_refused_without_a_test_network(
    user: int, ranks: int, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.geteuid", lambda: user)
    training = ["experiment=chaos", "strategy=ddp", "data.batch_size=155"]
    line = refusal("chaos", f"nproc={ranks}", "kinds=[cut_link]", "--", *training)
    assert f"kinds=cut_link: cut_link and delay_link can't be injected: {problem}" in line
