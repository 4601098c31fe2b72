"""Chooses number format and memory layout if the configuration says ``auto``: by a timed trial, or by a rule.

Which layout is fastest depends on the model: on one machine, channels-last was 60 % faster with one model and slower
with another. So a trial times forward and backward passes of the run's own model in each format, with as many images as
a rank has per step. All ranks take part at the same time, since they share caches and memory. The trial is done once,
at the start of a run. The chosen formats replace ``auto`` in the run's configuration; they are written to
``config.yaml`` and to every checkpoint, and a resumed run uses them again.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distrain.config.schema import Config
from distrain.data.base import Splits
from distrain.data.batch import Targets, slice_targets
from distrain.files.escaping import Lines
from distrain.files.terminal import FILE_ONLY
from distrain.models import deferred
from distrain.models.foreign import auxiliary_weight
from distrain.models.tensors import named_tensors, parameter_bytes
from distrain.runtime.agreement import agreed
from distrain.runtime.device import float64_device, is_mps, seed_everything, synchronize
from distrain.runtime.runtime import Runtime
from distrain.strategies import base as strategy_base
from distrain.strategies.precision import Precision
from distrain.tasks.base import Task
from distrain.tasks.training_loss import training_loss
from distrain.training import resume
from distrain.training.trial_batch import trial_batch

log = logging.getLogger(__name__)

#: Precisions that a trial may choose, from the highest to the lowest.
PRECISIONS = ("fp32", "bf16")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

#: A layout that is not the default, or a lower precision, is chosen only if it takes less than this share of the time.
#: On a busy machine timings vary by as much as 5 %, and two starts of the same run should choose the same formats.
_MAX_TIME_RATIO = 0.95
#: Images in the first steps, which load kernels and estimate the time per image. BatchNorm needs two; where two take
#: longer than a step of the trial may, there are no more.
_FEWEST_IMAGES, _FIRST_IMAGES = 2, 4
#: Longest step of a trial in seconds; if a model takes longer, the trial uses fewer images.
_MAX_STEP_SECONDS = 0.5
#: A trial ends when its steps have taken this many seconds, or after this many rounds; where the rounds contradict each
#: other, it goes on to more rounds, but not for longer than this by the clock on the wall.
_MAX_TRIAL_SECONDS = 1.0
_MAX_ROUNDS = 5
_MAX_ROUNDS_IF_UNCLEAR = 20
_MAX_WALL_SECONDS = 5.0


@dataclass(frozen=True)
class Formats:
    """Number format and memory layout of a run.

    Attributes:
        precision: A value of ``trainer.precision``.
        memory_format: A value of ``trainer.memory_format``: the layout of images and convolution weights.
    """

    precision: str
    memory_format: str


def resolve_auto(
    config: Config, runtime: Runtime, splits: Splits, task: Task, make_model: Callable[[], nn.Module]
) -> Config:
    """Resolves ``auto`` in ``trainer.precision`` and ``trainer.memory_format``; all ranks call it together.

    A resumed run keeps the formats of its checkpoint. Otherwise a trial chooses. The rules of :func:`default_layout`
    and :func:`default_precision` choose where a trial is impossible or unwanted: no rank runs the whole model
    (``strategy=pipeline``), the model is compiled, or the run must be repeatable (``trainer.deterministic``). In these
    cases the layout stays ``auto``, since the default layout depends on the device.

    Args:
        config: The run's configuration.
        runtime: This rank's surroundings; its random generators are seeded again after a trial.
        splits: The data; the trial uses training images.
        task: Computes the loss.
        make_model: Builds the model on its device; called only for a trial.

    Returns:
        The configuration with the chosen formats, the same on all ranks.
    """
    requested = config.trainer
    if requested.precision != "auto" and requested.lowest_precision != PRECISIONS[0]:
        log.warning("trainer.lowest_precision is ignored: trainer.precision=%s, not auto", requested.precision)
    if "auto" not in (requested.precision, requested.memory_format):
        return config
    formats = _resumed_formats(config, runtime)
    if formats is None and not (requested.deterministic or requested.compile):
        formats = _choose_by_trial(config, runtime, splits, task, make_model)
        seed_everything(config.seed)
    if formats is None:
        formats = Formats(_default_precision_of_all(config, runtime), requested.memory_format)
        log.info("formats by default: %s, %s", formats.precision, formats.memory_format, extra=FILE_ONLY)
    trainer = dataclasses.replace(requested, precision=formats.precision, memory_format=formats.memory_format)
    return dataclasses.replace(config, trainer=trainer)


# --- defaults --------------------------------------------------------------------------------------------------------


def default_layout(precision: str, device: torch.device, model: nn.Module) -> str:
    """The layout that is faster for most models: ``contiguous`` or ``channels_last``.

    The rule is based on measurements with this project's models. On CPUs, convolutions are up to 160 % faster in
    channels-last; with GroupNorm, whose torch kernel is slow in that layout, models are up to 30 % slower. GPUs are
    faster in channels-last with 16-bit formats. Apple GPUs get no channels-last; see :func:`memory_format`.
    """
    module_types = {type(module) for module in model.modules()}
    is_faster = nn.Conv2d in module_types and nn.GroupNorm not in module_types
    if device.type == "cuda":
        is_faster = is_faster and precision in ("bf16", "fp16")
    elif is_mps(device):
        is_faster = False
    return "channels_last" if is_faster else "contiguous"


def memory_format(config: Config, device: torch.device, model: nn.Module) -> torch.memory_format:
    """The configured layout; :func:`default_layout` if it is ``auto``, or on an Apple GPU.

    There torch's BatchNorm has had wrong gradients in channels-last, without an error, so that layout is never used.
    """
    layout = "auto" if is_mps(device) else config.trainer.memory_format
    return LAYOUTS[default_layout(config.trainer.precision, device, model) if layout == "auto" else layout]


def default_precision(device: torch.device) -> str:
    """The precision that is faster for most models: bf16 on GPUs that support it, else fp32."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def _precisions(config: Config) -> Sequence[str]:
    """The precisions that the configuration allows, the highest first."""
    if config.trainer.precision != "auto":
        return (config.trainer.precision,)
    return PRECISIONS[: PRECISIONS.index(config.trainer.lowest_precision) + 1]


