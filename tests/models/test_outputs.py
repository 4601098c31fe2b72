"""The logits are found in whatever a model returns."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distrain.models.outputs import NoLogits, auxiliary_logits, logits_of, other_outputs, trained_outputs

LOGITS, AUXILIARY, FEATURES = torch.zeros(2, 4), torch.ones(2, 4), torch.zeros(2, 8)
GoogLeNetOutputs = namedtuple("GoogLeNetOutputs", ["logits", "aux_logits2", "aux_logits1"])
Unlabelled = namedtuple("Unlabelled", ["scores", "features"])

OUTPUTS: dict[str, tuple[Any, list[str], list[str]]] = {
    "a tensor": (LOGITS, [], []),
    "a tuple": ((LOGITS, AUXILIARY, FEATURES), ["1"], ["1", "2"]),
    "a list after what is no tensor": ([None, LOGITS, 3.0], [], []),
    "a named tuple with logits": (GoogLeNetOutputs(LOGITS, None, AUXILIARY), ["aux_logits1"], ["aux_logits1"]),
    "a named tuple without": (Unlabelled(LOGITS, FEATURES), [], ["features"]),
    "a dictionary": ({"loss": None, "features": FEATURES, "logits": LOGITS}, [], ["features"]),
    "a segmentation model's": (OrderedDict(aux=AUXILIARY, out=LOGITS), ["aux"], ["aux"]),
    "a dictionary of one tensor": ({"scores": LOGITS, "epoch": 3}, [], []),
    "an object": (SimpleNamespace(hidden=FEATURES, logits=LOGITS, name="x"), [], ["hidden"]),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_logits_are_told_from_other_outputs(case: str) -> None:
    output, auxiliary, others = OUTPUTS[case]
    assert logits_of(output) is LOGITS
    assert list(auxiliary_logits(output)) == auxiliary
    assert other_outputs(output) == others
    assert trained_outputs(output, auxiliary=False) is LOGITS
    assert list(trained_outputs(output, auxiliary=True)) == ["logits", *auxiliary]


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (None, "a NoneType"),
        ((), "a tuple without a tensor"),
        ({"a": LOGITS, "b": LOGITS}, "a dict with a, b, none of them logits"),
        (SimpleNamespace(a=LOGITS, b=LOGITS), "a SimpleNamespace with a, b, none of them logits"),
        ("logits", "a str"),
    ],
)
def test_an_output_without_known_logits_is_refused(output: Any, problem: str) -> None:
    with pytest.raises(NoLogits) as caught:
        logits_of(output)
    assert str(caught.value) == problem
