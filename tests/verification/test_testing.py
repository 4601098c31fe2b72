"""The Python functions start the command, so each test here takes as long as it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import distrain
from distrain.verification.testing import assert_equals_single
from tests.api.models import SETTINGS, samples, skip_net

SHORT = ("data=digits", "data.batch_size=16", "runtime.threads=1")


@pytest.mark.soak
def test_users_can_assert_equality_in_their_own_suites(tmp_path: Path) -> None:
    found = assert_equals_single("strategy=ddp", *SHORT, ranks=3, steps=3)
    assert found.passed
    assert found.text.startswith("EQUAL: ddp on 3 ranks, 3 steps of simple_cnn on digits")
    with pytest.raises(AssertionError, match=r"(?s)NOT EQUAL.*why: BatchNorm"):
        assert_equals_single(
            *("strategy=ddp", "strategy.batchnorm=local", "model=custom", "model._target_=tests.runs.NormNet"),
            *("+model.kwargs.norm=batch", *SHORT),
        )


@pytest.mark.soak
def test_the_certificate_stays_in_a_folder_with_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "my, certificates"
    found = distrain.verify("strategy=ddp", "compression=topk", *SHORT, nproc=2, steps=2, folder=folder)
    assert found.passed
    assert found.verdict == "different by design"
    assert (folder / "certificate.json").exists()
    command = found.certificate["origin"]["command"]
    assert "nproc=2" in command
    assert command.endswith("-- strategy=ddp compression=topk data=digits data.batch_size=16 runtime.threads=1")


def test_objects_are_verified_as_they_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, before = skip_net(), skip_net().state_dict()
    found = distrain.verify(model, samples(), strategy="ddp", nproc=2, steps=2, float64=False, **SETTINGS)
    assert found.verdict == "equal", found.text
    assert found.text.startswith("EQUAL: ddp on 2 ranks, 2 steps of")
    assert found.certificate["origin"]["command"] == "distrain.verify(…, nproc=2)"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # Nothing is left behind.
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("what", "changes", "line"),
    [
        (("simple_cnn", "digits"), {"strategy": "single"}, "strategy=single: is what others are compared with"),
        (("simple_cnn", "digits"), {"strategy": "ddp", "nproc": 1}, "nproc: is 1; ranks are compared"),
        (("simple_cnn", "digits"), {"strategy": "ddp", "steps": 1}, "steps=1: must be at least 2"),
        (("simple_cnn", "digits"), {"strategy": "dpp"}, "strategy=dpp: no such choice"),
        (("simple_cnn", "digits"), {"timeout": 9}, "timeout: goes with keys of the command line only"),
        (("strategy=ddp",), {"batch_size": 8}, "batch_size: goes with a model and samples, as in distrain.verify"),
        (("strategy=ddp",), {"classes": 8}, "classes: goes with a model and samples, as in distrain.verify"),
        ((skip_net,), {}, "distrain.verify: takes a model and the samples to train on, or keys"),
    ],
)
def test_wrong_arguments_are_refused_before_ranks_start(
    what: tuple[Any, ...], changes: dict[str, Any], line: str
) -> None:
    with pytest.raises(distrain.ConfigError, match=f"^{line}"):
        distrain.verify(*what, **changes)


@pytest.mark.soak
def test_refusals_are_those_of_the_command() -> None:
    with pytest.raises(distrain.ConfigError, match=r"^strategy=dpp: no such choice; .*did you mean ddp"):
        distrain.verify("strategy=dpp")
    with pytest.raises(distrain.ConfigError, match=r"nproc: is 1; .* at least 2"):
        distrain.verify("strategy=ddp", nproc=1)
