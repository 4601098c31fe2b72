"""compression=signsgd: one bit per element, and error feedback."""

from __future__ import annotations

import torch
from torch import Tensor

from distrain.compression import base
from distrain.compression.bucket import Bucket
from distrain.compression.quantised import QuantisedConfig
from distrain.compression.signsgd import SignSGD
from tests.runs import compose


def make(*, error_feedback: bool = True, group: int = 4) -> SignSGD:
    return SignSGD(QuantisedConfig("signsgd", 1, error_feedback, group))


def sent(compressor: SignSGD, gradient: Tensor) -> Tensor:
    """What a step's message decodes to."""
    compressor.begin_step()
    received = torch.zeros_like(gradient)
    flat = gradient.clone()
    compressor.decode(compressor.encode(Bucket(flat, {"weight": flat})), Bucket(received, {"weight": received}))
    return received


def test_element_becomes_its_sign_times_the_mean_magnitude_of_its_group() -> None:
    gradient = torch.tensor([1.0, -3.0, 2.0, -6.0, 0.5, -0.0, 0.0])
    third = 0.5 / 3
    received = sent(make(error_feedback=False), gradient)
    torch.testing.assert_close(received, torch.tensor([3.0, -3.0, 3.0, -3.0, third, -third, third]))


def test_error_feedback_sends_later_what_was_left_out() -> None:
    compressor = make()
    total = torch.zeros(4)
    for _ in range(300):
        total += sent(compressor, torch.tensor([1.0, -0.25, 0.03, 0.0]))
    torch.testing.assert_close(total / 300, torch.tensor([1.0, -0.25, 0.03, 0.0]), rtol=0, atol=0.02)


def test_message_holds_signs_and_scales_alone() -> None:
    flat = torch.randn(4096)
    steps, signs = make(group=512).compress(Bucket(flat, {"weight": flat}))
    assert (steps.numel(), signs.numel()) == (8, 4096 // 8)


def test_default_sends_a_thirtieth_of_the_bytes_with_error_feedback() -> None:
    compressor = base.build(compose("compression=signsgd").compression)
    flat = torch.randn(1_000_000)
    bucket = Bucket(flat, {"weight": flat})
    assert isinstance(compressor, SignSGD)
    assert 30 < bucket.bytes / compressor.encode(bucket).numel() < 32
    assert compressor.residuals is not None


def test_error_feedback_converges_where_signs_alone_do_not() -> None:
    """Counterexample 2 of Karimireddy et al. 2019 (arXiv 1901.09847), §3: |x + y| / 4 + |x - y|, with its minimum at 0.

    The two elements of its gradient always have different signs, so signs alone never change x + y.
    """
    found = {}
    for error_feedback in (True, False):
        point, compressor = torch.tensor([1.01, 1.0]), make(error_feedback=error_feedback)
        for step in range(400):
            along, across = 0.25 * point.sum().sign(), 1.0 if point[0] > point[1] else -1.0
            point -= 2 / (step + 10) * sent(compressor, torch.stack([along + across, along - across]))
        found[error_feedback] = point
    assert found[True].abs().max() < 0.1
    torch.testing.assert_close(found[False].sum(), torch.tensor(2.01))
