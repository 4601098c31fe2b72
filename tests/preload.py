"""What ranks import sooner or later; the process that they are forked from does it once for all of them."""

from __future__ import annotations

import importlib
import pkgutil

# The first optimizer step imports it; it takes longest.
import torch._dynamo

import distrain

for _module in pkgutil.walk_packages(distrain.__path__, "distrain."):
    importlib.import_module(_module.name)
