"""model=timm: architectures by name, and the normalisation of their weights, with a stand-in for the library."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from distrain.config.schema import Config
from distrain.data import manifest
from distrain.errors import ConfigError
from distrain.models.trial import ModelTrial
from distrain.runtime.world import World
from distrain.training.run_plan import RunPlan
from tests.runs import small

WEIGHTS = {
    "tiny_net": {"mean": (0.485, 0.456, 0.406), "fixed_input_size": False},
    "tiny_vit": {"mean": (0.5, 0.5, 0.5), "fixed_input_size": True},
    "tiny_fixed": {"mean": (0.5, 0.5, 0.5), "fixed_input_size": True},
}


class TinyNet(nn.Sequential):
    def __init__(self, num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0) -> None:
        super().__init__(nn.Conv2d(in_chans, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


class TinyVit(TinyNet):
    def __init__(self, img_size: tuple[int, int] = (224, 224), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.position = nn.Parameter(torch.zeros(img_size))


def tiny_net(pretrained: bool = False, **kwargs: Any) -> TinyNet:
    return TinyNet(**kwargs)


def tiny_vit(pretrained: bool = False, **kwargs: Any) -> TinyVit:
    return TinyVit(**kwargs)


ENTRY_POINTS = {"tiny_net": tiny_net, "tiny_vit": tiny_vit, "tiny_fixed": tiny_net}


def _create_model(model_name: str, pretrained: bool = False, checkpoint_path: Any = None, **kwargs: Any) -> nn.Module:
    return ENTRY_POINTS[model_name.partition(".")[0]](pretrained=pretrained, **kwargs)


def _get_pretrained_cfg(name: str) -> SimpleNamespace:
    arch, _, tag = name.partition(".")
    if tag not in ("", "in1k"):
        raise RuntimeError(f"Invalid pretrained tag ({tag}) for {arch}.")
    return SimpleNamespace(std=(0.229, 0.224, 0.225), input_size=(3, 224, 224), **WEIGHTS[arch])


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the library's name, with those of its functions that are used."""
    module: Any = ModuleType("timm")
    module.create_model = _create_model
    module.get_pretrained_cfg = _get_pretrained_cfg
    module.is_model = lambda name: name.partition(".")[0] in ENTRY_POINTS
    module.list_models = lambda: list(ENTRY_POINTS)
    module.models = SimpleNamespace(model_entrypoint=lambda name: ENTRY_POINTS[name.partition(".")[0]])
    monkeypatch.setitem(sys.modules, "timm", module)


def config(*overrides: str) -> Config:
    return small("model=timm", "data.train_size=13", *overrides)


def plan(*overrides: str) -> RunPlan:
    return RunPlan.resolve(config(*overrides), World.from_environment())


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("arch", ["tiny_net", "tiny_net.in1k", "tiny_vit"])
def test_an_architecture_gets_what_the_data_set_determines(arch: str) -> None:
    trial = plan(f"model.arch={arch}", "data.channels=2", "data.width=9", "+model.kwargs.drop_rate=0.1").check()
    assert (trial.model.get_submodule("0").in_channels, trial.model.get_submodule("3").out_features) == (2, 4)  # type: ignore[comparison-overlap]
    assert (trial.unused, getattr(trial.model, "position", torch.zeros(8, 9)).shape) == (
        ["position"] if arch == "tiny_vit" else [],
        (8, 9),
    )


@pytest.mark.usefixtures("timm")
def test_images_are_normalised_as_its_weights_expect_and_the_data_file_says_so() -> None:
    measured = plan("model.arch=tiny_net").source.load()
    splits = plan("model.arch=tiny_net.in1k", "model.normalisation=model").source.load()
    assert (splits.mean, splits.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (measured.mean, measured.std) != (splits.mean, splits.std)
    said = manifest.data_manifest(splits)
    assert (list(said["mean"]), list(said["std"])) == (list(splits.mean), list(splits.std))


REFUSED = {
    "model.arch=tiny_nett": "model.arch=tiny_nett: timm has no such architecture; .* lists all .*mean tiny_net",
    "model.arch=hf-hub:some/net": "model.arch=hf-hub:some/net: timm has no such architecture",
    "model.arch=tiny_net.in2k": r"model.arch=tiny_net.in2k: Invalid pretrained tag \(in2k\) .*; without a tag it is",
    "model.arch=tiny_fixed": "takes images of 224x224 pixels alone, and the data set's have 8x8",
    "model.arch=tiny_net +model.kwargs.pretrained=true": "^model.kwargs.pretrained=true: .*; init.weights=FILE starts",
    "model.arch=tiny_net +model.kwargs.checkpoint_path=x": "^model.kwargs.checkpoint_path=x: .*; init.weights=FILE",
    "model.arch=tiny_net +model.kwargs.depth=3": r"^model.arch=tiny_net: fails to build \(TypeError: .*'depth'",
    "model.arch=tiny_net +model.kwargs.num_classes=3": r"^model.arch=tiny_net: returns \[2, 3\] for images",
    "model.arch=tiny_net model.normalisation=mode": "^model.normalisation=mode: unknown choice; choices: data, model",
    "model.arch=tiny_net model.normalisation=model data.channels=1": "^model.normalisation=model: is for images",
    "model.arch=tiny_net model.normalisation=model data.std=[1,1,1]": "^data.std=.*: the model brings its own",
    "model.normalisation=model": "^model.arch: needs a value",
}


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("overrides", REFUSED)
def test_a_wrong_use_is_refused_in_one_line(overrides: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[overrides]) as caught:
        plan(*overrides.split()).check()
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_named_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ConfigError, match=r"^model.name=timm: timm .*; .*pip install 'distrain\[timm\]'"):
        plan("model.arch=resnet18").check()


class _Broken:
    """An import that fails as torchvision's does under a torch that it was not made for."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "timm":
            raise RuntimeError("operator torchvision::nms does not exist")


def test_a_library_that_does_not_fit_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Broken(), *sys.meta_path])
    with pytest.raises(ConfigError, match=r"nms does not exist\); it needs a torchvision made for torch 2\.") as caught:
        plan("model.arch=resnet18").check()
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("timm")
def test_the_trial_speaks_of_the_architecture() -> None:
    trial = ModelTrial(config("model.arch=tiny_net").model, in_channels=3, num_classes=4, image_size=(8, 8))
    assert trial.problem_with(1, training=True) == ""
    with pytest.raises(ConfigError, match=r"^model\.arch=tiny_net: fails on images \[2, 3, 2, 2\]"):
        ModelTrial(config("model.arch=tiny_net").model, in_channels=3, num_classes=4, image_size=(2, 2))
