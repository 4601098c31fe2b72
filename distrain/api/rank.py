"""A rank that ``distrain.fit(…, nproc=…)`` has started: a program whose argument is the folder of the handover."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python has put this file's folder in front; its modules must not take the place of others.
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from distrain.api import handover
from distrain.cli.hydra_entry import ended_as_command, skip_destructors_after_communication
from distrain.errors import Stopped
from distrain.files.terminal import escape_everything
from distrain.runtime import program
from distrain.runtime.world import World


def main(folder: Path) -> None:
    """Trains, writes what the parent wants to know, and ends the process with the exit code of the command ``train``.

    Args:
        folder: What the parent has written; see :mod:`distrain.api.handover`.
    """
    escape_everything()
    handover.import_as_parent(folder)
    sys.argv[:] = ["distrain.fit"]
    tells_parent = World.from_environment().rank == 0
    with ended_as_command(), program.called_as("distrain.fit"):
        training = handover.read(folder)
        try:
            result = {"run_dir": str(training.run().run_dir.resolve())}
        except Stopped as stopped:
            if tells_parent:
                handover.write_result(folder, {"reason": stopped.reason, "step": stopped.step})
            raise
        if tells_parent:
            handover.write_result(folder, result)
    skip_destructors_after_communication()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
