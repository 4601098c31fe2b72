"""Number format and memory layout where the configuration says ``auto``: tried on the model, or by a rule.

On one machine a layout gains 60 % with one model and loses with the next, so the model's own forward and backward pass
is timed in each, on as many images as this rank has in a step, by all ranks at the same time, since they share caches
and memory. That is done once, when a run begins. What was chosen replaces ``auto`` in the run's configuration, so that
it stands in ``config.yaml`` and in every checkpoint, and a run that goes on repeats it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distrain.config.schema import Config
from distrain.data.base import Images, Splits
from distrain.data.batch import Targets, slice_targets
from distrain.data.loader import Loader
from distrain.runtime.device import seed_everything
from distrain.runtime.runtime import Runtime
from distrain.strategies import base as strategy_base
from distrain.strategies.precision import Precision
from distrain.tasks.base import Task
from distrain.training import resume

log = logging.getLogger(__name__)

#: From the highest to the lowest that a trial may choose.
PRECISIONS = ("fp32", "bf16")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

#: What is not the rule's, or is a lower precision, must take less than this share of the time. Two starts of one run
#: should choose alike, and clocks on a busy machine are this far off.
_CLEARLY = 0.95
#: Images of the first steps, which load kernels and show how long a step takes.
_FEW = 4
#: Seconds that a step may take in a trial; a model that takes longer is tried on fewer images.
_LONGEST_STEP = 0.5
#: Seconds of steps after which a trial ends.
_ENOUGH = 1.0
_ROUNDS = 5


@dataclass(frozen=True)
class Formats:
    """What is computed in which format.

    Attributes:
        precision: A choice of ``trainer.precision``.
        memory_format: A choice of ``trainer.memory_format``, of images and convolution weights.
    """

    precision: str
    memory_format: str


def resolve_auto(
    config: Config, runtime: Runtime, splits: Splits, task: Task, make_model: Callable[[], nn.Module]
) -> Config:
    """The configuration with ``trainer.precision`` and ``trainer.memory_format`` chosen; all ranks call it together.

    A run that goes on takes what its checkpoint was computed in. Else the choice is by trial, and by the rules of
    :func:`default_layout` and :func:`default_precision` where a trial says nothing: no rank runs the whole model
    (``strategy=pipeline``), the model is compiled, or runs are to be repeatable (``trainer.deterministic``). The rule's
    layout stays ``auto``, since it depends on the device.

    Args:
        config: What the user asked for.
        runtime: This rank's surroundings; generators are seeded anew, as it left them.
        splits: The data, for images to try the model on.
        task: Gives the loss.
        make_model: Builds the model on its device, and may be called or not.

    Returns:
        The same on all ranks.
    """
    wanted = config.trainer
    if wanted.precision != "auto" and wanted.lowest_precision != PRECISIONS[0]:
        log.warning("trainer.lowest_precision has nothing to do: trainer.precision=%s, not auto", wanted.precision)
    if "auto" not in (wanted.precision, wanted.memory_format):
        return config
    found = _of_before(config, runtime)
    if found is None and not (wanted.deterministic or wanted.compile):
        found = _tried(config, runtime, splits, task, make_model)
        seed_everything(config.seed)
    if found is None:
        found = Formats(_by_rule(config, runtime), wanted.memory_format)
        log.info("computing in %s, %s, by rule", found.precision, found.memory_format)
    trainer = dataclasses.replace(wanted, precision=found.precision, memory_format=found.memory_format)
    return dataclasses.replace(config, trainer=trainer)


# --- the rules -------------------------------------------------------------------------------------------------------


def default_layout(precision: str, device: torch.device, model: nn.Module) -> str:
    """The layout that mostly pays: a choice of ``trainer.memory_format`` but ``auto``.

    By measurements of this project's models: on CPUs channels-last gains up to 160 % with convolutions, except with
    GroupNorm, where torch's kernel loses up to 30 %; GPUs gain in 16 bits.
    """
    kinds = {type(module) for module in model.modules()}
    pays = nn.Conv2d in kinds and nn.GroupNorm not in kinds
    if device.type == "cuda":
        pays = pays and precision in ("bf16", "fp16")
    return "channels_last" if pays else "contiguous"


def memory_format(config: Config, device: torch.device, model: nn.Module) -> torch.memory_format:
    """The configured layout; for ``auto`` :func:`default_layout`."""
    layout = config.trainer.memory_format
    return LAYOUTS[default_layout(config.trainer.precision, device, model) if layout == "auto" else layout]


def default_precision(device: torch.device) -> str:
    """The precision, of those that may be chosen, that mostly pays: bf16 on GPUs that compute in it."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def _precisions(config: Config) -> Sequence[str]:
    """What may be computed in, the highest first."""
    if config.trainer.precision != "auto":
        return (config.trainer.precision,)
    return PRECISIONS[: PRECISIONS.index(config.trainer.lowest_precision) + 1]