def _default_precision_of_all(config: Config, runtime: Runtime) -> str:
    """The highest of all ranks' default precisions, as far as it is allowed; all ranks call it together."""
    precisions = _precisions(config)
    if len(precisions) == 1:
        return precisions[0]
    own = torch.tensor(PRECISIONS.index(default_precision(runtime.device)), device=runtime.device)
    return PRECISIONS[int(runtime.communicator().all_reduce(own, "min"))]


def _layouts(config: Config, model: nn.Module, device: torch.device) -> Sequence[str]:
    if is_mps(device):
        return ("contiguous",)
    if config.trainer.memory_format != "auto":
        return (config.trainer.memory_format,)
    # Only four-dimensional weights have a channels-last layout.
    has_convolutions = any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules())
    return tuple(LAYOUTS) if has_convolutions else ("contiguous",)


# --- the choice ------------------------------------------------------------------------------------------------------


def _resumed_formats(config: Config, runtime: Runtime) -> Formats | None:
    """Formats of the resumed run, if this configuration allows them."""
    saved = resume.saved_trainer_config(config, runtime)
    requested = config.trainer
    layout: Any = saved.get("memory_format") if requested.memory_format == "auto" else requested.memory_format
    if is_mps(runtime.device) and layout == "channels_last":
        layout = "contiguous"
    precision: Any = saved.get("precision") if requested.precision == "auto" else requested.precision
    # If the resumed run used the default layout, its configuration says auto, and so does this run's.
    if layout not in ("auto", *LAYOUTS) or precision not in _precisions(config):
        return None
    log.info("formats of the resumed run: %s, %s", precision, layout, extra=FILE_ONLY)
    return Formats(precision, layout)


def _choose_by_trial(
    config: Config, runtime: Runtime, splits: Splits, task: Task, make_model: Callable[[], nn.Module]
) -> Formats | None:
    """The fastest formats, the same on all ranks; ``None`` if no trial is possible or all formats fail."""
    strategy, world = strategy_base.strategy_class(config), runtime.world
    #: The first ranks, which run the whole model; the others only take part in the collectives.
    trial_ranks = strategy.full_model_ranks(config, world.size)
    if not trial_ranks:
        return None
    everyone, device = runtime.communicator(), runtime.device
    model = agreed(everyone, runtime, lambda: _small_model(make_model, strategy.most_trial_bytes(config)))
    if model is None:
        return None
    candidates = [
        Formats(precision, layout) for precision in _precisions(config) for layout in _layouts(config, model, device)
    ]
    if len(candidates) == 1:
        return candidates[0]
    default_layouts = {precision: default_layout(precision, runtime.device, model) for precision in _precisions(config)}
    strategy.prepare_trial(config, world.size, model)
    share = math.ceil(config.data.batch_size / strategy.data_parallel_size(config, world.size))
    # BatchNorm needs at least two samples.
    share = max(min(share, config.trainer.largest_pass or share), 2)
    samples = min(share, len(splits.train))
    trial = agreed(
        everyone,
        runtime,
        lambda: Trial(config, model, task, samples, splits, device) if world.rank < trial_ranks else None,
    )

    def max_over_ranks(numbers: Sequence[float]) -> list[float]:
        own = torch.tensor(numbers, dtype=torch.float64, device=float64_device(device))
        largest: list[float] = everyone.all_reduce(own, "max").tolist()
        return largest

    # This collective also makes all ranks start the trial at the same time.
    (per_image,) = max_over_ranks([trial.seconds_per_image(candidates) if trial is not None else 0.0])
    size = min(samples, max(_FEWEST_IMAGES, int(_MAX_STEP_SECONDS / per_image)))
    rounds = trial.rounds(candidates, size, default_layouts) if trial is not None else [[0.0] * len(candidates)]
    shortest = dict(zip(candidates, max_over_ranks(_shortest(rounds)), strict=True))
    typical = dict(zip(candidates, max_over_ranks(_typical(rounds)), strict=True))
    if runtime.device.type == "cuda":
        # So that the reported peak memory is that of the run without the trial.
        del trial, model
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(runtime.device)
    best = clearly_fastest(shortest, typical, default_layouts)
    if best is not None:
        tried = format_timings(shortest, best)
        log.info("tried forward and backward passes of %d images:\n%s", size, tried, extra=FILE_ONLY)
        if config.trainer.precision == "auto" and len(default_layouts) == 1:
            log.info("trainer.precision=auto stays fp32 unless trainer.lowest_precision=bf16 allows less")
    return best


