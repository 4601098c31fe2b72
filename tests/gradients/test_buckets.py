"""Gradients are in flat buckets, in one order on all ranks, and are sent during the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor, nn

from distrain.communication.collectives import Communicator, ring_all_reduce_bytes
from distrain.communication.types import DONE, Pending
from distrain.compression.bucket import Bucket
from distrain.compression.none import NoCompression
from distrain.config.groups import CompressionConfig
from distrain.gradients.bucket_sizes import MIB
from distrain.gradients.buckets import Gradients, split_into_buckets
from distrain.reporting.metrics import Stopwatch

KB = 1024


class SendRecorder(NoCompression):
    """Sends nothing; records which buckets were sent, in which order, and how many had a gradient by then."""

    def __init__(self) -> None:
        super().__init__(CompressionConfig(name="recorder"))
        self.sent: list[list[str]] = []
        self.watched: list[Tensor] = []
        self.complete: list[int] = []

    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
        self.sent.append(list(bucket.tensors))
        self.complete.append(sum(bool(gradient.any()) for gradient in self.watched))
        yield DONE


def replicas(size: int) -> Communicator:
    """A communicator with so many ranks, which can't communicate."""
    communicator = Communicator()
    communicator.size = size
    return communicator


def gradients(
    named: Iterable[tuple[str, nn.Parameter]], recorder: SendRecorder, first_kb: float = 1000, other_kb: float = 1000
) -> Gradients:
    stopwatch = Stopwatch(torch.device("cpu"))
    return Gradients(named, replicas(2), recorder, stopwatch, first_kb * KB / MIB, other_kb * KB / MIB)


def parameters(**kilobytes: float) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(torch.zeros(round(size * KB / 4)))) for name, size in kilobytes.items()]


def names(made: Gradients) -> list[list[str]]:
    return [list(bucket.tensors) for bucket in made.buckets]


# --- buckets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "other", "expected"),
    [
        (100, 100, [["e", "d", "c", "b", "a"]]),
        (1, 100, [["e"], ["d", "c", "b", "a"]]),
        (3, 4, [["e", "d"], ["c"], ["b", "a"]]),
        (0.1, 0.1, [["e"], ["d"], ["c"], ["b"], ["a"]]),
    ],
    ids=["one", "a small first", "full to the limit", "larger than any limit"],
)
def test_buckets_fill_up_in_reverse_order(first: float, other: float, expected: list[list[str]]) -> None:
    made = gradients(parameters(a=2, b=2, c=4, d=2, e=1), SendRecorder(), first, other)
    assert names(made) == expected


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (0, [["e"], ["d", "c", "b", "a"]]),
        (1, [["e"], ["d", "c", "b", "a"]]),
        (2, [["e"], ["d", "c", "b"], ["a"]]),
        (7, [["e"], ["d", "c"], ["b", "a"]]),
        (100, [["e"], ["d", "c", "b", "a"]]),
    ],
    ids=["none", "nothing fits", "one", "several", "all: the first bucket is no reason to split"],
)
def test_the_last_gradients_form_a_bucket_of_their_own(last: float, expected: list[list[str]]) -> None:
    row = parameters(a=2, b=4, c=4, d=2, e=1)[::-1]
    parts = split_into_buckets(row, 1 * KB, 100 * KB, last * KB)
    assert [[name for name, _ in part] for part in parts] == expected


def test_a_model_that_fits_into_one_bucket_is_not_split() -> None:
    row = parameters(a=2, b=4)[::-1]
    assert len(split_into_buckets(row, 6 * KB, 100 * KB, 2 * KB)) == 1


def test_a_bucket_holds_one_dtype() -> None:
    named = [(name, nn.Parameter(torch.zeros(1, dtype=dtype))) for name, dtype in (
        ("a", torch.float32), ("b", torch.float64), ("c", torch.float64), ("d", torch.float32)
    )]  # fmt: skip
    assert names(gradients(named, SendRecorder())) == [["d"], ["c", "b"], ["a"]]


def test_parameters_without_gradient_are_ignored() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    made = gradients(model.named_parameters(), SendRecorder())
    assert names(made) == [["1.bias", "1.weight"]]
    assert model[0].weight.grad is None


def test_bytes_per_step_are_those_of_a_ring_all_reduce_per_bucket() -> None:
    made = gradients(parameters(a=2, b=4), SendRecorder(), first_kb=1, other_kb=1)
    assert made.bytes_per_step == ring_all_reduce_bytes(2 * KB, 2) + ring_all_reduce_bytes(4 * KB, 2)
    alone = Gradients(parameters(a=2), Communicator(), SendRecorder(), Stopwatch(torch.device("cpu")))
    assert alone.bytes_per_step == 0


def test_gradients_are_views_with_the_parameters_strides() -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    gapped = nn.Parameter(torch.zeros(4, 8)[:, ::2])
    transposed = nn.Parameter(torch.zeros(4, 8).t())
    named = [*model.named_parameters(), ("gapped", gapped), ("transposed", transposed)]
    (bucket,) = gradients(named, SendRecorder()).buckets
    assert bucket.flat.numel() == sum(parameter.numel() for _, parameter in named)
    for number, (name, parameter) in enumerate(named):
        assert parameter.grad is not None
        assert bucket.tensors[name].data_ptr() == parameter.grad.data_ptr()
        parameter.grad.fill_(number + 1)
        if name != "gapped":
            assert parameter.grad.stride() == parameter.stride(), name
    assert not model.weight.is_contiguous()
    # Every element of the bucket belongs to one parameter, also where a parameter's own memory has gaps.
    expected = {number + 1: parameter.numel() for number, (_, parameter) in enumerate(named)}
    assert {int(value): int((bucket.flat == value).sum()) for value in bucket.flat.unique()} == expected


