"""Times the phases of making a plan."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from distrain.health import last_line
from distrain.health.process import seconds_since_start

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PhaseClock:
    """How long each phase took.

    Attributes:
        seconds: Of each phase, in the order in which they began.
    """

    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def since_start(cls) -> PhaseClock:
        """A clock whose first phase began when the command was started, and ends now.

        Where distrain's own launcher has started this rank, the command is the launcher.
        """
        pid = os.getppid() if last_line.is_launcher_ours() else os.getpid()
        return cls({"start": seconds_since_start(pid) or 0.0})

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
