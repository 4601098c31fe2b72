"""strategy=tensor_parallel trains as one process does."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from distrain.config.schema import Config
from distrain.errors import ConfigError, config_error
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.strategies.tensor_parallel import plan
from distrain.strategies.tensor_parallel.strategy import TensorParallel
from tests.harness import run_ranks
from tests.runs import check, relative_difference, small, train_on_rank, trainer_for

MODELS = "tests.strategies.tensor_parallel.models"
VIT = ("model=custom", f"model._target_={MODELS}.ViT")
GROUPED = ("model=custom", f"model._target_={MODELS}.GroupedNet")
UNITS = ("model=custom", f"model._target_={MODELS}.Units")
ENCODER = ("model=custom", f"model._target_={MODELS}.Encoder")
COMMON = ("trainer.max_steps=10", "trainer.epochs=9", "resume=never")
ADAM = ("optimizer=adam", "optimizer.eps=1e-3")
#: Keeps a single number for each parameter that is not named ``step``.
NADAM = (
    "optimizer=custom",
    "optimizer._target_=torch.optim.NAdam",
    "+optimizer.kwargs.eps=1e-3",
    "optimizer.fused=false",
)
PLANNED = "{blocks.*.attn: attention, blocks.0.mlp.fc1: column, blocks.0.mlp.fc2: row}"
#: Ways of training; a batch has 10 samples, the last one of an epoch 7.
WAYS: dict[str, tuple[str, ...]] = {
    "ViT": (*VIT, *ADAM, "trainer.precision=fp64", "trainer.grad_clip_norm=0.5"),
    "grouped": (*GROUPED, *ADAM, "trainer.precision=fp64", "trainer.micro_batch_size=4"),
    "encoder": (*ENCODER, *NADAM, "trainer.precision=fp64", "trainer.grad_clip_norm=0.5"),
    "float32": (*VIT, *ADAM, "trainer.micro_batch_size=4", "trainer.grad_clip_norm=0.5", "optimizer.sam_rho=0.05"),
    "ResNet-18 batch norm": (
        *("model=resnet18", "model.norm=batch", "optimizer=sgd", "optimizer.lr=0.001", "trainer.precision=fp64"),
        "trainer.memory_format=channels_last",
    ),
    "ResNet-18 group norm": ("model=resnet18", "model.norm=group", "optimizer=sgd", "optimizer.lr=0.001"),
    "CIFAR-10 CNN": ("model=cifar_cnn", "data.height=32", "data.width=32", *ADAM, "trainer.precision=fp64"),
    "bf16": (*VIT, *ADAM, "trainer.precision=bf16"),
}
#: What every run of the tests trains on three ranks.
ALWAYS = ["ViT", "grouped", "encoder"]
#: What becomes of the layers of a :class:`~tests.strategies.tensor_parallel.models.ViT`.
_OF_BLOCK = {"attn": "attention", "mlp.fc1": "column", "mlp.drop1": "channels", "mlp.fc2": "row"}
ROLES_OF_VIT = {f"blocks.{index}.{name}": role for index in range(2) for name, role in _OF_BLOCK.items()}
BOUNDS = {"trainer.precision=fp64": 1e-11, "trainer.precision=bf16": 2e-2}


def train_each(ways: list[str], more: tuple[str, ...], folder: str) -> list[dict[str, Any]]:
    """Trains each in turn in the same processes, because processes are slow to start."""
    return [train_on_rank(small(*COMMON, *WAYS[way], *more, f"run_dir={folder}/{way}")) for way in ways]


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(
    ("ranks", "ways"),
    [
        pytest.param(3, ALWAYS, id="3 ranks"),
        *(pytest.param(ranks, list(WAYS), id=f"{ranks} ranks, all", marks=pytest.mark.soak) for ranks in (2, 3)),
    ],
)
def test_tensor_parallel_is_the_serial_run(ranks: int, ways: list[str], serial: dict[str, Any], tmp_path: Path) -> None:
    new = [way for way in ways if way not in serial]
    if new:
        serial |= dict(zip(new, run_ranks(train_each, 1, new, (), str(tmp_path / "one"))[0], strict=True))
    several = run_ranks(train_each, ranks, ways, ("strategy=tensor_parallel",), str(tmp_path / "many"), timeout=500)
    for way, *runs in zip(ways, *several, strict=True):
        expected = serial[way]
        for run in runs:
            bound = next((bound for option, bound in BOUNDS.items() if option in WAYS[way]), 1e-5)
            assert relative_difference(run["model"], expected["model"]) <= bound, way
            if bound <= 1e-5:
                for count in ("test_correct", "test_count", "samples", "steps"):
                    assert run["summary"][count] == expected["summary"][count], (way, count)
                assert run["summary"]["test_loss"] == pytest.approx(expected["summary"]["test_loss"], rel=1e-4)
        for run in runs[1:]:
            assert relative_difference(run["model"], runs[0]["model"]) == 0, way


# --- a strategy by itself --------------------------------------------------------------------------------------------


def strategy_of(config: Config, runtime: Runtime) -> TensorParallel:
    strategy = trainer_for(config, runtime).strategy
    assert isinstance(strategy, TensorParallel)
    return strategy


def refused_by_one(config: Config, runtime: Runtime) -> str:
    """What each rank says if the second one finds no layer to divide."""
    with pytest.MonkeyPatch.context() as patched:
        if runtime.world.rank == 1:
            refusal = config_error("strategy.plan", "nothing can be divided here")
            patched.setattr(plan, "find_divisions", Mock(side_effect=refusal))
        with pytest.raises(ConfigError) as refused:
            trainer_for(config, runtime)
    return str(refused.value)


def examined(folder: str) -> dict[str, Any]:
    """What two ranks say of several things, in one process group."""
    found: dict[str, Any] = {}
    options = ("strategy=tensor_parallel", "runtime.setup_timeout_seconds=60", "resume=never", *ADAM)
    config = small(*options, *VIT, "+model.kwargs.rate=0", f"run_dir={folder}/examined")
    with Runtime(config, World.from_environment()) as runtime:
        trainer = trainer_for(config, runtime)
        strategy = trainer.strategy
        assert isinstance(strategy, TensorParallel)
        batch = next(trainer.loaders["train"].epoch(0))
        strategy.train_step(batch)
        found["sent"], found["said"] = strategy.uncompressed_bytes_per_step(), dict(strategy.ledger.sent)
        state = strategy.state_dict()
        found["saved"] = {
            kind: {name: list(t.shape) for name, t in state[kind].items()} for kind in ("model", "optimizer")
        }
        found["held"] = {name: list(parameter.shape) for name, parameter in strategy.model.named_parameters()}
        found["whole"] = {name: list(tensor.shape) for name, tensor in strategy.model_state().items()}
        # A processor that rounds differently.
        norm = strategy.model.get_parameter("norm.weight")
        with torch.no_grad():
            norm.add_(1e-3 * runtime.world.rank)
        strategy.begin_epoch(1)
        found["norm"] = norm.detach().clone()
        # Layers that don't belong together, dropout between divided layers that would draw for a part of them, and a
        # layer of which a rank would have nothing; a parameter that all channels share, and a rank that fails alone.
        for name, model, planned in (
            ("alone", (*VIT, "+model.kwargs.rate=0"), "{blocks.0.mlp.fc1: column}"),
            ("draws", (*VIT, "+model.kwargs.rate=0.2"), PLANNED),
            ("few", (*VIT, "+model.kwargs.heads=1"), PLANNED),
            ("shared", UNITS, "{first: column, second: row}"),
            ("fails", (*UNITS, "+model.kwargs.fails=true"), "{first: column, second: row}"),
        ):
            wrong = small(*options, *model, f"strategy.plan={planned}", f"run_dir={folder}/examined")
            with pytest.raises(ConfigError) as refused:
                trainer_for(wrong, runtime)
            found[name] = str(refused.value)
        found["refused by one"] = refused_by_one(config, runtime)
        fitting = small(
            *options, *VIT, "+model.kwargs.rate=0", f"strategy.plan={PLANNED}", f"run_dir={folder}/examined"
        )
        fitted = strategy_of(fitting, runtime)
        found["planned"] = {name: list(parameter.shape) for name, parameter in fitted.model.named_parameters()}
    return found


def tried_on_two_ranks(folder: str) -> dict[str, Any]:
    """Trains at once and in two parts, and examines."""
    options = (*VIT, *ADAM, "strategy=tensor_parallel", "scheduler=constant", "trainer.grad_clip_norm=0.5")
    whole = train_on_rank(small(*options, f"run_dir={folder}/whole", "trainer.max_steps=7"))
    parts = [
        train_on_rank(small(*options, f"run_dir={folder}/parts", f"trainer.max_steps={steps}")) for steps in (3, 7)
    ]
    layers = whole["summary"]["tensor_parallel"]
    return {"layers": layers, "whole": whole["model"], "parts": parts[-1]["model"], "examined": examined(folder)}


def test_two_ranks_hold_send_save_and_resume_what_they_should(tmp_path: Path) -> None:
    ranks = run_ranks(tried_on_two_ranks, 2, str(tmp_path))
    for rank in ranks:
        assert rank["layers"]["divided"] == ROLES_OF_VIT
        assert rank["layers"]["whole"][:4] == ["ViT", "patch_embed", "blocks.0.norm1", "blocks.0.norm2"]
        # Bit for bit, dropout included.
        assert all(torch.equal(tensor, rank["parts"][name]) for name, tensor in rank["whole"].items())
    first, second = (rank["examined"] for rank in ranks)
    # Two groups a block: attention of 5 heads and an MLP of 23 units; 20 channels, 5 tokens, 10 samples, 4 bytes.
    activation = 10 * 5 * 20 * 4
    norms = 2 * 2 * 2 * 4 * 4
    assert first["sent"] == second["sent"] == 2 * 2 * 2 * activation + norms
    assert first["said"]["all_reduce"] >= first["sent"]
    wholes = first["whole"]
    assert (wholes["blocks.0.attn.qkv.weight"], wholes["blocks.1.mlp.fc2.weight"]) == ([60, 20], [20, 23])
    assert first["held"]["blocks.0.attn.qkv.weight"] == [36, 20]
    assert second["held"]["blocks.0.attn.qkv.weight"] == [24, 20]
    assert [each["held"]["blocks.1.mlp.fc2.weight"] for each in (first, second)] == [[20, 12], [20, 11]]
    for kind, names in (("model", wholes), ("optimizer", _of_adam(wholes))):
        saved = [each["saved"][kind] for each in (first, second)]
        assert not saved[0].keys() & saved[1].keys()
        assert {**saved[0], **saved[1]} == names
        # Both save about as much.
        sizes = [sum(torch.Size(shape).numel() for shape in each.values()) for each in saved]
        assert max(sizes) < 1.7 * min(sizes)
    assert torch.equal(first["norm"], second["norm"])
    for name in ("alone", "draws", "few", "shared", "fails", "refused by one"):
        assert first[name] == second[name]
    assert "strategy.plan: the divided model fails (RuntimeError" in first["alone"]
    assert "strategy.plan: the divided model gives another gradient of act.weight" in first["shared"]
    assert "strategy.plan: the divided model fails (RuntimeError: too few units) at " in first["fails"]
    assert first["refused by one"].startswith("strategy.plan: nothing can be divided here (rank 1 on ")
    assert "strategy.plan: the divided model gives other outputs in training" in first["draws"]
    assert (
        first["few"] == "strategy.plan.blocks.*.attn=attention: blocks.0.attn can be divided into 1, not among 2 ranks"
    )
    assert first["planned"]["blocks.0.mlp.fc1.weight"] == [12, 20]
    assert first["planned"]["blocks.1.mlp.fc1.weight"] == [23, 20]


def _of_adam(parameters: Mapping[str, list[int]]) -> dict[str, list[int]]:
    moments = itertools.product(parameters.items(), ("exp_avg", "exp_avg_sq"))
    found = {f"{name}/{moment}": shape for (name, shape), moment in moments}
    return found | {f"{name}/step": [] for name in parameters}


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("optimizer=lamb", "optimizer.name=lamb: updates a parameter as a whole"),
        ("optimizer=lars", "optimizer.name=lars: updates a parameter as a whole"),
        ("optimizer=muon", "optimizer.name=muon: updates a parameter as a whole"),
        ("compression=topk", "compression=topk: compresses gradients"),
        ("trainer.compile=true", "trainer.compile=true: is not possible"),
        ("prune.amount=0.5", "prune.amount=0.5: compares weights of the whole model"),
        ("trainer.micro_batch_size=auto", "trainer.micro_batch_size=auto"),
        (
            "strategy.plan={blocks.*: colum}",
            "strategy.plan.blocks.*=colum: is no way to divide a layer; choices: column,",
        ),
        ("strategy.plan={block.*.fc1: column}", "strategy.plan=block.*.fc1: fits no layer; they are "),
        ("strategy.plan={blocks.0: column}", "strategy.plan.blocks.0=column: blocks.0 is a Block; Linear, Conv1d"),
        ("strategy.plan={norm: channels}", "strategy.plan.norm=channels: norm is a LayerNorm; BatchNorm,"),
        (
            "strategy.plan={norm: attention}",
            "strategy.plan.norm=attention: norm is a LayerNorm without linear layers qkv",
        ),
        ("strategy.plan={blocks*: replicated}", "strategy.plan: no layer of ViT was found that 2 ranks can divide"),
    ],
)
def test_what_cannot_be_divided_is_refused_in_a_line(option: str, problem: str) -> None:
    world = World(rank=0, size=2, local_rank=0, local_size=2, host="here")
    with pytest.raises(ConfigError) as refused:
        check(small("strategy=tensor_parallel", *VIT, option), world)
    assert str(refused.value).startswith(problem)
