"""Which arguments of a model the data set determines; found by asking for its signature, never by calling it.

A model tells by the names of its arguments. One that takes ``**kwargs`` hands them on to a class: of a class, that is
the one it inherits from; of a function, the one that it says it returns. So torchvision's ``resnet18(**kwargs) ->
ResNet`` takes what ``ResNet`` takes. Where that isn't known either, the user names the arguments: ``model.arguments``.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from torch import nn

from distrain.config import user_code
from distrain.errors import ConfigError

#: Names of arguments by what they mean; of several in one signature the first is taken.
_NAMES = {
    "classes": ("num_classes", "n_classes", "nb_classes", "num_labels", "n_labels", "classes"),
    "channels": ("in_channels", "in_chans", "input_channels", "num_channels", "n_channels", "channels"),
    "image_size": ("image_size", "img_size"),
}
#: Names among them that may mean something else, such as the width of a layer or a list of names, with the defaults
#: that show what they mean. Without a default there is nothing else that they could be filled with.
_DOUBTFUL: dict[str, Callable[[Any], bool]] = {
    "classes": lambda default: type(default) is int,
    **dict.fromkeys(
        ("num_channels", "n_channels", "channels"), lambda default: type(default) is int and default in (1, 3)
    ),
}
#: What the data set determines, in the words of ``model.arguments``.
QUANTITIES = ("classes", "channels", "image_size", "height", "width")
#: Arguments that all factories of a library hand on, also those that don't say what they return.
_LIBRARIES = {"timm": ("num_classes", "in_chans"), "torchvision": ("num_classes",)}


@dataclass(frozen=True)
class DataShape:
    """What a model must know of the data.

    Attributes:
        channels: Of the images.
        classes: Logits per sample.
        image_size: Height and width in pixels.
    """

    channels: int
    classes: int
    image_size: tuple[int, int]


@dataclass(frozen=True)
class Keywords:
    """What is known of the arguments that a model can be given by name.

    Attributes:
        parameters: By name.
        takes_more: It takes other arguments too, and doesn't say which.
    """

    parameters: Mapping[str, Parameter]
    takes_more: bool

    def meaning(self, quantity: str) -> str | None:
        """Name of the argument that means one of the quantities."""
        return next((name for name in _NAMES[quantity] if self._is_meant(name)), None)

    def _is_meant(self, name: str) -> bool:
        if name not in self.parameters:
            return False
        default = self.parameters[name].default
        return default is Parameter.empty or name not in _DOUBTFUL or _DOUBTFUL[name](default)

    def found(self) -> dict[str, str]:
        """The quantity that each argument means, for the arguments that mean one."""
        names = {quantity: self.meaning(quantity) for quantity in _NAMES}
        return {name: quantity for quantity, name in names.items() if name is not None}


def keywords(target: Callable[..., Any]) -> Keywords:
    """The arguments of a class or function, and of what it hands further ones on to."""
    if isinstance(target, functools.partial):
        return _of_partial(target)
    if isinstance(target, type):
        return _of_class(target, target.__mro__)
    signature = _signature(target)
    own = _named(signature)
    if not _takes_more(signature):
        return Keywords(own, takes_more=False)
    returned = signature.return_annotation
    # nn.Module says nothing, and a class of torch's own is put together by the function.
    if isinstance(returned, type) and issubclass(returned, nn.Module) and not _is_of(returned, "torch"):
        handed_on = keywords(returned)
    else:
        handed_on = Keywords({}, takes_more=True)
    if handed_on.takes_more:
        library = next((name for name in _LIBRARIES if _is_of(inspect.unwrap(target), name)), None)
        more = {name: Parameter(name, Parameter.KEYWORD_ONLY) for name in _LIBRARIES.get(library or "", ())}
        handed_on = Keywords({**more, **handed_on.parameters}, takes_more=library is None)
    return Keywords({**handed_on.parameters, **own}, handed_on.takes_more)


def _of_partial(target: functools.partial[Any]) -> Keywords:
    whole = keywords(target.func)
    own, left = _named(_signature(target.func)), _named(_signature(target))
    bound = {*target.keywords, *(name for name in own if name not in left)}
    left_over = {name: parameter for name, parameter in whole.parameters.items() if name not in bound}
    return Keywords(left_over, whole.takes_more)


def _of_class(target: type, ancestors: tuple[type, ...]) -> Keywords:
    """The arguments of a class's constructor; ``ancestors`` are the classes that may define it, nearest first."""
    owner = next(place for place, ancestor in enumerate(ancestors) if "__init__" in vars(ancestor))
    if ancestors[owner] in (nn.Module, object):  # nn.Module's declares **kwargs but rejects any argument
        return Keywords({}, takes_more=False)
    # Of the class itself, as a metaclass or __new__ may change it.
    signature = _signature(target if ancestors[owner] is target else vars(ancestors[owner])["__init__"])
    own = {name: parameter for name, parameter in _named(signature).items() if name != "self"}
    if not _takes_more(signature):
        return Keywords(own, takes_more=False)
    inherited = _of_class(target, ancestors[owner + 1 :])
    # With no argument in sight, **kwargs is where they come from.
    return Keywords({**inherited.parameters, **own}, inherited.takes_more or not (own or inherited.parameters))


