"""What a plan predicts of a run, beside what the run takes: ``predicted`` in ``summary.json``."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distrain.config.groups import StrategyConfig
from distrain.config.schema import Config
from distrain.errors import ConfigError, first_line
from distrain.files.terminal import FILE_ONLY
from distrain.files.untrusted import UnreadableFile
from distrain.strategies.base import strategy_class
from distrain.tools.planning import plan_file
from distrain.tools.planning.plan_file import FILE
from distrain.tools.planning.plan_keys import choice_of, period_of
from distrain.training.memory import MEMORY_KINDS

log = logging.getLogger(__name__)

#: What a plan calls some kinds of memory.
_KINDS = {"buckets": "other"}
#: A run is much slower than its plan if its steps take longer by more than this share.
_MUCH_SLOWER = 0.25
#: In fewer steps chance decides.
_FEWEST_STEPS = 10
#: Standard deviations of a normal distribution between its median and its 95th percentile.
_P95 = 1.645


def check(config: Config) -> dict[str, Any] | None:
    """Reads the plan that the key ``plan`` names.

    Returns:
        Its content; ``None`` if the key names none.

    Raises:
        ConfigError: It is no plan; the line says why.
    """
    if config.plan is None:
        return None
    try:
        content = plan_file.read(Path(config.plan))
    except FileNotFoundError as error:
        raise ConfigError("plan", config.plan, f"there is no such file, nor a folder with {FILE}") from error
    except UnreadableFile as error:
        raise ConfigError("plan", config.plan, str(error)) from error
    if not {"predictions", "training", "cluster", "workload"} <= content.keys():
        raise ConfigError("plan", config.plan, f"is not the {FILE} of a plan")
    return content


def of_run(config: Config, ranks: int, run_dir: Path, named: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a plan predicts of a run, for ``summary.json``; empty if there is no plan of it.

    Args:
        config: The run's configuration, as its user wrote it: before formats are chosen by a trial.
        ranks: Number of ranks.
        run_dir: The run's folder, in which there may be a plan.
        named: Content of the plan that the key ``plan`` names, as :func:`check` returns it.
    """
    path = run_dir / FILE if config.plan is None else Path(config.plan)
    try:
        content = plan_file.read(path) if named is None else named
        found, problem = _find(content, config, ranks)
    except FileNotFoundError:
        return {}
    # The file may come from anywhere.
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, OSError) as error:
        log.warning("%s is not used: it is no plan (%s: %s)", path, type(error).__name__, first_line(error))
        return {}
    if problem:
        # A plan that lies in the run's folder may be one of an earlier start.
        log.warning("%s predicts nothing of this run: %s", path, problem, extra={} if config.plan else FILE_ONLY)
        return {}
    return {**found, "plan": str(path)}


def _find(content: Mapping[str, Any], config: Config, ranks: int) -> tuple[dict[str, Any], str]:
    """What is predicted of the run, or why nothing is."""
    changed = plan_file.what_changed(content["training"], plan_file.planned_part(config))
    if changed:
        return {}, f"it is of another training, whose {changed}"
    cluster = content["cluster"]
    planned_ranks = cluster["hosts"] * cluster["ranks_per_host"]
    if planned_ranks != ranks:
        return {}, f"it is of {planned_ranks} ranks"
    for prediction in content["predictions"]:
        keys = prediction["keys"]
        # Composing all of them would take a while.
        names = keys["strategy"], keys.get("compression", "none")
        if names != (config.strategy.name, config.compression.name):
            continue
        planned = _spelled_out(choice_of("strategy", keys), ranks)
        if planned == _spelled_out(config.strategy, ranks) and choice_of("compression", keys) == config.compression:
            return _summary(content, prediction, config, ranks), ""
    return {}, f"it has no prediction of strategy={config.strategy.name} with these keys"


