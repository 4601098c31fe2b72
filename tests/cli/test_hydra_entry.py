"""The command line: every user error is one line and exit code 2 before ranks connect, and help shows what to type."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from distrain.cli import app, hydra_entry
from distrain.config.load import load_config
from distrain.config.registry import choices, selectable
from distrain.errors import EXIT_REFUSED, ConfigError, Failed
from tests.runs import CONF


class NoModule:
    """A class that is no model."""


class FlatOutput(nn.Module):
    """A model that returns no logits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten() * self.scale


#: Arguments after `launch/train.py strategy=ddp`, on two ranks without a GPU, and what the error line must contain.
#: FILE is a plain file, EMPTY an empty folder, ONE a folder with one class in it.
WRONG_ARGUMENTS: dict[str, tuple[str, ...]] = {
    # names
    "optimizer.lrr=0.1": ("optimizer.lrr: no such key", "choices: name, lr", "did you mean lr?"),
    "data.augment.flp=true": ("data.augment.flp: no such key", "choices: flip, crop_padding, crop_border, cutout"),
    "optimizer=sgd optimizer.momentm=0.9": ("optimizer.momentm: no such key", "did you mean momentum?"),
    "optimizer=adam optimizer.momentum=0.9": ("optimizer.momentum: no such key", "choices: name, lr, betas"),
    "optimiser=adam": ("optimiser: no such key", "did you mean optimizer?"),
    "trainr.epochs=2": ("trainr: no such key", "did you mean trainer?"),
    "sed=1": ("sed: no such key", "did you mean seed?"),
    "+new.key=1": ("new: no such key", "choices: strategy,"),
    "+optimizer.new=1": ("optimizer.new: no such key", "choices: name, lr"),
    "++optimizer.new=1": ("optimizer.new: no such key", "choices: name, lr"),
    "hydra.foo=1": ("hydra.foo: no such key",),
    "lr=0.1": ("lr: no such key", "did you mean optimizer.lr=0.1?"),
    "epochs=3": ("epochs: no such key", "did you mean trainer.epochs=3?"),
    "batch_size=8": ("batch_size: no such key", "did you mean data.batch_size=8?"),
    "max_steps=5": ("max_steps: no such key", "did you mean trainer.max_steps=5?"),
    "momentum=0.9": ("momentum: no such key", "optimizer.momentum=0.9 with optimizer=lars"),
    "learning_rate=1": ("learning_rate: no such key", "did you mean optimizer.lr=1?"),
    "+lr=0.1": ("lr: no such key", "did you mean optimizer.lr?"),
    "trainer.lr=0.1": ("trainer.lr: no such key", "did you mean optimizer.lr=0.1?"),
    "microbatches=4": ("microbatches: no such key", "strategy.microbatches=4 with strategy=mesh or strategy=pipeline?"),
    # choices
    "strategy=dpp": ("strategy=dpp: no such choice", "did you mean ddp?"),
    "strategy=DDP": ("strategy=DDP: no such choice", "did you mean ddp?"),
    "strategy=pipe": ("strategy=pipe: no such choice", "choices: auto, ddp,", "single"),
    "model=simple_cn": ("model=simple_cn: no such choice", "did you mean simple_cnn?"),
    "data=mnist": ("data=mnist: no such choice", "choices: cifar10, "),
    "data=python_object": ("data=python_object: stands for an object in a Python program", "distrain.fit(model, data)"),
    "model=python_object": ("model=python_object: stands for an object in", "distrain.fit(model, data)"),
    "model.name=python_object": ("model.name=python_object: stands for an object in", "distrain.fit(model, data)"),
    "optimizer=adagrad": ("optimizer=adagrad: no such choice", "choices: adam, adamw, custom, lamb, lars, lion, muon"),
    "scheduler=warm": ("scheduler=warm: no such choice", "choices: constant, cosine, cosine_restarts, custom,"),
    "loss=hinge": ("loss=hinge: no such choice", "cross_entropy"),
    "logger=neptune": ("logger=neptune: no such choice", "choices: csv, custom, mlflow, none"),
    "compression=zip": ("compression=zip: no such choice", "choices: auto, bf16, fp16, none, powersgd"),
    "experiment=unheard_of": ("experiment", "no such"),
    "--config-name=other": ("config=other: no such choice", "choices: chaos, compare, config"),
    "data=null": ("data=null: needs the name of a choice", "choices: cifar10, custom, digits"),
    "data=3": ("data=3: needs the name of a choice", "choices: cifar10, custom, digits"),
    "data.name=nope": ("data.name=nope: unknown choice", "choices: ", "cifar10"),
    "~optimizer": ("optimizer=null: needs one of the choices", "adamw"),
    "trainer=3": ("trainer=3: must be a mapping",),
    "~trainer": ("trainer=null: must be a mapping",),
    "model.norm=layer model=resnet18": ("model.norm=layer: unknown choice", "choices: batch, group, none"),
    "strategy.batchnorm=async": ("strategy.batchnorm=async: unknown choice", "choices: sync, local"),
    "trainer.precision=fp8": ("trainer.precision=fp8: unknown choice", "choices: fp32, bf16, fp16, fp64"),
    "trainer.progress=fancy": ("trainer.progress=fancy: unknown choice", "choices: auto, bar, lines, off"),
    "runtime.backend=mpi": ("runtime.backend=mpi: unknown choice", "choices: auto, gloo, nccl"),
    # types
    "trainer.epochs=many": ("trainer.epochs=many: must be a whole number",),
    "trainer.epochs=1.5": ("trainer.epochs=1.5: must be a whole number",),
    "trainer.epochs=null": ("trainer.epochs=null: must be a whole number",),
    "optimizer.lr=[1,2]": ("optimizer.lr=[1, 2]: must be a number",),
    "optimizer.lr=true": ("optimizer.lr=true: must be a number",),
    "optimizer.fused=maybe": ("optimizer.fused=maybe: must be true or false",),
    "optimizer.betas=0.9": ("optimizer.betas=0.9: must be a list, each element a number",),
    "optimizer.betas=[a,b]": ("optimizer.betas=['a', 'b']: must be a list, each element a number",),
    "seed=abc": ("seed=abc: must be a whole number",),
    "resume=null": ("resume=null: must be text",),
    # limits
    "seed=-1": ("seed=-1: must be at least 0",),
    "seed=4294967296": ("seed=4294967296: must be at most 4294967295",),
    "optimizer.lr=-0.1": ("optimizer.lr=-0.1: must be greater than 0",),
    "optimizer.lr=0": ("optimizer.lr=0.0: must be greater than 0",),
    "optimizer.lr=nan": ("optimizer.lr=nan: must be a finite number",),
    "optimizer.lr=inf": ("optimizer.lr=inf: must be a finite number",),
    "trainer.epochs=0": ("trainer.epochs=0: must be at least 1",),
    "trainer.max_steps=0": ("trainer.max_steps=0: must be at least 1",),
    "trainer.grad_clip_norm=-1": ("trainer.grad_clip_norm=-1.0: must be greater than 0",),
    "data.val_fraction=1": ("data.val_fraction=1.0: must be less than 1",),
    "optimizer=sgd optimizer.momentum=1": ("optimizer.momentum=1.0: must be less than 1",),
    "optimizer.betas=[0.9,1.0]": ("optimizer.betas=[0.9, 1.0]: must be less than 1",),
    "loss.label_smoothing=1.5": ("loss.label_smoothing=1.5: must be less than 1",),
    "runtime.timeout_seconds=-1": ("runtime.timeout_seconds=-1.0: must be greater than 0",),
    # combinations
    "data.batch_size=1": ("data.batch_size=1: ", "smaller than the 2 ranks"),
    "strategy=single": ("strategy=single: runs on 1 rank, but 2 were started", "choices: auto, ddp"),
    "optimizer=sgd optimizer.nesterov=true": ("optimizer.nesterov=true: needs optimizer.momentum above 0",),
    "optimizer.betas=[0.9]": ("optimizer.betas=[0.9]: must be two numbers",),
    "runtime.device=cuda": ("runtime.device=cuda: torch sees no GPU here", "choices: auto, cpu"),
    "runtime.backend=nccl": ("runtime.backend=nccl: needs runtime.device=cuda", "choices: auto, gloo"),
    "scheduler=cosine scheduler.warmup_epochs=100": ("scheduler.warmup_epochs=100.0: the warm-up takes",),
    "scheduler=step scheduler.milestones=[3,1]": ("scheduler.milestones=[3.0, 1.0]: must ascend",),
    "data.mean=[0.1,0.2]": ("data.mean=[0.1, 0.2]: needs one value for each of the 1 channels",),
    "data.augment.crop_padding=50": ("data.augment.crop_padding=50: is larger than the 8x8 images",),
    "data=synthetic data.train_size=100000000": ("data.memory_limit_mb=4096: ",),
    # models
    "model=cifar_cnn": ("model=cifar_cnn: needs images of at least", "8x8"),
    "model=custom": ("model._target_: needs a value",),
    "model=custom model._target_=nowhere.Net": (
        "model._target_=nowhere.Net: can't be imported: there is no module nowhere in the current folder, /",
        "nor in a folder that PYTHONPATH names",
    ),
    "model=custom model._target_=torch.nn.Nope": ("model._target_=torch.nn.Nope: module torch.nn has no Nope",),
    "model=custom model._target_=Net": ("model._target_=Net: is not a dotted path",),
    "model=custom model._target_=tests.cli.test_hydra_entry.NoModule": (
        "model._target_=tests.cli.test_hydra_entry.NoModule: ",
        "nn.Module",
    ),
    "model=custom model._target_=tests.cli.test_hydra_entry.FlatOutput": (
        "model._target_=tests.cli.test_hydra_entry.FlatOutput: returns",
    ),
    "model=custom model.kwargs.width=3": ("model._target_: needs a value",),
    "model=custom model._target_=torch.nn.Linear +model.kwargs.in_featurs=3": ("model.kwargs={'in_featurs': 3}: ",),
    "model._target_=torch.nn.Linear": ("model._target_=torch.nn.Linear: ", "model=custom"),
    # files
    "data=cifar10 data.root=EMPTY": ("data.root=EMPTY: lacks cifar-10-batches-bin", "data.download=true"),
    "data=cifar10 data.root=null": ("data.root=null: needs the folder",),
    "data=image_folder": ("data.root: needs a value",),
    "data=image_folder data.root=/not/there": ("data.root=/not/there: is not a folder",),
    "data=image_folder data.root=ONE": ("data.root=ONE: needs a folder for each of two or more classes",),
    "resume=/not/there": ("resume=/not/there: ", "auto, never"),
    # syntax
    "optimizer.lr": ("argument 'optimizer.lr': is not of the form key=value",),
    "run_dir=/x/a=b": ("argument 'run_dir=/x/a=b': ", """type 'run_dir="/x/a=b"'"""),
    "run_dir=a,b": ("run_dir=a,b: a list is written [a,b]", """type 'run_dir="a,b"'"""),
    "run_dir=[a]": ("run_dir=[a]: would not be read as text", """type 'run_dir="[a]"'"""),
    "run_dir=1.10": ("run_dir=1.10: would not be read as text",),
    "run_dir=/x/my photos": ("argument 'photos': ", """type 'run_dir="/x/my photos"'"""),
    "=3": ("argument '=3': is not of the form key=value",),
    "optimizer.betas=[0.9": ("argument 'optimizer.betas=[0.9': ", "bracket"),
    "optimizer.lr=0.1,0.2": ("optimizer.lr=0.1,0.2: ", "--multirun"),
    "--optimizer.lr=3": ("argument '--optimizer.lr=3': no such option", "key=value"),
    "--multirun optimizer.lr=3 --cfg job seed=1": ("configuration: Only one of --run, --multirun, --cfg",),
    "--cfg jobs": ("command line: ", "'jobs'", "job"),
    "--experimental-rerun FILE": ("--experimental-rerun=FILE: reads a pickle",),
    "optimizer.lr=${nope}": ("optimizer.lr: Interpolation key 'nope' not found",),
    "~optimizer.lr": ("optimizer.lr: needs a value: Base learning rate",),
    "~seed": ("seed: needs a value",),
}


