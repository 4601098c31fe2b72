"""A checked request to train: what this process runs itself, or hands to ranks that it starts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from distrain.api.result import Result, shared_result
from distrain.api.run import Run, open_run
from distrain.checkpoint import module_state
from distrain.cli import app
from distrain.cli.run_folder import RunFolder
from distrain.config.schema import Config
from distrain.data.python_object import DataObject, offered_data
from distrain.errors import ConfigError
from distrain.models.python_object import ModelObject, offered_model
from distrain.runtime.world import World
from distrain.strategies.base import Strategy
from distrain.training.callbacks import Callback
from distrain.training.chosen_callbacks import offered_callbacks
from distrain.training.trainer import Trainer


@dataclass
class Training:
    """A checked request to train.

    Attributes:
        config: The configuration.
        model: The model, if it is an object.
        data: The samples, if they are objects.
        callbacks: Callbacks that are objects, by the names that they have in the configuration.
    """

    config: Config
    model: ModelObject | None
    data: DataObject | None
    callbacks: Mapping[str, Callback] = field(default_factory=dict)

    @contextlib.contextmanager
    def objects(self) -> Iterator[None]:
        """Inside this block the configuration's model, data and callbacks stand for the objects."""
        with offered_model(self.model), offered_data(self.data), offered_callbacks(self.callbacks):
            yield

    def run(self) -> Result:
        """Trains, as this rank."""
        with self.objects(), app.prepared(self.config) as trainer:
            app.log_end(trainer, trainer.fit())
            return self.result(trainer)

    @staticmethod
    def result(trainer: Trainer) -> Result:
        """Where this rank finds what was trained; all ranks call it together at the end, inside the runtime."""
        runtime = trainer.runtime
        # Ranks of a parameter server end one by one, and don't meet again.
        ends_together = type(trainer.strategy).run is Strategy.run
        return shared_result(runtime) if ends_together else Result(runtime.run_dir)

    def check(self, world: World) -> None:
        """Refuses what a rank at this place would refuse before it meets the others.

        Raises:
            ConfigError: The configuration can't run.
        """
        with self.objects():
            app.check(self.config, world)

    def finish(self, result: Result) -> Run:
        """Gives the trained parameters to the user's module, and reads the run's folder.

        Raises:
            ConfigError: This rank's host doesn't see the folder that rank 0 has written.
        """
        world, run_dir = World.from_environment(), result.run_dir
        if world.rank and not (run_dir / "config.yaml").exists():
            problem = f"the training succeeded, but rank {world.rank} on {world.host} can't read its result, which rank"
            raise ConfigError("run_dir", run_dir, f"{problem} 0 has written there; name a folder that all hosts share")
        folder = RunFolder.open(str(run_dir), _allowed(self.config))
        if isinstance(self.model, nn.Module):
            weights = folder.weights("newest")
            module_state.load(self.model, weights.tensors, weights.plain)
        return open_run(folder, self.model, result.copy)


def _allowed(config: Config) -> list[str]:
    """Parts outside distrain that the user's own configuration names."""
    sections = [getattr(config, field.name) for field in dataclasses.fields(config)]
    names = [name for section in sections if "." in str(name := getattr(section, "name", ""))]
    return [*names, getattr(config.model, "_target_", "")]
