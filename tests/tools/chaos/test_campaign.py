"""The whole tool, on a training that is only pretended: what recovers passes, and what does not is named."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

import pytest

from distrain.tools.chaos import disturbed
from distrain.tools.chaos.campaign import Campaign, Unusable
from distrain.tools.chaos.disturbed import Recovery, Training
from distrain.tools.chaos.job import OneHost
from distrain.tools.chaos.plan import KINDS

if sys.platform != "linux":
    pytest.skip("needs /proc", allow_module_level=True)

PRETEND = Path(__file__).parent / "pretend.py"
LOCAL = [name for name, kind in KINDS.items() if not kind.needs_network]


def no_network() -> NoReturn:
    raise AssertionError("no fault needs it")


class Hurt:
    """What a campaign came to, and what it said meanwhile."""

    def __init__(self, folder: Path, wrong: str = "", limit_seconds: float = 30) -> None:
        self.said: list[str] = []
        self.recoveries: list[Recovery] = []
        keys = ("steps=100", "ranks=2", *([f"wrong={wrong}"] if wrong else []))
        training = Training("pretended", keys, 2, limit_seconds, limit_seconds)
        launcher = OneHost(f"{{python}} {PRETEND} {{keys}}", PRETEND.parent, 2)
        self._campaign = Campaign(
            training,
            launcher,
            no_network,
            folder,
            patience_seconds=30,
            keep=False,
            say=self.said.append,
            recoveries=self.recoveries,
        )

    def run(self, kinds: list[str], count: int, per_run: int = 3, seed: str = "0") -> list[Recovery]:
        self._campaign.run(kinds, count, per_run, seed)
        return self.recoveries


def test_every_kind_of_fault_on_one_host_is_survived(tmp_path: Path) -> None:
    hurt = Hurt(tmp_path)
    recoveries = hurt.run(LOCAL, len(LOCAL), per_run=4)
    assert sorted(each.fault.kind for each in recoveries) == sorted(LOCAL)
    for each in recoveries:
        assert each.recovered, each.line()
        assert each.identical, each.line()
    assert {path.name for path in tmp_path.glob("run_*") if path.is_dir()} == set(), "what came out right is removed"


@pytest.mark.parametrize(
    ("wrong", "kind", "problem"),
    [
        ("blame", "kill_rank", "failure.json blames rank "),
        ("silent", "stop_rank", "there is no failure.json"),
        ("believes", "flip_bit", "which was damaged"),
        ("forgets", "kill_all", "went on from the beginning, not from step_"),
        ("stop", "terminate", "stopped at step 0, and the newest checkpoint is step_"),
        ("rows", "kill_all", "metrics.jsonl has 1 rows too few, step "),
    ],
)
def test_what_goes_wrong_is_told(wrong: str, kind: str, problem: str, tmp_path: Path) -> None:
    (recovery,) = Hurt(tmp_path, wrong).run([kind], 1)
    assert any(problem in each for each in recovery.problems), recovery.line()
    assert not recovery.recovered


def test_process_left_behind_is_told_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disturbed, "_ALLOWANCE_SECONDS", 0.5)
    monkeypatch.setattr(disturbed, "_GRACE_SECONDS", 0.5)
    (recovery,) = Hurt(tmp_path, "orphan", limit_seconds=2).run(["kill_rank"], 1)
    assert "1 processes were left behind 2.5 s after the fault" in recovery.problems
    assert recovery.notice_seconds is None


def test_sabotaged_resume_is_a_mismatch(tmp_path: Path) -> None:
    hurt = Hurt(tmp_path, "sum")
    (recovery,) = hurt.run(["terminate"], 1)
    assert recovery.recovered
    assert not recovery.identical
    assert "WRONG: 1 tensors of the model differ, w among them" in hurt.said[-1]
    assert tmp_path.joinpath("run_001", "checkpoints").is_dir(), "what came out wrong is kept"


def test_trainings_that_differ_by_chance_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match=r"two undisturbed runs are not alike \(1 tensors of the model differ"):
        Hurt(tmp_path, "chance").run(["kill_all"], 1)


def test_training_that_fails_undisturbed_is_refused_with_its_last_words(tmp_path: Path) -> None:
    tmp_path.joinpath("undisturbed_1").write_text("in the way")
    with pytest.raises(Unusable, match=r"the undisturbed run failed: .*undisturbed_1"):
        Hurt(tmp_path).run(["kill_all"], 1)
