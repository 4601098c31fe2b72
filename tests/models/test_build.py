"""Building and checking the configured model, and refusing targets that can't be trained or must not be run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distrain.config.groups import ModelConfig
from distrain.errors import ConfigError
from distrain.models import trial
from distrain.models.build import CustomConfig, instantiate_model
from distrain.models.trial import ModelTrial

DIGITS: dict[str, Any] = {"in_channels": 1, "num_classes": 10, "image_size": (8, 8)}

MY_MODELS = """
import functools
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, image_size, width=2):
        super().__init__()
        self.hidden = nn.Linear(image_size[0] * image_size[1], width)
        self.output = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.output(self.hidden(images.flatten(1)))

class TakesAll(Net):
    def __init__(self, in_channels, **kwargs):
        super().__init__(**kwargs)
        self.received = {"in_channels": in_channels, **kwargs}

def takes_anything(**kwargs):
    return TakesAll(**kwargs)

def classes_by_another_name(count=1000):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, count))

def for_colours(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 8), nn.Flatten(), nn.Linear(8, num_classes))

class DependsOnValues(Net):
    def forward(self, images):
        return super().forward(images) * (1 if images.sum() > 0 else 2)

class Constant(Net):
    def __init__(self, num_classes, image_size):
        super().__init__(num_classes, image_size)
        self.scale = torch.ones(())

    def forward(self, images):
        return super().forward(images * self.scale)

class Unused(Net):
    def __init__(self, num_classes, image_size):
        super().__init__(num_classes, image_size)
        self.more = nn.Linear(2, 3)

class Broken(nn.Module):
    def __init__(self):
        raise OSError("no weights")

class WrongShape(Net):
    def forward(self, images):
        return super().forward(images)[:, :3]

class Lazy(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.LazyLinear(num_classes))

