"""Starts ranks for a training of objects, and ends as they end."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from distrain.api import handover
from distrain.api.training import Training
from distrain.errors import EXIT_INTERRUPTED, EXIT_REFUSED, EXIT_STOPPED, Failed, Stopped, config_error_from_line
from distrain.tools.launching import elastic
from distrain.tools.launching.launch_keys import LaunchSettings

#: The program of a rank. By its path, since distrain need not be installed.
_PROGRAM = Path(__file__).with_name("rank.py")


def run_on_ranks(training: Training, settings: LaunchSettings) -> Path:
    """Starts ranks, waits for their end, and returns the run's folder.

    Raises:
        ConfigError: The configuration can't run, or an object can't be sent to the ranks.
        Failed: A rank failed; the reason was printed.
        Stopped: The ranks saved everything and stopped on request.
        KeyboardInterrupt: Ctrl-C ended the ranks before they could save.
    """
    training.check(settings.first_world())
    with tempfile.TemporaryDirectory(prefix="distrain_objects_") as name:
        folder = Path(name)
        handover.write(training, folder)
        outcome = elastic.run_ranks(settings, sys.executable, [str(_PROGRAM), name])
        result = handover.read_result(folder)
    if outcome.code == 0 and "run_dir" in result:
        return Path(result["run_dir"])
    line = outcome.line.removeprefix("distrain: ")
    if outcome.code == EXIT_REFUSED:
        raise config_error_from_line(line or "a rank has refused the configuration")
    if outcome.code == EXIT_STOPPED and "reason" in result:
        raise Stopped(result["reason"], result["step"])
    if outcome.code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    raise Failed(line or "a rank failed, for the reason printed above")
