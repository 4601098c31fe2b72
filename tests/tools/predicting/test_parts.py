"""Finished parts of a prediction are used again, and those of another prediction are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distrain.errors import ConfigError
from distrain.tools.predicting.parts import Parts


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{number}.png" for number in range(7)]
    for path in paths:
        path.write_bytes(b"image")
    return list(map(str, paths))


def parts_of(images: list[str], **settings: Any) -> Parts:
    return Parts(Path(images[0]).with_name("result.csv"), images, 2, {"top": 1, **settings})


def test_parts_are_shared_among_ranks_and_joined_in_order(images: list[str]) -> None:
    first, second = parts_of(images), parts_of(images)
    assert first.start() is None
    second.check()
    # The ranks take turns; rank 1 is the first to finish.
    shares = (first.unfinished(), second.unfinished())
    for number, (part, paths) in enumerate(next(shares[turn]) for turn in (1, 0, 1, 0)):
        assert (part, len(paths)) == (number, 1 if number == 3 else 2)
        (second if number % 2 == 0 else first).finish(part, [{"path": path} for path in paths])
    assert [*shares[0], *shares[1]] == []
    assert [row["path"] for row in first.rows()] == images
    first.remove()
    assert not first.folder.exists()


def test_what_is_finished_is_not_done_again(images: list[str]) -> None:
    killed = parts_of(images)
    killed.start()
    work = killed.unfinished()
    number, paths = next(work)
    killed.finish(number, [{"path": path} for path in paths])
    next(work)  # claimed, and never finished
    killed.close()
    again = parts_of(images)
    assert again.start() == "going on: 2 of 7 images were predicted before"
    assert [number for number, _ in again.unfinished()] == [1, 2, 3]
    with pytest.raises(RuntimeError, match=r"part_000001.jsonl is missing"):
        list(again.rows())


@pytest.mark.parametrize("change", ["top", "files"])
def test_parts_of_another_prediction_are_discarded_in_one_line(images: list[str], change: str) -> None:
    before = parts_of(images)
    before.start()
    before.finish(0, [])
    before.close()
    if change == "files":
        Path(images[3]).write_bytes(b"another image")
    after = parts_of(images, top=2 if change == "top" else 1)
    message = f"{after.folder} held parts of another prediction ({change}); it begins anew"
    assert after.start() == message
    assert after.done() == 0
    # What a kill leaves while the folder is removed.
    after.finish(0, [])
    (after.folder / "job.json").unlink()
    after.close()
    assert "it begins anew" in str(parts_of(images).start())


def test_a_folder_is_neither_shared_by_two_commands_nor_taken_from_somebody(images: list[str]) -> None:
    first = parts_of(images)
    first.start()
    with pytest.raises(ConfigError, match=r"is in use by another distrain predict"):
        parts_of(images).start()
    with pytest.raises(RuntimeError, match="rank 0 predicts something else: top differ"):
        parts_of(images, top=2).check()
    first.close()
    assert not first.folder.exists()  # nothing was finished
    first.folder.mkdir()
    (first.folder / "notes.txt").touch()
    foreign = parts_of(images)
    with pytest.raises(ConfigError, match=r"holds other files \(notes.txt\)"):
        foreign.start()
    foreign.close()
    assert [path.name for path in first.folder.iterdir()] == ["notes.txt"]
    with pytest.raises(RuntimeError, match="all hosts must share"):
        foreign.check()
