"""What all tests share."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import garbage
from tests.side_by_side import (  # noqa: F401 - hooks of pytest
    pytest_cmdline_main,
    pytest_collection_modifyitems,
    pytest_report_to_serializable,
)


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays to the end."""
    garbage.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test or its fixtures draw without a seed of their own does not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - as users draw
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def handled_signals() -> None:
    """A shell starts background jobs with these signals ignored, and so would every process that a test starts."""
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGQUIT, signal.SIG_DFL),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def unchanged_process() -> Iterator[None]:
    """Environment, working directory, threads and default dtype are after a test what they were before."""
    environment, folder, threads = dict(os.environ), Path.cwd(), torch.get_num_threads()
    deterministic, dtype = torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()
    yield
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(threads)
    # torch's compiler is imported to set it.
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)
    assert torch.get_default_dtype() == dtype
    assert not torch.distributed.is_initialized(), "a test left its process group behind"
