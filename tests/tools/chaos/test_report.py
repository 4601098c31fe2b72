"""The table, and what machines read."""

from __future__ import annotations

import json

from distrain.tools.chaos import report
from distrain.tools.chaos.disturbed import Recovery
from distrain.tools.chaos.plan import Fault


def recovery(kind: str, training: str, *problems: str, identical: bool = True, seconds: float = 1.0) -> Recovery:
    fault = Fault(kind, 20, 0.1, 1, (0.1, 0.2, 0.3))
    notice = None if kind == "kill_all" else seconds
    return Recovery(training, 1, fault, "done", notice, "step_00000010", 6.0, list(problems), identical)


FOUND = [
    recovery("kill_rank", "ddp"),
    recovery("kill_all", "ddp", identical=False),
    recovery("kill_rank", "ddp", seconds=4.0),
    recovery("kill_rank", "pipeline", "not over"),
]


def test_table_counts_by_kind_and_training() -> None:
    lines = [line.split() for line in report.table(FOUND).splitlines()[1:]]
    assert lines == [
        ["kill_all", "ddp", "1", "1", "0", "–", "–", "6.0", "6.0"],
        ["kill_rank", "ddp", "2", "2", "2", "2.5", "4.0", "6.0", "6.0"],
        ["kill_rank", "pipeline", "1", "0", "1", "1.0", "1.0", "6.0", "6.0"],
        ["all", "4", "3", "3", "1.0", "4.0", "6.0", "6.0"],
    ]


def test_content_is_plain_data_with_every_fault() -> None:
    told = json.loads(json.dumps(report.content(FOUND, {"seed": 3})))
    assert (told["faults"], told["recovered"], told["identical"]) == (4, 3, 3)
    assert told["settings"] == {"seed": 3}
    assert told["recoveries"][3]["problems"] == ["not over"]
    assert told["recoveries"][3]["recovered"] is False
    assert told["recoveries"][0]["fault"]["kind"] == "kill_rank"


def test_fault_that_nothing_came_of_is_not_recovered() -> None:
    gone = recovery("kill_rank", "ddp")
    gone.go_on_seconds = None
    assert not gone.recovered


def test_line_says_what_happened_and_what_is_wrong() -> None:
    assert FOUND[3].line() == (
        "pipeline, run 1: kill_rank at step 20 + 0.10 s: done; over after 1.0 s; "
        "went on from step_00000010 after 6.0 s; WRONG: not over"
    )
