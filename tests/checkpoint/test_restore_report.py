"""What ranks say of the parts of a saved run becomes one table."""

from __future__ import annotations

from distrain.checkpoint.restore_report import RestoredPart, table, worst


def test_of_several_ranks_the_one_that_lost_most_is_told() -> None:
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


def test_columns_stand_below_each_other() -> None:
    lines = table(
        [RestoredPart("model", "exact", "by name"), RestoredPart("random draws", "reset", "another seed")]
    ).splitlines()
    assert [line.split() for line in lines] == [
        ["model", "exact", "by", "name"],
        ["random", "draws", "reset", "another", "seed"],
    ]
    assert lines[0].index("exact") == lines[1].index("reset")
    assert lines[0].index("by name") == lines[1].index("another seed")
