"""Keys of ``strategy=parameter_server``."""

from __future__ import annotations

from dataclasses import dataclass

from distrain.compression.base import MessageCompressor, compressor_class
from distrain.config.groups import StrategyConfig
from distrain.config.registry import choice, choices
from distrain.config.schema import Config
from distrain.config.setting import setting
from distrain.errors import ConfigError

_DEFAULT_STALENESS = 3


@dataclass
class ParameterServerConfig(StrategyConfig):
    """Keys of ``strategy=parameter_server``."""

    servers: int = setting(
        "Number of servers, which hold the parameters: the last ranks. All other ranks are workers.", at_least=1
    )
    mode: str = setting("Who waits for whom.", choices=("sync", "async", "ssp"))
    staleness: int | None = setting(
        f"mode=ssp: steps that a worker may be ahead of the slowest worker; null: {_DEFAULT_STALENESS}.",
        at_least=0,
    )
    overlap: bool | None = setting(
        "Compute a step before the answer to the last push is there; null: in async and ssp, where it pays."
    )
    bucket_mb: float = setting("Size in MiB of the messages in which gradients are pushed.", above=0)
    worker_timeout_seconds: float = setting("Seconds without a heartbeat after which a rank counts as lost.", above=0)

    @property
    def staleness_bound(self) -> int | None:
        """Steps that a worker may be ahead of the slowest worker; ``None``: no bound."""
        if self.mode != "ssp":
            return None
        return _DEFAULT_STALENESS if self.staleness is None else self.staleness

    @property
    def may_overlap(self) -> bool:
        """Whether a step may be computed before the answer to the last push is there."""
        allowed = self.mode == "async" or (self.staleness_bound or 0) > 0
        return allowed if self.overlap is None else self.overlap

    def __post_init__(self) -> None:
        """Refuses values that contradict each other.

        Raises:
            ConfigError: See the messages.
        """
        if self.staleness is not None and self.mode != "ssp":
            raise ConfigError("strategy.staleness", self.staleness, f"is a bound for mode=ssp, not {self.mode}")
        if self.overlap and self.mode == "sync":
            raise ConfigError("strategy.overlap", True, "mode=sync computes each step with all earlier ones applied")
        if self.overlap and self.staleness_bound == 0:
            raise ConfigError("strategy.overlap", True, "a step under way is one step of staleness; it needs 1")

    def check_run(self, config: Config, world_size: int) -> None:
        """Refuses numbers of servers that leave no worker, and keys that need workers at the same step.

        Raises:
            ConfigError: One line naming the key, the value and the choices.
        """
        if world_size < 2:
            raise ConfigError("strategy", "parameter_server", f"needs a server and a worker, and {world_size} started")
        if self.servers >= world_size:
            raise ConfigError(
                "strategy.servers",
                self.servers,
                f"leaves no worker among {world_size} ranks",
                range(1, world_size),
            )
        if config.trainer.precision == "fp16":
            raise ConfigError(
                "trainer.precision", "fp16", "would need a loss scale that all workers share", ["fp32", "bf16", "fp64"]
            )
        if config.trainer.on_nonfinite == "rewind" and self.mode != "sync":
            raise ConfigError(
                "trainer.on_nonfinite",
                "rewind",
                f"needs workers that keep step, not mode={self.mode}",
                ["stop", "skip"],
            )
        if config.optimizer.lookahead.every is not None and self.mode != "sync":
            raise ConfigError(
                "optimizer.lookahead.every",
                config.optimizer.lookahead.every,
                f"needs workers that keep step, not mode={self.mode}",
                ["null"],
            )
        for key, value in (("ema.decay", config.trainer.ema.decay), ("swa.from_epoch", config.trainer.swa.from_epoch)):
            if value is not None and self.mode != "sync":
                problem = f"with mode={self.mode} each worker sees other parameters; mode=sync averages"
                raise ConfigError(f"trainer.{key}", value, problem, ["null"])
        if not _sends_messages(compressor_class(config)):
            others = [name for name in choices("compression") if _sends_messages(choice("compression", name).target)]
            reason = "needs collectives; gradients are sent to servers instead"
            raise ConfigError("compression", config.compression.name, reason, others)


def _sends_messages(compressor: object) -> bool:
    """Whether a registered compressor makes messages that can be sent to one rank; others need collectives."""
    return isinstance(compressor, type) and issubclass(compressor, MessageCompressor)
