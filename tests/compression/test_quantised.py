"""What compressors that round to levels have in common: messages, groups, residuals, and the exchange."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distrain.communication.collectives import Communicator, digest
from distrain.compression import quantised
from distrain.compression.bucket import Bucket
from distrain.compression.qsgd import QSGD, QSGDConfig
from distrain.compression.quantised import Quantised, QuantisedConfig
from distrain.compression.signsgd import SignSGD
from distrain.gradients.exchange import BucketExchanger
from distrain.reporting.metrics import Stopwatch
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests.harness import run_ranks
from tests.runs import small

KINDS = ("signsgd", "qsgd 2 max", "qsgd 4 max", "qsgd 4 l2", "qsgd 8 max")
GROUP = 32


def make(kind: str, *, error_feedback: bool = True, group: int = GROUP, seed: int = 0) -> Quantised:
    if kind == "signsgd":
        return SignSGD(QuantisedConfig("signsgd", 1, error_feedback, group), seed)
    name, bits, norm = kind.split()
    return QSGD(QSGDConfig(name, 1, error_feedback, group, int(bits), norm), seed)


def bucket(
    size: int, plain: int = 0, *, seed: int = 0, dtype: torch.dtype = torch.float32, name: str = "weight"
) -> Bucket:
    """Random gradients whose magnitudes differ between groups: two tensors, and ``plain`` uncompressed elements."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(size + plain, generator=generator, dtype=dtype)
    magnitudes = 10.0 ** torch.randint(-4, 5, (len(flat) // GROUP + 1,), generator=generator)
    flat *= magnitudes.repeat_interleave(GROUP)[: len(flat)]
    parts = {f"{name}.first": size // 3, f"{name}.second": size - size // 3, f"{name}.plain": plain}
    views = flat.split(list(parts.values()))
    return Bucket(flat, {key: view for key, view in zip(parts, views, strict=True) if len(view)}, plain)


def decoded(compressor: Quantised, message: list[Tensor], about: Bucket) -> Tensor:
    """The elements that a message decodes to."""
    received = about.clone()
    received.flat.zero_()
    compressor.add_decompressed(message, received)
    return received.compressed_part


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a thousand elements take several blocks."""
    monkeypatch.setattr(quantised, "_BLOCK", 8 * GROUP + 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 7, 31, 32, 33, 255, 256, 257, 513, 1024, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_message_and_residual_add_up_to_the_input(kind: str, size: int, dtype: torch.dtype, small_blocks: None) -> None:
    compressor, original = make(kind), bucket(size, dtype=dtype)
    residual = original.clone()
    message = compressor.compress(residual)
    sent = decoded(compressor, message, original)
    assert sent.abs().sum() > 0
    rounding = 4 * torch.finfo(dtype).eps * torch.maximum(sent.abs(), original.flat.abs())
    assert ((sent + residual.flat - original.flat).abs() <= rounding).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 7, 513, 1500])
def test_message_size_is_bits_per_element_and_a_scale_per_group(kind: str, size: int, small_blocks: None) -> None:
    compressor, original = make(kind), bucket(size, plain=5)
    message = compressor.compress(original.clone())
    assert [(part.dtype, part.numel()) for part in message] == compressor.message_layout(original)
    steps, packed = message
    assert (steps.dtype, len(steps)) == (torch.float32, -(-size // GROUP))
    assert 0 <= len(packed) - size * compressor.bits / 8 < 3
    payload = compressor.encode(original.clone())
    assert 0 <= payload.numel() - (5 * 4 + steps.numel() * 4 + packed.numel()) < 3 * 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [7, 256, 1500])
def test_processing_all_rows_at_once_gives_the_same_message(
    kind: str, size: int, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = bucket(size)
    by_rows, residual = make(kind), original.clone()
    expected, left = by_rows.compress(residual), residual.flat
    received = decoded(by_rows, expected, original)
    monkeypatch.setattr(Quantised, "_row_by_row", lambda self, bucket: False)
    at_once, residual = make(kind), original.clone()
    message = at_once.compress(residual)
    assert all(torch.equal(part, wanted) for part, wanted in zip(message, expected, strict=True))
    assert torch.equal(residual.flat, left)
    assert torch.equal(decoded(at_once, message, original), received)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_message_and_residual_add_up_on_a_gpu(kind: str, small_blocks: None) -> None:
    original = bucket(1500)
    flat = original.flat.cuda()
    residual = Bucket(flat, {"weight": flat})
    message = make(kind).compress(residual)
    sent = decoded(make(kind), [part.cpu() for part in message], original)
    torch.testing.assert_close(sent + residual.flat.cpu(), original.flat, rtol=1e-5, atol=1e-2)
    assert torch.equal(decoded(make(kind), message, residual).cpu(), sent)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_independent(kind: str) -> None:
    original = bucket(4 * GROUP)
    original.flat[GROUP : 2 * GROUP] = 0
    original.flat[2 * GROUP : 3 * GROUP] *= 1e6
    message = make(kind).compress(original.clone())
    sent = decoded(make(kind), message, original).view(4, GROUP)
    assert not sent[1].any()
    for group, values in zip(sent, original.flat.view(4, GROUP), strict=True):
        largest = values.abs().max()
        assert group.abs().max() <= largest * (1 if "l2" not in kind else GROUP**0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-40, 1e-38])
def test_tiny_numbers_stay_tiny(kind: str, tiny: float) -> None:
    original = bucket(GROUP)
    original.flat.fill_(tiny)
    compressor, residual = make(kind), original.clone()
    sent = decoded(compressor, compressor.compress(residual), original)
    assert sent.abs().max() <= 2e-38
    assert residual.flat.abs().max() <= 2e-38


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_element_affects_its_group_in_one_step_only(kind: str, bad: float) -> None:
    compressor, original = make(kind), bucket(3 * GROUP + 1)
    compressor.begin_step()
    clean, spoilt = original.clone(), original.clone()
    spoilt.flat[GROUP + 3] = bad
    expected = decoded(compressor, make(kind).compress(clean), original)
    payload = compressor.encode(spoilt)
    received = original.clone()
    received.flat.zero_()
    compressor.decode(payload, received)
    assert not received.flat[GROUP + 3].isfinite()
    assert received.flat[:GROUP].isfinite().all()
    assert received.flat[2 * GROUP :].isfinite().all()
    if kind == "signsgd":  # the others draw at random
        assert torch.equal(received.flat[2 * GROUP :], expected[2 * GROUP :])
    norm = compressor.residual_norm()
    assert norm is not None
    assert norm.isfinite()
    compressor.begin_step()
    received.flat.zero_()
    compressor.decode(compressor.encode(original.clone()), received)
    assert received.flat.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_bucket_without_compressed_part_is_sent(kind: str) -> None:
    compressor, original = make(kind), bucket(0, plain=3)
    received = original.clone()
    received.flat.zero_()
    compressor.decode(compressor.encode(original.clone()), received)
    assert torch.equal(received.flat, original.flat)


@pytest.mark.parametrize("kind", KINDS)
def test_without_error_feedback_no_residual_is_kept(kind: str) -> None:
    compressor = make(kind, error_feedback=False)
    compressor.begin_step()
    compressor.encode(bucket(100))
    assert compressor.state_dict() == {"step": torch.tensor(1)}
    assert compressor.residual_norm() is None


def _payloads(compressor: Quantised, steps: range) -> list[Tensor]:
    found = []
    for step in steps:
        compressor.begin_step()
        found += [compressor.encode(bucket(600, 3, seed=step, name=name)) for name in ("late", "early")]
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error_feedback", [True, False])
def test_restored_compressor_continues_bit_for_bit(kind: str, error_feedback: bool) -> None:
    through = make(kind, error_feedback=error_feedback, seed=5)
    expected = _payloads(through, range(6))[6:]
    stopped = make(kind, error_feedback=error_feedback, seed=5)
    _payloads(stopped, range(3))
    saved = {name: tensor.clone() for name, tensor in stopped.state_dict().items()}
    again = make(kind, error_feedback=error_feedback, seed=5)
    again.load_state_dict(saved)
    found = _payloads(again, range(3, 6))
    assert all(torch.equal(payload, wanted) for payload, wanted in zip(found, expected, strict=True))
    for name, tensor in through.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def _exchange_on_rank(steps: int) -> dict[str, Any]:
    """Exchanges three ragged buckets a step, with each kind in turn."""
    world, found = World.from_environment(), {}
    with Runtime(small("strategy=ddp"), world, keep_logs=False) as runtime:
        for kind in KINDS:
            everyone = Communicator(runtime.communicator().group)
            compressor = make(kind)
            exchanges = BucketExchanger(compressor, everyone, Stopwatch(runtime.device))
            sizes = {"a": (513, 7), "b": (7, 0), "c": (1, 3)}
            contributed, aggregated, bytes_ = torch.zeros(0), torch.zeros(0), 0
            for step in range(steps):
                compressor.begin_step()
                seed = step * world.size + world.rank
                buckets = [bucket(n, p, seed=seed, dtype=torch.float64, name=name) for name, (n, p) in sizes.items()]
                contributed = _plus(contributed, buckets)
                for each in buckets:
                    exchanges.start(each)
                exchanges.finish()
                aggregated = _plus(aggregated, buckets)
                bytes_ += sum(make(kind).encode(each).numel() for each in buckets)
            state = compressor.state_dict()
            residual = torch.cat(
                [
                    state.get(f"residual/{name}", torch.zeros_like(tensor))
                    for each in buckets
                    for name, tensor in each.tensors.items()
                ]
            )
            found[kind] = {
                "digest": int(digest([aggregated])),
                "aggregated": aggregated,
                "contributed": everyone.all_reduce(contributed),
                "residual": everyone.all_reduce(residual),
                "counted": everyone.ledger.sent["all_gather"],
                "sent": bytes_ * (world.size - 1),
            }
    return found


def _plus(total: Tensor, buckets: list[Bucket]) -> Tensor:
    flat = torch.cat([each.flat for each in buckets]).clone()
    return total + flat if len(total) else flat


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_get_equal_sums_and_residuals_hold_the_rest(ranks: int) -> None:
    everyone = run_ranks(_exchange_on_rank, ranks, 5)
    for kind in KINDS:
        assert len({found[kind]["digest"] for found in everyone}) == 1
        first = everyone[0][kind]
        largest = float(first["contributed"].abs().max())
        torch.testing.assert_close(
            first["aggregated"] + first["residual"], first["contributed"], rtol=0, atol=1e-13 * largest
        )
        assert first["residual"].any()
        for found in everyone:
            assert found[kind]["counted"] == found[kind]["sent"] > 0
