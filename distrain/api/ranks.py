"""Starts ranks for a training of objects or its verification, and ends as they end."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrain.api import handover
from distrain.api.training import Training
from distrain.errors import EXIT_INTERRUPTED, EXIT_REFUSED, EXIT_STOPPED, Failed, Stopped, config_error_from_line
from distrain.tools.launching import elastic
from distrain.tools.launching.launch_keys import LaunchSettings

#: The program of a rank. By its path, since distrain need not be installed.
_PROGRAM = Path(__file__).with_name("rank.py")


def run_on_ranks(
    training: Training, settings: LaunchSettings, verification: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Starts ranks, waits for their end, and returns what rank 0 has told.

    Args:
        training: What the ranks train, which :meth:`Training.check` has found possible.
        settings: How many ranks.
        verification: How they verify it, as :func:`distrain.api.verify.options_of` reads it; ``None``: they train.

    Raises:
        ConfigError: The configuration can't run, or an object can't be sent to the ranks.
        Failed: A rank failed; the reason was printed.
        Stopped: The ranks saved everything and stopped on request.
        KeyboardInterrupt: Ctrl-C ended the ranks before they could save.
    """
    with tempfile.TemporaryDirectory(prefix="distrain_objects_") as name:
        folder = Path(name)
        handover.write(training, folder)
        if verification is not None:
            handover.write_verification(folder, verification)
        outcome = elastic.run_ranks(settings, sys.executable, [str(_PROGRAM), name])
        result = handover.read_result(folder)
    if outcome.code == 0 and result:
        return result
    line = outcome.line.removeprefix("distrain: ")
    if outcome.code == EXIT_REFUSED:
        raise config_error_from_line(line or "a rank has refused the configuration")
    if outcome.code == EXIT_STOPPED and "reason" in result:
        raise Stopped(result["reason"], result["step"])
    if outcome.code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    raise Failed(line or "a rank failed, for the reason printed above")
