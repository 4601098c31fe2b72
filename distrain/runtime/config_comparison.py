"""Checks that all ranks were started with the same configuration."""

from __future__ import annotations

import json
import time

from torch.distributed import Store  # type: ignore[attr-defined]

from distrain.config.load import difference, fingerprint, to_container
from distrain.config.schema import Config
from distrain.errors import config_error
from distrain.runtime.world import World


def require_same_configuration(config: Config, world: World, store: Store) -> None:
    """Compares this rank's configuration with rank 0's, and waits until all ranks have done so.

    Args:
        config: This rank's configuration.
        world: This rank's place.
        store: The run's store.

    Raises:
        ConfigError: A rank's configuration differs from rank 0's; raised on all ranks.
        RuntimeError: Not all ranks compared theirs in time.
    """
    own = to_container(config)
    if world.rank == 0:
        store.set("config", json.dumps(own))
    reference = json.loads(store.get("config"))
    if fingerprint(own) != fingerprint(reference):
        differences = "; ".join(difference(own, reference))
        store.set("config_differs", f"rank {world.rank} on {world.host} (≠ rank 0): {differences}")
    store.add("config_compared", 1)
    deadline = time.monotonic() + config.runtime.setup_timeout_seconds
    while int(store.add("config_compared", 0)) < world.size:
        if time.monotonic() > deadline:
            raise RuntimeError("not all ranks compared their configurations within runtime.setup_timeout_seconds")
        time.sleep(0.005)
    if store.check(["config_differs"]):
        raise config_error("configuration", f"differs between ranks: {store.get('config_differs').decode()}")
