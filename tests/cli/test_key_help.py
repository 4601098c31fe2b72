"""``--help KEY`` explains a key or a group from the schemas."""

from __future__ import annotations

import contextlib

import pytest

from tests.trained import launch


def helped(capsys: pytest.CaptureFixture[str], script: str, *arguments: str) -> str:
    with contextlib.suppress(SystemExit):
        launch(script, "--help", *arguments)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "arguments", "parts"),
    [
        ("train", "optimizer.lr", ("optimizer.lr=0.003\n", "Base learning rate", "a number greater than 0")),
        ("train", "lr", ("optimizer.lr=0.003\n",)),
        ("train", "optimizer.lr optimizer.lr=0.5", ("optimizer.lr=0.5\n",)),
        ("train", "optimizer=sgd optimizer.momentum", ("optimizer.momentum=", "less than 1")),
        ("train", "optimizer", ("optimizer=adam; choices: adam, adamw, custom, ", "optimizer.betas=[0.9, 0.999]")),
        ("train", "trainer", ("trainer.epochs=30", "a whole number", "Passes over the")),
        ("train", "trainer.progress", ("one of: auto, bar, lines, off",)),
        ("train", "run_dir seed", ("a path, or null", "seed=0")),
        ("train", "model=custom model", ("model._target_=needed", "nn.Module")),
        ("train", "strategy=pipeline strategy.schedule", ("strategy.schedule=", "one of: ")),
        ("sweep", "optimizer.lr", ("optimizer.lr=0.003",)),
        ("evaluate", "split", ("split=test", "one of: train, val, test")),
        ("predict", "input", ("input=needed", "a path, or a list of paths")),
        ("export", "output", ("File to write.",)),
        ("doctor", "wait", ("wait=30", "Seconds")),
        ("hosts", "nproc", ("nproc=",)),
        ("chaos", "faults", ("faults=",)),
        ("testnet", "rate", ("rate=",)),
    ],
)
def test_keys_are_explained(
    script: str, arguments: str, parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    printed = helped(capsys, script, *arguments.split())
    for part in parts:
        assert part in printed
    assert max(map(len, printed.splitlines())) <= 120


@pytest.mark.parametrize(("key", "hint"), [("lrr", "did you mean optimizer.lr?"), ("zebra", "choices: strategy,")])
def test_unknown_key_is_refused(key: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        launch("train", "--help", key)
    assert ended.value.code == 2
    assert hint in capsys.readouterr().err
