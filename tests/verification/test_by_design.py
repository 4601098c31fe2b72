"""What is not meant to equal one process."""

from __future__ import annotations

import pytest

from distrain.verification.by_design import statement
from tests.runs import small


@pytest.mark.parametrize(
    ("keys", "begins"),
    [
        (("compression=topk",), "compression=topk"),
        (("compression=topk", "compression.density=1"), "compression=topk"),
        (("compression=topk", "compression.density=1", "compression.values=full"), ""),
        (("compression=randomk", "compression.density=0.5"), "compression=randomk"),
        (("compression=randomk", "compression.density=1"), ""),
        (("compression=auto",), "compression=auto"),
        (("compression=auto", "compression.most_lossy=none"), ""),
        (("compression=none",), ""),
    ],
)
def test_a_compressor_that_sends_everything_loses_nothing(keys: tuple[str, ...], begins: str) -> None:
    said = statement(small("strategy=ddp", *keys), 2)
    assert said[0].startswith(begins) if begins else not said
