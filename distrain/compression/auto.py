"""Chooses a compressor by measuring: the link, each candidate's own work, and then some steps with the likeliest."""

from __future__ import annotations

import dataclasses
import json
import logging
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrain.communication.collectives import Communicator
from distrain.communication.types import Pending
from distrain.compression import base
from distrain.compression.autotune.candidates import Table, choose, turns
from distrain.compression.autotune.link_model import measure_link
from distrain.compression.autotune.simulation import Backdrop, Cost, measure_cost, predicted
from distrain.compression.autotune.step_trace import Recorder, Step, typical
from distrain.compression.base import Compressor
from distrain.compression.bucket import Bucket
from distrain.compression.error_feedback import Residuals
from distrain.config.registry import register
from distrain.config.schema import CompressionConfig, Config, setting
from distrain.errors import ConfigError

log = logging.getLogger(__name__)

#: Steps before anything is timed: memory, caches, compilation.
WARM_STEPS = 2
#: Steps whose median tells what uncompressed training takes, and then steps that hold their exchanges back.
PLAIN_STEPS, HELD_STEPS = 3, 3
#: A candidate's own work is measured as it will be so many steps later, when what warms up is warm.
LATER = 1_000_000
#: Steps after the choice that are compared with what led to it.
CHECKED_STEPS = 30
#: How much longer than expected a step may be without a word, and how much longer than without compression.
SURPRISING, TOO_SLOW = 0.1, 0.03


@dataclass
class AutoConfig(CompressionConfig):
    """Keys of ``compression=auto``."""

    most_lossy: str = setting("The last of the candidates, in their order, that may be chosen; none: no compression.")
    trial_seconds: float = setting(
        "About how long the likeliest candidates take turns in real steps; 0: decide by prediction alone.", at_least=0
    )
    candidates: dict[str, Any] = setting(
        "What to choose from besides none, from the least to the most lossy.", each="compression"
    )

    def __post_init__(self) -> None:
        """Refuses what can't be chosen from.

        Raises:
            ConfigError: A cap that is no candidate; a candidate that would choose itself.
        """
        names = ["none", *self.candidates]
        if self.most_lossy not in names:
            raise ConfigError("compression.most_lossy", self.most_lossy, "is none of the candidates", names)
        for name, candidate in self.candidates.items():
            chosen = candidate.get("name") if isinstance(candidate, Mapping) else getattr(candidate, "name", None)
            if chosen in ("auto", "none"):
                raise ConfigError(f"compression.candidates.{name}.name", chosen, "can't be a candidate")

    @property
    def allowed(self) -> dict[str, CompressionConfig]:
        """What may be chosen, from the least to the most lossy."""
        found: dict[str, CompressionConfig] = {"none": CompressionConfig(name="none")}
        for name, candidate in self.candidates.items():
            if self.most_lossy in found:
                break
            found[name] = candidate
        return found


