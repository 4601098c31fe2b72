"""What ranks import and compute sooner or later; the process that they are forked from does it once for all of them."""

from __future__ import annotations

import importlib
import pkgutil

import distrain
from distrain.config.registry import choices
from tests import garbage, runs

#: Besides distrain: the first optimizer step, figures, and what nearly every file of tests imports. A rank imports the
#: file of its function, and would take a third of a second for these alone.
_OTHERS = (
    "torch._dynamo",
    "numpy.ma",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "PIL.BmpImagePlugin",
    "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.PpmImagePlugin",
    "pytest",
    "safetensors.torch",
    "tests.harness",
    "tests.hosts",
    "tests.trained",
)

for _module in pkgutil.walk_packages(distrain.__path__, "distrain."):
    importlib.import_module(_module.name)
for _name in _OTHERS:
    importlib.import_module(_name)
# What is composed for a choice of groups is kept.
for _strategy in choices("strategy"):
    runs.compose(*runs.SMALL, f"strategy={_strategy}")
# What a rank never changes need not be copied for it, as the collector's marks would make it.
garbage.freeze()
