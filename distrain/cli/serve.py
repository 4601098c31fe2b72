"""Serves a run's model over HTTP."""

from __future__ import annotations

import functools
import importlib
import os
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distrain.cli.run_folder import LAST
from distrain.cli.settings import RunSettings, require_one_process
from distrain.config.schema import DEVICE_DOC, DEVICES
from distrain.config.setting import setting
from distrain.errors import EXIT_REFUSED, ConfigError, config_error
from distrain.files.terminal import print_to_stderr, show
from distrain.runtime.device import available_cores, choose_threads
from distrain.runtime.world import World

if TYPE_CHECKING:
    from distrain.tools.serving.model import Source

_MILLION = 1_000_000
#: What ``distrain[serve]`` installs, as modules.
_MODULES = ("fastapi", "uvicorn", "httptools", "python_multipart", "prometheus_client")
_ONNX, _TORCH_EXPORT, _BEST = ".onnx", ".pt2", "best"
#: Seconds after which a thread must give the interpreter's lock to one that waits. The model's thread needs it after
#: each operation, and with Python's 5 ms it would wait long for the threads of requests each time.
_SWITCH_SECONDS = 1e-4


@dataclass
class ServeSettings(RunSettings):
    """Keys of ``distrain serve``."""

    run: str = setting("Folder of the run, or an .onnx or .pt2 file of distrain export.", path=True)
    checkpoint: str = setting("best (by validation score), newest, or the folder of a checkpoint.", path=True)
    host: str = setting("Address that requests are accepted at; 0.0.0.0: at all addresses of this machine.")
    port: int = setting("TCP port; 0: one that is free.", at_least=0, at_most=65535)
    workers: int = setting("Processes, each with a model of its own.", at_least=1)
    device: str = setting(DEVICE_DOC, choices=DEVICES)
    threads: int | None = setting(
        "CPU threads of each worker's model; null: the cores, shared among the workers.", at_least=1
    )
    max_batch_size: int = setting("Images that go through the model together at most; 1: no batching.", at_least=1)
    batch_timeout_ms: float = setting(
        "Milliseconds that an image waits for others at most, while the model is idle.", at_least=0
    )
    max_queue: int = setting(
        "Images that each worker decodes or keeps waiting at most; further requests get status 503.",
        at_least=1,
    )
    max_connections: int = setting("Open connections of each worker at most.", at_least=1)
    max_request_mb: float = setting("Largest body of a request in MB (1 MB = 1,000,000 bytes).", above=0, at_most=1000)
    max_megapixels: float = setting(
        "Most pixels of an image, in millions; larger ones are refused before they are decoded.", above=0, at_most=89
    )
    receive_timeout: float = setting(
        "Seconds in which the header of a request must arrive, and then its body.", above=0
    )
    request_timeout: float = setting(
        "Seconds after which a request that has arrived is answered at the latest, if by status 504.", above=0
    )
    stop_timeout: float = setting("Seconds that accepted requests have after SIGTERM or Ctrl-C.", at_least=1)
    reload_every: float = setting(
        "Seconds between two looks for a newer best checkpoint (or a newer file); 0: never.", at_least=0
    )
    allow: list[str] = setting(
        "Dotted prefixes, besides distrain's, from which the run's model and choices may be imported; their code runs."
    )
    trust_file: bool = setting(
        "A .pt2 file is read only if this is true, since torch runs code that such a file contains: say so if you "
        "trust whoever wrote it."
    )


def run(settings: ServeSettings) -> int:
    """Serves until SIGTERM or Ctrl-C, and answers all accepted requests then.

    Returns:
        The exit code: 0, or that of a worker that could not start.

    Raises:
        ConfigError: A package is missing, the run can't be used, or the address is not free.
    """
    require_one_process("serve", World.from_environment())
    _require_packages()
    # Imported here because it needs these packages.
    from distrain.tools.serving import server, workers

    if settings.workers > 1:
        # What is wrong with the run is said once and not by each worker.
        source_of(settings).newest()
    try:
        listening = server.bind(settings.host, settings.port)
    except OSError as error:
        problem = f"can't be used at host={settings.host} ({error.strerror or error})"
        raise ConfigError("port", settings.port, problem) from error
    with listening:
        # Before the workers close it.
        address = server.url(listening)
        if settings.workers == 1:
            work(settings, listening, lambda about: show(f"serving {about} at {address} (Ctrl-C stops)"))
            return 0
        started = f"serving {settings.run} by {settings.workers} workers at {address} (Ctrl-C stops)"
        started_all = functools.partial(show, started)
        return workers.Workers(
            settings.workers, functools.partial(work_for_parent, settings), listening, settings.stop_timeout
        ).run(started_all)


