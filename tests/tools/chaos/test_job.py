"""One start of a command: how it is put together, and what is read off it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from distrain.errors import ConfigError
from distrain.tools.chaos.job import Job, OneHost

if sys.platform != "linux":
    pytest.skip("needs /proc", allow_module_level=True)


def test_template_is_filled_in_word_by_word() -> None:
    launcher = OneHost("{python} -n {nproc} {launch}/train.py {keys}", Path("/with space"), 3)
    assert launcher.command(["a=1", "b=[1, 2]"]) == [
        sys.executable,
        "-n",
        "3",
        "/with space/train.py",
        "a=1",
        "b=[1, 2]",
    ]


def test_keys_inside_of_a_word_are_quoted_for_a_shell() -> None:
    launcher = OneHost("sh -c 'train {keys}; true'", Path("/"), 1)
    assert launcher.command(["b=[1, 2]"]) == ["sh", "-c", "train 'b=[1, 2]'; true"]


@pytest.mark.parametrize("template", ["train {keys} {hosts}", "train {keys} 'open", "train {keys} {"])
def test_template_that_cannot_be_filled_in_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match=r"^launcher=.*can't be filled in .*it may hold \{python\}"):
        OneHost(template, Path("/"), 1)


def test_template_without_keys_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs \{keys\}"):
        OneHost("train", Path("/"), 1)


def job(folder: Path, program: str) -> Job:
    return Job(OneHost(f"{{python}} -c '{program}' {{keys}}", folder, 1), [], folder, folder / "output.log")


def test_only_what_this_start_wrote_counts(tmp_path: Path) -> None:
    tmp_path.joinpath("logs").mkdir()
    for path in (tmp_path / "output.log", tmp_path / "logs" / "rank_0.log"):
        path.write_text("before\n")
    rows = tmp_path / "metrics.jsonl"
    rows.write_text(json.dumps({"kind": "step", "step": 9, "time": time.time() - 1}) + "\n")
    failure = tmp_path / "failure.json"
    failure.write_text("{}")
    with job(tmp_path, 'print("distrain: now"); print("later")') as started:
        assert started.codes() == [0]
        assert started.has_ended()
        assert started.said() == "distrain: now\nlater\n"
        assert started.last_words() == "distrain: now"
        assert started.log() == ""
        assert started.step() is None
        with rows.open("a") as file:
            file.write(json.dumps({"kind": "step", "step": 2, "time": time.time()}) + "\n")
            file.write(json.dumps({"kind": "epoch", "step": 2, "time": time.time()}) + "\n")
            file.write('{"kind": "step", "st')
        assert started.step() == 2
        failure.write_text('{"rank": 1}')
        assert started.report("failure.json") == {"rank": 1}
        assert started.report("stopped.json") is None


def test_what_is_left_of_a_job_is_killed_when_it_is_left(tmp_path: Path) -> None:
    with job(tmp_path, 'import subprocess; subprocess.Popen(["sleep", "60"])') as started:
        assert started.codes() == [0]
        assert len(started.left(0)) == 1
    assert started.everyone() == []
