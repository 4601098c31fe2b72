"""Mistakes of every kind that a user may make behind ``distrain train nproc=2``, and what each line must say.

They are refused before ranks start: tests/cli/test_nproc.py checks the lines, benchmarks/startup.py the time. Under
torchrun, ranks refuse them: tests/launch/test_nproc.py.
"""

from __future__ import annotations

#: Arguments behind ``nproc=2 strategy=ddp``, and words of the one line that is printed.
MISTAKES: dict[str, str] = {
    # what to start
    "nproc=0": "nproc=0: must be at least 1",
    "nproc=two": "nproc=two: must be a whole number",
    "nnodes=2": "nnodes=2: several hosts need a place to meet; type rdzv_endpoint=HOST:PORT",
    "seed=1,2 --multirun": "nproc: does not go with --multirun",
    "npoc=2": "npoc: no such key",
    # names
    "strategy=dpp": "strategy=dpp: no such choice",
    "optimizer=adagrad": "optimizer=adagrad: no such choice",
    "optimizer.lrr=0.1": "optimizer.lrr: no such key",
    "lr=0.1": "lr: no such key",
    "trainr.epochs=2": "trainr: no such key",
    "trainer.precision=fp8": "trainer.precision=fp8: unknown choice",
    "model._target_=torch.nn.Lin model=custom": "torch.nn.Lin",
    # types and limits
    "trainer.epochs=many": "trainer.epochs=many: must be a whole number",
    "trainer.epochs=0": "trainer.epochs=0: must be at least 1",
    "optimizer.lr=fast": "optimizer.lr=fast: must be a number",
    "data.batch_size=0": "data.batch_size=0: must be at least 1",
    "data.val_fraction=1": "data.val_fraction=1.0: must be less than 1",
    "optimizer.lr": "is not of the form key=value",
    "seed=-1": "seed=-1: must be at least 0",
    "run_dir=2026_11_29": "run_dir=2026_11_29: would not be read as text",
    # what doesn't fit together
    "strategy=single": "strategy=single: runs on 1 rank, but 2 were started",
    "data.batch_size=1": "data.batch_size=1: the global batch is smaller than the 2 ranks",
    "strategy=pipeline strategy.stages=3": "strategy.stages=3",
    "data=image_folder data.root=nowhere": "data.root=nowhere",
    "runtime.device=cuda": "runtime.device=cuda",
}
