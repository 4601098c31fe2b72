"""A rank's place is what the launcher's environment says."""

from __future__ import annotations

import pytest

from distrain.errors import ConfigError
from distrain.runtime.world import World


def test_a_ranks_place_is_read_from_the_launchers_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    world = World.from_environment()
    assert (world.rank, world.size, world.local_rank, world.local_size) == (5, 8, 1, 4)


def test_without_a_launcher_there_is_one_rank() -> None:
    assert (World.from_environment().rank, World.from_environment().size) == (0, 1)


def test_a_launchers_variable_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE=two: "):
        World.from_environment()
