"""``distrain.fit``: a training of objects, by the code that the command ``train`` runs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from distrain.api.arrays import data_object
from distrain.api.ranks import run_on_ranks
from distrain.api.result import Result
from distrain.api.run import Run
from distrain.api.settings import build_config, merge
from distrain.api.surroundings import name_refusal_at_exit, restored_surroundings
from distrain.api.training import Training
from distrain.checkpoint.format import checkpoints_folder
from distrain.data.python_object import PythonObjectDataConfig
from distrain.errors import ConfigError, config_error
from distrain.models.python_object import ModelObject
from distrain.runtime import program
from distrain.runtime.garbage_collection import free_finished_trainings
from distrain.runtime.world import World
from distrain.tasks.base import target_of
from distrain.tools.launching import slurm
from distrain.tools.launching.launch_keys import LaunchSettings
from distrain.training.callbacks import Callback

#: Wrappers that distrain replaces by its own, by class name, and what to pass instead.
_WRAPPERS = {
    "DistributedDataParallel": "its module, model.module",
    "DataParallel": "its module, model.module",
    "FullyShardedDataParallel": "the module before it was wrapped",
    "OptimizedModule": "the module itself, and keys={'trainer.compile': True}",
}


def fit(
    model: ModelObject | str,
    train: Any,
    *,
    val: Any = None,
    test: Any = None,
    classes: int | Sequence[str] | None = None,
    nproc: int | str | None = None,
    callbacks: Sequence[Callback | str | Mapping[str, Any]] = (),
    config_dir: str | os.PathLike[str] | None = None,
    keys: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Run:
    """Trains a model, and returns the run.

    It does what the command ``train`` does, with the same configuration, checks, run folder and promises. Under
    torchrun all ranks call it with the same arguments; otherwise ``nproc`` starts ranks.

    Args:
        model: An ``nn.Module``, whose parameters are the initial ones, and which holds the trained ones at the end; or
            a class or function that makes one, which is called with the data's channels, classes and image size as far
            as it accepts them, under the run's seed; or the name of one of distrain's models.
        train: Samples to train on: a pair of inputs [N, C, H, W] (uint8, or floating point) and class numbers [N], as
            arrays or tensors; or a map-style ``torch.utils.data.Dataset`` of such pairs, which is read into memory
            once; or the name of one of distrain's data sets. Instead of class numbers: with ``task="multilabel"``
            labels [N, C] of 0 and 1, with ``task="regression"`` numbers [N] or [N, C], with ``task="segmentation"``
            masks [N, H, W] of class numbers, 255 where the class is unknown.
        val: Samples for validation; by default ``data.val_fraction`` of ``train`` is held out.
        test: Samples for the test at the end; by default those of the validation.
        classes: Names of the classes, labels or numbers, or how many there are; by default as many as ``train``,
            ``val`` and ``test`` have.
        nproc: Ranks to start on this machine, each a process; by default the training runs in this process.
        callbacks: What is called at fixed points: objects of subclasses of ``distrain.Callback``, names, and mappings
            as in ``callbacks=[…]`` on the command line. With ``nproc`` each rank gets copies of the objects.
        config_dir: A folder with further choices, as ``--config-dir`` of the command.
        keys: Values by dotted key, such as ``{"trainer.grad_clip_norm": 1.0}``.
        **settings: Choices: ``strategy``, ``compression``, ``optimizer``, ``scheduler``, ``loss``, ``task``,
            ``logger`` (a name, or a list of names), ``experiment``; values: ``epochs``, ``max_steps``, ``batch_size``,
            ``lr``, ``device``, ``seed``, ``run_dir``, ``resume`` (also a run's folder); or dotted keys,
            ``**{"optimizer.lr": 0.1}``.

    Returns:
        The run: its folder, configuration, metrics, summary and model.

    Raises:
        ConfigError: An argument is refused, before anything is trained; the message is one line.
        Failed: The training failed; the reason was printed, and is in ``failure.json`` of the run's folder.
        Stopped: The training was stopped on request, by Ctrl-C for example; everything is saved, and
            ``fit(…, run_dir=…)`` goes on.
    """
    with restored_surroundings(), program.called_as("distrain.fit"):
        slurm.set_torchrun_variables(os.environ)
        training = prepare(model, train, val, test, classes, callbacks, config_dir, merge(settings, keys or {}))
        ranks = _ranks_to_start(nproc)
        if ranks is None:
            result = training.run()
        else:
            training.check(ranks.first_world())
            result = Result(Path(run_on_ranks(training, ranks)["run_dir"]))
        free_finished_trainings()
        return training.finish(result)


def prepare(
    model: ModelObject | str,
    train: Any,
    val: Any,
    test: Any,
    classes: int | Sequence[str] | None,
    callbacks: Sequence[Callback | str | Mapping[str, Any]],
    config_dir: str | os.PathLike[str] | None,
    settings: dict[str, Any],
) -> Training:
    """Checks the arguments of :func:`fit`.

    Raises:
        ConfigError: One is wrong.
    """
    name_refusal_at_exit()
    if dist.is_initialized():
        problem = "forms the process group itself, and there is one; call it before init_process_group(), or after"
        raise config_error("distrain", f"{problem} torch.distributed.destroy_process_group()")
    fixed: dict[str, Any] = {}
    if isinstance(model, str):
        model_choice, model_object = model, None
    else:
        model_choice, model_object = "python_object", _checked_model(model)
        fixed["model._target_"] = _name_of(model)
    entries, callback_objects = _callback_entries(callbacks)
    if entries:
        fixed["callbacks"] = entries
    data_choice = train if isinstance(train, str) else "python_object"
    config = build_config(
        _with_run_to_resume(settings), model=model_choice, data=data_choice, fixed=fixed, config_dir=config_dir
    )
    if isinstance(train, str):
        for name, value in (("val", val), ("test", test), ("classes", classes)):
            if value is not None:
                raise config_error(name, f"does not go with train={train!r}, which has its own; leave it out")
        return Training(config, model_object, None, callback_objects)
    if isinstance(val, str) or isinstance(test, str):
        raise config_error("val" if isinstance(val, str) else "test", "must be samples, as train is, not a name")
    assert isinstance(config.data, PythonObjectDataConfig)
    classes = _class_names_of(train) if classes is None else classes
    data = data_object(
        train,
        val,
        test,
        target=target_of(config),
        classes=classes,
        memory_limit_mb=config.data.memory_limit_mb,
    )
    config.data = dataclasses.replace(config.data, fingerprint=data.fingerprint)
    return Training(config, model_object, data, callback_objects)


def _callback_entries(callbacks: Any) -> tuple[list[Any], dict[str, Callback]]:
    """What the configuration says of callbacks, and those that are objects, by their names in it."""
    if isinstance(callbacks, str | Callback) or not isinstance(callbacks, Sequence):
        raise config_error("callbacks", f"must be a list of callbacks, not {type(callbacks).__name__}")
    entries: list[Any] = []
    objects: dict[str, Callback] = {}
    for callback in callbacks:
        if isinstance(callback, str | Mapping):
            entries.append(callback)
        elif isinstance(callback, Callback):
            name = base = type(callback).__name__
            while name in objects:
                name = f"{base}_{len(objects) + 1}"
            objects[name] = callback
            entries.append({"name": name, "_target_": _name_of(type(callback))})
        else:
            problem = "is neither an object of a subclass of distrain.Callback, nor a name, nor a mapping"
            raise ConfigError("callbacks", type(callback).__name__, problem)
    return entries, objects


def _checked_model(model: Any) -> ModelObject:
    kind = type(model).__name__
    if isinstance(model, nn.Module):
        if kind in _WRAPPERS:
            raise config_error("model", f"is a {kind}; pass {_WRAPPERS[kind]}")
        if any(tensor.is_meta for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, Tensor)):
            problem = "has tensors on the meta device, which have no values; pass the class or function that makes it"
            raise config_error("model", problem)
        return model
    if not callable(model):
        problem = f"is a {kind}; pass an nn.Module, a class or function that makes one, or the name of a model"
        raise config_error("model", problem)
    return model  # type: ignore[no-any-return]


def _name_of(model: Any) -> str:
    """What the configuration calls an object: the dotted name of its class, or of the function."""
    target = type(model) if isinstance(model, nn.Module) else getattr(model, "func", model)
    return f"{target.__module__}.{getattr(target, '__qualname__', type(target).__qualname__)}"


def _class_names_of(train: Any) -> list[str] | None:
    """The names that torchvision's data sets, for example, know of their classes."""
    names = getattr(train, "classes", None)
    return list(names) if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names) else None


