"""Trains on several hosts over ssh: ``python launch/hosts.py hosts=[a,b] nproc=2 -- strategy=ddp …``."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from distrain.cli import hosts, hydra_entry
from distrain.tools.launching.hosts import run

HERE = Path(__file__).resolve().parent
CONF = HERE.parent / "conf"
OURS, THEIRS = hosts.parted(sys.argv[1:])


def task(composed: DictConfig) -> None:
    """Starts, watches and ends one agent a host."""
    # Imports torch, which --help and most mistakes need not wait for.
    from distrain.cli import settings

    chosen = settings.load(hosts.HostsSettings, composed)
    if chosen.script is None:
        hosts.check(CONF, THEIRS)
    sys.exit(run(hosts.plan(chosen, HERE / "train.py", THEIRS), chosen.grace_seconds))


if __name__ == "__main__":
    sys.argv[1:] = OURS
    hydra_entry.main(task, CONF, "hosts")
