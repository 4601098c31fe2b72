"""Differences, limits and verdicts, from records that are written by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from distrain.verification.comparison import (
    EPSILON,
    FACTOR,
    FACTOR_16_BIT,
    FACTOR_16_BIT_NUMBER,
    ONE_PROCESS,
    THE_RANKS,
    Difference,
    Limits,
    Series,
    bitwise_difference,
    first_parting,
    judge,
    series,
)
from distrain.verification.products import format_of_products
from distrain.verification.recorder import RankRecord, StepRecord

QUANTITIES = ("sample order", "loss", "gradients", "parameters")


def record(rank: int = 0, **changes: Any) -> RankRecord:
    """A rank that had half of a batch of four samples, in two steps."""
    shard = slice(2 * rank, 2 * rank + 2)
    step = StepRecord(
        (rank, 2),
        [7, 3, 5, 1][shard],
        ["a", "b", "c", "d"][shard],
        ["x", "y", "x", "y"][shard],
        1.0,
        2,
        [1.0],
        {},
        {"gradients": {"w": (0.0, 3.0), "b": (0.0, 4.0)}, "state": {"w": (0.0, 1.0), "running": (0.0, 1.0)}},
        {"w": "0", "running": "1"},
    )
    return RankRecord(rank, "here", {1: dataclasses.replace(step, **changes), 2: step}, [], ["w", "b"])


def whole() -> RankRecord:
    """The same in one process."""
    one, other = record(0).steps[1], record(1).steps[1]
    step = dataclasses.replace(
        one,
        shard=(0, 1),
        indices=one.indices + other.indices,
        samples=one.samples + other.samples,
        targets=one.targets + other.targets,
        loss_sum=2.0,
        count=4,
        metric_sums=[2.0],
    )
    return RankRecord(0, "here", {1: step, 2: step}, [], ["w", "b"])


def largest(changes: dict[str, object]) -> dict[str, Difference]:
    """The difference of each quantity in the first step, where rank 1 recorded something else."""
    found = series(whole(), [record(0), record(1, **changes)])
    return {quantity: steps[1] for quantity, steps in found.items() if 1 in steps}


@pytest.mark.parametrize(
    ("changes", "quantity", "value", "where"),
    [
        ({"indices": [5, 2]}, "sample order", 1.0, "sample 3 of the batch"),
        ({"samples": ["c", "e"]}, "sample content", 1.0, "input of sample 1"),
        ({"targets": ["z", "y"]}, "sample content", 1.0, "target of sample 5"),
        ({"loss_sum": 1.5}, "loss", 0.25, ""),
        ({"metric_sums": [2.0]}, "training metrics", 0.25, ""),
        ({"distances": {"gradients": {"w": (0.5, 3.0)}}}, "gradients", 0.1, "w"),
        ({"distances": {"state": {"w": (0.5, 1.0)}}}, "parameters", 0.5, "w"),
        ({"distances": {"state": {"running": (0.5, 1.0)}}}, "buffers", 0.5, "running"),
        ({"distances": {"gradients": {"new": (math.inf, 0.0)}}}, "gradients", math.inf, "new"),
    ],
)
def test_what_a_rank_did_otherwise_is_found(
    changes: dict[str, object], quantity: str, value: float, where: str
) -> None:
    found = largest(changes)
    assert found[quantity].value == pytest.approx(value)
    assert (found[quantity].where, found[quantity].step) == (where, 1)
    assert all(each.value == 0 for name, each in found.items() if name != quantity)


def test_stages_of_a_pipeline_that_share_a_shard_count_once() -> None:
    twice = record(1)
    twice.steps[1].count, twice.steps[1].loss_sum, twice.steps[1].metric_sums = 0, 0.0, [0.0]
    found = series(whole(), [record(0), record(1), twice])
    assert all(steps[1].value == 0 for steps in found.values() if 1 in steps)


def without(kind: str, name: str | None = None) -> list[RankRecord]:
    """Both ranks without a tensor in their second step, or without all of a kind."""
    ranks = [record(0), record(1)]
    for rank in ranks:
        step = rank.steps[2]
        kept = {} if name is None else {each: far for each, far in step.distances[kind].items() if each != name}
        rank.steps[2] = dataclasses.replace(step, distances={**step.distances, kind: kept})
    return ranks


@pytest.mark.parametrize(
    ("ranks", "quantity", "where"),
    [
        (without("gradients", "b"), "gradients", "b"),
        (without("gradients"), "gradients", "w"),
        (without("state", "w"), "parameters", "w"),
        (without("state", "running"), "buffers", "running"),
    ],
)
def test_a_tensor_that_only_one_process_has_is_a_difference(ranks: list[RankRecord], quantity: str, where: str) -> None:
    found = series(whole(), ranks)
    assert found[quantity][1].value == 0
    assert found[quantity][2] == Difference(math.inf, where, 2, ONE_PROCESS)
    assert first_parting(judge(found, limits(tolerance=0.9))) == (quantity, found[quantity][2])


def test_gradients_that_a_strategy_hides_by_design_are_not_compared() -> None:
    ranks = [dataclasses.replace(rank, hides_gradients=True) for rank in without("gradients")]
    assert series(whole(), ranks)["gradients"].keys() == {1}


def test_a_parameter_that_is_tied_may_go_by_any_of_its_names() -> None:
    serial = dataclasses.replace(whole(), tied=[["w", "other"]])
    for step in (1, 2):
        ranks = [record(0), record(1)]
        for rank in ranks:
            gradients = {"b": (0.0, 4.0), "other": (math.inf, 0.0)}
            rank.steps[step] = dataclasses.replace(
                rank.steps[step], distances={**rank.steps[step].distances, "gradients": gradients}
            )
        assert series(serial, ranks)["gradients"][step] == Difference(0.0, "b", step)


@pytest.mark.parametrize("only_in", [ONE_PROCESS, THE_RANKS])
def test_a_step_that_only_one_run_has_is_a_difference(only_in: str) -> None:
    serial, ranks = whole(), [record(0), record(1)]
    for shorter in ranks if only_in == ONE_PROCESS else [serial]:
        del shorter.steps[2]
    found = series(serial, ranks)
    assert found["sample order"][2] == Difference(math.inf, "the whole step", 2, only_in)
    quantity, difference = first_parting(judge(found, limits())) or ("", None)
    assert (quantity, difference) == ("sample order", found["sample order"][2])


def test_a_resumed_run_lacks_only_the_steps_before() -> None:
    ranks = [record(0), record(1)]
    for rank in ranks:
        del rank.steps[1]
    assert first_parting(judge(series(whole(), ranks, after=1), limits())) is None
    assert first_parting(judge(series(whole(), ranks), limits())) is not None


def evaluations(*steps: int, **metrics: float) -> list[dict[str, Any]]:
    return [
        {"step": step, "split": "val", "loss": 1.0, "count": 4, "metrics": metrics or {"accuracy": 0.5}}
        for step in steps
    ]


@pytest.mark.parametrize(
    ("of_serial", "of_ranks", "step", "only_in"),
    [
        (evaluations(1, 2), evaluations(1), 2, ONE_PROCESS),
        (evaluations(2), evaluations(1, 2), 1, THE_RANKS),
    ],
)
def test_an_evaluation_that_only_one_run_has_is_a_difference(
    of_serial: list[dict[str, Any]], of_ranks: list[dict[str, Any]], step: int, only_in: str
) -> None:
    serial, first = whole(), record(0)
    serial.evaluations, first.evaluations = of_serial, of_ranks
    found = series(serial, [first, record(1)])["evaluation count"]
    assert found[step] == Difference(math.inf, "val as a whole", step, only_in)
    assert found[2 if step == 1 else 1].value == 0


def test_an_evaluation_before_the_resume_may_be_missing() -> None:
    serial, first = whole(), record(0)
    serial.evaluations, first.evaluations = evaluations(1, 2), evaluations(2)
    assert series(serial, [first, record(1)], after=1)["evaluation count"].keys() == {2}


def test_a_metric_that_only_one_run_has_is_a_difference() -> None:
    serial, first = whole(), record(0)
    serial.evaluations, first.evaluations = evaluations(1, accuracy=0.5, f1=0.4), evaluations(1, accuracy=0.5)
    found = series(serial, [first, record(1)])["evaluation metrics"]
    assert found[1] == Difference(math.inf, "val f1", 1, ONE_PROCESS)


def test_records_go_through_json_unchanged() -> None:
    plain = json.loads(json.dumps(dataclasses.asdict(whole())))
    again = RankRecord.from_plain(plain)
    assert again.steps.keys() == {1, 2}
    assert json.loads(json.dumps(dataclasses.asdict(again))) == plain


def spread(value: float, step: int, quantity: str = "gradients") -> Series:
    return {name: {step: Difference(value if name == quantity else 0.0, "w", step)} for name in QUANTITIES}


def limits(
    *spreads: Series,
    rounded: Series | None = None,
    precision: str = "fp64",
    tolerance: float | None = None,
    order_is_free: bool = False,
) -> Limits:
    return Limits(spreads, rounded, precision, tolerance, evaluated=100, batch=10, order_is_free=order_is_free)


def test_limits_grow_with_the_measured_spread_and_never_shrink() -> None:
    measured = limits(spread(1e-14, 2), spread(3e-14, 3))
    assert measured.limit("gradients", 1) == 64 * EPSILON["fp64"]
    assert measured.limit("gradients", 2) == FACTOR * 1e-14
    assert measured.limit("gradients", 3) == measured.limit("gradients", 9) == FACTOR * 3e-14
    assert measured.limit("sample order", 3) == 0


def test_a_spread_in_the_first_step_that_is_no_rounding_gives_no_wide_limit() -> None:
    measured = limits(spread(0.1, 1))
    assert measured.limit("gradients", 1) == math.sqrt(EPSILON["fp64"])
    order = measured.order_matters()
    assert order is not None
    assert order.value == 0.1
    assert limits(spread(1e-15, 1)).order_matters() is None


@pytest.mark.parametrize(
    ("device_type", "matmul", "convolution", "products", "limit"),
    [
        ("cpu", "highest", True, "fp32", 64 * 2.0**-23),
        ("cpu", "high", False, "tf32", 2 * 2.0**-11),
        ("cpu", "medium", False, "bf16", 2.0**-7),
        ("cuda", "highest", False, "fp32", 64 * 2.0**-23),
        ("cuda", "highest", True, "tf32", 2 * 2.0**-11),
        ("cuda", "high", False, "tf32", 2 * 2.0**-11),
    ],
)
def test_the_format_of_the_factors_of_products_gives_the_limits_of_float32(
    device_type: str, matmul: str, convolution: bool, products: str, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", convolution)
    try:
        torch.set_float32_matmul_precision(matmul)
        found = format_of_products("fp32", device_type)
        assert [format_of_products(each, device_type) for each in ("fp64", "bf16")] == ["fp64", "bf16"]
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == products
    assert limits(precision=found).limit("gradients", 1) == limit


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_large_spread_is_rounding_where_float64_has_shown_that_the_order_is_free(precision: str) -> None:
    # As in ShuffleNet in float32, where batches of 12 with BatchNorm on a single pixel moved gradients by 0.7 %.
    rounded = spread(0.01, 1) if precision == "bf16" else None
    assert limits(spread(0.05, 1), rounded=rounded, precision=precision).limit("gradients", 1) < 0.05
    measured = limits(spread(0.05, 1), rounded=rounded, precision=precision, order_is_free=True)
    assert measured.limit("gradients", 1) > 0.05
    assert measured.order_matters() is None


def test_in_16_bits_an_order_that_matters_widens_no_limit() -> None:
    measured = limits(spread(0.5, 1), rounded=spread(0.01, 2), precision="bf16")
    assert measured.order_matters() == Difference(0.5, "w", 1)
    assert measured.limit("gradients", 1) == EPSILON["bf16"]
    assert measured.limit("gradients", 2) == FACTOR_16_BIT * 0.01
    assert measured.limit("parameters", 9) == EPSILON["bf16"]


def test_in_16_bits_an_order_that_does_not_matter_tells_how_rounding_grows() -> None:
    measured = limits(spread(0.03, 2), rounded=spread(0.01, 1), precision="bf16")
    assert measured.order_matters() is None
    assert measured.limit("gradients", 1) == FACTOR_16_BIT * 0.01
    assert measured.limit("gradients", 2) == FACTOR_16_BIT * 0.03


def test_in_16_bits_a_single_number_gets_more_room_than_a_tensor() -> None:
    measured = limits(rounded=spread(0.001, 1, "loss"), precision="bf16")
    assert measured.limit("loss", 1) == FACTOR_16_BIT_NUMBER * 0.001


def test_ties_are_allowed_in_metrics_but_not_in_float64() -> None:
    assert limits(precision="fp32").limit("evaluation metrics", 1) == 0.02
    assert limits().limit("evaluation metrics", 1) < 1e-12


def test_a_given_tolerance_takes_the_place_of_what_is_measured() -> None:
    measured = limits(spread(1.0, 1), tolerance=1e-3)
    assert measured.limit("gradients", 1) == 1e-3
    assert measured.limit("sample order", 1) == 0


def test_the_first_parting_is_the_earliest_and_then_the_first_in_the_step() -> None:
    found: Series = {
        "parameters": {1: Difference(1e-3, "w", 1), 2: Difference(1e-2, "w", 2)},
        "gradients": {1: Difference(1e-3, "w", 1)},
        "loss": {1: Difference(0.0, "", 1), 2: Difference(0.5, "", 2)},
    }
    verdicts = judge(found, limits())
    assert [verdict.equal for verdict in verdicts] == [False, False, False]
    assert first_parting(verdicts) == ("gradients", Difference(1e-3, "w", 1))
    assert first_parting(judge({"loss": {1: Difference(0.0, "", 1)}}, limits())) is None


def test_a_difference_that_is_not_a_number_is_no_equality() -> None:
    assert not judge({"loss": {1: Difference(math.nan, "", 1)}}, limits())[0].equal


def test_other_bits_are_found() -> None:
    assert bitwise_difference(record(), record()) is None
    assert bitwise_difference(record(), record(hashes={"w": "0", "running": "2"})) == Difference(1.0, "running", 1)


def test_a_tensor_or_a_step_that_one_run_lacks_has_other_bits() -> None:
    assert bitwise_difference(record(), record(hashes={"w": "0"})) == Difference(1.0, "running", 1)
    assert bitwise_difference(record(hashes={"w": "0"}), record()) == Difference(1.0, "running", 1)
    shorter, resumed = record(), record()
    del shorter.steps[2], resumed.steps[1]
    assert bitwise_difference(record(), shorter) == Difference(1.0, "w", 2)
    assert bitwise_difference(record(), resumed, after=1) is None
    assert bitwise_difference(record(), resumed) == Difference(1.0, "w", 1)