def _small_model(make_model: Callable[[], nn.Module], most_bytes: float) -> nn.Module | None:
    """The model, unless it has more bytes of parameters than a rank may hold for a trial."""
    if most_bytes == math.inf:
        return make_model()
    model, values = deferred.build(make_model)
    if parameter_bytes(model) > most_bytes:
        return None
    if values is not None:
        values.fill(dict(named_tensors(model)))
    return model


def clearly_fastest(
    shortest: Mapping[Formats, float], typical: Mapping[Formats, float], default_layouts: Mapping[str, str]
) -> Formats | None:
    """The formats that are the fastest both by their shortest and by their typical step; else the usual ones.

    Other work on the machine makes single steps several times longer, which shortens no step but may hide that a format
    is fast; so one number alone may be wrong.

    Args:
        shortest: The shortest time of a step in each format, infinite if it fails; from the highest precision.
        typical: The median time, as ``shortest``.
        default_layouts: The default layout for each precision.

    Returns:
        The choice; ``None`` if all formats fail.
    """
    choice = fastest(shortest, default_layouts)
    if choice is None or choice == fastest(typical, default_layouts):
        return choice
    usual = [Formats(precision, layout) for precision, layout in default_layouts.items()]
    return next((formats for formats in usual if math.isfinite(shortest.get(formats, math.inf))), choice)


def _shortest(rounds: Sequence[Sequence[float]]) -> list[float]:
    return [min(seconds) for seconds in zip(*rounds, strict=True)]


def _typical(rounds: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(seconds) for seconds in zip(*rounds, strict=True)]


def fastest(seconds: Mapping[Formats, float], default_layouts: Mapping[str, str]) -> Formats | None:
    """The fastest formats; but the default layout and the highest precision unless others are clearly faster.

    Args:
        seconds: Time of a step in each format, infinite if it fails; ordered from the highest precision.
        default_layouts: The default layout for each precision.

    Returns:
        The choice; ``None`` if all formats fail.
    """
    best: Formats | None = None
    for precision in dict.fromkeys(formats.precision for formats in seconds):
        candidates = [formats for formats in seconds if formats.precision == precision]
        choice = min(candidates, key=seconds.__getitem__)
        default = Formats(precision, default_layouts[precision])
        if default in seconds and seconds[choice] >= _MAX_TIME_RATIO * seconds[default]:
            choice = default
        if best is None or seconds[choice] < _MAX_TIME_RATIO * seconds[best]:
            best = choice
    return best if best is not None and math.isfinite(seconds[best]) else None


def format_timings(seconds: Mapping[Formats, float], best: Formats) -> Lines:
    """A table of the timings for people, one line per candidate."""
    lines = ["precision  memory format        ms"]
    for formats, step_seconds in seconds.items():
        time_column = f"{1000 * step_seconds:8.2f}" if math.isfinite(step_seconds) else "   fails"
        mark = "  chosen" if formats == best else ""
        lines.append(f"{formats.precision:9}  {formats.memory_format:13}  {time_column}{mark}")
    return Lines.of(lines)


