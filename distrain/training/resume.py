"""Resuming from a checkpoint: which one, whether it is compatible with this run, and what became of each part."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from distrain.checkpoint import format as checkpoint_format
from distrain.checkpoint import module_state, named_state
from distrain.checkpoint import reader as checkpoint_reader
from distrain.checkpoint.format import DamagedCheckpoint
from distrain.checkpoint.progress import Progress
from distrain.checkpoint.restore_report import RestoredPart, table, worst
from distrain.checkpoint.state_schema import check_data, read_state
from distrain.communication.collectives import Communicator
from distrain.config.effects import ARGUMENTS, affected_by, default_of
from distrain.config.load import changes, to_container
from distrain.config.schema import Config
from distrain.data import manifest
from distrain.data.base import DataSpec, source_class
from distrain.data.manifest import data_changes
from distrain.errors import NO_VALUE, ConfigError, show_value
from distrain.files.terminal import FILE_ONLY
from distrain.files.untrusted import read_json
from distrain.optim.optimizers.saved_state import check_saved_state
from distrain.runtime.runtime import Runtime
from distrain.strategies.base import Strategy
from distrain.tasks.base import Task
from distrain.training import callback_list
from distrain.training.averaging import Averages

log = logging.getLogger(__name__)

#: Most changes, and most characters of a value, that a message shows.
_MOST_CHANGES, _LONGEST_VALUE = 20, 200
_START_ANEW = "to start from the beginning choose another run_dir, or resume=never"
#: Old and new value of each configuration key that differs.
Changes = Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Resumed:
    """What a run was resumed from.

    Attributes:
        path: The checkpoint.
        progress: The trainer's position.
        parts: What became of each part of the saved state.
        callbacks: The saved state of each callback, by its name.
    """

    path: Path
    progress: Progress
    parts: list[RestoredPart]
    callbacks: Mapping[str, Mapping[str, Any]]


# --- compatibility ---------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Refuses an incompatible or damaged checkpoint, as far as this can be checked without other ranks.

    Raises:
        ConfigError: ``resume`` names no valid checkpoint, or the saved run's configuration is incompatible with this
            one; the message shows the differences.
    """
    with _refusing_unreadable(config):
        if config.resume not in ("auto", "never"):
            path = Path(config.resume)
            if not path.is_dir():
                raise ConfigError("resume", config.resume, "is not a checkpoint's folder", ["auto", "never", "PATH"])
            try:
                checkpoint_reader.verify(path)
            except DamagedCheckpoint as error:
                raise ConfigError("resume", config.resume, str(error)) from error
        _check_resumed(config, lambda path: refuse_incompatible(config, path, *_read_saved_config(path)))


def check_model(config: Config, model: nn.Module, spec: DataSpec) -> None:
    """Refuses a checkpoint whose model or optimizer's state has other names or shapes; no tensor is read.

    Args:
        config: This run's configuration.
        model: This run's model; its values don't matter.
        spec: Shape and classes of this run's data, which may be why the model differs.

    Raises:
        ConfigError: The model or its optimizer can't load the checkpoint; the message names the first tensors, and how
            the data changed.
    """

    def refuse_misfit(path: Path) -> None:
        try:
            state = read_state(path)
            shapes, optimizer_shapes = (checkpoint_reader.shapes_of(path, part) for part in ("model", "optimizer"))
        except DamagedCheckpoint:  # loading it reports that
            return
        scalars = state["scalars"]
        try:
            module_state.check_fits(model, shapes, scalars.get("module"))
            named_state.check_optimizer(config.optimizer.name, scalars)
            check_saved_state(config.optimizer, model, optimizer_shapes, scalars["optimizer"])
        except ValueError as error:
            changed = data_changes(_saved_data(path, state), asdict(spec))
            because = f" (the data changed: {', '.join(changed)})" if changed else ""
            raise ConfigError("resume", path, f"{error}{because}; {_START_ANEW}") from error

    with _refusing_unreadable(config):
        _check_resumed(config, refuse_misfit)


