"""compression=auto chooses the fastest candidate, loses no gradients on the way, and keeps its choice on resuming."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distrain.communication.collectives import Communicator, digest
from distrain.communication.types import Pending
from distrain.compression import base
from distrain.compression.auto import Auto, AutoConfig
from distrain.compression.autotune import candidates, decision
from distrain.compression.autotune.candidate_set import CandidateSet
from distrain.compression.base import Compressor, LossyConfig
from distrain.compression.bucket import Bucket
from distrain.compression.none import NoCompression
from distrain.config.groups import CompressionConfig
from distrain.config.registry import _CHOICES, Choice, choices
from distrain.errors import ConfigError
from distrain.gradients.buckets import Gradients
from distrain.reporting.metrics import Stopwatch
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from tests.harness import run_ranks
from tests.runs import check, compose, small, train_on_rank
from tests.strategies.helpers import ALONE

CPU = torch.device("cpu")


# --- configuration ---------------------------------------------------------------------------------------------------


def configured(*overrides: str) -> AutoConfig:
    config = compose("compression=auto", *overrides).compression
    assert isinstance(config, AutoConfig)
    return config


def test_candidate_keys_come_from_its_own_file_and_the_command_line() -> None:
    config = configured("compression.candidates.powersgd.rank=2")
    own = compose("compression=powersgd", "compression.rank=2").compression
    assert config.candidates["powersgd"] == own
    assert type(config.candidates["powersgd"]) is type(own)
    assert [config.candidates[f"qsgd{bits}"].bits for bits in (2, 4, 8)] == [2, 4, 8]


def test_candidates_are_ordered_and_the_limit_excludes_more_lossy_ones() -> None:
    every = ["none", "bf16", "fp16", "qsgd8", "powersgd", "topk", "qsgd4", "randomk", "signsgd", "qsgd2"]
    assert list(configured("compression.most_lossy=qsgd2").allowed) == every
    assert list(configured("compression.most_lossy=qsgd8").allowed) == every[:4]
    assert list(configured("compression.most_lossy=none").allowed) == ["none"]
    more = configured("+compression.candidates.topk1=${compression.candidates.topk}", "compression.most_lossy=topk1")
    assert list(more.allowed) == [*every, "topk1"]
    fewer = configured("~compression.candidates.powersgd")
    assert list(fewer.allowed) == ["none", "bf16", "fp16", "qsgd8", "topk"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["compression.candidates.powersgd.rank=0"], "compression.candidates.powersgd.rank=0: must be at least 1"),
        (["compression.candidates.powersgd.rank=x"], "compression.candidates.powersgd.rank=x: must be a whole number"),
        (["+compression.candidates.powersgd.rnk=2"], "compression.candidates.powersgd.rnk: no such key; choices: name"),
        (["compression.candidates.qsgd4.bits=5"], "compression.candidates.qsgd4.bits=5: unknown choice; choices: 2"),
        (
            ["compression.candidates.topk.momentum_correction=0.9", "compression.candidates.topk.error_feedback=false"],
            "compression.candidates.topk.momentum_correction=0.9: needs",
        ),
        (["+compression.candidates.new.name=nothing"], "compression.candidates.new.name=nothing: unknown choice"),
        (["+compression.candidates.new.name=auto"], "compression.candidates.new.name=auto: can't be a candidate"),
        (["+compression.candidates.new=3"], "compression.candidates.new=3: needs one of the choices"),
        (["compression.most_lossy=tpk"], "compression.most_lossy=tpk: is none of the candidates; choices: none, bf16"),
        (["compression.trial_seconds=-1"], "compression.trial_seconds=-1.0: must be at least 0"),
        (["compression.candidates=bf16"], "compression.candidates=bf16: must be a mapping of keys to values"),
    ],
)
def test_a_mistake_in_a_candidate_is_named_by_its_full_key(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(*overrides)
    assert str(caught.value).startswith(expected)


def test_a_limit_that_allows_an_unsupported_candidate_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^compression\.most_lossy=topk: allows powersgd, but trainer\.precision"):
        check(compose("compression=auto", "trainer.precision=fp16"), ALONE)
    check(compose("compression=auto", "trainer.precision=fp16", "compression.most_lossy=fp16"), ALONE)


# --- layout ----------------------------------------------------------------------------------------------------------


class Fake(Compressor):
    """Sleeps, then all-reduces half of what it compresses and keeps the other half for the next step."""

    sleeps = 0.0
    seen: list[Bucket]

    def __init__(self, config: CompressionConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.seen = []

    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
        self.seen.append(bucket)
        time.sleep(self.sleeps)
        owed = self.residuals.accumulate(bucket) if self.residuals is not None else bucket
        bucket.compressed_part.copy_(owed.compressed_part).mul_(0.5)
        owed.compressed_part.mul_(0.5)
        yield communicator.start_all_reduce(bucket.flat)


class Slow(Fake):
    """Sleeps longer."""

    sleeps = 0.01


class Fading(Fake):
    """Fast at first, then slow."""

    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
        # A candidate's cost is measured as of later steps, so those are fast too.
        self.sleeps = 0.02 if 15 < self.step < 1000 else 0.0
        return super().aggregate(bucket, communicator)


FAKES: dict[str, type[Compressor]] = {"fake": Fake, "slow": Slow, "fading": Fading}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    choices("compression")
    for name, kind in FAKES.items():
        monkeypatch.setitem(_CHOICES["compression"], name, Choice("compression", name, LossyConfig, kind))


def fake(name: str, min_elements: int = 1, error_feedback: bool = True) -> LossyConfig:
    return LossyConfig(name=name, min_elements=min_elements, error_feedback=error_feedback)


def choosing(most_lossy: str, trial_seconds: float, **candidates: CompressionConfig) -> AutoConfig:
    """``compression=auto`` among these; with very few seconds a trial has the minimum number of rounds."""
    return AutoConfig(name="auto", most_lossy=most_lossy, trial_seconds=trial_seconds, candidates=dict(candidates))


def gradients_of(used: Compressor, replicas: Communicator | None = None, bucket_mb: float = 1) -> Gradients:
    sizes = {"small": (2, 3), "large": (20, 30), "bias": (20,), "medium": (5, 8)}
    named = [(name, nn.Parameter(torch.zeros(size, dtype=torch.float64))) for name, size in sizes.items()]
    return Gradients(named, replicas or Communicator(), used, Stopwatch(CPU), bucket_mb, bucket_mb)


@pytest.mark.usefixtures("fakes")
def test_each_candidate_gets_the_compressed_part_that_it_would_have_alone() -> None:
    parts: dict[str, CompressionConfig] = {"all": fake("fake", 1), "some": fake("fake", 40), "few": fake("fake", 600)}
    config = choosing("few", 0.0, **parts)
    (bucket,) = gradients_of(Auto(config)).buckets
    candidate_set = CandidateSet(config.allowed, seed=0)
    # Parameters that equally many candidates compress are in the order of the backward pass; vectors are last.
    assert list(bucket.tensors) == ["large", "medium", "small", "bias"]
    for name, candidate in parts.items():
        (own,) = gradients_of(base.build(candidate)).buckets
        seen = candidate_set.view(name, bucket)
        assert set(seen.compressed_tensors) == set(own.compressed_tensors)
        assert seen.uncompressed_numel == own.uncompressed_numel
        assert seen.flat is bucket.flat
    assert candidate_set.view("none", bucket).uncompressed_numel == bucket.flat.numel()


# --- on ranks --------------------------------------------------------------------------------------------------------


def _force(name: str) -> None:
    """In this process this candidate is chosen, whichever is fastest, and the check accepts it."""
    vars(decision)["choose"] = lambda seconds, errors: name
    decision.TOO_SLOW = decision.SURPRISING = 1e9


def _exchange_on_rank(
    chosen: AutoConfig, steps: int, prefer: str | None = None, none_sleeps: float = 0.0
) -> dict[str, Any]:
    """Exchanges random gradients; ``prefer`` replaces the measured choice."""
    for name, kind in FAKES.items():
        _CHOICES.setdefault("compression", {})[name] = Choice("compression", name, LossyConfig, kind)
    if prefer is not None:
        candidates.SHORTLIST_FACTOR = candidates.SHORTLIST_FACTOR_NONE = 1e9
        _force(prefer)
    if none_sleeps:
        usual: Callable[..., Iterator[Pending]] = NoCompression.aggregate

        def slow(self: NoCompression, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
            time.sleep(none_sleeps)
            return usual(self, bucket, communicator)

        NoCompression.aggregate = slow  # type: ignore[method-assign]
    lines: list[tuple[str, str]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append((record.levelname, record.getMessage()))

    logging.getLogger("distrain").addHandler(Keep())
    world = World.from_environment()
    with Runtime(small("strategy=ddp"), world, keep_logs=False) as runtime:
        everyone = runtime.communicator()
        used = Auto(chosen, seed=3)
        gradients = gradients_of(used, everyone, bucket_mb=0.003)
        generator = torch.Generator().manual_seed(world.rank)
        given, got = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for _ in range(steps):
            gradients.zero()
            used.begin_step()
            gradients.begin_last_backward()
            for bucket in gradients.buckets:
                bucket.flat.copy_(torch.randn(bucket.flat.shape, generator=generator, dtype=torch.float64))
            given = given + torch.cat([bucket.flat for bucket in gradients.buckets])
            gradients.finish()
            got = got + torch.cat([bucket.flat for bucket in gradients.buckets])
        state = used.state_dict()
        none = {name: torch.zeros_like(t) for bucket in gradients.buckets for name, t in bucket.tensors.items()}
        residuals = torch.cat([state.get(f"residual/{name}", zeros).flatten() for name, zeros in none.items()])
        return {
            "digest": int(digest([got])),
            "given": everyone.all_reduce(given),
            "got": got,
            "residuals": everyone.all_reduce(residuals.clone()),
            "report": used.report(),
            "state": state,
            "lines": [line for line in lines if "auto" in line[1]],
            "observed": used.observer is not None,
        }


#: Warm-up, ordinary and held steps, a short trial of three candidates, the check, and a trial of two.
ENOUGH = 9 + 5 * (candidates.MIN_ROUNDS + 1) + decision.CHECKED_STEPS


@pytest.mark.parametrize(
    ("none_sleeps", "candidates", "expected"),
    [(0.0, ["slow"], "none"), (0.01, ["fake", "slow"], "fake")],
    ids=["nothing pays", "something pays"],
)
def test_all_ranks_choose_the_same_fastest_candidate(none_sleeps: float, candidates: list[str], expected: str) -> None:
    chosen = choosing("slow", 0.0001, **{name: fake(name) for name in candidates})
    everyone = run_ranks(_exchange_on_rank, 2, chosen, ENOUGH, None, none_sleeps)
    assert everyone[0]["digest"] == everyone[1]["digest"]
    for rank in everyone:
        report = rank["report"]
        assert report["chosen"] == expected
        rows = {row["candidate"]: row for row in report["candidates"]}
        assert list(rows) == ["none", *candidates]
        # Three buckets, each with a sleep.
        assert rows["slow"]["compress_ms"] >= 30
        assert rows["slow"]["predicted_ms"] >= 30
        assert rows["none"]["measured_ms"] is not None
        assert rows["none"]["bytes_sent"] == rows["slow"]["bytes_sent"] == 8 * (6 + 600 + 20 + 40)
        assert any(f"compression=auto chooses {expected} on this link" in line for _, line in rank["lines"])
        assert not rank["observed"]


@pytest.mark.parametrize("prefer", ["none", "first", "second"])
def test_residuals_of_tried_candidates_are_not_lost(prefer: str) -> None:
    chosen = choosing("second", 0.0001, first=fake("fake", 40), second=fake("fake"))
    # During the trial, and after it.
    for steps in (20, 40):
        for result in run_ranks(_exchange_on_rank, 2, chosen, steps, prefer):
            assert result["report"]["chosen"] == (prefer if steps == 40 else None)
            torch.testing.assert_close(result["got"] + result["residuals"], result["given"], rtol=1e-12, atol=1e-12)
            if prefer != "none" or steps == 20:
                assert result["residuals"].abs().max() > 0.01
            else:
                assert not result["residuals"].any()


def test_compression_is_switched_off_if_it_turns_out_slower() -> None:
    chosen = choosing("fading", 0.0001, fading=fake("fading"))
    for result in run_ranks(_exchange_on_rank, 2, chosen, 70, None, 0.005):
        warnings = [(level, line) for level, line in result["lines"] if "compression is switched off" in line]
        assert [level for level, _ in warnings] == ["WARNING"]
        assert warnings[0][1].startswith("compression=auto chose fading, with which a step takes ")
        assert result["report"]["chosen"] == "none"
        torch.testing.assert_close(result["got"], result["given"], rtol=1e-12, atol=1e-12)


def test_without_trial_seconds_no_candidate_is_tried() -> None:
    chosen = choosing("fake", trial_seconds=0, fake=fake("fake"))
    for result in run_ranks(_exchange_on_rank, 2, chosen, 10, None, 0.01):
        assert result["report"]["chosen"] == "fake"
        assert [row["measured_ms"] is None for row in result["report"]["candidates"]] == [False, True]


def test_a_single_process_chooses_nothing() -> None:
    used = Auto(configured())
    gradients = gradients_of(used)
    for _ in range(12):
        used.begin_step()
        gradients.begin_last_backward()
        gradients.finish()
    assert used.report() == {"chosen": None}
    assert used.step == 12


# --- whole runs ------------------------------------------------------------------------------------------------------


def _auto(run_dir: Path, *more: str, strategy: str = "ddp") -> Any:
    return small(
        f"strategy={strategy}",
        "compression=auto",
        "compression.trial_seconds=0.01",
        "trainer.epochs=100",
        "trainer.max_steps=50",
        f"run_dir={run_dir}",
        *more,
    )


def _log(run_dir: Path) -> str:
    return "".join(path.read_text() for path in sorted(run_dir.glob("logs/rank_*.log")))


def test_a_run_resumed_on_as_many_ranks_keeps_the_choice(tmp_path: Path) -> None:
    # Whichever candidate is fastest, one with residuals is chosen.
    forced = ("compression.most_lossy=topk", "compression.candidates.topk.min_elements=8")
    through, again, elsewhere = tmp_path / "through", tmp_path / "again", tmp_path / "elsewhere"
    saving = ("checkpoint.every_steps=45", "checkpoint.keep=9")
    first = run_ranks(_train_with_topk, 2, _auto(through, *forced, *saving))
    assert all(torch.equal(first[0]["model"][name], first[1]["model"][name]) for name in first[0]["model"])
    assert "compression=auto chooses topk" in _log(through)

    resume = f"resume={through / 'checkpoints' / 'step_00000045'}"
    for result in run_ranks(_train_with_topk, 2, _auto(again, *forced, resume)):
        assert all(torch.equal(result["model"][name], first[0]["model"][name]) for name in result["model"])
    assert _log(again).count("compression=auto continues with topk") == 2
    assert "chooses" not in _log(again)

    run_ranks(_train_with_topk, 3, _auto(elsewhere, *forced, resume, "trainer.max_steps=90"))
    assert "continues with" not in _log(elsewhere)
    assert _log(elsewhere).count("compression=auto chooses topk") == 3


def _train_with_topk(configuration: Any) -> dict[str, Any]:
    _force("topk")
    return train_on_rank(configuration)


def test_pipeline_stages_decide_separately_by_prediction(tmp_path: Path) -> None:
    net = ("model=custom", "model._target_=tests.runs.NormNet", "+model.kwargs.norm=group", "strategy.stages=2")
    everyone = run_ranks(train_on_rank, 4, _auto(tmp_path, *net, "trainer.max_steps=20", strategy="pipeline"))
    for result in everyone:
        assert all(torch.equal(result["model"][name], everyone[0]["model"][name]) for name in result["model"])
    log_text = _log(tmp_path)
    assert log_text.count("compression=auto chooses") == 4
