"""What ranks import sooner or later; the process that they are forked from does it once for all of them."""

from __future__ import annotations

import gc
import importlib
import pkgutil

import distrain

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
    "tests.garbage",
    "tests.harness",
    "tests.hosts",
    "tests.runs",
    "tests.trained",
)

for _module in pkgutil.walk_packages(distrain.__path__, "distrain."):
    importlib.import_module(_module.name)
for _name in _OTHERS:
    importlib.import_module(_name)
# What a rank never changes need not be copied for it, as the collector's marks would make it.
gc.collect()
gc.freeze()
