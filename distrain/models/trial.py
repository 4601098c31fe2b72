"""A model's first trial: what can be known of it in a second, before data are loaded and ranks communicate."""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from distrain.checkpoint.module_state import check_saveable
from distrain.config.groups import ModelConfig
from distrain.errors import ConfigError, described
from distrain.models import tensors
from distrain.models.base import DataDependentInit
from distrain.models.build import instantiate_model, is_untold
from distrain.models.foreign import ForeignModelConfig, auxiliary_weight, identity
from distrain.models.meta_device import fast_meta_passes
from distrain.models.outputs import NoLogits, auxiliary_logits, logits_of, other_outputs
from distrain.runtime.device import RandomState, seed_everything
from distrain.torch_internals import BatchNorm, Dropout, apply_to_tensors, write_count

log = logging.getLogger(__name__)

#: Floating-point operations that any CPU does in less than a second.
_FAST_FLOPS = 1e11
#: Seconds after which a trial says that it is still waiting for the model.
_PATIENCE = 10.0


class ModelTrial:
    """Builds the configured model, only to try it, and runs a few images through it.

    A model that a CPU runs fast is run on the CPU: one of distrain's own with zeros as parameters, another one with its
    own initial parameters. A larger model runs on the meta device (shapes without memory): what depends on values is
    not known of it then. If it fails there and is not one of distrain's, for example because its forward pass depends
    on values, it is tried again on the CPU.

    Args:
        config: As for :func:`instantiate_model`, like the next four.
        in_channels: Channels of the images.
        num_classes: Number of logits per sample.
        image_size: Height and width of the images in pixels.
        output_shape: Shape of the outputs for one sample; by default a logit for each class.
        allowed: Prefixes that the ``_target_`` of a ``custom`` model may have.
        dtype: Floating-point format of parameters and images.
        autocast: The context of forward passes.
        extra_check: Another check of the model, called before images run; it may add to the model what training adds.
        most_bytes: A model with more bytes of parameters is not built on the CPU unless it fails on the meta device.

    Attributes:
        model: The model that was tried, for its structure: what training builds has other values.
        unused: Names of trainable parameters that the loss doesn't depend on.
        ignored_outputs: Names of outputs in training mode, besides the logits, that the loss doesn't depend on.
        auxiliary_outputs: Those of them that are logits of auxiliary heads.
        cast: Names of parameters and buffers that training gives another number format, by their own format.
        buffers_of_samples: Names of parameters and buffers that a forward pass in training mode changes, in a way that
            depends on the samples it sees. BatchNorm's are left out.
        buffers_of_passes: Names of those that it changes in the same way whatever the samples are.
        has_batchnorm: Whether a layer normalises by statistics of the samples that run at once.
        draws_random: Whether a forward pass in training mode draws random numbers.
        mixes_samples: Whether a sample's logits depend on the other samples of its batch, in training mode and apart
            from BatchNorm.

    Raises:
        ConfigError: What :func:`instantiate_model` raises, or the model can't be trained on such images.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        in_channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        output_shape: tuple[int, ...] | None = None,
        allowed: Sequence[str] | None = None,
        dtype: torch.dtype = torch.float32,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        extra_check: Callable[[nn.Module], None] | None = None,
        most_bytes: float = math.inf,
    ) -> None:
        self._config, self._num_classes, self._dtype, self._autocast = config, num_classes, dtype, autocast
        self._image_shape = (in_channels, *image_size)
        self._output_shape = (num_classes,) if output_shape is None else output_shape
        self._allowed, self._extra_check, self._most_bytes = allowed, extra_check, most_bytes
        #: Whether the model is not one of distrain's own, of which all is known that can't be seen in shapes.
        self._is_foreign = isinstance(config, ForeignModelConfig) or not config._target_.startswith("distrain.models.")
        self.unused: list[str] = []
        self.ignored_outputs: list[str] = []
        self.auxiliary_outputs: list[str] = []
        self.cast: dict[str, list[str]] = {}
        self.buffers_of_samples: list[str] = []
        self.buffers_of_passes: list[str] = []
        self.has_batchnorm = self.draws_random = self.mixes_samples = False
        with self._surroundings():
            self._try()

    def forget_model(self) -> None:
        """Frees the model's memory; what was found out about the model stays."""
        del self.model

    def problem_with(self, count: int, *, training: bool, batchnorm: bool = True) -> str:
        """Why the model can't run so many images at once; empty if it can.

        Args:
            count: Number of images.
            training: In training mode; otherwise in evaluation mode.
            batchnorm: Whether BatchNorm layers take statistics of these images, if in training mode.
        """
        with self._surroundings():
            self._set_mode(training, batchnorm=batchnorm)
            try:
                with torch.set_grad_enabled(training):
                    self._forward(self._images(count))
            except _Refused as refused:
                return str(refused)
        return ""

    def show(self, look: Callable[[nn.Module, Tensor], None]) -> None:
        """Gives the model, and two images that it can run, to another check of it.

        Does nothing for distrain's own models, of which all is known, so that nobody waits for it.

        Raises:
            ConfigError: The check refuses the model.
        """
        if self._is_foreign:
            with self._surroundings():
                look(self.model, self._images(2))

    # --- the trial ---------------------------------------------------------------------------------------------------

    def _try(self) -> None:
        try:
            self._build("meta")
            if tensors.parameter_bytes(self.model) > self._most_bytes or not self._runs_fast():
                self._check_training()
                return
        except ConfigError:
            if not self._is_foreign:
                raise
        if self._is_foreign:
            self._build("cpu")
        elif self._device == "meta":
            self._fill_with_zeros()
        self._check_training()

    @staticmethod
    def _fast_passes(device: str) -> AbstractContextManager[None]:
        return fast_meta_passes() if device == "meta" else nullcontext()

    def _fill_with_zeros(self) -> None:
        # Not Module.to_empty: it calls torch.empty_like on meta tensors, and torch then needs a second to import the
        # code that computes shapes.
        apply_to_tensors(self.model, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu"))
        self._device = "cpu"

    def _build(self, device: str) -> None:
        channels, *size = self._image_shape
        with torch.device(device), self._fast_passes(device):
            self.model = instantiate_model(
                self._config,
                in_channels=channels,
                num_classes=self._num_classes,
                image_size=(size[0], size[1]),
                allowed=self._allowed,
            )
        self._device = device
        self.has_batchnorm = any(isinstance(layer, BatchNorm) for layer in self.model.modules())
        self.buffers_of_samples, self.buffers_of_passes = [], []
        self.cast = tensors.cast_tensors(self.model, self._dtype)
        if self._extra_check is not None:
            self._extra_check(self.model)
        tensors.convert(self.model, self._dtype)

    def _runs_fast(self) -> bool:
        """Whether a CPU runs two images in less than a second.

        An upper bound tells that of most models: each parameter used at each pixel. The operations of a larger one of
        distrain's own are counted, on the CPU; if they are too many, it is on the meta device again.
        """
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        if 2 * 2 * parameters * self._image_shape[1] * self._image_shape[2] < _FAST_FLOPS:
            return True
        if self._is_foreign:
            return False
        self._fill_with_zeros()
        if 2 * self._flops() < _FAST_FLOPS:
            return True
        self._build("meta")
        return False

    def _flops(self) -> float:
        """Operations of a forward pass of one image, counted in a pass of no images, which has all shapes."""
        flops = 0.0

        def count(layer: nn.Module, _: Any, output: Tensor) -> None:
            nonlocal flops
            parameters = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
            if parameters:
                flops += 2 * parameters * math.prod(output.shape[2:])

        handles = [layer.register_forward_hook(count) for layer in self.model.modules()]
        self._set_mode(training=False)
        with torch.no_grad():
            self._run(self._images(0))
        for handle in handles:
            handle.remove()
        return flops

    @property
    def _has_values(self) -> bool:
        """Whether the model computes what it will compute at the start of training."""
        return self._is_foreign and self._device == "cpu"

    def _check_training(self) -> None:
        model = self.model
        if not any(parameter.requires_grad for parameter in model.parameters()):
            self._refuse("nothing to train: no parameter of it has requires_grad=True; leave it so for some")
        shapes = self._saved_shapes()
        before = _State(model)
        self._set_mode(training=True)
        images = self._images(2)
        random_state = RandomState.now()
        output = self._run(images)
        logits = logits_of(output)
        drew = not RandomState.now().draws_equal(random_state)
        self.draws_random = drew or any(isinstance(layer, Dropout) and layer.p > 0 for layer in model.modules())
        if not logits.requires_grad:
            self._refuse(
                "nothing to train: its output depends on no trainable parameter; its forward pass must not run under "
                "torch.no_grad() or detach() its output"
            )
        auxiliary = auxiliary_logits(output)
        has_weight = auxiliary_weight(self._config) > 0
        self.auxiliary_outputs = [] if has_weight else list(auxiliary)
        self.ignored_outputs = [name for name in other_outputs(output) if not has_weight or name not in auxiliary]
        self.unused = _unused_parameters(model, [logits, *(auxiliary.values() if has_weight else ())])
        self._check_state(before)
        if self._has_values:
            self._check_values(logits)
        else:
            self.buffers_of_samples = before.changed(model)
        if not self._is_foreign:
            return
        self._set_mode(training=False)
        with torch.no_grad():
            self._run(self._images(2))
        now = self._saved_shapes()
        if differing := [name for name in {**shapes, **now} if shapes.get(name) != now.get(name)]:
            problem = f"its forward pass adds, removes or reshapes the state {_listed(differing)}"
            self._refuse(
                f"{problem}, so that a new model could not load a saved one; make it in __init__, or "
                "register_buffer(…, persistent=False)"
            )

    def _saved_shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of what a checkpoint would hold."""
        return check_saveable(self.model) if self._is_foreign else {}

    def _check_state(self, before: _State) -> None:
        """Refuses a forward pass that changes what the model consists of."""
        model = self.model
        if replaced := before.replaced_parameters(model):
            problem = f"its forward pass makes or replaces the parameters {_listed(replaced)}"
            self._refuse(f"{problem}; make all parameters in __init__, and change them only in place")
        if holding := [name for name, buffer in model.named_buffers() if buffer.requires_grad]:
            problem = f"its forward pass leaves the graph of the backward pass in the buffers {_listed(holding)}"
            self._refuse(f"{problem}; call detach() on what they are computed from")

    def _check_values(self, logits: Tensor) -> None:
        """Runs backward passes, and finds out how samples and buffers depend on each other."""
        if not isinstance(self.model, DataDependentInit) and not bool(logits.isfinite().all()):
            self._refuse(
                f"returns {_nonfinite(logits)} for images of normal noise; look at its initial parameters, and at "
                "divisions, logarithms and roots of numbers near 0"
            )
        self._backward(logits)
        # BatchNorm, which is expected to mix samples and is spoken of elsewhere, keeps still.
        self._set_mode(training=True, batchnorm=False)
        buffers = _Buffers(self.model)
        images = self._images(3)
        results = []
        for pair in ([0, 1], [0, 2]):
            buffers.restore()
            before = _State(self.model)
            seed_everything(0)
            logits = logits_of(self._run(images[pair]))
            self._backward(logits)
            results.append((logits.detach()[0], {name: tensor.clone() for name, tensor in _changeable(self.model)}))
        (first, buffers_first), (second, buffers_second) = results
        self.mixes_samples = not _nearly_equal(first, second)
        for name in before.changed(self.model):
            same = _nearly_equal(buffers_first[name], buffers_second[name])
            (self.buffers_of_passes if same else self.buffers_of_samples).append(name)

    # --- passes ------------------------------------------------------------------------------------------------------

    def _images(self, count: int) -> Tensor:
        shape = (count, *self._image_shape)
        if not self._has_values:
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        return torch.randn(shape, dtype=self._dtype, generator=torch.Generator().manual_seed(0))

    def _set_mode(self, training: bool, *, batchnorm: bool = True) -> None:
        self.model.train(training)
        for layer in self.model.modules():
            if not isinstance(layer, BatchNorm):
                continue
            if not batchnorm:
                layer.eval()
            if not layer.track_running_stats:
                # Without running statistics a layer takes those of the images in evaluation mode too.
                zeros = torch.zeros(layer.num_features, dtype=self._dtype, device=self._device)
                layer.running_mean, layer.running_var = (None, None) if batchnorm else (zeros, zeros + 1)

    def _run(self, images: Tensor) -> Any:
        try:
            return self._forward(images)
        except _Refused as refused:
            self._refuse(str(refused), refused.__cause__)

    def _forward(self, images: Tensor) -> Any:
        """The model's output for images, if its logits are what is needed."""
        shape, mode = list(images.shape), "" if self.model.training else " in evaluation mode"
        try:
            with self._autocast(), torch.device(self._device), self._fast_passes(self._device):
                output: Any = self.model(images)
        except Exception as error:  # a user's forward may raise anything
            way_out = self._way_to_tell("channels") if self._image_shape[0] != 3 else ""
            raise _Refused(f"fails on images {shape}{mode} {described(error)}{way_out}") from error
        expected = [len(images), *self._output_shape]
        needed = f"outputs {expected} are needed: "
        try:
            result = logits_of(output)
        except NoLogits as error:
            way_out = "its forward must return them alone, first in a tuple, or as `logits` of a dictionary or object"
            raise _Refused(f"returns {error} for images {shape}{mode}; {needed}{way_out}") from error
        if (actual := list(result.shape)) != expected:
            each = "a row for each image and a column for each class or number"
            if len(self._output_shape) > 1:
                each = "a number for each image, class and pixel"
            way_out = f"its forward must return one tensor with {each}" + self._way_to_tell("classes")
            raise _Refused(f"returns {actual} for images {shape}{mode}; {needed}{way_out}")
        if not result.is_floating_point():
            raise _Refused(f"returns logits of {result.dtype}{mode}; they must be real numbers, such as torch.float32")
        if len(images) == 1 and self._has_values and not bool(result.isfinite().all()):
            raise _Refused(f"returns {_nonfinite(result)} for a single image{mode}")
        return output

    def _way_to_tell(self, quantity: str) -> str:
        """How to tell the model a number that it was built without; empty if it was told, or has no arguments."""
        if not is_untold(self._config, quantity, self._allowed):
            return ""
        named = f"model.arguments='{{NAME: {quantity}}}'"
        return f"; no argument of it is known to be the number of {quantity}; if there is one, name it: {named}"

    def _backward(self, logits: Tensor) -> None:
        try:
            logits.float().square().mean().backward()
        except Exception as error:  # a user's autograd function may raise anything
            self._refuse(f"fails in the backward pass {described(error)}", error)

    def _refuse(self, problem: str, cause: BaseException | None = None) -> NoReturn:
        raise ConfigError(*identity(self._config), problem) from cause

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        """Leaves the random generator as it is, compiles nothing, and says so if the model takes long."""
        _, name = identity(self._config)
        timer = threading.Timer(
            _PATIENCE, log.warning, ("still waiting for the first trial of %s (a forward pass of 2 images)", name)
        )
        timer.daemon = True
        # Only a model that compiles parts of itself has imported the compiler.
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        random_state = RandomState.now()
        timer.start()
        try:
            with torch.enable_grad(), eager:
                seed_everything(0)
                yield
        finally:
            timer.cancel()
            random_state.restore()


class _Refused(Exception):
    """The model can't run some images; the message says why."""


# --- what a forward pass changes -------------------------------------------------------------------------------------


class _State:
    """What a model consists of at a moment."""

    def __init__(self, model: nn.Module) -> None:
        # The tensors themselves are kept, so that no other tensor gets their ids.
        self._parameters = dict(model.named_parameters())
        self._versions = {name: (tensor, write_count(tensor)) for name, tensor in _changeable(model)}

    def replaced_parameters(self, model: nn.Module) -> list[str]:
        """Names of parameters that are other objects than before, new or gone."""
        now = dict(model.named_parameters())
        return [name for name in {**self._parameters, **now} if self._parameters.get(name) is not now.get(name)]

    def changed(self, model: nn.Module) -> list[str]:
        """Names of parameters and buffers other than BatchNorm's that were replaced or written to."""
        changed = []
        for name, tensor in _changeable(model):
            before, version = self._versions.get(name, (None, 0))
            if before is not None and (tensor is not before or write_count(tensor) != version):
                changed.append(name)
        return changed


def _changeable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and buffers other than BatchNorm's, by name."""
    yield from model.named_parameters()
    for prefix, module in model.named_modules():
        if not isinstance(module, BatchNorm):
            yield from module.named_buffers(prefix, recurse=False)


class _Buffers:
    """Buffers as they were when this was made."""

    def __init__(self, model: nn.Module) -> None:
        self._copies = [
            (module, name, buffer.clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
        ]

    def restore(self) -> None:
        for module, name, copy in self._copies:
            setattr(module, name, copy.clone())


def _unused_parameters(model: nn.Module, outputs: Sequence[Tensor]) -> list[str]:
    """Names of parameters that are not in the outputs' autograd graph; cheaper than a backward pass."""
    reached: set[int] = set()
    visited: set[Any] = set()
    pending: list[Any] = [output.grad_fn for output in outputs]
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        pending.extend(next_node for next_node, _ in node.next_functions)
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in reached]


# --- words -----------------------------------------------------------------------------------------------------------


def _nearly_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two results of the same computation differ by rounding at most."""
    if not first.is_floating_point() and not first.is_complex():
        return torch.equal(first, second)
    return torch.allclose(first, second, rtol=1e-4, atol=1e-6, equal_nan=True)


def _nonfinite(logits: Tensor) -> str:
    return "NaN" if bool(logits.isnan().any()) else "infinite numbers"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