def work_for_parent(settings: ServeSettings, listening: socket.socket, on_start: Callable[[], None]) -> None:
    """What a worker process does; it ends with an exit code of its own if it can't start."""
    code = 0
    try:
        work(settings, listening, lambda _: on_start())
    except ConfigError as error:
        print_to_stderr(f"distrain: {error}")
        code = EXIT_REFUSED
    # A thread may still work on an answer that has been given up.
    os._exit(code)


def work(settings: ServeSettings, listening: socket.socket, on_start: Callable[[str], None]) -> None:
    """Loads the model, and serves it in this process.

    Args:
        settings: The keys.
        listening: A bound socket.
        on_start: Called with the model's name when connections are accepted.

    Raises:
        ConfigError: The model can't be used.
    """
    from distrain.tools.serving import app, server
    from distrain.tools.serving.answering import ServingOptions
    from distrain.tools.serving.limits import Limits
    from distrain.tools.serving.metrics import Metrics
    from distrain.tools.serving.model import CurrentModel

    # Pillow warns about images that it can read nevertheless.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    torch.set_num_threads(threads_of(settings))
    sys.setswitchinterval(_SWITCH_SECONDS)
    limits = Limits(
        request_bytes=round(settings.max_request_mb * _MILLION),
        pixels=round(settings.max_megapixels * _MILLION),
        queue=settings.max_queue,
        receive_seconds=settings.receive_timeout,
        answer_seconds=settings.request_timeout,
        connections=settings.max_connections,
    )
    options = ServingOptions(
        limits=limits,
        max_batch_size=settings.max_batch_size,
        batch_timeout=settings.batch_timeout_ms / 1000,
        reload_seconds=settings.reload_every,
        decoders=max(1, available_cores() // settings.workers),
    )
    metrics = Metrics()
    current = CurrentModel(source_of(settings), sorted({1, settings.max_batch_size}), metrics)
    about = current.model.about
    built = app.build(current, options, metrics)
    name = f"{about.name} ({about.model}, {len(about.classes)} classes)"
    server.run(server.make_server(built, limits, settings.stop_timeout, lambda: on_start(name)), listening)


def source_of(settings: ServeSettings) -> Source:
    """Where the models come from that the keys name.

    Raises:
        ConfigError: There is no such run or file.
    """
    path = Path(settings.run)
    kind = "" if path.is_dir() else path.suffix.lower()
    if settings.trust_file and kind != _TORCH_EXPORT:
        raise ConfigError("trust_file", True, f"is for a {_TORCH_EXPORT} file")
    if path.is_dir():
        from distrain.cli.served_run import RunSource

        return RunSource(settings.run, settings.checkpoint, settings.weights, settings.device, settings.allow)
    if not path.is_file():
        raise ConfigError("run", settings.run, "is neither a run's folder nor a file")
    if kind not in (_ONNX, _TORCH_EXPORT):
        problem = f"serve reads a run's folder, or an {_ONNX} or {_TORCH_EXPORT} file of: distrain export format=onnx"
        raise ConfigError("run", settings.run, f"{problem} (or torch_export)")
    for key, default in (("checkpoint", _BEST), ("weights", LAST)):
        if getattr(settings, key) != default:
            raise ConfigError(key, getattr(settings, key), f"is for a run's folder; {settings.run} holds one model")
    if settings.device not in ("auto", "cpu"):
        raise ConfigError("device", settings.device, f"{kind} files run on the CPU", ["auto", "cpu"])
    from distrain.tools.serving import onnx_program, torch_program
    from distrain.tools.serving.program_model import ProgramFile

    if kind == _ONNX:
        return ProgramFile(path, functools.partial(onnx_program.load, threads=threads_of(settings)))
    if not settings.trust_file:
        problem = "torch runs code that such a file contains; trust_file=true if you trust whoever wrote it"
        raise ConfigError("run", settings.run, f"{problem}, or serve a file of: distrain export format=onnx")
    return ProgramFile(path, torch_program.load)


def threads_of(settings: ServeSettings) -> int:
    """CPU threads of one worker's model."""
    return choose_threads(settings.threads, World(0, settings.workers, 0, settings.workers, ""))


def _require_packages() -> None:
    for name in _MODULES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise config_error("serve", f"needs {name} ({error}); run pip install 'distrain[serve]'") from error
