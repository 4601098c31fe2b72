"""strategy=single is the training loop that one would write by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distrain.data.batch import Batch
from distrain.errors import ConfigError
from distrain.optim.optimizers.build import build_optimizer
from distrain.strategies.single import Single
from tests.runs import small
from tests.strategies.helpers import batch, drawn, parameters, single


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4))
    return nn.Sequential(*layers).to(dtype)


def batches(dtype: torch.dtype = torch.float32) -> list[Batch]:
    """The last one is ragged."""
    return [drawn(count, 3, 6, 6, seed=count, dtype=dtype) for count in (10, 11, 7)]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("optimizer.momentum=0.9", "optimizer.weight_decay=0.01"),
        ("optimizer=adamw",),
        ("trainer.grad_clip_norm=0.05",),
        ("trainer.grad_clip_norm=1e6",),
    ],
    ids=["SGD", "momentum", "AdamW", "clipped", "clipped in vain"],
)
def test_steps_are_those_of_a_loop_in_plain_pytorch(overrides: tuple[str, ...]) -> None:
    ours, theirs = network(torch.float64), network(torch.float64)
    strategy = single(ours, *overrides, "trainer.precision=fp64")
    optimizer = build_optimizer(strategy.config.optimizer, theirs.parameters())
    clip = strategy.config.trainer.grad_clip_norm
    for each in batches(torch.float64):
        result = strategy.train_step(each)
        optimizer.zero_grad()
        logits = theirs(each.inputs)
        loss = F.cross_entropy(logits, each.targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), clip if clip is not None else float("inf"))
        optimizer.step()
        torch.testing.assert_close(parameters(ours), parameters(theirs), rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(strategy.gradient_norm(), norm, rtol=1e-12, atol=0)
        torch.testing.assert_close(result.loss_sum, loss.detach() * len(each.targets), rtol=1e-12, atol=0)
        assert int(result.metric_sums) == int((logits.argmax(1) == each.targets).sum())
        assert result.count == each.global_count == len(each.targets)
        assert not result.loss_sum.requires_grad


def test_a_step_s_rate_is_the_one_set_before() -> None:
    model = network()
    strategy = single(model)
    strategy.set_learning_rate(0.0)
    before = parameters(model)
    strategy.train_step(batches()[0])
    assert torch.equal(parameters(model), before)
    strategy.set_learning_rate(0.1)
    strategy.train_step(batches()[0])
    assert not torch.equal(parameters(model), before)


# --- accumulation ----------------------------------------------------------------------------------------------------


class Sizes(nn.Module):
    """Notes how many samples it was given at once."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4, dtype=torch.float64)
        self.seen: list[int] = []

    def forward(self, input: Tensor) -> Tensor:
        self.seen.append(len(input))
        out: Tensor = self.linear(input)
        return out


@pytest.mark.parametrize(
    ("samples", "at_once", "pieces"),
    [(7, 7, [7]), (7, 3, [3, 2, 2]), (8, 3, [3, 3, 2]), (4, 1, [1, 1, 1, 1]), (3, 100, [3])],
)
def test_pieces_are_near_equal_and_add_up_to_the_batch(samples: int, at_once: int, pieces: list[int]) -> None:
    whole, cut = Sizes(), Sizes()
    cut.load_state_dict(whole.state_dict())
    each = drawn(samples, 3, dtype=torch.float64)
    expected = single(whole, "trainer.precision=fp64").train_step(each)
    found = single(cut, "trainer.precision=fp64", f"trainer.micro_batch_size={at_once}").train_step(each)
    assert cut.seen == pieces
    torch.testing.assert_close(parameters(cut), parameters(whole), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(found.loss_sum, expected.loss_sum, rtol=1e-13, atol=0)
    assert (int(found.metric_sums), found.count) == (int(expected.metric_sums), samples)


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_gives_sums_counts_and_predictions_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(12), nn.Linear(12, 4))
    strategy = single(model)
    strategy.train_step(drawn(10, 3, 2, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    each = drawn(9, 3, 2, 2, seed=1)
    result = strategy.eval_step(each)
    logits = model.eval()(each.inputs)
    assert result.outputs is not None
    torch.testing.assert_close(result.outputs, logits)
    assert int(result.metric_sums) == int((logits.argmax(1) == each.targets).sum())
    torch.testing.assert_close(result.loss_sum, F.cross_entropy(logits, each.targets, reduction="sum"))
    assert not result.loss_sum.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_all_layers_train_in_training_steps_whatever_was_before() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5).eval(), nn.BatchNorm1d(12).eval(), nn.Linear(12, 4))
    strategy = single(model)
    strategy.train_step(drawn(10, 3, 2, 2))
    assert all(layer.training for layer in model.modules())
    strategy.eval_step(drawn(10, 3, 2, 2))
    assert not any(layer.training for layer in model.modules())
    strategy.train_step(drawn(10, 3, 2, 2))
    assert all(layer.training for layer in model.modules())


def test_evaluating_no_samples_counts_nothing() -> None:
    # A model that can't run without samples need not.
    model = nn.Sequential(nn.Unflatten(1, (3, -1)), nn.Flatten(), nn.Linear(6, 4))
    result = single(model).eval_step(batch(torch.empty(0, 6), torch.empty(0, dtype=torch.int64)))
    assert (float(result.loss_sum), int(result.metric_sums), result.count) == (0, 0, 0)
    assert result.outputs is None


# --- the rest --------------------------------------------------------------------------------------------------------


def test_more_than_one_rank_is_refused_with_the_other_choices() -> None:
    Single.check(small(), 1)
    with pytest.raises(ConfigError, match=r"strategy=single: runs on 1 rank, but 2 were started; choices: .*ddp"):
        Single.check(small(), 2)


def test_one_process_sends_nothing() -> None:
    strategy = single(network())
    strategy.train_step(batches()[0])
    assert strategy.ledger.total() == 0
    assert strategy.uncompressed_bytes_per_step() == 0
    assert strategy.mesh is None
    assert strategy.data_shard == (0, 1)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_another_process_goes_on_from_the_state_as_if_nothing_happened(optimizer: str) -> None:
    overrides = (f"optimizer={optimizer}", *(("optimizer.momentum=0.9",) if optimizer == "sgd" else ()))
    strategy = single(network(), *overrides)
    for each in batches():
        strategy.train_step(each)
    torch.manual_seed(1)
    other = single(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4)), *overrides)
    saved = strategy.state_dict()
    other.load_state_dict({**saved, "compressor": [saved["compressor"]], "layout": strategy.layout})
    for each in batches():
        strategy.train_step(each)
        other.train_step(each)
    assert torch.equal(parameters(other.model), parameters(strategy.model))


def test_the_model_is_compiled_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[nn.Module, dict[str, object]]] = []

    def compile_it(self: nn.Module, **options: object) -> None:
        compiled.append((self, options))

    monkeypatch.setattr(nn.Module, "compile", compile_it)
    model = network()
    single(model)
    assert compiled == []
    single(model, "trainer.compile=true")
    assert compiled == [(model, {})]
    single(model, "trainer.compile=max")
    assert compiled[1:] == [(model, {"mode": "max-autotune", "dynamic": False})]
