"""The lines of a run fit the terminal, and nothing in its files controls it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from distrain.files.live_text import display_width
from distrain.tools.watching.job import Job
from distrain.tools.watching.screen import to_line, to_lines
from tests.tools.comparison.runs import CONFIG, SUMMARY
from tests.tools.watching.jobs import rank, read, status, write_job


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return read(write_job(tmp_path / "run", status(), config={**CONFIG, "model": {"name": "resnet18"}}))


def test_a_running_job(job: Job) -> None:
    assert to_lines(job, 80, 24, io.StringIO()) == [
        "run: ddp, 3 ranks, resnet18",
        "running: training, epoch 2 of 3, 0:10 so far, about 0:20 left",
        "██████████░░░░░░░░░░░░░░░░░░░░  step 20 of 60, 33%",
        "loss 0.5000, accuracy 0.7500",
        "validation: loss 0.6000, accuracy 0.7000",
        "128 images/s, 250.0 ms a step",
        "",
        "rank  host   phase     step  steps/s  last moved  last heard",
        "   0  host0  training    20      4.0   0.5 s ago   0.2 s ago",
        "   1  host1  training    20      4.0   0.5 s ago   0.2 s ago",
        "   2  host2  training    20      4.0   0.5 s ago   0.2 s ago",
    ]
    assert to_line(job).endswith("left, step 20/60, loss 0.5000, accuracy 0.7500")


def test_ranks_of_a_mesh_are_shown_with_their_places(tmp_path: Path) -> None:
    places = [{"data": number // 2, "tensor": number % 2} for number in range(4)]
    ranks = [rank(number, place=place) for number, place in enumerate(places)]
    config = {**CONFIG, "strategy": {"name": "mesh"}}
    lines = to_lines(read(write_job(tmp_path / "run", status(ranks=ranks), config=config)), 100, 24, io.StringIO())
    assert lines[0] == "run: mesh (data 2 × tensor 2), 4 ranks"
    assert lines[-5:-2] == [
        "rank  place             host   phase     step  steps/s  last moved  last heard",
        "   0  data 0, tensor 0  host0  training    20      4.0   0.5 s ago   0.2 s ago",
        "   1  data 0, tensor 1  host1  training    20      4.0   0.5 s ago   0.2 s ago",
    ]


def test_a_job_that_has_ended_shows_what_it_came_to(tmp_path: Path) -> None:
    lines = to_lines(read(write_job(tmp_path / "run", status(running=False), summary=SUMMARY)), 80, 24, io.StringIO())
    assert lines[1] == "ended"
    assert any(line.split() == ["test", "accuracy", "0.8500,", "loss", "0.5000"] for line in lines)
    assert not any("rank" in line for line in lines[1:])


@pytest.mark.parametrize("width", [20, 40, 80])
def test_lines_fit_the_terminal_and_many_ranks_its_height(width: int, tmp_path: Path) -> None:
    ranks = [rank(n, host="数据" * 30, idle_seconds=n % 7) for n in range(1000)]
    job = read(write_job(tmp_path / ("run" * 40), status(ranks=ranks)))
    lines = to_lines(job, width, 24, io.StringIO())
    assert all(display_width(line) <= width for line in lines)
    assert len(lines) < 24
    # Those that have made no progress for longest.
    rows = lines[[line.startswith("rank") for line in lines].index(True) + 1 :]
    assert [line.split()[0] for line in rows[:2]] == ["6", "13"]
    assert rows[-1].startswith("and 989 more; all a")


def test_nothing_in_the_files_controls_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b]0;title\x07\n\u202e"
    content = status(
        ranks=[rank(0, host=evil, phase=evil)], values={f"train/{evil}": 1.0}, epoch_values={f"epoch/val_{evil}": 1.0}
    )
    config = {"strategy": {"name": evil}, "model": {"name": [evil]}, "data": evil}
    for reports in ({}, {"failure": {"error": evil, "rank": evil}}, {"stopped": {"reason": evil}}):
        job = read(write_job(tmp_path / "run", content, config=config, **reports))
        for line in (*to_lines(job, 80, 24, io.StringIO()), to_line(job)):
            assert line.isprintable()
    write_job(tmp_path / "run", f'{{"{evil}": 1}}')
    (tmp_path / "run" / "failure.json").unlink()
    assert all(line.isprintable() for line in to_lines(read(tmp_path / "run"), 80, 24, io.StringIO()))


def test_the_state_is_coloured_in_a_terminal_unless_the_user_wants_no_colour(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert to_lines(job, 80, 24, Terminal())[1].startswith("\x1b[32mrunning\x1b[0m: training")
    monkeypatch.setenv("NO_COLOR", "1")
    assert to_lines(job, 80, 24, Terminal())[1].startswith("running: training")
