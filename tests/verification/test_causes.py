"""Each cause is planted into a training, and found: the module where the runs part, and the cause's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import distrain
from distrain.verification.causes import CAUSES, Evidence, find
from distrain.verification.probe import LossFindings, ModuleFindings
from distrain.verification.recorder import RankRecord
from tests.runs import small
from tests.verification.helpers import verified

HERE = "tests.verification.planted"
DDP = "strategy=ddp"


def net(suspect: str) -> tuple[str, ...]:
    return ("model=custom", f"model._target_={HERE}.Net", f"+model.kwargs.suspect={suspect}")


NORM_NET = ("model=custom", "model._target_=tests.runs.NormNet", "+model.kwargs.norm=batch")
SAMPLES = ("data=custom", f"data._target_={HERE}.Samples", "data.workers=0", "data.batch_size=10")
#: A choice without keys, whose name is replaced by that of a planted one.
ALONE = "strategy=single"
#: Settings, the cause, the module, and the direction in which it is found.
PLANTED: dict[str, tuple[tuple[str, ...], str, str, str]] = {
    "batch norm of each rank": ((DDP, "strategy.batchnorm=local", *NORM_NET), "BatchNorm", "first.1", "forward"),
    "dropout": ((DDP, *net("Plain"), "+model.kwargs.dropout=0.5"), "dropout", "suspect", "forward"),
    "mean of means": ((DDP, *net("Plain"), f"task.name={HERE}.MeanOfMeans"), "mean of means", "", ""),
    "contrastive loss": (
        (DDP, *net("Plain"), f"task.name={HERE}.Contrastive"),
        "loss that mixes samples",
        "",
        "",
    ),
    "module that mixes samples": ((DDP, *net("MixesSamples")), "module that mixes samples", "suspect", "forward"),
    "buffer that counts": ((DDP, *net("Counts")), "buffer that counts", "suspect", "forward"),
    "autograd function": ((DDP, *net("ScalesGradient")), "backward that depends on the batch", "suspect", "backward"),
    "kernel with races": ((DDP, *net("NeverTwice")), "not repeatable", "suspect", "forward"),
    "randomness in the data": ((DDP, *SAMPLES, "data.kwargs={drawn: true}"), "randomness in the data set", "", ""),
    "tied parameters": (
        (ALONE, f"strategy.name={HERE}.Unties", "model=custom", f"model._target_={HERE}.Tied"),
        "tied parameters",
        "one",
        "backward",
    ),
    "compressor": ((DDP, *net("Plain"), f"compression.name={HERE}.Coarse"), "compressor", "last", "backward"),
    "place in the batch": ((DDP, *net("Place")), "module that mixes samples", "suspect", "forward"),
}


@pytest.mark.soak
@pytest.mark.parametrize("planted", PLANTED)
def test_what_was_planted_is_found(planted: str, tmp_path: Path) -> None:
    keys, cause, module, direction = PLANTED[planted]
    content, text = verified(tmp_path, 2, *keys, "optimizer=sgd", steps=4)
    assert content["verdict"] == "different", text
    parting = content["parting"]
    assert (parting["cause"], parting["module"], parting["direction"]) == (cause, module, direction), text
    assert parting["step"] <= 2, text


@pytest.mark.soak
def test_a_format_that_rounds_is_told_from_another_computation(tmp_path: Path) -> None:
    content, text = verified(tmp_path, 2, DDP, "trainer.precision=bf16", steps=4, tolerance=1e-6)
    assert content["verdict"] == "different", text
    assert [phase["equal"] for phase in content["phases"]] == [True, False]
    assert content["parting"]["cause"] == "rounding of the format", text


@pytest.mark.soak
def test_the_order_of_a_set_is_found_between_processes_that_hash_in_their_own_ways(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The ranks of the harness are forked from one process, and hash alike.
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    options = ("trainer.progress=off", "runtime.threads=1", "optimizer=sgd")
    found = distrain.verify(DDP, *SAMPLES, "data.kwargs={order: set}", *options, nproc=2, steps=2, timeout=600)
    assert found.verdict == "different", found.text
    parting = found.certificate["parting"]
    assert (parting["cause"], parting["quantity"]) == ("order of a set", "sample content"), found.text
    assert parting["step"] == 1
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    again = distrain.verify(DDP, *SAMPLES, "data.kwargs={order: set}", *options, nproc=2, steps=2, timeout=600)
    assert again.verdict == "equal", again.text


#: Settings, what parts first, and the cause.
GROSS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "batch norm of each rank": ((DDP, "strategy.batchnorm=local", *NORM_NET), "loss", "BatchNorm"),
    "gradients scaled by the number of ranks": (
        (ALONE, f"strategy.name={HERE}.ForgetsARank", *net("Plain")),
        "gradients",
        "",
    ),
    "mean of means": ((DDP, *net("Plain"), f"task.name={HERE}.MeanOfMeans"), "loss", "mean of means"),
}


@pytest.mark.soak
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("planted", GROSS)
def test_a_gross_error_is_found_in_16_bits_alone(planted: str, precision: str, tmp_path: Path) -> None:
    keys, quantity, cause = GROSS[planted]
    options = (f"trainer.precision={precision}", "optimizer=sgd")
    content, text = verified(tmp_path, 2, *keys, *options, steps=4, float64=False)
    assert content["verdict"] == "different", text
    assert [phase["precision"] for phase in content["phases"]] == [precision]
    parting = content["parting"]
    assert (parting["quantity"], parting["cause"]) == (quantity, cause), text
    assert parting["step"] <= 2, text


@pytest.mark.soak
def test_a_wrong_strategy_has_no_cause_of_the_table(tmp_path: Path) -> None:
    keys = (ALONE, f"strategy.name={HERE}.ForgetsARank", *net("Plain"), "optimizer=sgd")
    content, text = verified(tmp_path, 2, *keys, steps=2)
    assert content["verdict"] == "different", text
    assert content["parting"]["cause"] == "", text
    assert content["parting"]["quantity"] == "gradients"
    assert "no cause of the table is recognised" in text


def evidence(**changes: Any) -> Evidence:
    serial = RankRecord(0, "here", parameters=["one", "two"], tied=[["one", "two"]])
    asked = [RankRecord(0, "here", parameters=["one", "two"], tied=[["one", "two"]])]
    known = {"quantity": "gradients", "where": "one", "serial": serial, "asked": asked, **changes}
    return Evidence(small(), "fp64", **known)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({}, None),
        ({"quantity": "sample content", "content_same_again": False}, "randomness in the data set"),
        ({"quantity": "sample content"}, "order of a set"),
        ({"same_again": False}, "not repeatable"),
        ({"asked": [RankRecord(0, "here", parameters=["one", "two"])]}, "tied parameters"),
        # A stage that has only one of the two.
        ({"asked": [RankRecord(0, "here", parameters=["one"])]}, None),
        ({"module_is_batchnorm": True, "module": ModuleFindings("", "", mixes=True)}, "BatchNorm"),
        ({"module": ModuleFindings("", "", draws=True)}, "dropout"),
        ({"loss": LossFindings(additive=False, is_mean=True)}, "mean of means"),
        ({"loss": LossFindings(additive=False)}, "loss that mixes samples"),
        ({"quantity": "buffers"}, "buffer that counts"),
        ({"module": ModuleFindings("", "", mixes=True)}, "module that mixes samples"),
        ({"module": ModuleFindings("", "", backward_depends=True)}, "backward that depends on the batch"),
        ({"equal_without_compression": True}, "compressor"),
        ({"equal_without_compression": False}, None),
        ({"order_matters": "w"}, "order of the samples"),
        ({"float64_equal": True}, "rounding of the format"),
        ({"float64_equal": False}, None),
    ],
)
def test_causes_are_told_from_each_other(changes: dict[str, Any], cause: str | None) -> None:
    found = find(evidence(**changes))
    assert (None if found is None else found.name) == cause


def test_each_cause_says_what_to_do_in_a_sentence() -> None:
    assert len({cause.name for cause in CAUSES}) == len(CAUSES)
    for cause in CAUSES:
        assert 40 < len(cause.advice) < 300
