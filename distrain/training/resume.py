"""Going on from a checkpoint: which one, whether it fits this run, and what became of each of its parts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint.format import DamagedCheckpoint
from distrain.checkpoint.progress import Progress
from distrain.checkpoint.restore_report import RestoredPart, table, worst
from distrain.communication.collectives import Communicator
from distrain.config.load import changes, to_container
from distrain.config.schema import Config
from distrain.data.base import source_class
from distrain.errors import NO_VALUE, ConfigError
from distrain.files.untrusted import read_json
from distrain.runtime.runtime import Runtime
from distrain.strategies.base import Strategy
from distrain.tasks.base import Task

log = logging.getLogger(__name__)

#: What an epoch's order depends on: between epochs it may change.
_ORDER = ("seed", "data.limit")
#: What the rate at a step depends on.
_SCHEDULE = ("scheduler.", "optimizer.lr", "trainer.epochs", "trainer.max_steps", "data.batch_size", "data.limit")
#: Where a run writes and how it was started.
_ELSEWHERE = ("run_dir", "resume", "experiment")


@dataclass(frozen=True)
class Resumed:
    """What a run goes on from.

    Attributes:
        path: The checkpoint.
        progress: The trainer's position.
        parts: What became of each part.
    """

    path: Path
    progress: Progress
    parts: list[RestoredPart]


# --- does it fit? ----------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Refuses a checkpoint that this run can't go on from, as far as that can be seen without talking to other ranks.

    Raises:
        ConfigError: ``resume`` names no sound checkpoint, or the run that would be gone on with was configured so
            differently that its state means something else; the difference is shown.
    """
    if config.resume == "never":
        return
    if config.resume != "auto":
        path = Path(config.resume)
        if not path.is_dir():
            raise ConfigError("resume", config.resume, "is not a checkpoint's folder", ["auto", "never", "PATH"])
        try:
            checkpoint_reader.verify(path)
        except DamagedCheckpoint as error:
            raise ConfigError("resume", config.resume, str(error)) from error
        refuse_if_changed(config, path, *_peek(path))
    elif config.run_dir is not None:
        folder = checkpoint_format.checkpoints_folder(Path(config.run_dir))
        try:
            for path in checkpoint_format.list_checkpoints(folder)[-1:]:
                refuse_if_changed(config, path, *_peek(path))
        except ConfigError:
            # It may be damaged, and not the one that will be chosen. To look at that costs time.
            chosen = checkpoint_reader.newest_valid(folder)
            if chosen is not None:
                refuse_if_changed(config, chosen, *_peek(chosen))


def _peek(path: Path) -> tuple[dict[str, Any] | None, bool]:
    """The configuration of the run that saved a checkpoint, if it says, and whether it was amid an epoch."""
    try:
        held = read_json(path / "state.json", checkpoint_format.MAX_JSON_BYTES)
        return dict(held["config"]), bool(held["progress"]["epoch_samples"])
    except (OSError, ValueError, TypeError, KeyError):
        # Damaged, or of before configurations were saved: loading it will tell.
        return None, False


def refuse_if_changed(config: Config, path: Path, saved: Mapping[str, Any] | None, amid_epoch: bool) -> None:
    """Compares the configuration that was saved with this run's.

    Args:
        config: This run's.
        path: The checkpoint.
        saved: Its configuration as plain data; ``None`` where it holds none.
        amid_epoch: Whether it was saved amid an epoch, whose order of samples must then stay.

    Raises:
        ConfigError: A difference with which the saved state would mean something else.
    """
    found = changes(saved, to_container(config)) if saved is not None else {}
    compatible = source_class(config.data).compatible_keys
    wrong = {
        key: change
        for key, change in found.items()
        if _means_something_else(key, change, compatible, amid_epoch=amid_epoch)
    }
    if wrong:
        raise ConfigError(
            "resume",
            path,
            f"was saved with another configuration: {_shown(wrong)}"
            + (" (amid an epoch, whose order of samples would change)" if wrong.keys() <= {*_ORDER} else "")
            + "; to begin anew take another run_dir, or resume=never",
        )


def _means_something_else(
    key: str, change: tuple[str, str], compatible_data_keys: Set[str], *, amid_epoch: bool
) -> bool:
    if key in _ORDER:
        return amid_epoch
    # A key that one of the two lacks came or went with a release, or belongs to a choice that differs by name.
    if NO_VALUE in change and not key.startswith("model.kwargs."):
        return False
    if key.startswith("data."):
        return key.split(".")[1] not in compatible_data_keys
    return key.startswith("model.") or key == "optimizer.name"


def _shown(changes: Mapping[str, tuple[str, str]]) -> str:
    return ", ".join(f"{key}: {old} → {new}" for key, (old, new) in changes.items())


def trainer_of_before(config: Config, runtime: Runtime) -> dict[str, Any]:
    """What the run that ``resume`` goes on with was configured to as ``trainer``; all ranks call it together.

    It is read from the newest checkpoint that says so, by rank 0; empty where the run begins anew.
    """
    held: object = None
    if runtime.is_main and config.resume != "never":
        paths = [Path(config.resume)]
        if config.resume == "auto":
            paths = checkpoint_format.list_checkpoints(checkpoint_format.checkpoints_folder(runtime.run_dir))[::-1]
        saved = next((found for path in paths if (found := _peek(path)[0]) is not None), {})
        held = saved.get("trainer")
    held = held if isinstance(held, dict) else {}
    trainer: dict[str, Any] = runtime.communicator().all_gather_json({"trainer": held}, runtime.device)[0]["trainer"]
    return trainer


