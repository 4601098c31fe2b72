"""What ranks import sooner or later; the process that they are forked from does it once for all of them."""

from __future__ import annotations

import importlib
import pkgutil

import distrain

# The first optimizer step imports it; nothing takes longer.
importlib.import_module("torch._dynamo")
for _module in pkgutil.walk_packages(distrain.__path__, "distrain."):
    importlib.import_module(_module.name)
