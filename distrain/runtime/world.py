"""A rank's place among all ranks, from the launcher's environment variables."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from distrain.errors import ConfigError

#: Longest number accepted from the launcher's environment, in digits.
MAX_DIGITS = 9


@dataclass(frozen=True)
class World:
    """A rank's place among all ranks.

    Attributes:
        rank: Index of this rank among all.
        size: Number of ranks.
        local_rank: Index of this rank among those on its host.
        local_size: Number of ranks on its host.
        host: Name of its host.
    """

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
            if not text.isdecimal() or len(text) > MAX_DIGITS:
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
