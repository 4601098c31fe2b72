"""A rank's place among all, as the launcher's environment says."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from distrain.errors import ConfigError

#: Digits of a number in the launcher's environment.
LONGEST_NUMBER = 9


@dataclass(frozen=True)
class World:
    """This rank's place among all, as the launcher's environment says."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str

    @classmethod
    def from_environment(cls) -> World:
        """Reads torchrun's variables; without them this is the only rank.

        Raises:
            ConfigError: A variable is not a number.
        """

        def number(name: str, default: int) -> int:
            text = os.environ.get(name, str(default))
            if not text.isdecimal() or len(text) > LONGEST_NUMBER:
                raise ConfigError(name, text, "the launcher's environment variable must be a whole number")
            return int(text)

        size = number("WORLD_SIZE", 1)
        return cls(
            rank=number("RANK", 0),
            size=size,
            local_rank=number("LOCAL_RANK", 0),
            local_size=number("LOCAL_WORLD_SIZE", size),
            host=socket.gethostname(),
        )
