"""Times the phases of making a plan."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PhaseClock:
    """How long each phase took.

    Attributes:
        seconds: Of each phase, in the order in which they began.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what is done inside; phases of the same name add up.

        Args:
            name: For the user.
        """
        begin = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - begin
            self.seconds[name] = self.seconds.get(name, 0.0) + taken
            log.debug("planning: %s took %.2f s", name, taken)