def _by_rule(config: Config, runtime: Runtime) -> str:
    """The precision that all ranks' devices have; all call it together."""
    precisions = _precisions(config)
    if len(precisions) == 1:
        return precisions[0]
    mine = torch.tensor(PRECISIONS.index(default_precision(runtime.device)), device=runtime.device)
    return PRECISIONS[int(runtime.communicator().all_reduce(mine, "min"))]


def _layouts(config: Config, model: nn.Module) -> Sequence[str]:
    if config.trainer.memory_format != "auto":
        return (config.trainer.memory_format,)
    # Nothing else has weights of four dimensions.
    convolves = any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules())
    return tuple(LAYOUTS) if convolves else ("contiguous",)


# --- the choice ------------------------------------------------------------------------------------------------------


def _of_before(config: Config, runtime: Runtime) -> Formats | None:
    """What the run that this one goes on with computed in, where that is what this one may."""
    held = resume.saved_trainer_config(config, runtime)
    wanted = config.trainer
    layout: Any = held.get("memory_format") if wanted.memory_format == "auto" else wanted.memory_format
    precision: Any = held.get("precision") if wanted.precision == "auto" else wanted.precision
    # A layout by the rule is one by the rule again.
    if layout not in ("auto", *LAYOUTS) or precision not in _precisions(config):
        return None
    log.info("computing in %s, %s, as before", precision, layout)
    return Formats(precision, layout)


def _tried(
    config: Config, runtime: Runtime, splits: Splits, task: Task, make_model: Callable[[], nn.Module]
) -> Formats | None:
    """The fastest by trial, the same on all ranks; ``None`` where nothing can be tried."""
    strategy, world = strategy_base.strategy_class(config), runtime.world
    triers = strategy.full_model_ranks(config, world.size)
    if not triers:
        return None
    model = make_model()
    candidates = [Formats(each, layout) for each in _precisions(config) for layout in _layouts(config, model)]
    if len(candidates) == 1:
        return candidates[0]
    usual = {each: default_layout(each, runtime.device, model) for each in _precisions(config)}
    strategy.prepare_trial(config, world.size, model)
    share = math.ceil(config.data.batch_size / strategy.data_parallel_size(config, world.size))
    # BatchNorm needs two.
    share = max(min(share, config.trainer.micro_batch_size or share), 2)
    images = splits.train.subset(torch.arange(min(share, len(splits.train))))
    trial = Trial(config, model, task, images, splits, runtime.device) if world.rank < triers else None
    everyone = runtime.communicator()

    def agreed(numbers: Sequence[float]) -> list[float]:
        mine = torch.tensor(numbers, dtype=torch.float64, device=runtime.device)
        slowest: list[float] = everyone.all_reduce(mine, "max").tolist()
        return slowest

    # Also where ranks wait for each other, so that they try at the same time.
    (an_image,) = agreed([trial.seconds_an_image(candidates) if trial is not None else 0.0])
    size = min(len(images), max(_FEW, int(_LONGEST_STEP / an_image)))
    seconds = agreed(trial.seconds(candidates, size) if trial is not None else [0.0] * len(candidates))
    if runtime.device.type == "cuda":
        # The run's own peak is reported.
        del trial, model
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(runtime.device)
    timed = dict(zip(candidates, seconds, strict=True))
    best = fastest(timed, usual)
    if best is not None:
        log.info("tried forward and backward passes of %d images:\n%s", size, described(timed, best))
        if config.trainer.precision == "auto" and len(usual) == 1:
            log.info("trainer.precision=auto stays fp32 unless trainer.lowest_precision=bf16 allows less")
    return best