class ConfigAccepted(Exception):
    """Raised where ranks would connect: the configuration was accepted."""


def accept(*_: object) -> NoReturn:
    raise ConfigAccepted


def train(composed: DictConfig) -> None:
    app.train(load_config(composed))


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Calls the command with arguments as rank 0 of two, up to where ranks would connect."""
    monkeypatch.setattr(app, "Runtime", accept)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def call(*typed: str, task: Callable[[DictConfig], object] = train, full_error: str = "0") -> None:
        monkeypatch.setenv("HYDRA_FULL_ERROR", full_error)
        monkeypatch.setattr(sys, "argv", ["launch/train.py", *typed])
        hydra_entry.main(task, CONF, "config")

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield call
    # Hydra's help sets up logging to a stream that closes with this test.
    root.handlers[:] = [handler for handler in root.handlers if handler in handlers]
    root.setLevel(level)


@pytest.mark.parametrize("arguments", WRONG_ARGUMENTS)
def test_user_error_is_one_line_and_exit_code_2(
    arguments: str, run_command: Callable[..., None], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    paths = {"FILE": tmp_path / "file", "EMPTY": tmp_path / "empty", "ONE": tmp_path / "one"}
    paths["FILE"].write_text("")
    paths["EMPTY"].mkdir()
    paths["ONE"].joinpath("cat").mkdir(parents=True)

    def with_paths(text: str) -> str:
        for name, path in paths.items():
            text = text.replace(name, str(path))
        return text

    strategy = [] if arguments.startswith(("strategy=", "--", "~")) else ["strategy=ddp"]
    with pytest.raises(SystemExit) as ended:
        run_command(*strategy, *with_paths(arguments).split(" "))
    output = capfd.readouterr()
    assert ended.value.code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1, output.err
    assert output.err.startswith(f"distrain: {with_paths(WRONG_ARGUMENTS[arguments][0])}")
    for part in WRONG_ARGUMENTS[arguments]:
        assert with_paths(part) in output.err


@pytest.mark.parametrize(
    "arguments",
    [
        "strategy=ddp",
        "strategy=ddp data.batch_size=7",
        "strategy=ddp optimizer={lr:0.5}",
        "strategy=ddp model=custom model._target_=distrain.models.cnn.SimpleCNN",
        "strategy=ddp trainer.micro_batch_size=null data.limit=null seed=4294967295",
    ],
)
def test_valid_configuration_is_accepted(arguments: str, run_command: Callable[..., None]) -> None:
    with pytest.raises(ConfigAccepted):
        run_command(*arguments.split(" "))


def test_missing_extra_of_the_default_data_is_reported(
    run_command: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "sklearn" else find(name, *rest)
    )
    with pytest.raises(SystemExit):
        run_command("strategy=ddp")
    assert "data=digits" in (printed := capfd.readouterr().err)
    assert "pip install 'distrain[digits]'" in printed


def test_error_about_a_value_with_a_line_break_is_one_line(
    run_command: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_command("strategy=ddp", "resume='first\nsecond'")
    assert capfd.readouterr().err.startswith("distrain: resume=first second: ")


@pytest.mark.parametrize("arguments", ["optimizer.lr=-1", "model=nope", "optimizer.lr"])
def test_hydra_full_error_shows_the_traceback(
    arguments: str, run_command: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Exception, match=r"lr|nope"):
        run_command("strategy=ddp", arguments, full_error="1")
    assert "distrain:" not in capfd.readouterr().err


def test_error_of_the_task_keeps_its_traceback(run_command: Callable[..., None]) -> None:
    def broken(_: DictConfig) -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        run_command(task=broken)


def test_failed_run_exits_with_1_and_prints_nothing_more(
    run_command: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fake_exit(code: int) -> NoReturn:
        raise SystemExit(code)

    def failed(_: DictConfig) -> None:
        raise Failed

    monkeypatch.setattr(os, "_exit", fake_exit)
    with pytest.raises(SystemExit) as end:
        run_command(task=failed)
    assert end.value.code == 1
    assert capfd.readouterr().err == ""


def test_other_ranks_of_a_host_wait_before_they_print_the_error(
    run_command: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    printed_before_waiting = []
    monkeypatch.setattr(time, "sleep", lambda seconds: printed_before_waiting.append((seconds, capfd.readouterr().err)))
    with pytest.raises(SystemExit):
        run_command("optimizer.lr=-1")
    assert printed_before_waiting == []
    assert "optimizer.lr" in capfd.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as ended:
        run_command("optimizer.lr=-1")
    assert [printed for _, printed in printed_before_waiting] == [""]
    # The launcher polls every tenth of a second, so it normally ends this rank long before.
    assert printed_before_waiting[0][0] >= 1
    assert "optimizer.lr" in capfd.readouterr().err
    assert ended.value.code == 2


def test_model_in_the_current_folder_is_found(run_command: Callable[..., None], tmp_path: Path) -> None:
    tmp_path.joinpath("beside_me.py").write_text("from distrain.models.cnn import SimpleCNN as Net\n")
    with pytest.raises(ConfigAccepted):
        run_command("strategy=ddp", "model=custom", "model._target_=beside_me.Net")


def test_module_that_is_hidden_by_another_is_named(
    run_command: Callable[..., None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tmp_path.joinpath("hydra.py").write_text("from distrain.models.cnn import SimpleCNN as Net\n")
    with pytest.raises(SystemExit):
        run_command("strategy=ddp", "model=custom", "model._target_=hydra.Net")
    assert "hides hydra.py of the current folder: rename that, or put" in capfd.readouterr().err


@pytest.fixture
def one_process(run_command: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [
        ("strategy=pipeline strategy.stages=4 data.batch_size=64", 4),
        ("strategy=pipeline", 2),
        ("strategy=parameter_server", 2),
        ("strategy=parameter_server strategy.servers=2", 3),
    ],
)
def test_too_few_ranks_are_refused_with_the_command_for_enough(
    arguments: str, ranks: int, run_command: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_command(*arguments.split())
    line = capfd.readouterr().err
    assert line.endswith(f"; on {ranks} ranks: torchrun --nproc-per-node {ranks} launch/train.py {arguments}\n")


@pytest.mark.usefixtures("one_process")
def test_one_process_of_a_strategy_for_several_is_told_how_to_start_them(
    run_command: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("distrain"), "propagate", True)
    with pytest.raises(ConfigAccepted):
        run_command("strategy=ddp", "run_dir=a b")
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == (
        "strategy=ddp on one process has nothing to divide; on two: "
        "torchrun --nproc-per-node 2 launch/train.py strategy=ddp 'run_dir=a b'"
    )


def test_interrupted_command_says_one_line(
    run_command: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fake_exit(code: int) -> NoReturn:
        raise SystemExit(code)

    def interrupted(_: DictConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "_exit", fake_exit)
    with pytest.raises(SystemExit) as end:
        run_command(task=interrupted)
    assert end.value.code == 130
    assert capfd.readouterr().err == "distrain: interrupted\n"


def test_help_shows_all_choices_and_examples(
    run_command: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command("--help")
    printed = capfd.readouterr().out
    assert ended.value.code == 0
    for group in ("strategy", "model", "data", "optimizer", "scheduler", "loss", "logger", "compression"):
        assert f"{group}: {', '.join(selectable(sorted(choices(group))))}\n" in printed
    assert "python_object" not in printed
    assert "torchrun --nproc-per-node 2 launch/train.py strategy=ddp" in printed
    assert len(printed.splitlines()) < 40


def test_hydras_own_help_is_available(run_command: Callable[..., None], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command("--hydra-help")
    assert ended.value.code == 0
    assert "--shell-completion" in capfd.readouterr().out


def test_cfg_shows_the_values_of_the_command_line(
    run_command: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    run_command("strategy=ddp", "optimizer.lr=0.25", "--cfg", "job")
    printed = capfd.readouterr().out
    assert "name: ddp" in printed
    assert "lr: 0.25" in printed


def test_multirun_runs_each_value_and_leaves_no_file_in_the_current_folder(
    run_command: Callable[..., None], tmp_path: Path
) -> None:
    rates: list[Any] = []
    run_command("optimizer.lr=0.1,0.2", "--multirun", task=lambda composed: rates.append(composed.optimizer.lr))
    assert rates == [0.1, 0.2]
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []


def test_multirun_stops_at_the_first_refused_value(
    run_command: Callable[..., None], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command("strategy=ddp", "optimizer.lr=-1,-2", "--multirun")
    assert ended.value.code == 2
    assert capfd.readouterr().err == "distrain: optimizer.lr=-1.0: must be greater than 0\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "strategy=",
            {
                f"strategy={name}"
                for name in (
                    *("auto", "ddp", "fsdp", "local_sgd", "mesh"),
                    *("parameter_server", "pipeline", "single", "tensor_parallel"),
                )
            },
        ),
        ("strategy=d", {"strategy=ddp"}),
        ("opti", {"optimizer.", "optimizer="}),
        ("optimizer.l", {"optimizer.lr=", "optimizer.layer_decay=", "optimizer.lookahead."}),
        ("optimizer=sgd optimizer.mo", {"optimizer.momentum="}),
        ("data=synthetic data.aug", {"data.augment."}),
    ],
)
def test_shell_completion_offers_keys_and_choices(
    line: str,
    expected: set[str],
    run_command: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COMP_LINE", f"python launch/train.py {line}")
    run_command("-sc", "query=bash")
    assert set(capfd.readouterr().out.split()) == expected


def test_shell_completion_can_be_installed(run_command: Callable[..., None], capfd: pytest.CaptureFixture[str]) -> None:
    run_command("-sc", "install=bash")
    assert "complete -o nospace" in capfd.readouterr().out


def test_compose_can_be_called_twice() -> None:
    first = hydra_entry.compose(CONF, "config", ["seed=1"])
    second = hydra_entry.compose(CONF, "config", ["seed=2"])
    assert (first.seed, second.seed) == (1, 2)


def test_exit_refused_prints_the_error_and_exits_with_2(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        hydra_entry.exit_refused(ConfigError("a.b", 3, "is odd", ["2", "4"]))
    assert ended.value.code == EXIT_REFUSED == 2
    assert capfd.readouterr().err == "distrain: a.b=3: is odd; choices: 2, 4\n"


def test_garbage_collection_is_enabled_again_after_imports_even_failed_ones() -> None:
    assert gc.isenabled()
    with hydra_entry.gc_disabled():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ModuleNotFoundError), hydra_entry.gc_disabled():
        importlib.import_module("no_such_module")
    assert gc.isenabled()


def test_command_is_taken_from_behind_the_first_dashes() -> None:
    arguments = ["hosts.py", "hosts=[a]", "--", "x=1", "--", "y"]
    assert hydra_entry.pop_command(arguments) == ["x=1", "--", "y"]
    assert arguments == ["hosts.py", "hosts=[a]"]
    assert hydra_entry.pop_command(arguments) == []
