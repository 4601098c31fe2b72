"""A rank that ``distrain.fit`` or ``distrain.verify`` has started: a program with the folder of the handover."""

from __future__ import annotations

import dataclasses
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
    """Trains or verifies, writes what the parent wants to know, and ends the process with a command's exit code.

    Args:
        folder: What the parent has written; see :mod:`distrain.api.handover`.
    """
    escape_everything()
    handover.import_as_parent(folder)
    verification = handover.read_verification(folder)
    name = "distrain.fit" if verification is None else "distrain.verify"
    sys.argv[:] = [name]
    tells_parent = World.from_environment().rank == 0
    with ended_as_command(), program.called_as(name):
        training = handover.read(folder)
        try:
            if verification is None:
                result = {"run_dir": str(training.run().run_dir.resolve())}
            else:
                # Which a training doesn't need.
                from distrain.api.verify import options_of, verify_on_rank

                result = dataclasses.asdict(verify_on_rank(training, options_of(verification)))
        except Stopped as stopped:
            if tells_parent:
                handover.write_result(folder, {"reason": stopped.reason, "step": stopped.step})
            raise
        if tells_parent:
            handover.write_result(folder, result)
    skip_destructors_after_communication()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
