"""A model that is no sequence as a sequence of segments, made by recording its forward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from distrain.errors import ConfigError, config_error, described
from distrain.models.outputs import trained_outputs
from distrain.strategies.pipeline.calls import Trace, Untraceable, tensors_of
from distrain.strategies.pipeline.cuts import Cut, CutFinder
from distrain.strategies.pipeline.layout import Line
from distrain.strategies.pipeline.program import Segment
from distrain.strategies.pipeline.tracing import record
from distrain.strategies.precision import Precision
from distrain.strategies.trial_copy import restored, trial_copy

#: Numbers of samples of the two recorded passes, and of those that are compared with the model.
_RECORDED, _COMPARED, _ALONE = (2, 3), 5, 1
#: Differences of results that are rounding: a backward pass may add gradients in another order.
_TOLERANCE = 1e-4


class TracedModel(nn.Sequential):
    """A model as a sequence of segments, each of which hands a tuple of tensors to the next one.

    Args:
        model: The model, whose modules and parameters it uses.
        training: The calls in training mode.
        evaluation: The calls in evaluation mode.
        cuts: Where segments after the first begin.
        modes: For each mode, names of modules that the model keeps in the other one.

    Attributes:
        block_names: A name for each segment.
    """

    def __init__(
        self, model: nn.Module, training: Line, evaluation: Line, cuts: Sequence[Cut], modes: dict[bool, list[str]]
    ) -> None:
        self._made_of = (training, evaluation, modes)
        self._bounds = [
            (0, 0),
            *((cut.training, cut.evaluation) for cut in cuts),
            (len(training), len(evaluation)),
        ]
        self.block_names = [training.name_at(0), *(cut.name for cut in cuts)]
        self._model = [model]  # in a list, so that it does not become a submodule
        super().__init__()
        for index in range(len(cuts) + 1):
            self.append(self.part(index, index + 1))

    def part(self, start: int, stop: int) -> Segment:
        """The segments from ``start`` to before ``stop`` as one."""
        model, (training, evaluation, modes) = self._model[0], self._made_of
        (train_start, eval_start), (train_stop, eval_stop) = self._bounds[start], self._bounds[stop]
        is_last = stop == len(self._bounds) - 1
        elsewhere = training.used_between(0, train_start) | training.used_between(train_stop, len(training))
        elsewhere |= evaluation.used_between(0, eval_start) | evaluation.used_between(eval_stop, len(evaluation))
        if not is_last:
            elsewhere |= self._unused
        program, modules, states = training.part(train_start, train_stop, elsewhere, training=True)
        for_evaluation, *also = evaluation.part(eval_start, eval_stop, elsewhere, training=False)
        modules, states = modules | also[0], states | also[1]
        owned = {id(tensor) for name, tensor in _named_state(model) if name in states}
        if is_last:
            owned |= self._unused
            modules |= {name for name, _ in self._unused_modules()}
        # Each name of a tensor that has several.
        states |= {name for name, tensor in _named_state(model) if id(tensor) in owned}
        constants = {name: model.get_buffer(name) for name in sorted(training.constants)}
        return Segment(model, program, for_evaluation, modules, sorted(states - set(constants)), constants, modes)

    @functools.cached_property
    def _unused(self) -> set[int]:
        """Ids of the parameters and buffers that no call uses; the last segment has them."""
        training, evaluation, _ = self._made_of
        used = training.used_between(0, len(training)) | evaluation.used_between(0, len(evaluation))
        state = _named_state(self._model[0])
        return {id(tensor) for name, tensor in state if name not in training.constants} - used

    def _unused_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules with state that nothing calls and of which nothing is used."""
        called = {str(call.target) for line in self._made_of[:2] for call in line.calls if isinstance(call.target, str)}
        for name, module in self._model[0].named_modules():
            used = any(each == name or each.startswith(f"{name}.") for each in called)
            tensors = [*module.parameters(), *module.buffers()]
            if name and not used and module.state_dict() and all(id(tensor) in self._unused for tensor in tensors):
                yield name, module


def _named_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


# --- recording -------------------------------------------------------------------------------------------------------


def traced_model(
    model: nn.Module,
    example: Tensor,
    precision: Precision,
    stages: int,
    boundaries: Sequence[str],
    still: Set[str] = frozenset(),
    *,
    auxiliary: bool,
) -> TracedModel:
    """Records the model's forward pass in both modes, and cuts it into segments. The model stays as it was.

    Args:
        model: The model.
        example: Inputs ``[N, …]``, of which shape and format matter, and the values of integers.
        precision: Of forward passes.
        stages: Number of stages that the model is to be cut into.
        boundaries: Names of modules that stages are to begin with.
        still: Names of modules that are in evaluation mode in some steps while the model is in training mode.
        auxiliary: Whether the loss depends on auxiliary heads. If not, their outputs are handed to no stage.

    Raises:
        ConfigError: The model can't be traced, or not be cut so; the message says where and why.
    """
    kind = type(model).__name__
    with _surroundings(example, precision), trial_copy(model) as trial:
        try:
            training, evaluation = _record_both(trial, example, auxiliary, still)
        except Untraceable as error:
            place = error.place and f" at {error.place}"
            way_out = "what a submodule does may be anything: a submodule that can't be traced is run as a whole"
            problem = f"{kind} is no nn.Sequential and can't be traced: {error.problem}{place}; {way_out}"
            raise config_error("model", problem) from error
        modes: dict[bool, list[str]] = {}
        for mode in (True, False):
            trial.train(mode)
            modes[mode] = [name for name, module in trial.named_modules() if name and module.training != mode]
        finder = CutFinder(Line(trial, training), Line(trial, evaluation))
        cuts = finder.find(stages, boundaries)
        if len(cuts) < stages - 1:
            reasons = "; ".join(f"before {name}: {problem}" for name, problem in list(finder.problems.items())[:3])
            problem = f"{kind} can be cut at {len(cuts)} places only{reasons and f'; not {reasons}'}"
            raise ConfigError("strategy.stages", stages, problem, [cut.name for cut in cuts])
        traced = TracedModel(trial, Line(trial, training), Line(trial, evaluation), cuts, modes)
        if problem := _difference(trial, traced, example, auxiliary):
            way_out = "write it as nn.Sequential(block, block, …)"
            raise config_error("model", f"{kind} can't be traced: {problem}; {way_out}")
    return TracedModel(model, Line(model, training), Line(model, evaluation), cuts, modes)