def _spelled_out(strategy: StrategyConfig, ranks: int) -> StrategyConfig:
    """A strategy's keys, with the number of replicas that the other dimensions of a mesh leave."""
    if strategy.name != "mesh":
        return strategy
    # Importing it imports all that a mesh may stand for.
    from distrain.strategies.mesh.options import MeshConfig

    assert isinstance(strategy, MeshConfig)
    mesh = dataclasses.replace(strategy.mesh, data=ranks // strategy.mesh.ranks_of_replica)
    return dataclasses.replace(strategy, mesh=mesh)


def _summary(content: Mapping[str, Any], prediction: Mapping[str, Any], config: Config, ranks: int) -> dict[str, Any]:
    """A prediction in the terms in which a run is measured."""
    step, parts = float(prediction["step_ms"]), prediction["parts_ms"]
    communication = float(parts["waiting"] + parts["stragglers"])
    outside = min(_outside_ms(content, config, ranks), max(step - communication, 0.0))
    times = {"compute": step - communication - outside, "communication": communication, "outside": outside}
    trials = [float(one["measured_ms"]) for one in content["trials"] if one["keys"] == prediction["keys"]]
    return {
        "step_ms": step,
        "parts_ms": {str(name): float(value) for name, value in parts.items()},
        "time_share": {name: value / step for name, value in times.items()},
        "images_per_second": float(prediction["images_per_second"]),
        "bytes_sent_per_step_per_rank": int(prediction["bytes_sent_per_rank"]),
        "memory_mb": round(prediction["memory_bytes"]["total"] / 2**20, 1),
        "memory_by_kind_mb": {
            kind: round(prediction["memory_bytes"][_KINDS.get(kind, kind)] / 2**20, 1) for kind in MEMORY_KINDS
        },
        "trial_ms": min(trials) if trials else None,
        "period": period_of(prediction["keys"]),
    }


def _outside_ms(content: Mapping[str, Any], config: Config, ranks: int) -> float:
    """Milliseconds of a step outside the strategy: loading data, and the loop around steps."""
    # Imports what else only the command plan needs.
    from distrain.tools.planning.cluster import slowdown_at
    from distrain.tools.planning.workload import at

    cluster, workload = content["cluster"], content["workload"]
    share = -(-workload["batch_size"] // strategy_class(config).data_parallel_size(config, ranks))
    seconds = at({int(size): float(value) for size, value in workload["outside"].items()}, share)
    computing = min(cluster["ranks_per_host"] * cluster["hosts_per_machine"], ranks)
    return 1000 * seconds * float(slowdown_at(cluster["slowdown"], computing))


def slower_than_planned(summary: Mapping[str, Any]) -> str:
    """One line about a run that was much slower than its plan, and in which part; empty if it was not.

    Args:
        summary: Content of ``summary.json``.
    """
    predicted = summary.get("predicted")
    steps = summary.get("steps", 0) - summary.get("resumed_at_step", 0)
    if not predicted or steps < _FEWEST_STEPS:
        return ""
    times = summary["step_ms"]
    # A few long steps, in which the machine did something else, are chance; but where the same repeats after several
    # steps, such as a merge, the median step does not have it.
    step = times["mean"] if predicted["period"] > 1 else min(times["mean"], times["p50"])
    # A short run has shown better than a prediction what these ranks can do.
    planned = max(predicted["step_ms"], predicted["trial_ms"] or 0.0)
    chance = 2 * (times["p95"] - times["p50"]) / _P95 / math.sqrt(steps)
    if step - planned <= max(_MUCH_SLOWER * planned, chance):
        return ""
    shares = summary["time_share"]
    measured = {name: shares[name] * step for name in ("compute", "communication")}
    measured["outside"] = step - sum(measured.values())
    expected = {name: share * predicted["step_ms"] for name, share in predicted["time_share"].items()}
    slowest = max(measured, key=lambda name: measured[name] - expected[name])
    between = "waiting for data" if shares["data"] >= shares["other"] else "what is done between steps"
    part = {"compute": "computing", "outside": between}.get(slowest, slowest)
    return (
        f"slower than planned: a step took {shown_ms(step)} instead of {shown_ms(planned)}, most of the difference "
        f"in {part}: {shown_ms(measured[slowest])} instead of {shown_ms(expected[slowest])}"
    )


def shown_ms(milliseconds: float) -> str:
    """A time with three digits."""
    return f"{milliseconds:,.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"
