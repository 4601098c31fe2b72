"""``logger=wandb``: a run of Weights & Biases, also offline."""

from __future__ import annotations

import importlib.util
import io
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

from distrain.config.registry import register
from distrain.config.setting import setting
from distrain.errors import EXIT_STOPPED, ConfigError
from distrain.reporting.loggers.base import Scalars
from distrain.reporting.loggers.remote import Note, RemoteConfig, RemoteLogger, Row, Service

log = logging.getLogger(__name__)


@dataclass
class WandbConfig(RemoteConfig):
    """Keys of ``logger=wandb``."""

    project: str = setting("Name of the project that the run is in.")
    entity: str | None = setting("User or team that the project belongs to; null: W&B's default.")
    run_name: str | None = setting("Name of the run; null: the last parts of run_dir.")
    mode: str = setting(
        "online: sends to W&B; offline: writes into the run's folder, for the command wandb sync.",
        choices=("online", "offline"),
    )

    @override
    def check(self) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ConfigError("logger", "wandb", "needs wandb; run pip install 'distrain[wandb]'")
        if self.mode == "online":
            import wandb

            if not wandb.login(prompt=False):
                problem = "needs a key of W&B: run wandb login, or set WANDB_API_KEY"
                raise ConfigError("logger.mode", self.mode, problem, ["online", "offline"])


@register("logger", "wandb", WandbConfig)
class WandbLogger(RemoteLogger):
    """A run of Weights & Biases: curves over ``step``, configuration, final metrics and figures.

    The file ``wandb.json`` of the run's folder says which run it is, and what has been sent.
    """

    @override
    def make_service(self, config: WandbConfig, run_dir: Path) -> Service:
        return WandbService(config, run_dir, self.note("wandb.json"))


class WandbService(Service):
    """The package ``wandb``, which has a process of its own that talks to W&B.

    Args:
        config: The logger's keys.
        run_dir: The run's folder.
        note: Says which run of W&B it is, and what has been sent.
    """

    def __init__(self, config: WandbConfig, run_dir: Path, note: Note) -> None:
        super().__init__(note)
        self._config, self._run_dir = config, run_dir
        self._run: Any = None
        self._known: dict[str, Any] = {}

    @override
    def open(self, *, new: bool) -> Mapping[str, int]:
        # Imported in the thread, since it takes seconds.
        import wandb

        config, run_dir = self._config, self._run_dir.resolve()
        self._known = {} if new else self.note.read()
        run_id, sent = self._known.get("run_id"), self._known.get("sent")
        if isinstance(run_id, str) and isinstance(sent, dict):
            self._known["sent"] = {name: step for name, step in sent.items() if type(step) is int}
        else:
            self._known = {"run_id": uuid.uuid4().hex[:12], "sent": {}}
        self._wait_for_a_new_folder(run_dir)
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.run_name or "/".join(run_dir.parts[-2:]),
            id=self._known["run_id"],
            resume="allow",
            dir=str(run_dir),
            mode=config.mode,
            # The terminal and the signals are distrain's.
            settings=wandb.Settings(silent=True, console="off"),
        )
        # W&B's own step can't go back, and counts calls; ours is a number as the others are.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self.note.write(self._known)
        where = run_dir / "wandb" if config.mode == "offline" else self._run.url
        log.info("W&B: run %s of project %s: %s", self._run.id, config.project, where)
        return dict(self._known["sent"])

    def _wait_for_a_new_folder(self, run_dir: Path) -> None:
        """Waits up to a second: W&B names folders by the second, and two starts in one second would write into one."""
        while any((run_dir / "wandb").glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{self._known['run_id']}")):
            time.sleep(0.05)

    @override
    def send(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._log(row.step, row.values)
        self.note.write(self._known)

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        # A call that failed after it had logged, on a full disk, is made again.
        missing = {name: value for name, value in values.items() if self._known["sent"].get(name, -1) < step}
        if missing:
            self._run.log({**missing, "step": step})
            self._known["sent"] = {**self._known["sent"], **dict.fromkeys(missing, step)}

    @override
    def parameters(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    @override
    def figure(self, step: int, name: str, png: bytes) -> None:
        import wandb
        from PIL import Image

        self._log(step, {name: wandb.Image(Image.open(io.BytesIO(png)))})
        self.note.write(self._known)

    @override
    def histogram(self, step: int, name: str, counts: Sequence[int], edges: Sequence[float]) -> None:
        import wandb

        self._log(step, {name: wandb.Histogram(np_histogram=(list(counts), list(edges)))})
        self.note.write(self._known)

    @override
    def final(self, step: int, metrics: Scalars) -> None:
        self._run.summary.update(dict(metrics))

    @override
    def end(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else EXIT_STOPPED)