def with_plain_arguments(target: Callable[..., Any]) -> Callable[..., Any]:
    """What makes the same model from numbers, text and lists.

    The target itself, except for a model of transformers, which takes an object of its ``config_class``: then a
    function that makes both.
    """
    config_class = getattr(target, "config_class", None)
    if not isinstance(config_class, type) or not any(_is_of(base, "transformers") for base in _ancestors(target)):
        return target

    def make(**arguments: Any) -> Any:
        return target(config_class(**arguments))

    # Each configuration takes the number of classes, also where its signature doesn't say so.
    parameters = {"num_labels": Parameter("num_labels", Parameter.KEYWORD_ONLY, default=2)}
    parameters |= keywords(config_class).parameters
    by_name = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in parameters.values()]
    make.__signature__ = inspect.Signature(by_name)  # type: ignore[attr-defined]
    return make


def _ancestors(target: Any) -> tuple[type, ...]:
    return target.__mro__ if isinstance(target, type) else ()


def call(target: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Calls a target with arguments by name, also such as it takes by position alone."""
    positional, named = [], dict(arguments)
    for name, parameter in _signature(target).parameters.items():
        if parameter.kind is not Parameter.POSITIONAL_ONLY or name not in named:
            break
        positional.append(named.pop(name))
    return target(*positional, **named)


def problem_with(target: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """Why a target can't be called with these arguments; empty if it can, as far as its signature tells."""
    signature = _signature(target)
    by_name = [
        parameter.replace(kind=Parameter.POSITIONAL_OR_KEYWORD)
        if parameter.kind is Parameter.POSITIONAL_ONLY
        else parameter
        for parameter in signature.parameters.values()
    ]
    try:
        signature.replace(parameters=by_name).bind(**arguments)
    except TypeError as error:
        return f"{error}; its arguments: {', '.join(signature.parameters)}"
    return ""


def _signature(target: Callable[..., Any]) -> inspect.Signature:
    try:
        return user_code.signature(target, eval_str=True)
    except Exception:  # evaluating an annotation may raise anything; the names need none
        return user_code.signature(target)


def _named(signature: inspect.Signature) -> dict[str, Parameter]:
    kinds = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return {name: parameter for name, parameter in signature.parameters.items() if parameter.kind not in kinds}


def _takes_more(signature: inspect.Signature) -> bool:
    return any(parameter.kind is Parameter.VAR_KEYWORD for parameter in signature.parameters.values())


def _is_of(target: Any, library: str) -> bool:
    return str(getattr(target, "__module__", "")).partition(".")[0] == library


# --- values ----------------------------------------------------------------------------------------------------------


def data_arguments(
    path: str,
    target: Callable[..., Any],
    shape: DataShape,
    names: Mapping[str, str] | None,
    given: Collection[str],
) -> dict[str, Any]:
    """The arguments that the data set determines.

    Args:
        path: The model's dotted path, for messages.
        target: A class, or a function that makes the model.
        shape: Of the data.
        names: ``model.arguments``: the quantity that each argument means; ``None``: to be found out.
        given: Names of arguments that the configuration itself gives a value.

    Raises:
        ConfigError: It isn't known which arguments these are, or the images are not square where one number must say
            their size.
    """
    known = keywords(target)
    if names is None:
        names = known.found()
        if known.takes_more and "classes" not in names.values() and not set(given).intersection(_NAMES["classes"]):
            example = "model.arguments='{num_classes: classes, in_channels: channels}'"
            problem = "takes **kwargs and doesn't say what they are; name the arguments that the data set determines"
            raise ConfigError("model._target_", path, f"{problem}: {example} ({{}}: none)")
    values = {
        "classes": shape.classes,
        "channels": shape.channels,
        "height": shape.image_size[0],
        "width": shape.image_size[1],
    }
    return {
        name: _size(path, name, known.parameters.get(name), shape) if quantity == "image_size" else values[quantity]
        for name, quantity in names.items()
        if name not in given
    }


def check_names(names: Mapping[str, str] | None, given: Collection[str]) -> None:
    """Refuses ``model.arguments`` that say what isn't there.

    Args:
        names: The value of the key.
        given: Names of arguments in ``model.kwargs``.

    Raises:
        ConfigError: A quantity is unknown, or an argument is given twice.
    """
    for name, quantity in (names or {}).items():
        if quantity not in QUANTITIES:
            raise ConfigError(f"model.arguments.{name}", quantity, "is not determined by the data set", QUANTITIES)
        if name in given:
            raise ConfigError(f"model.arguments.{name}", quantity, f"model.kwargs.{name} gives it too; leave one out")


def _size(path: str, name: str, parameter: Parameter | None, shape: DataShape) -> int | tuple[int, int]:
    """The size of the images: a number where the argument takes one number only, else height and width."""
    if parameter is None or not _takes_a_number(parameter):
        return shape.image_size
    height, width = shape.image_size
    if height != width:
        problem = f"takes one number as {name}, and the images are {height}x{width}; take square images"
        raise ConfigError("model._target_", path, f"{problem}, or say what to pass: +model.kwargs.{name}=…")
    return height


def _takes_a_number(parameter: Parameter) -> bool:
    hint = parameter.annotation
    if hint is Parameter.empty or isinstance(hint, str):  # none, or one that can't be evaluated
        return isinstance(parameter.default, int)
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return all(kind in (int, type(None)) for kind in (typing.get_args(hint) if is_union else [hint]))