def recorded_passes(model: nn.Module, example: Tensor, precision: Precision, *, auxiliary: bool) -> tuple[Trace, Trace]:
    """Records the model's forward pass in training and in evaluation mode; the model stays as it was.

    Args:
        model: The model.
        example: As for :func:`traced_model`.
        precision: Of forward passes.
        auxiliary: As for :func:`traced_model`.

    Raises:
        Untraceable: The model's own ``forward`` can't be recorded.
    """
    with _surroundings(example, precision), trial_copy(model) as trial:
        return _record_both(trial, example, auxiliary, frozenset())


@contextlib.contextmanager
def _surroundings(example: Tensor, precision: Precision) -> Iterator[None]:
    """Those of a forward pass; the generators stay as they are."""
    device = example.device if example.is_meta else contextlib.nullcontext()
    devices = [example.device] if example.is_cuda else []
    with torch.random.fork_rng(devices=devices), device, precision.autocast(), torch.enable_grad():
        yield


def images_like(example: Tensor, count: int) -> Tensor:
    """Inputs like the example: normal noise, or some of its own values if they are integers."""
    shape = (count, *example.shape[1:])
    if not example.is_floating_point():
        return example[torch.arange(count, device=example.device) % len(example)]
    images = torch.randn(shape, generator=torch.Generator().manual_seed(count), device="cpu")
    is_channels_last = example.dim() == 4 and not example.is_contiguous()
    is_channels_last = is_channels_last and example.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    return images.to(example.device, example.dtype, memory_format=layout)


def _record_both(trial: nn.Module, example: Tensor, auxiliary: bool, still: Set[str]) -> tuple[Trace, Trace]:
    """Records in training and in evaluation mode; the same modules are opened in both."""
    images = (images_like(example, _RECORDED[0]), images_like(example, _RECORDED[1]))
    closed: dict[str, str] = {}
    for mode in (True, False):
        # A first pass may make what later ones keep.
        with torch.set_grad_enabled(mode), restored(trial):
            _run(trial.train(mode), images[0])
    while True:
        before = dict(closed)
        training = record(trial.train(), images, closed, still, auxiliary=auxiliary)
        with torch.no_grad():
            evaluation = record(trial.eval(), images, closed, still, auxiliary=auxiliary)
        if closed == before:
            return training, evaluation


def _run(model: nn.Module, images: Tensor) -> Any:
    try:
        return model(images)
    except Exception as error:  # a user's forward may raise anything
        mode = "" if model.training else " in evaluation mode"
        problem = f"{type(model).__name__} fails on {len(images)} images{mode} {described(error)}"
        raise config_error("model", problem) from error


def _difference(trial: nn.Module, traced: TracedModel, example: Tensor, auxiliary: bool) -> str:
    """How the segments' results differ from the model's; empty if they don't."""
    for mode, count in ((True, _COMPARED), (False, _COMPARED), (False, _ALONE)):
        images = images_like(example, count)
        results = []
        for model in (trial, traced):
            with restored(trial), torch.set_grad_enabled(mode):
                torch.manual_seed(0)
                try:
                    output = model.train(mode)(images.clone())
                except Exception as error:
                    if model is trial:
                        break  # it can't run so few images, or such a number of them
                    return f"its parts fail on {count} images {described(error)}"
                outputs = tensors_of(trained_outputs(output, auxiliary=auxiliary))
                results.append([*(tensor.detach() for tensor in outputs), *_gradients(trial, outputs)])
        if len(results) == 2 and not _are_nearly_equal(*results):
            where = "training" if mode else "evaluation"
            return f"with {count} images its parts give other results in {where} than the model"
    return ""


def _gradients(model: nn.Module, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the parameters, of a loss that depends on all outputs."""
    roots = [tensor for tensor in outputs if tensor.requires_grad and not tensor.is_meta]
    if not roots:
        return []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = torch.stack([root.float().square().mean() for root in roots]).sum()
    # None for a parameter that the output does not depend on.
    found: Sequence[Tensor | None] = torch.autograd.grad(loss, trained, allow_unused=True)
    return [torch.zeros(0) if gradient is None else gradient for gradient in found]


def _are_nearly_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(map(_nearly_equal, first, second))


def _nearly_equal(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.is_meta:
        return first.shape == second.shape
    if not first.is_floating_point():
        return torch.equal(first, second)
    scale = float(first.detach().abs().max()) if first.numel() else 0.0
    return torch.allclose(first, second, rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True)
