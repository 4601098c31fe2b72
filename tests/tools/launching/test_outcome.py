"""Which of the ranks' ends is a command's end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from distrain.tools.launching.outcome import outcome_of

#: Ends of ranks as (exit code, what the rank told its launcher, seconds after the first end); then the command's.
CASES: dict[str, tuple[list[tuple[int, str | None, int]], int, str]] = {
    "refused; the agent ended the other rank": ([(2, "no", 0), (-15, None, 0)], 2, "no"),
    "refused on one rank, noticed by another": ([(1, "0 is gone", 0), (2, "no", 0)], 2, "no"),
    "failed": ([(1, "because", 0), (1, "because", 0)], 1, "because"),
    "the first failure counts": ([(1, "later", 3), (1, "first", 0)], 1, "first"),
    "stopped; said already": ([(75, "", 0), (75, "", 1)], 75, ""),
    "stopped, but one rank failed": ([(75, "", 0), (1, "because", 1)], 1, "because"),
    "killed; others noticed": ([(1, "rank 1 is gone", 0), (-9, None, 0)], 137, "rank 1 is gone"),
    "killed; another rank was ended": ([(1, "rank 0: SIGTERM", 0), (-9, None, 0)], 137, "rank 1 was ended by SIGKILL"),
    "killed; a later one noticed": (
        [(1, "rank 0: SIGTERM", 0), (-9, None, 0), (1, "rank 1 is gone", 1)],
        137,
        "rank 1 is gone",
    ),
    "killed; nobody noticed": ([(-9, None, 0), (-15, None, 0)], 137, "rank 0 was ended by SIGKILL"),
    "killed by the agent, because it did not end": ([(1, "because", 0), (-9, None, 30)], 1, "because"),
    "crashed": ([(0, None, 0), (-11, None, 0)], 139, "rank 1 was ended by SIGSEGV"),
    "a real-time signal": ([(-40, None, 0)], 168, "rank 0 was ended by signal 40"),
    "asked to end before it could save": ([(-15, None, 0), (-15, None, 0)], 143, "rank 0 was ended by SIGTERM"),
    "a code of its own": ([(0, None, 0), (7, None, 0)], 7, "rank 1 ended with exit code 7 and did not say why"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_cause_is_what_counts(case: str, tmp_path: Path) -> None:
    ends, code, words = CASES[case]
    failures = {}
    for rank, (exit_code, told, seconds) in enumerate(ends):
        if exit_code:
            file = tmp_path / str(rank)
            if told is not None:
                extra = {"timestamp": str(1000 + seconds), "distrain_line": told}
                file.write_text(json.dumps({"message": {"message": "for torchrun", "extraInfo": extra}}))
            failures[rank] = ProcessFailure(rank, 1, exit_code, str(file))
            failures[rank].timestamp = 1000 + seconds
    outcome = outcome_of(failures)
    assert outcome.code == code
    assert words in outcome.line
    assert bool(outcome.line) == bool(words)


def test_an_error_that_torch_wrote_down_for_a_function_is_told(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    file.write_text(json.dumps({"message": {"message": "ValueError: no", "extraInfo": {"timestamp": "5"}}}))
    outcome = outcome_of({3: ProcessFailure(1, 1, 1, str(file))})
    assert (outcome.code, outcome.line) == (1, "distrain: rank 3 failed: ValueError: no")
