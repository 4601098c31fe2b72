from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.data.helpers import write_image


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes of grey PNG files, 5x4 pixels, with 8 training and 4 test images per class.

    All pixels of image i have the value 10 i in class a and 100 + 10 i in class b.
    """
    root = tmp_path / "tree"
    for part, count in (("train", 8), ("test", 4)):
        for label, name in enumerate(("a", "b")):
            for i in range(count):
                write_image(root / part / name / f"{i}.png", np.full((5, 4, 3), 10 * i + 100 * label, dtype=np.uint8))
    return root
