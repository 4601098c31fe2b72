"""distrain: one PyTorch model, trained under any parallelism with one word changed.

The names below are the Python API; see :mod:`distrain.api`. Importing distrain imports neither torch nor Hydra, which
the first use of a name does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrain.api.fit import fit
    from distrain.api.run import Run, read_run
    from distrain.api.trained import evaluate, export, load_model, predict
    from distrain.api.trainer import Trainer
    from distrain.api.verify import verify
    from distrain.errors import ConfigError, Failed, Stopped
    from distrain.training.callbacks import Callback

__version__ = "0.1.0"
__all__ = [
    "Callback",
    "ConfigError",
    "Failed",
    "Run",
    "Stopped",
    "Trainer",
    "evaluate",
    "export",
    "fit",
    "load_model",
    "predict",
    "read_run",
    "verify",
]

#: Where each name is defined.
_HOMES = {
    "evaluate": "distrain.api.trained",
    "export": "distrain.api.trained",
    "fit": "distrain.api.fit",
    "load_model": "distrain.api.trained",
    "predict": "distrain.api.trained",
    "Run": "distrain.api.run",
    "Trainer": "distrain.api.trainer",
    "read_run": "distrain.api.run",
    "Callback": "distrain.training.callbacks",
    "ConfigError": "distrain.errors",
    "Failed": "distrain.errors",
    "Stopped": "distrain.errors",
    "verify": "distrain.api.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distrain' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