# --- sums ------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.outer = nn.Linear(5, 5)
        self.outer.weight = self.inner.weight

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.outer(torch.tanh(self.inner(input)))
        return out


def reference(model: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    """The gradients that torch accumulates for these inputs, without buckets."""
    kept = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for each in inputs:
        model(each).square().sum().backward()
    accumulated = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for name, parameter in model.named_parameters():
        parameter.grad = kept[name]
    return accumulated


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), Tied])
def test_backward_passes_accumulate_in_place_and_buckets_are_sent_once(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, recorder = make(), SendRecorder()
    made = gradients(model.named_parameters(), recorder, first_kb=0.01, other_kb=0.01)
    places = {
        name: parameter.grad.data_ptr() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    for _ in range(2):
        inputs = [torch.randn(6, 5), torch.randn(2, 5)]
        expected = reference(model, inputs)
        recorder.sent.clear()
        made.zero()
        model(inputs[0]).square().sum().backward()
        assert recorder.sent == []
        made.begin_last_backward()
        model(inputs[1]).square().sum().backward()
        made.finish()
        assert recorder.sent == names(made)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.data_ptr() == places[name]
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=0)
    assert sum(len(bucket.tensors) for bucket in made.buckets) == len(list(model.named_parameters()))


def test_the_norm_equals_torch_s() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 30))
    made = gradients(model.named_parameters(), SendRecorder(), first_kb=1, other_kb=2)
    assert len(made.buckets) > 2
    model(torch.randn(8, 50)).square().sum().backward()
    expected = torch.nn.utils.get_total_norm([bucket.flat for bucket in made.buckets])
    torch.testing.assert_close(made.norm(), expected, rtol=0, atol=0)
    torch.testing.assert_close(made.norm(), nn.utils.clip_grad_norm_(model.parameters(), 1e9))
    before = made.norm()
    made.scale(torch.tensor(0.25))
    assert made.norm() == before / 4


# --- sending ---------------------------------------------------------------------------------------------------------


class Backwards(nn.Module):
    """Uses its layers in the reverse of the order in which they are listed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, input: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            input = layer(input)
        return input


def one_layer_a_bucket(model: nn.Module, recorder: SendRecorder) -> Gradients:
    made = gradients(model.named_parameters(), recorder, first_kb=48 / KB, other_kb=48 / KB)
    assert [len(bucket.tensors) for bucket in made.buckets] == [2, 2, 2]
    recorder.watched = [bucket.flat for bucket in made.buckets]
    return made


def test_buckets_are_sent_during_the_backward_pass() -> None:
    recorder = SendRecorder()
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    made = one_layer_a_bucket(model, recorder)
    made.begin_last_backward()
    model(torch.ones(1, 3)).sum().backward()
    assert recorder.sent == names(made)
    assert recorder.complete == [1, 2, 3]


def test_buckets_are_sent_in_order_even_if_later_ones_are_complete_first() -> None:
    recorder, model = SendRecorder(), Backwards()
    made = one_layer_a_bucket(model, recorder)
    made.begin_last_backward()
    model(torch.ones(1, 3)).sum().backward()
    assert recorder.sent == names(made)
    # The first bucket was complete last, so the others had to wait for it.
    assert recorder.complete == [3, 3, 3]


def test_unused_parameters_and_an_empty_share_contribute_zeros() -> None:
    recorder = SendRecorder()
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    made = one_layer_a_bucket(model, recorder)
    model(torch.ones(1, 3)).sum().backward()
    made.zero()
    made.begin_last_backward()
    # The last layer, whose gradients are in the first bucket, is not used.
    model[1](model[0](torch.ones(1, 3))).sum().backward()
    assert recorder.sent == []
    made.finish()
    assert recorder.sent == names(made)
    assert [bool(bucket.flat.any()) for bucket in made.buckets] == [False, True, True]
    recorder.sent.clear()
    made.zero()
    made.begin_last_backward()
    made.finish()
    assert recorder.sent == names(made)
    assert not any(bucket.flat.any() for bucket in made.buckets)


@pytest.mark.parametrize("make", [Backwards, lambda: nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))])
def test_nothing_is_sent_before_the_last_backward_pass(make: Callable[[], nn.Module]) -> None:
    recorder, model = SendRecorder(), make()
    made = one_layer_a_bucket(model, recorder)
    model(torch.ones(1, 3)).sum().backward()
    assert recorder.sent == []
    made.begin_last_backward()
    model(torch.ones(1, 3)).sum().backward()
    made.finish()
    assert len(recorder.sent) == 3
    model(torch.ones(1, 3)).sum().backward()
    assert len(recorder.sent) == 3


def test_waiting_is_recorded_as_communication() -> None:
    stopwatch = Stopwatch(torch.device("cpu"))
    made = Gradients(parameters(a=1), replicas(2), SendRecorder(), stopwatch)
    made.begin_last_backward()
    with stopwatch.step():
        made.finish()
    step, communication, _ = stopwatch.collect()
    assert 0 < communication < step
