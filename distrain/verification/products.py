"""The format to which torch may round the factors of float32 products: TF32 or bf16, where settings allow it."""

from __future__ import annotations

from typing import Any

import torch

#: What torch calls its settings for matrix products and convolutions, by type of device.
_SETTINGS = {
    "cuda": ("cuda.matmul", "cudnn.conv"),
    "cpu": ("mkldnn.matmul", "mkldnn.conv"),
}
#: From the coarsest on.
_COARSE = ("bf16", "tf32")


def format_of_products(precision: str, device_type: str) -> str:
    """The coarsest format to which factors of matrix products and convolutions may be rounded.

    Args:
        precision: Value of ``trainer.precision``.
        device_type: Where the run computes.

    Returns:
        The precision itself; in float32 ``tf32`` or ``bf16`` if torch's settings allow a kernel to use it, whether or
        not this hardware has one.
    """
    if precision != "fp32":
        return precision
    allowed = {_setting(name) for name in _SETTINGS.get(device_type, ())}
    return next((each for each in _COARSE if each in allowed), precision)


def _setting(name: str) -> str:
    """What torch may use for one kind of product: ``tf32``, ``bf16``, or something else: float32 itself."""
    backend, kind = name.split(".")
    module: Any = getattr(torch.backends, backend)
    setting = getattr(getattr(module, kind, None), "fp32_precision", None)
    if setting is not None:
        return str(setting)
    # Releases before 2.9 know one setting for convolutions on GPUs, and one for all matrix products.
    if name == "cudnn.conv":
        return "tf32" if module.allow_tf32 else "ieee"
    if name == "mkldnn.conv":
        return "ieee"
    chosen = torch.get_float32_matmul_precision()
    return {"highest": "ieee", "high": "tf32"}.get(chosen, "bf16" if backend == "mkldnn" else "tf32")
