"""Runs the processes that decode images, see :mod:`distrain.data.decode`, and collects what they report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

import distrain
from distrain.data import decode
from distrain.errors import ConfigError


def run(
    job: Mapping[str, Any], path: Path, processes: int, images: int, report_broken: Callable[[int, str], None]
) -> dict[int, str]:
    """Decodes the images of a job.

    Args:
        job: What :func:`distrain.data.decode.decode_chunks` takes.
        path: Where to write the job for the processes to read.
        processes: Number of processes.
        images: Number of images.
        report_broken: Called with the index of each image that can't be decoded, and the reason; may raise.

    Returns:
        The index of each image that can't be decoded and the reason, in order.

    Raises:
        ConfigError: A process was ended.
        OSError: A process can't write its result.
    """
    path.write_text(json.dumps(job))
    reader, writer = os.pipe()
    # Workers must import this package, and no modules from the current folder, which may be a folder of untrusted
    # images. Python 3.10 ignores PYTHONSAFEPATH, so the workers' current folder is changed too.
    source = os.fspath(Path(distrain.__file__).resolve().parent.parent)
    paths = [os.fspath(Path(part).absolute()) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([source, *paths]),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
    }
    workers: list[subprocess.Popen[bytes]] = []
    with os.fdopen(reader, "rb") as lines:
        try:
            try:
                for index in range(processes):
                    arguments = [os.fspath(path.absolute()), str(index), str(processes)]
                    worker = subprocess.Popen(  # noqa: S603
                        [sys.executable, "-m", decode.__name__, *arguments],
                        stdin=subprocess.DEVNULL,
                        stdout=writer,
                        env=environment,
                        cwd=source,
                    )
                    workers.append(worker)
            finally:
                os.close(writer)
            broken = _collect_reports(lines, images, report_broken)
            codes = [worker.wait() for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    if any(codes):
        problem = f"a decoding process ended with exit code {next(filter(None, codes))}"
        raise ConfigError("data.workers", processes, problem)
    return dict(sorted(broken.items()))


def _collect_reports(lines: IO[bytes], images: int, report_broken: Callable[[int, str], None]) -> dict[int, str]:
    """Reads the workers' messages until all workers have ended; returns the reasons of broken images by index."""
    broken: dict[int, str] = {}
    with tqdm(desc="decoding", total=images, unit="image", disable=None) as bar:
        for line in lines:
            message: dict[str, Any] = json.loads(line)
            bar.update(message.get("done", 0))
            if "failed" in message:
                raise OSError(f"a decoding process failed ({message['failed']})")
            if "broken" in message:
                broken[message["broken"]] = message["reason"]
                report_broken(message["broken"], message["reason"])
    return broken
