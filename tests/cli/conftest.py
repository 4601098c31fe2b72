from __future__ import annotations

from tests.trained import original, run

__all__ = ["original", "run"]
