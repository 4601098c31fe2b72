"""Traces of modules, and where two of them part."""

from __future__ import annotations

import dataclasses
import json

import torch

from distrain.verification.trace import Call, Trace, first_difference, rows_of

LIMIT = 1e-9


def trace(shard: tuple[int, int], **outputs: torch.Tensor) -> Trace:
    """The trace of a share of a batch of five, by the outputs of modules for it."""
    calls = {f"{name}#0": Call(name, "Linear", rows_of(output, len(output))) for name, output in outputs.items()}
    return Trace.from_plain(json.loads(json.dumps(dataclasses.asdict(Trace(shard, 5, calls)))))


def outputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(5, 3, 2, dtype=torch.float64, generator=generator) for name in ("one", "two", "three")}


def shared(whole: dict[str, torch.Tensor]) -> list[Trace]:
    """The same on two ranks, with three and two of the five samples."""
    first = {name: output[:3] for name, output in whole.items()}
    return [trace((0, 2), **first), trace((1, 2), **{name: output[3:] for name, output in whole.items()})]


def test_shares_of_different_sizes_are_laid_beside_the_whole_batch() -> None:
    whole = outputs()
    ranks = [
        trace((0, 2), **{k: v[:3] for k, v in whole.items()}),
        trace((1, 2), **{k: v[3:] for k, v in whole.items()}),
    ]
    assert first_difference(trace((0, 1), **whole), ranks, LIMIT) is None


def test_the_first_module_is_named_whose_output_differs_for_one_sample() -> None:
    whole, changed = outputs(), outputs()
    changed["two"][4, 0, 0] += 1e-3
    changed["three"][0, 0, 0] += 1.0
    ranks = [
        trace((0, 2), **{k: v[:3] for k, v in changed.items()}),
        trace((1, 2), **{k: v[3:] for k, v in changed.items()}),
    ]
    found = first_difference(trace((0, 1), **whole), ranks, LIMIT)
    assert found is not None
    assert (found.name, found.kind) == ("two", "Linear")
    assert 1e-5 < found.value < 1e-2


def test_parts_of_a_divided_layer_are_compared_together() -> None:
    whole = outputs()
    # Two ranks with the same share have two and one of the three channels, and "three" whole.
    parts = [{**whole, "one": whole["one"][:, :2]}, {**whole, "one": whole["one"][:, 2:]}]
    ranks = [trace((0, 1), **part) for part in parts]
    assert first_difference(trace((0, 1), **whole), ranks, LIMIT) is None
    # Without the other part nothing is said.
    assert first_difference(trace((0, 1), **whole), ranks[:1], LIMIT) is None
    parts[1]["one"] = 1.001 * parts[1]["one"]
    found = first_difference(trace((0, 1), **whole), [trace((0, 1), **part) for part in parts], LIMIT)
    assert found is not None
    assert found.name == "one"


def test_a_stage_that_holds_only_some_modules_is_compared_in_those() -> None:
    whole, changed = outputs(), outputs()
    changed["three"] += 1.0
    stages = [trace((0, 1), one=whole["one"]), trace((0, 1), two=whole["two"], three=changed["three"])]
    found = first_difference(trace((0, 1), **whole), stages, LIMIT)
    assert found is not None
    assert found.name == "three"


def test_outputs_that_are_not_laid_out_by_samples_are_left_out() -> None:
    assert rows_of(torch.zeros(7, 2), 5) == []
    assert rows_of(torch.zeros(()), 5) == []
    given = {"logits": torch.zeros(5, 2), "classes": torch.zeros(5, dtype=torch.int64)}
    assert rows_of(given, 5) == [[0.0, 0.0, 2.0]] * 5
    # Windows of images: several rows a sample.
    assert len(rows_of(torch.zeros(20, 2), 5)) == 5