def factory(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

def number(num_classes):
    return num_classes

imported = torch.nn.Identity
with_width = functools.partial(Net, width=3)
with_torch = functools.partial(torch.nn.Linear, 64)
"""


@pytest.fixture(params=["small", "large"])
def my_models(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's module of models, checked once in the way of small models and once in the way of large ones."""
    if request.param == "large":
        monkeypatch.setattr(trial, "_FAST_FLOPS", 0)
    (tmp_path / "my_models.py").write_text(MY_MODELS)
    monkeypatch.syspath_prepend(tmp_path)


def custom(target: str, arguments: dict[str, str] | None = None, **kwargs: Any) -> CustomConfig:
    return CustomConfig(name="custom", _target_=target, kwargs=kwargs, arguments=arguments)


@pytest.mark.usefixtures("my_models")
def test_a_custom_model_gets_the_data_sets_shape_and_its_kwargs() -> None:
    model = instantiate_model(custom("my_models.Net", width=7), **DIGITS)
    assert [tuple(p.shape) for p in model.parameters()] == [(7, 64), (7,), (10, 7), (10,)]
    assert instantiate_model(custom("my_models.TakesAll", width=7), **DIGITS).received == {**DIGITS, "width": 7}
    ModelTrial(custom("my_models.Net", width=7), **DIGITS)


@pytest.mark.usefixtures("my_models")
def test_what_the_data_set_determines_can_be_named() -> None:
    names = {"num_classes": "classes", "image_size": "image_size", "in_channels": "channels"}
    model = instantiate_model(custom("my_models.takes_anything", names, width=7), **DIGITS)
    assert model.received == {**DIGITS, "width": 7}
    ModelTrial(custom("my_models.classes_by_another_name", {"count": "classes"}), **DIGITS)


@pytest.mark.usefixtures("my_models")
def test_kwargs_override_the_data_sets_shape() -> None:
    assert instantiate_model(custom("my_models.Net", num_classes=3), **DIGITS).output.out_features == 3  # type: ignore[union-attr]


@pytest.mark.usefixtures("my_models")
def test_a_target_may_be_a_function_that_makes_the_model() -> None:
    ModelTrial(custom("my_models.factory"), **DIGITS)
    assert isinstance(instantiate_model(custom("my_models.factory"), **DIGITS), nn.Sequential)


@pytest.mark.usefixtures("my_models")
@pytest.mark.parametrize("target", ["my_models.DependsOnValues", "my_models.Constant"])
def test_a_model_that_fails_on_the_meta_device_is_checked_on_cpu(target: str) -> None:
    assert ModelTrial(custom(target), **DIGITS).unused == []


@pytest.mark.usefixtures("my_models")
def test_parameters_without_gradient_are_returned() -> None:
    assert ModelTrial(custom("my_models.Unused"), **DIGITS).unused == ["more.weight", "more.bias"]


@pytest.mark.usefixtures("my_models")
@pytest.mark.parametrize("target", ["my_models.Net", "my_models.DependsOnValues"])
def test_the_check_leaves_the_random_generator_unchanged(target: str) -> None:
    before = torch.random.get_rng_state()
    ModelTrial(custom(target), **DIGITS)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.usefixtures("my_models")
@pytest.mark.parametrize(
    ("target", "kwargs", "message"),
    [
        ("my_models.Nett", {}, "module my_models has no Nett"),
        ("no_such_package.Net", {}, "can't be imported"),
        ("my_models.Net", {"widht": 3}, "unexpected keyword argument 'widht'; its arguments: num_classes, image_size"),
        ("my_models.Broken", {}, "fails to build (OSError: no weights) at "),
        ("my_models.Lazy", {}, "is lazy"),
        ("my_models.MY_MODELS", {}, "has no MY_MODELS"),
        ("my_models.number", {}, "makes a int, not an nn.Module"),
        ("my_models.__name__", {}, "neither an nn.Module class nor a function"),
        ("pathlib.Path", {}, "neither an nn.Module class nor a function"),
        ("torch.relu", {"arguments": {}}, "fails to build (TypeError: relu() missing 1 required positional argument"),
        ("my_models.takes_anything", {}, "takes **kwargs and doesn't say what they are; name the arguments that"),
        ("my_models.classes_by_another_name", {}, "if there is one, name it: model.arguments='{NAME: classes}'"),
        ("my_models.for_colours", {}, "no argument of it is known to be the number of channels; if there is one, name"),
        ("my_models.Net", {"arguments": {"num_clases": "classes"}}, "missing a required argument: 'num_classes'"),
        ("my_models.factory", {"arguments": {"num_clases": "classes"}, "num_classes": 3}, "argument 'num_clases'"),
        (
            "my_models.Net",
            {"arguments": {"num_classes": "clases"}},
            "num_classes=clases: is not determined by",
        ),
        ("my_models.Net", {"arguments": {}}, "missing a required argument: 'num_classes'; its arguments: num_classes"),
        ("my_models.WrongShape", {}, "returns [2, 3] for images [2, 1, 8, 8]; outputs [2, 10] are needed"),
        ("torch.nn.Conv2d", {"out_channels": 3, "kernel_size": 9}, "fails on images [2, 1, 8, 8] (RuntimeError"),
    ],
)
def test_an_untrainable_target_is_refused_in_one_line(target: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelTrial(custom(target, **kwargs), **DIGITS)
    assert message in str(caught.value)
    assert str(caught.value).startswith(("model._target_=", "model.kwargs=", "model.arguments."))
    assert "\n" not in str(caught.value)


def test_a_changed_target_of_a_named_choice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\._target_=my\.Net: .* use model=custom"):
        instantiate_model(ModelConfig(name="simple_cnn", _target_="my.Net"), **DIGITS)


@pytest.mark.usefixtures("my_models")
@pytest.mark.parametrize(
    "target",
    [
        "torch.nn.Identity",
        "my_models.imported",
        "my_models.with_torch",
        "distrain.models.build.locate",
        "distrain.models.build.nn",
    ],
)
def test_targets_outside_the_allowed_prefixes_are_refused(target: str) -> None:
    with pytest.raises(ConfigError, match=r"model\._target_=.*is not below"):
        instantiate_model(custom(target), **DIGITS, allowed=["distrain.models", "my_models"])


def test_a_refused_target_is_not_even_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "untrusted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="is not below"):
        instantiate_model(custom("untrusted.Net"), **DIGITS, allowed=["distrain.models"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.usefixtures("my_models")
def test_an_allowed_target_is_built() -> None:
    allowed = ["distrain.models", "my_models"]
    for target in ("my_models.Net", "my_models.with_width"):
        assert type(instantiate_model(custom(target), **DIGITS, allowed=allowed)).__name__ == "Net"
    registered = ModelConfig(name="simple_cnn", _target_="distrain.models.cnn.SimpleCNN")
    assert type(instantiate_model(registered, **DIGITS, allowed=["distrain.models"])).__name__ == "SimpleCNN"