def fastest(seconds: Mapping[Formats, float], usual: Mapping[str, str]) -> Formats | None:
    """The fastest, but the rule's layout and the highest precision unless another is clearly faster.

    Args:
        seconds: Of a step in each, infinite where it fails; precisions from the highest.
        usual: The rule's layout for each precision.

    Returns:
        The choice; ``None`` where all fail.
    """
    best: Formats | None = None
    for precision in dict.fromkeys(each.precision for each in seconds):
        layouts = [each for each in seconds if each.precision == precision]
        chosen = min(layouts, key=seconds.__getitem__)
        expected = Formats(precision, usual[precision])
        if expected in seconds and seconds[chosen] >= _CLEARLY * seconds[expected]:
            chosen = expected
        if best is None or seconds[chosen] < _CLEARLY * seconds[best]:
            best = chosen
    return best if best is not None and math.isfinite(seconds[best]) else None


def described(seconds: Mapping[Formats, float], best: Formats) -> str:
    """The table as people read it, one line a candidate."""
    lines = ["precision  memory format        ms"]
    for each, taken in seconds.items():
        shown = f"{1000 * taken:8.2f}" if math.isfinite(taken) else "   fails"
        lines.append(f"{each.precision:9}  {each.memory_format:13}  {shown}{'  chosen' if each == best else ''}")
    return "\n".join(lines)


# --- the trial -------------------------------------------------------------------------------------------------------


class Trial:
    """Steps of a model that serves for nothing else, since they change its buffers and layout.

    Args:
        config: The run's.
        model: On its device, as the strategy would run it.
        task: Gives the loss.
        images: What a rank has in a step at once.
        splits: Says how images are normalised.
        device: Where the model is.
    """

    def __init__(
        self, config: Config, model: nn.Module, task: Task, images: Images, splits: Splits, device: torch.device
    ) -> None:
        self._model, self._task, self._device = model, task, device
        model.train()
        loader = Loader(
            images,
            batch_size=len(images),
            shard=(0, 1),
            mean=splits.mean,
            std=splits.std,
            device=device,
            dtype=Precision(config.trainer.precision, device).dtype,
            memory_format=torch.contiguous_format,
        )
        self._batch = next(loader.epoch(0))
        self._failed: set[Formats] = set()

    def seconds_an_image(self, candidates: Sequence[Formats]) -> float:
        """Roughly, in the fastest of the formats; infinite where all fail."""
        few = min(_FEW, len(self._batch))
        # The first round loads kernels.
        *_, taken = [[self._step(each, few) for each in candidates] for _ in range(2)]
        return min(taken) / few

    def seconds(self, candidates: Sequence[Formats], size: int) -> list[float]:
        """The least that a step of so many images took in each of the formats, which take turns; infinite if it fails.

        Not the median: what else a machine does only adds to a step, and often to more than half of a few.
        """
        rounds: list[list[float]] = []
        total = 0.0
        while len(rounds) < 2 or (len(rounds) < _ROUNDS and total < _ENOUGH):
            rounds.append([self._step(each, size) for each in candidates])
            total += sum(taken for taken in rounds[-1] if math.isfinite(taken))
        return [min(taken) for taken in zip(*rounds, strict=True)]

    def _step(self, formats: Formats, size: int) -> float:
        if formats in self._failed:
            return math.inf
        layout = LAYOUTS[formats.memory_format]
        inputs = self._batch.inputs[:size].contiguous(memory_format=layout)
        precision = Precision(formats.precision, self._device)
        try:
            self._model.to(memory_format=layout)  # type: ignore[call-overload]
            targets = slice_targets(self._batch.targets, 0, size)
            return _timed(self._model, inputs, targets, self._task, precision)
        except Exception as error:  # whatever a user's model raises, a view of images in another layout, say
            log.info("%s, %s: %s", formats.precision, formats.memory_format, str(error).partition("\n")[0])
            self._failed.add(formats)
            return math.inf
        finally:
            self._model.zero_grad(set_to_none=True)


def _timed(model: nn.Module, inputs: Tensor, targets: Targets, task: Task, precision: Precision) -> float:
    """Seconds of a forward and backward pass."""
    began = _now(inputs.device)
    with precision.autocast():
        loss, count = task.loss(model(inputs), targets)
    (loss / count).backward()
    return _now(inputs.device) - began


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
