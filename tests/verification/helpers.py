"""What tests of verification share: a verification on ranks of the harness."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from distrain.runtime.world import World
from distrain.training.trainer import Trainer
from distrain.verification import engine
from distrain.verification.engine import Options
from tests.harness import run_ranks
from tests.runs import SMALL, compose


def verified_on_rank(overrides: tuple[str, ...], folder: Path, options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What a rank does: returns the certificate's content and its text."""
    # Another data set has other keys than the synthetic one.
    other_data = any(key.startswith("data=") for key in overrides)
    shared = [key for key in SMALL if not (other_data and key.startswith("data"))]
    config = compose(*shared, *overrides)
    certificate = engine.verify(config, World.from_environment(), Options(folder=folder, **options))
    # Each run has freed those before it.
    assert sum(type(living) is Trainer for living in gc.get_objects()) <= 1
    return certificate.to_plain(), "\n".join(certificate.lines())


def verified(folder: Path, ranks: int, *overrides: str, **options: Any) -> tuple[dict[str, Any], str]:
    """The certificate of a small training on ranks."""
    everyone = run_ranks(verified_on_rank, ranks, overrides, folder, options)
    assert all(content["verdict"] == everyone[0][0]["verdict"] for content, _ in everyone)
    content, text = everyone[0]
    return content, text