def _with_run_to_resume(settings: dict[str, Any]) -> dict[str, Any]:
    """``resume=`` a run's folder goes on in that folder; a checkpoint's starts a new one, as on the command line."""
    resume = settings.get("resume")
    if isinstance(resume, Run):
        resume = resume.run_dir
    if resume is None or not checkpoints_folder(Path(resume)).is_dir():
        return {name: value for name, value in settings.items() if name != "resume" or value is not None}
    if settings.get("run_dir") not in (None, resume, str(resume)):
        raise ConfigError("run_dir", settings["run_dir"], f"is another folder than that of resume={resume}; give one")
    return {**settings, "run_dir": os.fspath(resume), "resume": "auto"}


def _ranks_to_start(nproc: int | str | None) -> LaunchSettings | None:
    """How many ranks to start; ``None``: this process is a rank, perhaps the only one.

    Raises:
        ConfigError: ``nproc`` is no number of ranks, or a launcher has started another number.
    """
    if nproc is None:
        return None
    if nproc != "gpu" and (isinstance(nproc, bool) or not isinstance(nproc, int) or nproc < 1):
        raise ConfigError("nproc", nproc, "must be a whole number from 1 on, or gpu: one rank for each GPU")
    settings = LaunchSettings(nproc=nproc)
    ranks = settings.ranks_per_host()
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        started = World.from_environment().local_size
        if ranks != started:
            problem = f"a launcher, such as torchrun, has started {started} ranks on this machine; leave nproc out"
            raise ConfigError("nproc", nproc, problem)
        return None
    return settings if ranks > 1 else None
