"""What a training changes in its process, and a program that goes on afterwards expects to be as before."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import sys
from collections.abc import Iterator

import torch

from distrain.errors import ConfigError
from distrain.health import last_line
from distrain.runtime.device import RandomState


@contextlib.contextmanager
def restored_surroundings() -> Iterator[None]:
    """Restores after this block: random generators, threads, environment, torch's modes, the log's level.

    Signal handlers, log handlers and the process group are the business of :class:`~distrain.runtime.runtime.Runtime`.
    """
    log = logging.getLogger("distrain")
    environment, random_state = dict(os.environ), RandomState.now()
    threads, level, benchmark = torch.get_num_threads(), log.level, torch.backends.cudnn.benchmark
    deterministic, precision = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    # Asking for the state of a GPU that is not in use yet would take it into use.
    gpu_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        log.setLevel(level)
        torch.backends.cudnn.benchmark = benchmark
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic)
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)
        random_state.restore()
        if gpu_states:
            torch.cuda.set_rng_state_all(gpu_states)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


@functools.cache
def name_refusal_at_exit() -> None:
    """Lets torchrun name the refusal at the end of its output, if one ends this program, which did not catch it."""
    atexit.register(_name_refusal)


def _name_refusal() -> None:
    # Python keeps there what has ended the program, after printing it.
    error = getattr(sys, "last_value", None)
    if isinstance(error, ConfigError):
        last_line.tell_launcher(f"distrain: {error}")
