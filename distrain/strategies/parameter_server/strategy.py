"""strategy=parameter_server: servers hold the parameters, workers push gradients and pull parameters."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain.checkpoint import named_state
from distrain.checkpoint.restore_report import RestoredPart
from distrain.communication.collectives import Communicator
from distrain.communication.types import RankName
from distrain.compression.base import MessageCompressor
from distrain.config.registry import register
from distrain.config.schema import Config
from distrain.errors import ConfigError, NonFinite, Stopped
from distrain.gradients.buckets import Gradients, ReducedGradients
from distrain.gradients.clip import clip_gradient_norm
from distrain.gradients.trainable_parameters import trainable_parameters
from distrain.reporting import figures as pictures
from distrain.runtime.agreement import agreed
from distrain.runtime.consensus import Consensus, request_from_signal
from distrain.strategies.base import MakeOptimizer, StepResult
from distrain.strategies.named_buffers import NamedBuffers
from distrain.strategies.parameter_server.client import ServerClient, ServerClients
from distrain.strategies.parameter_server.collectives import WorkerCommunicator, average_in_place
from distrain.strategies.parameter_server.connect import Listener, connect_to_server, listen_address
from distrain.strategies.parameter_server.options import ParameterServerConfig
from distrain.strategies.parameter_server.protocol import FrameKind
from distrain.strategies.parameter_server.server import Server
from distrain.strategies.parameter_server.server_policy import ServerPolicy
from distrain.strategies.parameter_server.server_shard import ServerShard
from distrain.strategies.parameter_server.sharded_gradients import ShardedGradients
from distrain.strategies.parameter_server.shards import assign_tensors
from distrain.strategies.parameter_server.statistics import merge_statistics, report_statistics
from distrain.strategies.parameter_server.stop_decision import PushConsensus
from distrain.strategies.parameter_server.worker_record import WorkerRecord
from distrain.strategies.replicated import Replicated
from distrain.tasks.base import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from distrain.data.batch import Batch
    from distrain.runtime.runtime import Runtime

log = logging.getLogger(__name__)

#: Steps are overlapped with answers only if steps might then be so many times faster.
_MIN_SPEEDUP = 1.5


@register("strategy", "parameter_server", ParameterServerConfig)
class ParameterServer(Replicated[ParameterServerConfig]):
    """Servers hold the parameters in shards, apply the optimizer to what workers push, and answer with parameters.

    The last ``servers`` ranks are servers. Rank 0 writes a run's files and must take part in training, so workers come
    first, and a worker's rank is also the index of its share. Each tensor is on one server; bytes are balanced.

    - ``sync``: the servers wait for all workers, add the shares in order of rank, clip by the norm of the whole and
      make one update: the parameters are those of ``strategy=single`` to rounding, and a run resumes bit for bit.
    - ``async``: a server applies each push at once and answers with what it has then (Downpour SGD, Dean et al. 2012,
      NIPS, §4.1), so gradients miss what others pushed meanwhile. What is applied is the mean gradient of the worker's
      samples, with the learning rate times their part of the global batch: the pushes of one batch move the parameters
      together about as far as ``ddp``'s one update, whatever the optimizer, and decay weights as much. Dividing the
      learning rate by the staleness, which is about the number of workers, follows Zhang et al. 2016, "Staleness-aware
      async-SGD for distributed deep learning" (arXiv 1511.05950).
    - ``ssp``: as async, but a worker starts no step that is more than ``staleness`` ahead of what the slowest living
      worker has finished (Ho et al. 2013, NIPS).

    Buckets are pushed while the backward pass still runs. In async and ssp a worker may also compute its next step
    before the last push is answered, with parameters that are one step older. By default it does so where that might
    make steps at least 1.5 times as fast: where an answer takes between half and twice as long as computing a step.

    In async and ssp the training differs from that of one process, depends on the speed of the workers, and is
    repeated and resumed approximately: a checkpoint holds the servers' parameters and optimizer state at a moment when
    every worker has pushed all steps up to it, so no sample is lost or seen twice. ``trainer.grad_clip_norm`` bounds
    the mean gradient of each worker's samples, before it is compressed. Workers wait for each other at ends of epochs
    and at checkpoints, but not at logs.

    If a worker other than rank 0 is lost in async or ssp, the others continue without the samples of its share in the
    current epoch; from the next epoch on, and in evaluation at once, the remaining workers share all samples. The run
    succeeds, with a warning and ``lost_workers`` in the summary. In sync mode, or if a server or rank 0 is lost, the
    run fails with that rank's name. A launcher that ends all ranks when one dies (torchrun does so on each host) ends
    this run too; see ``docs/parameter_server.md``.

    With ``trainer.on_nonfinite=skip`` the servers skip a sync update that is not finite; in async and ssp a worker
    whose own gradient is not finite pushes nothing in its place. Stops are decided by the first server, for a step that
    no worker has finished yet; in async that takes until the slowest one is there.

    BatchNorm normalises by each worker's share; running statistics, which stay with the workers, are averaged for
    evaluation and checkpoints.
    """

    compressor: MessageCompressor
    divides_model = True
    trainers_update = False
    saves_in_background = False  # a process group fails with the first rank that is lost, and workers may be lost

    def __init__(self, config: Config, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        self._worker_count = runtime.world.size - self.options.servers
        runtime.activity.independent_steps = self.options.mode != "sync"
        self._server: Server | None = None
        self.is_server = runtime.world.rank >= self._worker_count
        self.data_shard = (0 if self.is_server else runtime.world.rank, self._worker_count)
        self._up_to_date = True
        self._checks_finite = config.trainer.on_nonfinite != "stop"
        self._skipped = False
        self._overlapped_steps = 0
        self._figures: dict[str, Figure] = {}

    @override
    @classmethod
    def check(cls, config: Config, world_size: int) -> None:
        cls.options_of(config).check_run(config, world_size)

    @classmethod
    def check_model(cls, config: Config, model: nn.Module) -> None:
        """Refuses more servers than the model has trainable tensors."""
        options = cls.options_of(config)
        tensors = len(trainable_parameters(model))
        if options.servers > tensors:
            raise ConfigError("strategy.servers", options.servers, f"the model has only {tensors} tensors to hold")

    @override
    @classmethod
    def data_parallel_size(cls, config: Config, world_size: int) -> int:
        return world_size - cls.options_of(config).servers

    @property
    @override
    def training_group(self) -> Communicator:
        return self.replicas

    @property
    def layout(self) -> dict[str, Any]:
        """As the base class's; after the loss of a worker it is another layout."""
        return {**super().layout, "mesh": {"server": self.options.servers, "worker": self.replicas.size}}

    # --- set-up ------------------------------------------------------------------------------------------------------

    @override
    def setup(self, model: nn.Module, task: Task, make_optimizer: MakeOptimizer, example: Tensor) -> None:
        world, all_ranks = self.runtime.world, self.runtime.communicator()
        self.sync_initial_state(model, all_ranks)
        parameters = list(trainable_parameters(model).items())
        sizes = [parameter.numel() * parameter.element_size() for _, parameter in parameters]
        shards = [
            dict(parameters[position] for position in positions)
            for positions in assign_tensors(sizes, self.options.servers)
        ]
        hosts = [str(info["host"]) for info in all_ranks.all_gather_json({"host": world.host}, self.runtime.device)]
        peers = [RankName(rank, host) for rank, host in enumerate(hosts)]
        workers, servers = peers[: self._worker_count], peers[self._worker_count :]
        held = shards[world.rank - self._worker_count] if self.is_server else {}
        own_shard = agreed(all_ranks, self.runtime, lambda: self._make_shard(held, make_optimizer))
        if own_shard is not None:
            address = listen_address(hosts)
            listener = Listener(address)
            own_endpoint = {"address": address.advertise, "port": listener.port, "token": listener.token}
            all_ranks.all_gather_json(own_endpoint, self.runtime.device)
            self._serve(own_shard, workers, listener, sum(sizes))
            return
        endpoints = all_ranks.all_gather_json({}, self.runtime.device)[self._worker_count :]
        seconds = self.config.runtime.setup_timeout_seconds
        clients = []
        for server, endpoint, shard in zip(servers, endpoints, shards, strict=True):
            connections = connect_to_server(
                server, endpoint["address"], endpoint["port"], endpoint["token"], world.rank, seconds
            )
            clients.append(
                ServerClient(
                    server,
                    connections,
                    shard,
                    self.compressor,
                    self.stopwatch,
                    self.ledger,
                    self.options.worker_timeout_seconds,
                )
            )
        self._clients = ServerClients(clients)
        if self._worker_count > 1:
            self.replicas = WorkerCommunicator(clients[0].request, world.rank, list(range(self._worker_count)))
        self._averaged_buffers = NamedBuffers(model, floating=True)
        super().setup(model, task, make_optimizer, example)
        log.info(
            "parameter server, %s: %d workers, %d servers that hold %s MB",
            self.options.mode,
            self._worker_count,
            self.options.servers,
            ", ".join(f"{client.bytes / 1e6:.2f}" for client in clients),
        )

    def _make_shard(self, named: dict[str, nn.Parameter], make_optimizer: MakeOptimizer) -> ServerShard | None:
        """What this rank serves; ``None`` on a worker."""
        if not self.is_server:
            return None
        self.optimizer = make_optimizer(named.items())
        self._shard_parameters = named
        gradients = self._make_shard_gradients(named, None)
        return ServerShard(named, gradients, self.optimizer, self.compressor, self.options.bucket_mb)

    def _serve(self, shard: ServerShard, workers: list[RankName], listener: Listener, size: int) -> None:
        policy = ServerPolicy.of(self.options, self.config.trainer, self.runtime.collective_timeout_seconds, size)
        connections = listener.accept_workers(workers, self.config.runtime.setup_timeout_seconds)
        own_name = RankName(self.runtime.world.rank, self.runtime.world.host)
        self._server = Server(
            own_name,
            shard,
            policy,
            workers,
            connections,
            self._on_worker_lost,
            lambda: int(request_from_signal(self.runtime.stop_requested)),
            self.runtime.activity.reach,
        )
        named = self._shard_parameters
        log.info("holds %d tensors: %s", len(named), ", ".join(named))

    @property
    @override
    def _setup_ranks(self) -> Communicator:
        # Workers communicate by way of a server, which begins to serve after set-up.
        return Communicator()

    def _make_gradients(self) -> ReducedGradients:
        shards = [self._make_shard_gradients(client.parameters, client) for client in self._clients.clients]
        return ShardedGradients(shards, self._clip_locally if self._clips_locally else None)

    def _make_shard_gradients(self, named: Mapping[str, nn.Parameter], client: ServerClient | None) -> Gradients:
        size = self.options.bucket_mb
        return Gradients(named.items(), Communicator(), self.compressor, self.stopwatch, size, size, carrier=client)

    @override
    def set_trained(self, names: frozenset[str]) -> None:
        # Pushes of the old buckets are answered before a server lays out new ones, and none is made before all have.
        self._clients.take_parameters()
        self._barrier()
        super().set_trained(names)
        for client in self._clients.clients:
            # Each worker does, since any of them may be lost just now; it is the same request.
            client.request_trained()
            client.trained_changed()
        self._barrier()

    @override
    def _rebuild_buckets(self) -> None:
        assert isinstance(self.gradients, ShardedGradients)
        self.gradients.rebuild_buckets(self.options.bucket_mb)

    # --- the life of a rank ------------------------------------------------------------------------------------------

    @override
    def run(self, fit: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        # Servers wait for all workers; a barrier of the process group would fail if one is lost.
        self.runtime.final_barrier = lambda: None
        self.runtime.expendable = self.options.mode != "sync" and 0 < self.runtime.world.rank < self._worker_count
        if self._server is not None:
            self.runtime.activity.phase = "serving"
            self.runtime.publish_activity()
            self.runtime.stoppable = True
            self._server.serve()
            self._server.log_workers()
            if self._server.stop_reason is not None:
                raise Stopped(self._server.stop_reason, self._server.steps())
            return {}
        try:
            summary = fit()
            # No worker leaves while another one still communicates.
            self._barrier()
            self._clients.leave()
        except Stopped as stop:
            self._barrier()
            self._clients.leave(stop.reason)
            raise
        except BaseException as error:
            self._clients.abandon(error, fatal=isinstance(error, NonFinite))
            raise
        return summary

    def _on_worker_lost(self, worker: WorkerRecord) -> None:
        self.runtime.lost_ranks.add(worker.peer.rank)
        log.warning("worker %s is gone after %d steps: %s", worker.peer, worker.steps, worker.loss_reason)

    def _warn_of_lost_workers(self) -> None:
        self.runtime.lost_ranks |= self._clients.warn_of_lost_workers(self.runtime.lost_ranks)

    # --- the step ----------------------------------------------------------------------------------------------------

    @override
    def train_step(self, batch: Batch) -> StepResult:
        self._up_to_date = False
        self._step_started = time.perf_counter()
        self._share = len(batch) / batch.global_count
        self._clients.begin_push(self.compressor.step + 1, self._learning_rate, len(batch), self._share)
        return super().train_step(batch)

    @override
    def consensus(self) -> Consensus:
        return PushConsensus(self._clients.clients)

    @property
    @override
    def skips_locally(self) -> bool:
        return self.options.mode != "sync"

    @property
    def _clips_locally(self) -> bool:
        """Whether a worker clips or checks its own gradient before it is sent, instead of the servers."""
        return self.options.mode != "sync" and (self.config.trainer.grad_clip_norm is not None or self._checks_finite)

    def _clip_locally(self, gradients: ReducedGradients) -> None:
        max_norm = self.config.trainer.grad_clip_norm
        # The gradient of an empty share is zero, so any factor will do.
        share = self._share or 1.0
        norm = gradients.norm()
        self._norm = norm / share
        self._skipped = self._checks_finite and not bool(norm.isfinite())
        if self._skipped:
            # The servers count a push of no samples, but don't apply it.
            gradients.zero()
            self._clients.begin_push(self.compressor.step, self._learning_rate, 0, self._share)
        elif max_norm is not None:
            clip_gradient_norm(gradients, max_norm * share, norm)

    @property
    def _learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _update(self) -> bool:
        compute_seconds = time.perf_counter() - self._step_started
        with self.stopwatch.communication():
            # The answer to the last push was on its way while this step was computed.
            self._clients.take_parameters()
            if self.options.mode == "sync" and (self._checks_finite or self.config.trainer.grad_clip_norm is not None):
                norm = self._clients.exchange_norms()
                self._norm, self._skipped = torch.tensor(norm), self._checks_finite and not math.isfinite(norm)
            self._clients.start_receiving()
            if self._overlaps(compute_seconds):
                self._overlapped_steps += 1
            else:
                self._clients.take_parameters()
        self._warn_of_lost_workers()
        if self._skipped and self._snapshot is not None:
            self._snapshot.restore()
        return self._skipped

    def _overlaps(self, compute_seconds: float) -> bool:
        """Whether the next step begins before this push is answered; ``compute_seconds`` is how long this step took."""
        if not self.options.may_overlap or self.options.overlap is not None:
            return self.options.may_overlap
        # At best the longer of the two is left. A network that is never idle gains nothing, and each step under way
        # makes all workers' gradients a step older.
        answer_seconds = self._clients.answer_seconds
        return compute_seconds + answer_seconds > _MIN_SPEEDUP * max(compute_seconds, answer_seconds)

    def gradient_norm(self) -> Tensor:
        """Norm before clipping of the gradient that the servers applied last; in async and ssp that of one worker.

        Where workers clip or check their own gradients, it is that of this worker.
        """
        return self._norm if self._norm is not None else torch.tensor(self._clients.gradient_norm())

    @override
    def eval_step(self, batch: Batch) -> StepResult:
        self._prepare_model_state()
        return super().eval_step(batch)

    @override
    def _prepare_model_state(self) -> None:
        """Takes the servers' parameters when all workers have pushed their steps, and averages buffers."""
        if self._up_to_date:
            return
        self._clients.take_parameters()
        if self.options.mode != "sync":
            self._barrier()
            self._clients.pull()
            self._warn_of_lost_workers()
        average_in_place(list(self._averaged_buffers.values()), self.replicas)
        self._up_to_date = True

    @override
    @torch.no_grad()
    def agree_on_average(self, average: Mapping[str, Tensor]) -> None:
        super().agree_on_average(average)
        average_in_place([average[name] for name in self._averaged_buffers if name in average], self.replicas)

    def _barrier(self) -> None:
        """Waits until all living workers are here."""
        self.replicas.barrier()

    @override
    def agree_on_shard(self) -> tuple[int, int]:
        if self.options.mode != "sync":
            self._barrier()
            self.data_shard = (self.replicas.rank, self.replicas.size)
        return self.data_shard

    @override
    def reduce_counts(self, name: str, counted: Tensor, *, settled: bool) -> Tensor:
        if isinstance(self.replicas, WorkerCommunicator) and self.options.mode != "sync":
            return self.replicas.accumulate(name, counted, wait=settled)
        return super().reduce_counts(name, counted, settled=settled)

    def metrics(self) -> dict[str, float]:
        """Compression's, in async and ssp of this worker alone, and how stale all workers' last pushes were."""
        if self.options.mode == "sync":
            return super().metrics()
        metrics = self.compression_metrics(Communicator())
        if self.runtime.is_main:
            recent = self._clients.clients[0].request(FrameKind.STATISTICS, {"recent": True})[0]
            if recent.integer("pushes"):
                metrics["parameter_server/staleness_mean"] = recent.integer("staleness_sum") / recent.integer("pushes")
                metrics["parameter_server/staleness_max"] = float(recent.integer("staleness_max"))
        return metrics

    def uncompressed_bytes_per_step(self) -> int:
        """A push and a pull of everything."""
        return 2 * sum(client.bytes for client in self._clients.clients)

    def report(self) -> dict[str, Any]:
        """Steps and staleness of each worker, lost workers, and bytes; also draws the staleness."""
        by_server = [client.request(FrameKind.STATISTICS)[0].meta for client in self._clients.clients]
        workers = [
            merge_statistics([server["workers"][index] for server in by_server]) for index in range(self._worker_count)
        ]
        statistics = {
            "mode": self.options.mode,
            "staleness_bound": self.options.staleness_bound,
            "overlapped_steps": int(self.replicas.all_reduce(torch.tensor(self._overlapped_steps))),
            **report_statistics(by_server, workers),
        }
        if self.runtime.is_main and self.options.mode != "sync":
            self._figures["parameter_server/staleness"] = pictures.histogram(
                {f"rank {worker['rank']}": worker["staleness"] for worker in workers},
                "updates that a push was late",
                "pushes",
            )
        return {
            "mesh": {"server": self.options.servers, "worker": self._worker_count},
            "parameter_server": statistics,
            **super().report(),
        }

    def figures(self) -> dict[str, Figure]:
        """How stale the workers' pushes were."""
        return self._figures

    # --- state -------------------------------------------------------------------------------------------------------

    def model_state(self) -> dict[str, Tensor]:
        """Parameters as the servers have them, and buffers; all workers call it together.

        On a server it is the shard that it holds.
        """
        if self._server is not None:
            return {name: parameter.detach() for name, parameter in self._shard_parameters.items()}
        return super().model_state()

    @override
    def state_dict(self) -> dict[str, Any]:
        self._prepare_model_state()
        tensors: dict[str, Tensor] = {}
        scalars: dict[str, Any] = {}
        if self.replicas.rank == 0:
            for client in self._clients.clients:
                more_tensors, more_scalars = client.fetch_optimizer_state()
                tensors |= more_tensors
                scalars |= more_scalars
        # No worker pushes before that is done, or parameters and moments would be of different steps.
        self._barrier()
        return self._saved(tensors, scalars)

    @override
    def load_state_dict(self, saved: Mapping[str, Any]) -> list[RestoredPart]:
        restored = super().load_state_dict(saved)
        # Checked by loading it here as every strategy does; workers keep none of it.
        tensors, scalars = named_state.optimizer_state(self.optimizer, self._names)
        if self.replicas.rank == 0:
            for client in self._clients.clients:
                client.load(tensors, scalars)
        self.optimizer.state.clear()
        self._barrier()
        return restored
