"""What the C library does, on CPUs, with memory that a training step frees: as a rule it keeps it for the next step.

glibc returns large blocks to the operating system as soon as they are freed, and the system clears every page before it
hands it out again. Each step allocates and frees the same activations and gradients: 32,000 pages for ResNet-18 with 32
images, which took 5 to 10 % of the step's time.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from typing import cast

#: Parameters of mallopt(3): how much free memory at the top of the heap is kept, and the size from which a block is
#: allocated outside the heap.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIM_BYTES = 2**31 - 1
#: The second value is for releases of glibc that accept no larger one.
_MMAP_BYTES = (2**30, 2**25)
#: Blocks from this size on are large for :func:`return_large_blocks`.
_LARGE_BYTES = 1 << 22
#: Environment variables with which users configure the allocator themselves.
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def retain_freed_memory() -> bool:
    """Makes this process's allocator keep freed memory; the peak amount in use does not change.

    Returns:
        Whether it does. It does not without glibc, nor if the environment configures the allocator.
    """
    mallopt = _mallopt()
    if mallopt is None or mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES) != 1:
        return False
    return any(mallopt(_M_MMAP_THRESHOLD, size) == 1 for size in _MMAP_BYTES)


def return_large_blocks() -> bool:
    """Makes this process's allocator keep only small freed blocks; large ones go back to the system at once.

    Of a large block that is kept, small objects get pieces. As long as one of these stays, the next large block needs
    new memory: a rank that gathered blocks of 15 MiB held 1.7 times the memory that it used.

    Returns:
        As :func:`retain_freed_memory`.
    """
    mallopt = _mallopt()
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES) == 1


def _mallopt() -> Callable[[int, int], int] | None:
    if platform.libc_ver()[0] != "glibc" or any(os.environ.get(name) for name in _VARIABLES):
        return None
    return cast(Callable[[int, int], int], ctypes.CDLL(None).mallopt)
