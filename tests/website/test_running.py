"""The commands of each page run, one after the other, in one folder, as a reader would type them: ``make test-docs``.

They run with short settings; see :mod:`tests.website.short`. A command with a mark that says why is not run.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.website import documented
from tests.website.documented import PAGES, ROOT

#: Seconds for one block.
LIMIT = 400


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the programs that the documentation uses."""
    folder = tmp_path_factory.mktemp("bin")
    for program in ("distrain", "torchrun", "python"):
        file = folder / program
        file.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/website/short.py {program} "$@"\n')
        file.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def finished_run(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documentation calls DIR."""
    folder = tmp_path_factory.mktemp("finished")
    shell(folder, programs, "distrain train run_dir=DIR")
    return folder / "DIR"


def shell(folder: Path, programs: Path, text: str) -> str:
    """Runs a block of commands; returns what they print."""
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode} of\n{text}\n{done.stdout[-4000:]}"
    return done.stdout


def blocks_to_run(path: Path) -> Iterator[documented.Block]:
    for block in documented.read(path)[0]:
        if block.language == "bash" and not block.not_run:
            yield block


def photos(folder: Path) -> None:
    """Small images of two classes, for training and for prediction."""
    draws = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 4)):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = draws.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")


def shards(folder: Path, images: Path) -> None:
    """The same images in tar shards."""
    folder.mkdir()
    for part in ("train", "test"):
        with tarfile.open(folder / f"{part}-000.tar", "w") as archive:
            for number, path in enumerate(sorted(images.glob(f"{part}/*/*.png"))):
                archive.add(path, f"{number}.png")
                label = tarfile.TarInfo(f"{number}.cls")
                label.size = len(path.parent.name)
                archive.addfile(label, io.BytesIO(path.parent.name.encode()))


@pytest.mark.docs
@pytest.mark.parametrize(
    "path",
    [path for path in PAGES if any(blocks_to_run(path))],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_the_commands_of_a_page_run(path: Path, tmp_path: Path, programs: Path, finished_run: Path) -> None:
    blocks, _ = documented.read(path)
    documented.write_files(blocks, tmp_path)
    photos(tmp_path / "photos")
    shards(tmp_path / "shards", tmp_path / "photos")
    for name in ("benchmarks", "docker", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "DIR").symlink_to(finished_run)
    for block in blocks_to_run(path):
        shell(tmp_path, programs, block.text)


@pytest.mark.docs
@pytest.mark.parametrize("text", ["distrain train strategy=dpp", "distrain train run_dir=a; false", "nonsense"])
def test_a_block_that_fails_is_noticed(text: str, tmp_path: Path, programs: Path) -> None:
    with pytest.raises(AssertionError, match="exit code"):
        shell(tmp_path, programs, text)
