"""Virtual hosts on one machine: ``python launch/testnet.py hosts=4 rate=100mbit -- torchrun launch/train.py …``."""

from __future__ import annotations

import sys
from pathlib import Path

# This checkout's package is found even where nothing is installed, or another folder called distrain lies on the path.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from distrain.cli.commands import testnet

if __name__ == "__main__":
    testnet.main()