# --- going on --------------------------------------------------------------------------------------------------------


def newest(runtime: Runtime, everyone: Communicator) -> Path | None:
    """The newest sound checkpoint of this run, by rank 0's choice; all ranks call it together."""
    folder = checkpoint_format.checkpoints_folder(runtime.run_dir)
    found = checkpoint_reader.newest_valid(folder) if everyone.rank == 0 else None
    name = everyone.all_gather_json({"name": found.name if found is not None else None}, runtime.device)[0]["name"]
    return None if name is None else folder / name


def resume(config: Config, runtime: Runtime, strategy: Strategy, task: Task, samples: int) -> Resumed | None:
    """Goes on from what ``resume`` says, all ranks from the same; all ranks call it together.

    Args:
        config: This run's configuration.
        runtime: This rank's surroundings.
        strategy: Set up; takes its state back.
        task: What the model is trained to do.
        samples: Training samples of an epoch.

    Returns:
        What was found; ``None`` where the run begins anew.

    Raises:
        ConfigError: A rank can't read the checkpoint, or it doesn't fit this run.
    """
    everyone = strategy.training_group
    path = None
    if config.resume == "auto":
        path = newest(runtime, everyone)
    elif config.resume != "never":
        path = Path(config.resume)
    return _load(config, runtime, strategy, task, path, samples) if path is not None else None


def _load(config: Config, runtime: Runtime, strategy: Strategy, task: Task, path: Path, samples: int) -> Resumed:
    everyone = strategy.training_group
    problem = ""
    try:
        state, where = checkpoint_reader.load(path)
        progress = Progress.read(where, len(task.metrics))
    except (DamagedCheckpoint, OSError, ValueError) as error:
        problem = str(error)
    for rank, told in enumerate(
        everyone.all_gather_json({"problem": problem, "host": runtime.world.host}, runtime.device)
    ):
        if told["problem"]:
            raise ConfigError("resume", path, f"rank {rank} on {told['host']} can't read it: {told['problem']}")
    saved: Mapping[str, Any] | None = state.get("config")
    refuse_if_changed(config, path, saved, bool(progress.epoch_samples))
    try:
        mine = strategy.load_state_dict(state)
    except ValueError as error:
        raise ConfigError("resume", path, str(error)) from error
    said = everyone.all_gather_json({"parts": [astuple(part) for part in mine]}, runtime.device)
    parts = worst([[RestoredPart(*row) for row in each["parts"]] for each in said])
    changed = changes(saved, to_container(config)) if saved is not None else {}
    # A key that only one of the two has belongs to a choice that differs by name.
    changed = {k: change for k, change in changed.items() if k not in _ELSEWHERE and NO_VALUE not in change}
    parts += _trainers_parts(progress, changed, samples, same_layout=state["layout"] == strategy.layout)
    before, now = (f"{each['strategy']} on {each['world_size']}" for each in (state["layout"], strategy.layout))
    log.info("resumed from %s: step %d, epoch %d", path, progress.step, progress.epoch)
    log.info("of what was saved by %s, this run (%s) has:\n%s", before, now, table(parts))
    if saved is None:
        log.info("the checkpoint doesn't hold its configuration, so nothing was compared with this run's")
    for key, (old, new) in changed.items():
        log.info("changed: %s: %s → %s", key, old, new)
    return Resumed(path, progress, parts)


def _trainers_parts(
    progress: Progress, changes: Mapping[str, tuple[str, str]], samples: int, *, same_layout: bool
) -> list[RestoredPart]:
    """What becomes of that which no strategy has a part in."""
    step, epoch, consumed = progress.step, progress.epoch, progress.epoch_samples
    rate = {key: change for key, change in changes.items() if key.startswith(_SCHEDULE)}
    schedule = RestoredPart("schedule", "exact", f"a function of the step, {step}")
    if rate:
        schedule = RestoredPart("schedule", "changed", f"from step {step} on by {_shown(rate)}")
    order = {key: change for key, change in changes.items() if key in _ORDER}
    position = RestoredPart(
        "data position", "exact", f"epoch {epoch}, {consumed} of {samples} samples seen, the rest to come once"
    )
    if order:
        position = RestoredPart("data position", "changed", f"epoch {epoch} in another order: {_shown(order)}")
    draws = RestoredPart("random draws", "exact", "of seed, step and sample")
    if "seed" in changes:
        draws = RestoredPart("random draws", "reset", f"of another seed: {_shown({'seed': changes['seed']})}")
    elif not same_layout:
        draws = RestoredPart(
            "random draws", "redistributed", "order and augmentation exact; dropout's go by share of a batch"
        )
    best = RestoredPart("best metric", "absent", "no evaluation yet")
    if progress.best_score is not None:
        best = RestoredPart("best metric", "exact", f"{progress.best_score:.4f} at step {progress.best_step}")
    return [schedule, position, draws, best]


def finished(run_dir: Path, step: int) -> dict[str, Any] | None:
    """What ``summary.json`` says of a run that ended at this step; ``None`` where it says nothing of it."""
    try:
        summary = read_json(run_dir / "summary.json", checkpoint_format.MAX_JSON_BYTES)
        return summary if summary["steps"] == step else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
