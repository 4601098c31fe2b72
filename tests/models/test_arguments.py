"""Which arguments of a model the data set determines: found by its signature, whatever a factory looks like."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from distrain.errors import ConfigError
from distrain.models.arguments import DataShape, call, check_names, data_arguments, keywords, problem_with

SHAPE = DataShape(channels=1, classes=7, image_size=(16, 16))
WIDE = DataShape(channels=1, classes=7, image_size=(16, 32))


class Net(nn.Module):
    def __init__(self, layers: int, num_classes: int = 1000, in_chans: int = 3, img_size: int = 224) -> None:
        super().__init__()


class Configured(Net):
    def __init__(self, depth: int = 2, **kwargs: Any) -> None:
        super().__init__(layers=depth, **kwargs)


class Unchanged(Configured):
    pass


class Swallows(nn.Module):
    def __init__(self, n_classes: int, **kwargs: Any) -> None:
        super().__init__()


class Bare(nn.Module):
    pass


class Opaque(nn.Module):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__()


def like_torchvision(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> Net:
    return Net(2, **kwargs)


@functools.wraps(like_torchvision)
def wrapped(*args: Any, **kwargs: Any) -> Any:
    return like_torchvision(*args, **kwargs)


def opaque(**kwargs: Any) -> nn.Module:
    return Net(2, **kwargs)


def assembled(**kwargs: Any) -> nn.Sequential:
    return nn.Sequential()


def half_opaque(num_classes: int, **kwargs: Any) -> nn.Module:
    return Net(2, num_classes, **kwargs)


def by_position(n_classes: int, in_channels: int, /, width: int = 8) -> nn.Module:
    return nn.Linear(in_channels, n_classes)


def unannotated(classes, channels, img_size=224):  # type: ignore[no-untyped-def]
    return nn.Identity()


def other_meanings(classes: Any = ("cat", "dog"), channels: int = 64, num_channels: Any = None) -> nn.Module:
    return nn.Identity()


def like_lucidrains(*, image_size: Any, num_classes: int, dim: int, channels: int = 3) -> nn.Module:
    return nn.Identity()


def like_smp(encoder: str = "resnet18", in_channels: int = 3, classes: int = 1) -> nn.Module:
    return nn.Identity()


def several(num_classes: int, classes: int, in_chans: int, channels: int) -> nn.Module:
    return nn.Identity()


def sizes(image_size: tuple[int, int], img_size: int = 3) -> nn.Module:
    return nn.Identity()


def either_size(num_classes: int, img_size: int | tuple[int, int] = 224) -> nn.Module:
    return nn.Identity()


def unknown_annotation(num_classes: NoSuchType, img_size: NoSuchType = 224) -> NoSuchType:  # type: ignore[name-defined] # noqa: F821
    return nn.Identity()


class Factory:
    def __call__(self, num_labels: int) -> nn.Module:
        return nn.Identity()

    def method(self, num_labels: int) -> nn.Module:
        return nn.Identity()


NET = {"num_classes": 7, "in_chans": 1, "img_size": 16}
FOUND: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "a class": (Net, NET),
    "a class that hands on to its base": (Configured, NET),
    "one without a constructor of its own": (Unchanged, NET),
    "one that swallows the rest": (Swallows, {"n_classes": 7}),
    "one without any": (Bare, {}),
    "torch's": (nn.Conv2d, {"in_channels": 1}),
    "torchvision's factories": (like_torchvision, NET),
    "a decorated one": (wrapped, NET),
    "a partial": (functools.partial(like_torchvision, progress=False), NET),
    "a partial of a class": (functools.partial(Net, 3), NET),
    "a partial that says the classes itself": (
        functools.partial(like_torchvision, num_classes=3),
        {"in_chans": 1, "img_size": 16},
    ),
    "a partial by position": (functools.partial(Net, 3, 4), {"in_chans": 1, "img_size": 16}),
    "arguments besides unknown ones": (half_opaque, {"num_classes": 7}),
    "by position alone": (by_position, {"n_classes": 7, "in_channels": 1}),
    "without types": (unannotated, {"classes": 7, "channels": 1, "img_size": 16}),
    "words that mean something else": (other_meanings, {}),
    "a default that is one of an image": (
        like_lucidrains,
        {"num_classes": 7, "image_size": (16, 16), "channels": 1},
    ),
    "a number of classes": (like_smp, {"in_channels": 1, "classes": 7}),
    "several names of one meaning": (several, {"num_classes": 7, "in_chans": 1}),
    "height and width": (sizes, {"image_size": (16, 16)}),
    "a number or a pair": (either_size, {"num_classes": 7, "img_size": (16, 16)}),
    "types that can't be evaluated": (unknown_annotation, {"num_classes": 7, "img_size": 16}),
    "an object that is called": (Factory(), {"num_labels": 7}),
    "a method": (Factory().method, {"num_labels": 7}),
    "a lambda": (lambda num_classes: nn.Identity(), {"num_classes": 7}),
}


@pytest.mark.parametrize("case", FOUND)
def test_arguments_are_found_by_asking(case: str) -> None:
    target, expected = FOUND[case]
    assert data_arguments("my.net", target, SHAPE, None, set()) == expected


@pytest.mark.parametrize("target", [opaque, Opaque, assembled, lambda **kwargs: nn.Identity()])
def test_unknown_arguments_are_asked_for_in_one_line(target: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        data_arguments("my.net", target, SHAPE, None, set())
    assert str(caught.value) == (
        "model._target_=my.net: takes **kwargs and doesn't say what they are; name the arguments that the data set "
        "determines: model.arguments='{num_classes: classes, in_channels: channels}' ({}: none)"
    )
    assert data_arguments("my.net", target, SHAPE, {}, set()) == {}
    assert data_arguments("my.net", target, SHAPE, None, {"num_classes"}) == {}


def test_arguments_can_be_named() -> None:
    names = {"k": "classes", "c": "channels", "s": "image_size", "h": "height", "w": "width"}
    expected = {"k": 7, "c": 1, "s": (16, 32), "h": 16, "w": 32}
    assert data_arguments("my.net", opaque, WIDE, names, set()) == expected
    assert data_arguments("my.net", Net, SHAPE, {"layers": "classes"}, set()) == {"layers": 7}


def test_a_given_value_is_kept() -> None:
    assert data_arguments("my.net", Net, SHAPE, None, {"num_classes", "img_size"}) == {"in_chans": 1}


def test_one_number_can_not_be_the_size_of_images_that_are_not_square() -> None:
    assert data_arguments("my.net", either_size, WIDE, None, set())["img_size"] == (16, 32)
    with pytest.raises(
        ConfigError, match=r"takes one number as img_size, and the images are 16x32; .*kwargs\.img_size="
    ):
        data_arguments("my.net", Net, WIDE, None, set())


def test_what_is_named_wrongly_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model\.arguments\.k=clases: .*did you mean classes\?"):
        check_names({"k": "clases"}, set())
    with pytest.raises(ConfigError, match=r"^model\.arguments\.k=classes: model\.kwargs\.k gives it too"):
        check_names({"k": "classes"}, {"k"})
    check_names(None, {"k"})


def test_arguments_by_position_alone_are_given_so() -> None:
    model = call(by_position, {"width": 3, "in_channels": 2, "n_classes": 5})
    assert (model.in_features, model.out_features) == (2, 5)
    assert problem_with(by_position, {"n_classes": 5, "in_channels": 2}) == ""
    assert "missing a required argument: 'in_channels'" in problem_with(by_position, {"n_classes": 5})


def test_a_library_of_factories_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opaque, "__module__", "timm.models.efficientvit_mit")
    assert list(keywords(opaque).found()) == ["num_classes", "in_chans"]
    monkeypatch.setattr(opaque, "__module__", "torchvision.models._api")
    assert list(keywords(opaque).found()) == ["num_classes"]