@register("compression", "auto", AutoConfig)
class Auto(Compressor):
    """Begins without compression, then goes on with what makes a step fastest.

    Of the first steps some run as they are and some hold their exchanges back, which tells the bare backward pass. Then
    the link is measured and each candidate does its work on a real step's gradients, which together predict each one's
    step. The likeliest take turns in real steps, and the fastest is kept; of those that are about as fast the least
    lossy. It is watched for some steps more, and where it turns out slower than no compression, there is none.

    All ranks of the group decide by the same figures, each the slowest rank's, so they decide alike. In a pipeline each
    stage's replicas decide for themselves, and by prediction alone: a step's time is not theirs alone.
    """

    config: AutoConfig

    def __init__(self, config: AutoConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        # What former candidates owe, until it is added to the next gradient.
        self.residuals: Residuals = Residuals()
        self._candidates = {name: base.build(each, seed) for name, each in config.allowed.items()}
        self._name = "none"
        self._chosen: str | None = None
        self._table: Table | None = None
        self._recorder = Recorder()
        self.observer = self._recorder
        self._course: Iterator[None] = self._decide()
        self._communicator = Communicator()
        self._device = torch.device("cpu")
        self._parameters: dict[str, None] = {}
        self._plain: dict[tuple[str, tuple[str, ...]], int] = {}
        self._copies: list[Bucket] | None = None
        self._loaded: dict[str, Tensor] = {}

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuses a cap that allows candidates which can't serve; see the base class."""
        assert isinstance(config.compression, AutoConfig)
        possible: list[str] = []
        for name, candidate in config.compression.allowed.items():
            try:
                alone = dataclasses.replace(config, compression=candidate)
                base.compressor_class(alone).check(alone)
            except ConfigError as error:
                why, _, _ = str(error).partition("; choices")
                most = config.compression.most_lossy
                raise ConfigError("compression.most_lossy", most, f"allows {name}, but {why}", possible) from error
            possible.append(name)

    # --- a compressor like any other ---------------------------------------------------------------------------------

    def compresses(self, parameter: nn.Parameter) -> bool:
        """Whether any candidate does."""
        return self.bucket_order(parameter) < 0

    def bucket_order(self, parameter: nn.Parameter) -> int:
        """What most candidates compress comes first, so that each one's part is the beginning of a bucket."""
        return -sum(candidate.compresses(parameter) for candidate in self._candidates.values())

    def begin_step(self) -> None:
        """Goes on deciding; see the base class."""
        self._recorder.close()
        self.step += 1
        next(self._course, None)
        self._begin()
        if self.observer is not None:
            self._recorder.open()

    def aggregate(self, bucket: Bucket, communicator: Communicator) -> Iterator[Pending]:
        """As the candidate in use does it; see the base class."""
        self._communicator, self._device = communicator, bucket.flat.device
        self._parameters |= dict.fromkeys(bucket.tensors)
        if self._loaded:
            self._go_on(next(iter(bucket.tensors)))
        if self.residuals.state_dict():
            self.residuals.fold_into_gradients(bucket)
        if self._copies is not None:
            self._copies.append(bucket.clone())
        return self._current.aggregate(self._view(self._name, bucket), communicator)

    def residual_norm(self) -> Tensor | None:
        """Of all candidates that had a turn; see the base class."""
        norms = [norm for each in self._candidates.values() if (norm := each.residual_norm()) is not None]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else None

    def report(self) -> dict[str, Any]:
        """What was chosen, and the figures of this run that led to it."""
        return {"chosen": self._chosen, **(self._table.to_plain() if self._table is not None else {})}

    @property
    def _current(self) -> Compressor:
        return self._candidates[self._name]

    def _begin(self) -> None:
        # All count the run's steps, so that what is drawn or warms up is as if there were only this one.
        self._current.step = self.step - 1
        self._current.begin_step()
        self.phases = self._current.phases

    def _view(self, name: str, bucket: Bucket) -> Bucket:
        """A bucket as a candidate would have laid it out, but for the order of its tensors.

        A tensor that it would compress but that lies behind one that it would not travels as it is.
        """
        key = (name, tuple(bucket.tensors))
        if key not in self._plain:
            lossy = 0
            for tensor in bucket.tensors.values():
                if not self._candidates[name].compresses(nn.Parameter(tensor, requires_grad=False)):
                    break
                lossy += tensor.numel()
            self._plain[key] = bucket.flat.numel() - lossy
        return dataclasses.replace(bucket, uncompressed_numel=self._plain[key])

    # --- deciding ----------------------------------------------------------------------------------------------------

    def _decide(self) -> Iterator[None]:
        """What comes before each step; a ``yield`` is a step."""
        while self._communicator.size == 1:
            yield
        for _ in range(WARM_STEPS - 1):
            yield
        self._recorder.take()
        for _ in range(PLAIN_STEPS):
            yield
        plain = self._recorder.take()
        self._recorder.holds = True
        for left in reversed(range(HELD_STEPS)):
            self._copies = None if left else []
            yield
        self._recorder.holds = False
        held, copies, self._copies = self._recorder.take(), self._copies or [], None
        if len(plain) < PLAIN_STEPS or len(held) < HELD_STEPS:
            # A strategy whose buckets don't leave in each step, or not by exchanges.
            log.warning("compression=auto can't observe this strategy's steps, so it compresses nothing")
            self._keep("none")
            return
        self._table = table = self._measure(plain, held, copies)
        # They are as large as the model.
        copies.clear()
        names = table.hopeful()
        if len(names) > 1 and self._tries:
            yield from self._try(names)
            self._keep(choose({name: table.measured[name] for name in names}, table.errors))
        else:
            self._keep(choose({**table.predicted, "none": table.without}, {}))
        log.info("compression=auto chooses %s on this link (%s)\n%s", self._chosen, table.link, table)
        yield from self._check(table)
        self.observer = None

    @property
    def _tries(self) -> bool:
        """Whether real steps may tell: it is wanted, and their time depends on this group's exchanges alone."""
        return self.config.trial_seconds > 0 and self._communicator.size == _world_size()

    def _measure(self, plain: Sequence[Step], held: Sequence[Step], copies: Sequence[Bucket]) -> Table:
        link = measure_link(self._communicator, self._device, max(bucket.bytes for bucket in copies))
        costs = {}
        for name, config in self.config.allowed.items():
            trial = base.build(config, self.seed)
            trial.step = self.step + LATER
            costs[name] = measure_cost(trial, [self._view(name, bucket) for bucket in copies], self._communicator)
        mine = {
            "steps": [dataclasses.asdict(Backdrop.of(step)) for step in held],
            "costs": {name: cost.to_plain() for name, cost in costs.items()},
        }
        everyone = self._communicator.all_gather_json(mine, self._device)
        steps = [[Backdrop(**step) for step in each["steps"]] for each in everyone]
        table = Table(link, max(statistics.median(step.rest for step in own) for own in steps))
        for name in costs:
            each_rank = [Cost.from_plain(each["costs"][name]) for each in everyone]
            table.sent[name] = each_rank[0].sent
            table.compressing[name] = max(cost.seconds for cost in each_rank)
            table.predicted[name] = predicted(steps, each_rank, link)
        table.add_measured("none", self._slowest(plain))
        return table

    def _try(self, names: Sequence[str]) -> Iterator[None]:
        """Lets candidates take turns, and notes what that took."""
        assert self._table is not None
        self._recorder.take()
        order = turns(names, sum(map(self._table.expected, names)), self.config.trial_seconds)
        for name in order:
            self._name = name
            yield
        self._table.add_trial(order, self._slowest(self._recorder.take()))

    def _check(self, table: Table) -> Iterator[None]:
        """Compares what happens with what was expected."""
        name = self._name
        expected = table.expected(name)
        self._recorder.take()
        for _ in range(CHECKED_STEPS):
            yield
        middle, error = typical(self._slowest(self._recorder.take()))
        found = middle + table.rest
        told = f"compression=auto chose {name}, with which a step takes {1000 * found:.1f} ms"
        if name != "none" and found - error > (1 + TOO_SLOW) * table.expected("none"):
            if self._tries:
                # Everything may have become slower, so both are measured again.
                yield from self._try(["none", name])
                self._name = choose({each: table.measured[each] for each in ("none", name)}, table.errors)
            else:
                self._name = "none"
            if self._name == "none":
                log.warning("%s, and %.1f ms without; it goes on without", told, 1000 * table.expected("none"))
                self._keep("none")
        elif found - error > (1 + SURPRISING) * expected:
            log.warning("%s, where %.1f ms were expected", told, 1000 * expected)

    def _slowest(self, steps: Sequence[Step]) -> list[float]:
        """Seconds of each step until its last bucket held its sum, on the rank where that took longest."""
        shared = self._communicator.all_gather_json({"spans": [step.span for step in steps]}, self._device)
        return [max(spans) for spans in zip(*(each["spans"] for each in shared), strict=True)]

    def _keep(self, name: str) -> None:
        """From now on there is only this one; what others owe is not lost."""
        kept = self._candidates[name]
        owed: dict[str, Tensor] = {}
        for candidate in self._candidates.values():
            if candidate is not kept:
                add_residuals(owed, candidate.state_dict())
        if kept.residuals is not None:
            # Not by way of the next gradient, which momentum correction would send more than once.
            held = kept.residuals.state_dict()
            taken = {key: held[key] + owed.pop(key) for key in list(owed) if key in held}
            kept.residuals.load_state_dict(held | taken)
        add_residuals(owed, self.residuals.state_dict())
        self.residuals.load_state_dict(owed)
        self._candidates = {"none": self._candidates["none"], name: kept}
        self._name = self._chosen = name

    # --- what is kept between steps ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Besides what the chosen compressor keeps ``choice/<parameter>``, a text as uint8: who was chosen where.

        Before the choice it is what all candidates owe.
        """
        if self._loaded:
            return dict(self._loaded)
        state = super().state_dict()
        for candidate in self._candidates.values():
            kept = candidate.state_dict()
            add_residuals(state, kept)
            if self._chosen is not None:
                state |= {key: value for key, value in kept.items() if key not in state}
        if self._chosen is not None:
            choice = torch.tensor(list(self._choice(self._chosen).encode()), dtype=torch.uint8)
            state |= {f"choice/{name}": choice for name in self._parameters}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what :meth:`state_dict` gave, or what another compressor owed.

        With the first bucket it is known where this rank is: where the choice was made it stands, and elsewhere
        everything is measured again.
        """
        self.step = int(state.get("step", torch.tensor(0)))
        owed: dict[str, Tensor] = {}
        add_residuals(owed, state)
        self.residuals.load_state_dict(owed)
        self._loaded = dict(state)
        # A run that goes back has used them already.
        for candidate in self._candidates.values():
            candidate.load_state_dict({})

    def _go_on(self, parameter: str) -> None:
        state, self._loaded = self._loaded, {}
        choice = bytes(state.get(f"choice/{parameter}", torch.tensor([])).tolist()).decode()
        name = next((name for name in self._candidates if self._choice(name) == choice), None)
        if name is None:
            return
        self._name = name
        if self._current.residuals is not None:
            self.residuals.load_state_dict({})
        self._current.load_state_dict({key: value for key, value in state.items() if not key.startswith("choice/")})
        self._keep(name)
        self._begin()
        self._course, self.observer = iter(()), None
        log.info("compression=auto goes on with %s, which it chose before", name)

    def _choice(self, name: str) -> str:
        return json.dumps({"candidate": name, "ranks": self._communicator.size, "world_size": _world_size()})


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def add_residuals(total: dict[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Adds what one compressor's state owes to a total, in new tensors."""
    for key, tensor in state.items():
        if key.startswith("residual/"):
            total[key] = total[key] + tensor if key in total else tensor