def repeat_rounds(
    time_round: Callable[[], list[float]],
    candidates: Sequence[Formats],
    default_layouts: Mapping[str, str],
    before: Sequence[list[float]] = (),
) -> list[list[float]]:
    """Repeats a round of timings until they say clearly which formats are fastest, or take too long.

    Args:
        time_round: Times one step in each format, in seconds.
        candidates: The formats, in the order of the timings.
        default_layouts: The default layout for each precision.
        before: Rounds that were timed already.
    """
    start, rounds = time.perf_counter(), list(before)
    total = sum(seconds for each in rounds for seconds in each if math.isfinite(seconds))
    while len(rounds) < 2 or (
        len(rounds) < _MAX_ROUNDS_IF_UNCLEAR
        and total < 3 * _MAX_TRIAL_SECONDS
        and time.perf_counter() - start < _MAX_WALL_SECONDS
    ):
        rounds.append(time_round())
        total += sum(seconds for seconds in rounds[-1] if math.isfinite(seconds))
        if len(rounds) >= _MAX_ROUNDS or (len(rounds) >= 3 and total >= _MAX_TRIAL_SECONDS):
            by_shortest, by_typical = (
                fastest(dict(zip(candidates, seconds, strict=True)), default_layouts)
                for seconds in (_shortest(rounds), _typical(rounds))
            )
            if by_shortest == by_typical:
                break
    return rounds


# --- the trial -------------------------------------------------------------------------------------------------------


class Trial:
    """Times steps of a model in several formats.

    Args:
        config: The run's configuration.
        model: The model on its device, prepared as the strategy would run it. The trial changes its buffers and layout,
            so it can't be trained afterwards.
        task: Computes the loss.
        samples: How many training samples a rank has in a forward and backward pass.
        splits: The data.
        device: The model's device.
    """

    def __init__(
        self, config: Config, model: nn.Module, task: Task, samples: int, splits: Splits, device: torch.device
    ) -> None:
        self._model, self._task, self._device = model, task, device
        self._auxiliary_weight = auxiliary_weight(config.model)
        model.train()
        dtype = Precision(config.trainer.precision, device).dtype
        self._batch = trial_batch(splits, samples, device, dtype, torch.contiguous_format)
        self._failed: set[Formats] = set()
        #: The first steps, where they are long enough to count.
        self._long_round: list[list[float]] = []

    def seconds_per_image(self, candidates: Sequence[Formats]) -> float:
        """A rough estimate in the fastest of the formats; infinite if all fail."""
        count = min(_FEWEST_IMAGES, len(self._batch))
        seconds = [self._step(formats, count) for formats in candidates]
        if min(seconds) > _MAX_STEP_SECONDS:
            # That kernels are loaded matters little, and more rounds would take long.
            self._long_round = [seconds]
            return min(seconds) / count
        count = min(_FIRST_IMAGES, len(self._batch))
        # The first round is not counted, since it loads kernels.
        for _ in range(2):
            seconds = [self._step(formats, count) for formats in candidates]
        return min(seconds) / count

    def rounds(self, candidates: Sequence[Formats], size: int, default_layouts: Mapping[str, str]) -> list[list[float]]:
        """Times of steps in which the formats take turns: per round one of each format, infinite if the format fails.

        Args:
            candidates: The formats.
            size: Images per step.
            default_layouts: The default layout for each precision.
        """

        def time_round() -> list[float]:
            return [self._step(formats, size) for formats in candidates]

        before = self._long_round if size == _FEWEST_IMAGES else []
        return repeat_rounds(time_round, candidates, default_layouts, before)

    def _step(self, formats: Formats, size: int) -> float:
        if formats in self._failed:
            return math.inf
        layout = LAYOUTS[formats.memory_format]
        # A copy, since a model may change the images that it is given.
        inputs = self._batch.inputs[:size].clone(memory_format=layout)
        precision = Precision(formats.precision, self._device)
        try:
            self._model.to(memory_format=layout)  # type: ignore[call-overload]
            targets = slice_targets(self._batch.targets, 0, size)
            return _time_step(self._model, inputs, targets, self._task, precision, self._auxiliary_weight)
        except Exception as error:  # any error of a user's model, for example a view of a tensor in another layout
            problem = str(error).partition("\n")[0]
            log.info("%s, %s: %s", formats.precision, formats.memory_format, problem, extra=FILE_ONLY)
            self._failed.add(formats)
            return math.inf
        finally:
            self._model.zero_grad(set_to_none=True)


def _time_step(
    model: nn.Module, inputs: Tensor, targets: Targets, task: Task, precision: Precision, weight: float
) -> float:
    """Seconds of a forward and backward pass."""
    start = _now(inputs.device)
    with precision.autocast():
        _, loss, count = training_loss(task, model(inputs), targets, weight)
    (loss / count).backward()
    return _now(inputs.device) - start


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        synchronize(device)
        return time.perf_counter()
    # Processor time of this thread, which takes part in all of the model's work: unlike the clock on the wall, it
    # stands still while other programs have the processor.
    return time.thread_time()
