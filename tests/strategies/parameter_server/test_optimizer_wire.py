"""Optimizer state is transferred unchanged, and state that doesn't fit the parameters is refused."""

from __future__ import annotations

import pytest
import torch

from distrain.strategies.parameter_server.protocol import FrameKind, ProtocolError
from tests.strategies.parameter_server.helpers import common_value, layer_of_ones, running_server, server_policy


def test_optimizer_state_is_loaded_and_fetched_unchanged() -> None:
    with running_server(1, server_policy(), optimizer=torch.optim.Adam) as run:
        run.push(0, 0.5)
        tensors, scalars = run.clients[0].fetch_optimizer_state()
        assert set(tensors) == {
            f"{name}/{state}" for name in ("weight", "bias") for state in ("step", "exp_avg", "exp_avg_sq")
        }
        assert tensors["weight/exp_avg"].shape == (2, 3)
        doubled = {key: 2 * tensor for key, tensor in tensors.items()}
        run.models[0].load_state_dict({name: 5 * tensor for name, tensor in layer_of_ones().state_dict().items()})
        run.clients[0].load(doubled, scalars)
        again, _ = run.clients[0].fetch_optimizer_state()
        assert all(torch.equal(again[key], doubled[key]) for key in doubled)
        assert common_value(run.model) == 5.0


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([["other/step", "float32", []]], r"other/step \[\] belongs to none of the parameters here"),
        ([["weight/step", "float32", [10**9]]], "belongs to none of the parameters here"),
        ([["weight/step", "object", []]], "is not a name, dtype and shape"),
        ([["weight/step", "float32"]], "is not a name, dtype and shape"),
        ("nothing", "it doesn't list tensors and scalars"),
        ([[f"weight/{index}", "float64", [2, 3]] for index in range(100)], "far more than an optimizer keeps"),
        ([["weight/exp_avg", "float32", [2, 3]]], "0 bytes, 24 were expected"),
    ],
)
def test_optimizer_state_that_fits_no_parameter_is_refused(entries: object, problem: str) -> None:
    with running_server(1, server_policy()) as run:
        connection = run.clients[0]._connections["requests"]
        connection.send(FrameKind.LOAD, None, run.clients[0]._buffer.pack())
        connection.send(FrameKind.STATE, {"tensors": entries, "scalars": {}})
        run.join()
    (error,) = run.errors
    assert isinstance(error, ProtocolError)
    with pytest.raises(ProtocolError, match=problem):
        raise error
