"""Ranks meet for a moment, to go by what the first one says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distrain.config.schema import Config
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World


def of_rank_0(config: Config, world: World, mine: Mapping[str, Any]) -> dict[str, Any]:
    """What rank 0 has to tell; all ranks call it together.

    Args:
        config: A configuration that is the same on all ranks.
        world: This rank's place.
        mine: What this rank would tell; anything that JSON can hold.
    """
    with Runtime(config, world, keep_logs=False) as runtime:
        return runtime.communicator().all_gather_json(mine, runtime.device)[0]
