"""BatchNorm layers on the meta device give what torch's own code gives there, and no compiler is imported for them."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from distrain.models.meta_device import fast_meta_passes

FORWARD, BACKWARD = torch.ops.aten.native_batch_norm.default, torch.ops.aten.native_batch_norm_backward.default
WITHOUT_COMPILER = """
import sys
import torch
from torch import nn
from distrain.models.meta_device import fast_meta_passes
from distrain.runtime.live_memory import LiveMemory
from distrain.tools.planning.structure import _FlopCounter

with fast_meta_passes(), torch.device("meta"), LiveMemory(torch.device("cpu")), _FlopCounter() as counter:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model(torch.zeros(2, 3, 8, 8)).sum().backward()
print(counter.flops, "torch._dynamo" in sys.modules)
"""


def layouts(tensors: Iterable[Tensor | None]) -> list[object]:
    return [None if one is None else (one.shape, one.dtype, one.stride(), one.device) for one in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_results_have_the_layout_that_torch_gives_them(dtype: torch.dtype, layout: torch.memory_format) -> None:
    inputs = torch.empty(4, 6, 5, 5, dtype=dtype, device="meta", memory_format=layout)
    statistics = [torch.empty(6, device="meta") for _ in range(2)]
    weight = torch.empty(6, dtype=dtype, device="meta")
    for training, affine in itertools.product((True, False), (weight, None)):
        given = (inputs, affine, affine, *statistics, training, 0.1, 1e-5)
        expected = FORWARD(*given)
        wanted = [True, affine is not None, False]
        back = (inputs, inputs, affine, *statistics, *expected[1:], training, 1e-5, wanted)
        gradients = BACKWARD(*back)
        with fast_meta_passes():
            assert layouts(FORWARD(*given)) == layouts(expected)
            assert layouts(BACKWARD(*back)) == layouts(gradients)


def test_other_devices_are_as_always() -> None:
    layer, images = nn.BatchNorm2d(3), torch.randn(2, 3, 4, 4)
    with fast_meta_passes():
        normalised = layer(images)
        drawn = torch.empty(50).normal_()
    assert torch.equal(normalised, nn.BatchNorm2d(3)(images))
    assert drawn.std() > 0.1


def test_passes_do_not_import_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], check=True, capture_output=True, text=True)
    # Two images, 36 pixels of 8 channels, 27 weights: a product and a sum, and once more for the weights' gradients.
    assert done.stdout == f"{2 * 2 * 36 * 8 * 27 * 2} False\n"
