"""The Python functions start the command, so each test here takes as long as it does."""

from __future__ import annotations

from pathlib import Path

import pytest

import distrain
from distrain.verification.testing import assert_equals_single

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


@pytest.mark.soak
def test_refusals_are_those_of_the_command() -> None:
    with pytest.raises(distrain.ConfigError, match=r"^strategy=dpp: no such choice; .*did you mean ddp"):
        distrain.verify("strategy=dpp")
    with pytest.raises(distrain.ConfigError, match=r"nproc: is 1; .* at least 2"):
        distrain.verify("strategy=ddp", nproc=1)
