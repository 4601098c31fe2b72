"""The table for people and the content of the result file."""

from __future__ import annotations

import json

from distrain.tools.chaos import report
from distrain.tools.chaos.disturbed_run import Recovery
from distrain.tools.chaos.plan import Fault


def recovery(kind: str, training: str, *problems: str, identical: bool = True, seconds: float = 1.0) -> Recovery:
    fault = Fault(kind, 20, 0.1, 1, (0.1, 0.2, 0.3))
    notice = None if kind == "kill_all" else seconds
    return Recovery(training, 1, fault, "done", notice, "step_00000010", 6.0, list(problems), identical)


RECOVERIES = [
    recovery("kill_rank", "ddp"),
    recovery("kill_all", "ddp", identical=False),
    recovery("kill_rank", "ddp", seconds=4.0),
    recovery("kill_rank", "pipeline", "not ended"),
]


def test_table_counts_by_kind_and_training() -> None:
    lines = [line.split() for line in report.table(RECOVERIES).splitlines()[1:]]
    assert lines == [
        ["kill_all", "ddp", "1", "1", "0", "–", "–", "6.0", "6.0"],
        ["kill_rank", "ddp", "2", "2", "2", "2.5", "4.0", "6.0", "6.0"],
        ["kill_rank", "pipeline", "1", "0", "1", "1.0", "1.0", "6.0", "6.0"],
        ["all", "4", "3", "3", "1.0", "4.0", "6.0", "6.0"],
    ]


def test_content_is_plain_data_with_every_fault() -> None:
    results = json.loads(json.dumps(report.content(RECOVERIES, {"seed": 3})))
    assert (results["faults"], results["recovered"], results["identical"]) == (4, 3, 3)
    assert results["settings"] == {"seed": 3}
    assert results["recoveries"][3]["problems"] == ["not ended"]
    assert results["recoveries"][3]["recovered"] is False
    assert results["recoveries"][0]["fault"]["kind"] == "kill_rank"


def test_fault_without_a_later_step_is_not_recovered() -> None:
    unfinished = recovery("kill_rank", "ddp")
    unfinished.go_on_seconds = None
    assert not unfinished.recovered


def test_line_names_the_fault_the_times_and_the_problems() -> None:
    assert RECOVERIES[3].line() == (
        "pipeline, run 1: kill_rank at step 20 + 0.10 s: done; ended after 1.0 s; "
        "resumed from step_00000010 after 6.0 s; WRONG: not ended"
    )
