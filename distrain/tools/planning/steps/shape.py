"""How the ranks of a step are arranged: numbers of them along the dimensions of a mesh, and the groups that follow."""

from __future__ import annotations

from dataclasses import dataclass

from distrain.tools.planning.network import Group, Network


@dataclass(frozen=True)
class Shape:
    """Numbers of ranks along each dimension, from the outermost one to that whose ranks are neighbours.

    ``strategy=mesh`` places ranks in this order, and other strategies have those dimensions of it that they know.

    Attributes:
        data: Replicas, or groups of replicas that share what updates them.
        shard: Replicas in such a group.
        pipeline: Ranks that hold stages of the model one after the other.
        tensor: Ranks that divide layers among themselves.
    """

    data: int = 1
    shard: int = 1
    pipeline: int = 1
    tensor: int = 1

    @property
    def replicas(self) -> int:
        """Parts into which a batch is divided."""
        return self.data * self.shard

    @property
    def ranks_of_replica(self) -> int:
        """Ranks that work on the same samples."""
        return self.pipeline * self.tensor

    def layers_group(self, network: Network) -> Group:
        """The ranks that divide the same layers."""
        return network.group(self.tensor)

    def replicas_group(self, network: Network) -> Group:
        """The ranks that have the same layers, or the same part of them."""
        return network.group(self.replicas, self.ranks_of_replica)

    def shard_group(self, network: Network) -> Group:
        """Of these, the ranks that share what updates them."""
        return network.group(self.shard, self.ranks_of_replica)

    def data_group(self, network: Network) -> Group:
        """Of these, the ranks that have the same share of it."""
        return network.group(self.data, self.shard * self.ranks_of_replica)
