"""The ranks' reports of a restore become one table."""

from __future__ import annotations

from distrain.checkpoint.restore_report import RestoredPart, table, worst


def test_worst_outcome_over_ranks_is_reported() -> None:
    first = [
        RestoredPart("model", "exact", "a"),
        RestoredPart("residuals", "absent", "b"),
        RestoredPart("scale", "changed", "c"),
    ]
    second = [
        RestoredPart("model", "redistributed", "d"),
        RestoredPart("residuals", "exact", "e"),
        RestoredPart("scale", "reset", "f"),
    ]
    assert [part.why for part in worst([first, second])] == ["d", "e", "f"]
    assert worst([first]) == first


def test_table_columns_are_aligned() -> None:
    lines = table(
        [RestoredPart("model", "exact", "by name"), RestoredPart("random draws", "reset", "another seed")]
    ).splitlines()
    assert [line.split() for line in lines] == [
        ["model", "exact", "by", "name"],
        ["random", "draws", "reset", "another", "seed"],
    ]
    assert lines[0].index("exact") == lines[1].index("reset")
    assert lines[0].index("by name") == lines[1].index("another seed")