def changed_data(config: Config, data: Mapping[str, Any]) -> str:
    """One line that says how the data differ from those that the resumed run was trained on; empty if they don't.

    Call it before this start writes ``data.json``, since old checkpoints don't say it themselves.

    Args:
        config: This run's configuration.
        data: Result of :func:`distrain.data.manifest.data_manifest` for this run's data.

    Raises:
        ConfigError: The folder of the checkpoints can't be read.
    """
    with _refusing_unreadable(config):
        for path in reversed(_checkpoints(config)):
            try:
                state = read_state(path)
            except DamagedCheckpoint:  # an older one is resumed
                continue
            saved = _saved_data(path, state)
            return _describe_changes(path, state["progress"], saved, data)
    return ""


def _describe_changes(
    path: Path, progress: Mapping[str, Any], saved: Mapping[str, Any], data: Mapping[str, Any]
) -> str:
    changed = data_changes(saved, data)
    if not changed:
        return ""
    message = (
        f"THE DATA CHANGED since {path.name} was saved: {', '.join(changed)}; the run goes on with the new data, so "
        "its results differ from those of a run that was not interrupted"
    )
    if progress["epoch_samples"] and _samples_of(saved) not in (None, data["samples"]["train"]):
        message += f"; epoch {progress['epoch'] + 1} goes on in another order: it has some samples twice, others never"
    return message


