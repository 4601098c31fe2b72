"""Optimizers with modes, under which parameters have other values in an evaluation than in training.

Strategies switch them: to training before a step, to evaluation before the model is evaluated or saved.
"""

from __future__ import annotations

import torch


def for_training(optimizer: torch.optim.Optimizer) -> None:
    """Gives the parameters the values that are trained; does nothing for most optimizers."""
    _switch(optimizer, "train")


def for_evaluation(optimizer: torch.optim.Optimizer) -> None:
    """Gives the parameters the values that are evaluated and saved; does nothing for most optimizers."""
    _switch(optimizer, "eval")


def _switch(optimizer: torch.optim.Optimizer, mode: str) -> None:
    switch = getattr(optimizer, mode, None)
    if switch is not None:
        switch()
