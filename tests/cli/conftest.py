from __future__ import annotations

from tests.trained import original, refusal, run

__all__ = ["original", "refusal", "run"]
