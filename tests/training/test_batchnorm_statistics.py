"""Statistics of BatchNorm layers that are measured over the training data."""

from __future__ import annotations

import torch
from torch import nn

from distrain.communication.collectives import Communicator
from distrain.training.batchnorm_statistics import _Measured


def test_parts_of_a_batch_count_as_one_batch() -> None:
    layer = nn.BatchNorm2d(3).double().eval()
    measured = _Measured(layer, Communicator())
    batches = torch.randn(2, 10, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double() * 5 + 2
    with measured.watching():
        for batch in batches:
            # Of different sizes, each normalised by itself, as microbatches are.
            for part in batch.split([3, 7]):
                expected = nn.functional.batch_norm(part, None, None, training=True)
                torch.testing.assert_close(layer(part), expected)
            measured.end_batch()
    measured.finish()
    means, variances = batches.mean((1, 3, 4)), batches.transpose(1, 2).flatten(2).var(2)
    torch.testing.assert_close(layer.running_mean, means.mean(0))
    torch.testing.assert_close(layer.running_var, variances.mean(0))
    before = layer.running_mean
    layer(batches[0])
    assert layer.running_mean is before


def test_a_layer_that_does_not_run_keeps_its_statistics() -> None:
    layer = nn.BatchNorm2d(3).eval()
    measured = _Measured(layer, Communicator())
    with measured.watching():
        measured.end_batch()
    measured.finish()
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert not layer.running_mean.any()
    assert bool((layer.running_var == 1).all())
