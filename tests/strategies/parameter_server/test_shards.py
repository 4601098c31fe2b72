"""Each tensor lies on one server, bytes are balanced, and a buffer copy comes back bit for bit."""

from __future__ import annotations

import torch
from torch import nn

from distrain.models.build import instantiate_model
from distrain.strategies.parameter_server.shards import ParameterBuffer, assign_tensors
from tests.runs import small


def test_every_tensor_lies_on_one_server() -> None:
    sizes = [7, 3, 3, 9, 1, 0, 5]
    shards = assign_tensors(sizes, 3)
    assert sorted(position for shard in shards for position in shard) == list(range(7))
    assert all(shard == sorted(shard) for shard in shards)
    assert assign_tensors(sizes, 3) == shards


def test_bytes_are_balanced() -> None:
    assert [sum([4, 4, 3, 3, 2][position] for position in shard) for shard in assign_tensors([4, 4, 3, 3, 2], 2)] == [
        9,
        7,
    ]
    with torch.device("meta"):
        model = resnet()
    sizes = [parameter.numel() * 4 for parameter in model.parameters()]
    for servers in (2, 3, 4):
        filled = [sum(sizes[position] for position in shard) for shard in assign_tensors(sizes, servers)]
        # The bound of the algorithm: 4/3 of the best assignment, which is at least the mean and the largest tensor.
        assert max(filled) <= 4 / 3 * max(sum(sizes) / servers, *sizes)


def resnet() -> nn.Module:
    return instantiate_model(small("model=resnet18").model, in_channels=3, num_classes=10, image_size=(32, 32))


def test_a_packed_copy_comes_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "first": nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
            "second": nn.Linear(3, 3).to(torch.bfloat16),
            "third": nn.Linear(1, 1).double(),
        }
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffer = ParameterBuffer(list(model.parameters()))
    sent = buffer.pack().clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    buffer.data.copy_(sent)
    buffer.unpack()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_packed_copy_does_not_change_with_the_parameters() -> None:
    linear = nn.Linear(2, 2)
    buffer = ParameterBuffer(list(linear.parameters()))
    sent = buffer.pack().clone()
    nn.init.zeros_(linear.weight)
    assert torch.equal(buffer.data, sent)