def _saved_data(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint, or else the run that it lies in, says of the data; empty if neither says anything valid."""
    if state.get("data"):
        return dict(state["data"])
    try:
        # Checkpoints of older releases don't say it.
        content = read_json(path.parent.parent / manifest.FILE, manifest.MAX_BYTES)
        check_data(content)
    except (OSError, ValueError):
        return {}
    return content


@contextlib.contextmanager
def _refusing_unreadable(config: Config) -> Iterator[None]:
    """Runs a block that reads checkpoints; an error of the file system names the key."""
    try:
        yield
    except OSError as error:
        key, value = ("resume", config.resume) if config.resume != "auto" else ("run_dir", config.run_dir)
        raise ConfigError(key, value, f"{error.filename} can't be read: {error.strerror}") from error


def _checkpoints(config: Config) -> list[Path]:
    """What may be resumed, oldest first, as far as it is known before the ranks agree on a run folder."""
    if config.resume not in ("auto", "never"):
        return [Path(config.resume)]
    if config.resume == "never" or config.run_dir is None:
        return []
    return checkpoint_format.list_checkpoints(checkpoint_format.checkpoints_folder(Path(config.run_dir)))


def has_checkpoint(config: Config) -> bool:
    """Whether the run may be resumed, as far as it is known before the ranks agree on a run folder."""
    with _refusing_unreadable(config):
        return bool(_checkpoints(config))


def _check_resumed(config: Config, check: Callable[[Path], None]) -> None:
    """Applies a check, which may raise :class:`ConfigError`, to the checkpoint that will be resumed."""
    try:
        for path in _checkpoints(config)[-1:]:
            check(path)
    except ConfigError:
        if config.resume != "auto":
            raise
        # The newest checkpoint may be damaged, and an older one be resumed. Verifying takes time, so only now.
        newest = checkpoint_reader.newest_valid(path.parent)
        if newest is not None:
            check(newest)


def _read_saved_config(path: Path) -> tuple[dict[str, Any] | None, bool]:
    """Configuration of the run that saved a checkpoint, and whether it was saved in the middle of an epoch."""
    try:
        state = read_state(path)
    except DamagedCheckpoint:  # loading it reports that
        return None, False
    # A release that saved no configuration may have written it.
    return state.get("config"), bool(state["progress"]["epoch_samples"])


def refuse_incompatible(config: Config, path: Path, saved: Mapping[str, Any] | None, mid_epoch: bool) -> None:
    """Compares the configuration saved in a checkpoint with this run's.

    Args:
        config: This run's configuration.
        path: The checkpoint.
        saved: The checkpoint's configuration as plain data; ``None`` if it contains none.
        mid_epoch: Whether the checkpoint was saved in the middle of an epoch, whose order of samples must then stay.

    Raises:
        ConfigError: The saved state does not fit this run's configuration.
    """
    changed = changes(saved, to_container(config)) if saved is not None else {}
    compatible = source_class(config.data).compatible_keys
    wrong = {
        key: change
        for key, change in changed.items()
        if _is_incompatible(config, key, change, compatible, mid_epoch=mid_epoch)
    }
    if wrong:
        go_on = ""
        if list(wrong) == ["optimizer.name"]:
            go_on = f"; to go on from it type optimizer={wrong['optimizer.name'][0]}"
        only_order = all("sample_order" in affected_by(config, key) for key in wrong)
        raise ConfigError(
            "resume",
            path,
            f"was saved with another configuration: {_format_changes(wrong)}"
            + (" (in the middle of an epoch, whose order of samples would change)" if only_order else "")
            + f"{go_on}; {_START_ANEW}",
        )


def _is_incompatible(
    config: Config, key: str, change: tuple[str, str], compatible_data_keys: Set[str], *, mid_epoch: bool
) -> bool:
    if change[0] == NO_VALUE and change[1] == show_value(default_of(config, key)):
        return False
    if "sample_order" in affected_by(config, key):
        return mid_epoch
    # A key that only one side has was added or removed by a release, or belongs to a choice whose name differs too.
    if NO_VALUE in change and not key.startswith(tuple(f"{name}." for name in ARGUMENTS)):
        return False
    if key.startswith("data."):
        return key.split(".")[1] not in compatible_data_keys
    if key == "prune.amount":  # without one, layers have no masks
        return "null" in change
    return key.startswith(("model.", "lora.", "prune.exclude")) or key in ("optimizer.name", "optimizer._target_")


def _format_changes(changes: Changes) -> str:
    shown = [f"{_shortened(key)}: {_shortened(old)} → {_shortened(new)}" for key, (old, new) in changes.items()]
    return ", ".join(shown[:_MOST_CHANGES]) + (
        f" and {len(shown) - _MOST_CHANGES} more" if len(shown) > _MOST_CHANGES else ""
    )


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def saved_trainer_config(config: Config, runtime: Runtime) -> dict[str, Any]:
    """The section ``trainer`` of the run that ``resume`` continues; all ranks call it together.

    Rank 0 reads it from the newest checkpoint that contains a configuration.

    Returns:
        The section as plain data, the same on all ranks; empty if no checkpoint is resumed.
    """

    def trainer_section(path: Path) -> dict[str, Any] | None:
        saved = _read_saved_config(path)[0]
        section = {} if saved is None else saved.get("trainer")
        return None if saved is None else section if isinstance(section, dict) else {}

    return _newest(config, runtime, trainer_section)


def saved_layout(config: Config, runtime: Runtime) -> dict[str, Any]:
    """How the ranks of the run that ``resume`` continues were arranged; all ranks call it together.

    Returns:
        ``Strategy.layout`` of the newest checkpoint that says it, the same on all ranks; empty if there is none.
    """

    def layout(path: Path) -> dict[str, Any] | None:
        try:
            return dict(read_state(path)["layout"])
        except DamagedCheckpoint:  # an older one is resumed
            return None

    return _newest(config, runtime, layout)


def _newest(config: Config, runtime: Runtime, read: Callable[[Path], dict[str, Any] | None]) -> dict[str, Any]:
    """What rank 0 reads from the newest checkpoint that contains it, on all ranks; empty if none does."""
    found = None
    if runtime.is_main and config.resume != "never":
        paths = [Path(config.resume)]
        if config.resume == "auto":
            paths = checkpoint_format.list_checkpoints(checkpoint_format.checkpoints_folder(runtime.run_dir))[::-1]
        found = next((content for content in map(read, paths) if content is not None), None)
    content: dict[str, Any] = runtime.communicator().all_gather_json({"newest": found or {}}, runtime.device)[0][
        "newest"
    ]
    return content


def will_resume(config: Config, runtime: Runtime) -> bool:
    """Whether :func:`resume` will restore a checkpoint, or fail; all ranks call it together.

    A newest checkpoint that is valid is looked for only if the answer matters, since that takes time.
    """
    if config.init.weights is None or config.resume == "never":
        return False
    if config.resume != "auto":
        return True
    return newest_checkpoint(runtime, runtime.communicator()) is not None


# --- resuming --------------------------------------------------------------------------------------------------------


def newest_checkpoint(runtime: Runtime, training_group: Communicator, before: Path | None = None) -> Path | None:
    """The newest valid checkpoint of this run, chosen by rank 0; all ranks call it together.

    Args:
        runtime: This rank's surroundings.
        training_group: The ranks that train.
        before: A checkpoint that could not be loaded; an older one is chosen.
    """
    folder = checkpoint_format.checkpoints_folder(runtime.run_dir)
    newest = checkpoint_reader.newest_valid(folder, before) if training_group.rank == 0 else None
    names = training_group.all_gather_json({"name": newest.name if newest is not None else None}, runtime.device)
    name = names[0]["name"]
    return None if name is None else folder / name


def resume(
    config: Config, runtime: Runtime, strategy: Strategy, averages: Averages, task: Task, samples: int
) -> Resumed | None:
    """Restores the checkpoint that ``resume`` chooses; all ranks call it together, and restore the same one.

    Args:
        config: This run's configuration.
        runtime: This rank's surroundings.
        strategy: Is set up; its state is restored.
        averages: Of the strategy's model; they are restored too.
        task: What the model is trained to do.
        samples: Number of training samples in an epoch.

    Returns:
        What was restored; ``None`` if the run starts from the beginning.

    Raises:
        ConfigError: A rank can't read the checkpoint that ``resume`` names, or a checkpoint does not fit this run.
    """
    path = None
    if config.resume == "auto":
        path = newest_checkpoint(runtime, strategy.training_group)
    elif config.resume != "never":
        path = Path(config.resume)
    while path is not None:
        loaded = read(runtime, strategy.training_group, task, path)
        if not isinstance(loaded, str):
            return _restore(config, runtime, strategy, averages, path, samples, *loaded)
        if config.resume != "auto":
            raise ConfigError("resume", path, loaded)
        if runtime.is_main:
            log.warning("checkpoint left out: %s: %s", path, loaded)
        path = newest_checkpoint(runtime, strategy.training_group, before=path)
    return None


def read(runtime: Runtime, group: Communicator, task: Task, path: Path) -> tuple[dict[str, Any], Progress] | str:
    """A checkpoint's state and position; or why a rank can't read it, the same on all ranks, which call it together."""
    problem = ""
    try:
        state, position = checkpoint_reader.load(path)
        progress = Progress.read(position, len(task.metrics))
    except (OSError, ValueError) as error:
        problem = str(error)
    problems = group.all_gather_json({"problem": problem, "host": runtime.world.host}, runtime.device)
    for rank, report in enumerate(problems):
        if report["problem"]:
            return f"rank {rank} on {report['host']} can't read it: {report['problem']}"
    return state, progress


def _restore(
    config: Config,
    runtime: Runtime,
    strategy: Strategy,
    averages: Averages,
    path: Path,
    samples: int,
    state: dict[str, Any],
    progress: Progress,
) -> Resumed:
    """Gives a checkpoint's state to the strategy, and reports what became of each part."""
    group = strategy.training_group
    saved: Mapping[str, Any] | None = state.get("config")
    refuse_incompatible(config, path, saved, bool(progress.epoch_samples))
    try:
        strategy.begin_epoch(progress.epoch)
        restored = strategy.load_state_dict(state) + averages.load(state)
    except ValueError as error:
        raise ConfigError("resume", path, str(error)) from error
    by_rank = group.all_gather_json({"parts": [astuple(part) for part in restored]}, runtime.device)
    parts = worst([[RestoredPart(*row) for row in rank["parts"]] for rank in by_rank])
    changed = changes(saved, to_container(config)) if saved is not None else {}
    # Only what trains differently is told; a key that only one side has belongs to a choice whose name differs too.
    changed = {
        key: change
        for key, change in changed.items()
        if not affected_by(config, key) & {"start", "identity", "execution"} and NO_VALUE not in change
    }
    same_layout = strategy.is_arranged_as(state["layout"])
    parts += _trainer_parts(
        config, progress, changed, _samples_of(state.get("data") or {}), samples, same_layout=same_layout
    )
    before, now = (f"{layout['strategy']} on {layout['world_size']}" for layout in (state["layout"], strategy.layout))
    log.info("resumed from %s: step %d, epoch %d", path, progress.step, progress.epoch)
    log.info("of what was saved by %s, this run (%s) has:\n%s", before, now, table(parts), extra=FILE_ONLY)
    differing = [part for part in parts if part.how not in ("exact", "absent")]
    if differing:
        log.info("not as in the run that was saved:\n%s", table(differing))
    if saved is None:
        log.info("the checkpoint doesn't contain its configuration, so it was not compared with this run's")
    for key, (old, new) in changed.items():
        log.info("changed: %s: %s → %s", _shortened(key), _shortened(old), _shortened(new))
    return Resumed(path, progress, parts, callback_list.saved_state(state))


def _trainer_parts(
    config: Config,
    progress: Progress,
    changes: Changes,
    saved_samples: int | None,
    samples: int,
    *,
    same_layout: bool,
) -> list[RestoredPart]:
    """What became of the parts that do not depend on the strategy: schedule, position, random numbers, best score."""
    step, epoch, consumed = progress.step, progress.epoch, progress.epoch_samples
    schedule_changes = {key: change for key, change in changes.items() if "schedule" in affected_by(config, key)}
    schedule = RestoredPart("schedule", "exact", f"a function of the step, {step}")
    if schedule_changes:
        schedule = RestoredPart("schedule", "changed", f"from step {step} on by {_format_changes(schedule_changes)}")
    order_changes = {key: change for key, change in changes.items() if "sample_order" in affected_by(config, key)}
    position = RestoredPart("data position", "exact", f"epoch {epoch}, {consumed} of {samples} samples seen")
    if order_changes:
        why = f"epoch {epoch} in another order: {_format_changes(order_changes)}"
        position = RestoredPart("data position", "changed", why)
    elif consumed and saved_samples not in (None, samples):
        why = f"epoch {epoch}, {consumed} of {saved_samples} samples seen; there are {samples} now, in another order"
        position = RestoredPart("data position", "changed", why)
    draws = RestoredPart("random draws", "exact", "functions of seed, step and sample")
    if "seed" in changes:
        draws = RestoredPart("random draws", "reset", f"of another seed: {_format_changes({'seed': changes['seed']})}")
    elif not same_layout:
        why = "order and augmentation exact; dropout depends on how a batch is divided"
        draws = RestoredPart("random draws", "redistributed", why)
    best = RestoredPart("best metric", "absent", "no evaluation yet")
    if progress.best_score is not None:
        best = RestoredPart("best metric", "exact", f"{progress.best_score:.4f} at step {progress.best_step}")
    return [schedule, position, draws, best]


def _samples_of(data: Mapping[str, Any]) -> int | None:
    """Number of training samples that a manifest of data says; ``None`` in those of older releases."""
    samples: int | None = data.get("samples", {}).get("train")
    return samples


def finished_summary(run_dir: Path, step: int) -> dict[str, Any] | None:
    """Content of ``summary.json`` if it is of a run that finished at this step, else ``None``."""
    try:
        summary = read_json(run_dir / "summary.json", checkpoint_format.MAX_JSON_BYTES)
        return summary if summary["steps"] == step else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
