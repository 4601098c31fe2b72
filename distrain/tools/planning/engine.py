"""Makes a plan: measures or reads what there is, predicts all configurations, and ranks them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distrain.config.schema import CompressionConfig, Config
from distrain.errors import ConfigError, config_error
from distrain.models.trial import ModelTrial
from distrain.runtime.runtime import Runtime
from distrain.runtime.world import World
from distrain.tools.planning import candidates, cluster_file
from distrain.tools.planning.cluster import Cluster
from distrain.tools.planning.measurement import measure
from distrain.tools.planning.network import Network
from distrain.tools.planning.plan import Plan, Trial
from distrain.tools.planning.steps.common import Setting
from distrain.tools.planning.trial_run import step_seconds
from distrain.tools.planning.workload import Workload
from distrain.training.run_plan import RunPlan
from distrain.verification.short_runs import as_single

#: Strategies that a plan looks at.
STRATEGIES = ("single", "ddp", "pipeline", "local_sgd", "parameter_server")
#: Compressors that a plan times; the others send about as much as one of them.
COMPRESSORS = ("bf16", "qsgd", "powersgd", "topk", "signsgd")


@dataclass(frozen=True)
class Options:
    """What is asked of a plan.

    Attributes:
        cluster: Description of a cluster that isn't here; ``None``: these ranks.
        strategies: Names of the strategies to look at.
    """

    cluster: Path | None = None
    strategies: Sequence[str] = STRATEGIES


def check(config: Config, world: World, options: Options) -> tuple[RunPlan, ModelTrial]:
    """Refuses what can't be planned, before any process group forms.

    Returns:
        The training as one process does it, and its trial.

    Raises:
        ConfigError: One line that names the key.
    """
    if unknown := [name for name in options.strategies if name not in STRATEGIES]:
        raise config_error("strategies", f"{unknown[0]} is none that a plan knows: {', '.join(STRATEGIES)}")
    if options.cluster is not None:
        cluster_file.read(options.cluster)
        if world.size > 1:
            raise config_error("nproc", "has no meaning with cluster=…, which says how many ranks there are")
    alone = dataclasses.replace(world, rank=0, size=1)
    plan = RunPlan.resolve(as_single(config), alone)
    return plan, plan.check(warn=False)


def agreed_folder(config: Config, world: World, folder: Path) -> Path:
    """The folder that rank 0 names, which it makes; all ranks call it together.

    Raises:
        ConfigError: It can't be made.
    """
    if world.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError("folder", folder, f"can't be made ({error.strerror or error})") from error
    with Runtime(config, world, keep_logs=False) as runtime:
        told = runtime.communicator().all_gather_json({"folder": str(folder.resolve())}, runtime.device)
    return Path(told[0]["folder"])


def make_plan(config: Config, world: World, options: Options, compressors: Mapping[str, CompressionConfig]) -> Plan:
    """Makes a plan; all ranks call it together.

    Args:
        config: The training.
        world: This rank's place.
        options: What is asked.
        compressors: Configurations of the compressors to time.

    Returns:
        The same on all ranks.

    Raises:
        ConfigError: The training can't run, or the cluster's file is wrong.
        Failed: A rank failed.
    """
    run, trial = check(config, world, options)
    with contextlib.closing(run.load()) as splits:
        run.check_sizes(splits, trial)
        del trial
        measured = measure(run, world, splits, compressors)
    workload, cluster = measured.workload, measured.cluster
    if options.cluster is not None:
        cluster = cluster_file.read(options.cluster)
        if cluster.accelerator is not None:
            workload = workload.on(cluster.accelerator)
    return predict(workload, cluster, options, measured.remarks)


def try_out(
    plan: Plan, count: int, config_of: Callable[[Mapping[str, str]], Config], world: World, folder: Path
) -> Plan:
    """Runs the fastest configurations, and plain ``ddp``, for a few steps; all ranks call it together.

    Args:
        plan: The plan.
        count: Number of configurations besides ``ddp``.
        config_of: The training with the keys of a configuration.
        world: This rank's place.
        folder: For the runs; all hosts see it.

    Returns:
        The plan with its trials; configurations that can't run are among its remarks.

    Raises:
        Failed: A rank failed.
    """
    trials: list[Trial] = []
    remarks = list(plan.remarks)
    chosen = plan.chosen_for_trial(count)
    if not chosen:
        return plan
    run = RunPlan.resolve(config_of(chosen[0].keys), world)
    with contextlib.closing(run.load()) as splits:
        for number, prediction in enumerate(chosen):
            period = int(prediction.keys.get("strategy.sync_every", 1))
            place = folder / f"trial_{number}"
            try:
                seconds = step_seconds(config_of(prediction.keys), world, splits, place, prediction.seconds, period)
            except ConfigError as error:
                remarks.append(f"not tried: {error}")
                continue
            trials.append(Trial(prediction, seconds))
    return dataclasses.replace(plan, trials=trials, remarks=remarks)


def predict(workload: Workload, cluster: Cluster, options: Options, remarks: Sequence[str] = ()) -> Plan:
    """Predicts and ranks all configurations; needs no ranks.

    Args:
        workload: The training.
        cluster: The machines.
        options: What is asked.
        remarks: For the user.
    """
    setting = setting_of(workload, cluster)
    found = candidates.predictions(setting, options.strategies, list(workload.compressors))
    ranked = sorted(found, key=lambda prediction: prediction.seconds)
    if not ranked:
        problem = f"no strategy can divide a batch of {workload.batch_size} among {cluster.ranks} ranks"
        raise config_error("data.batch_size", problem)
    return Plan(workload, cluster, ranked, list(remarks))


def setting_of(workload: Workload, cluster: Cluster) -> Setting:
    """A training on a cluster, whose collectives are those of its devices."""
    flat = workload.accelerator is not None
    return Setting(workload, cluster, Network(cluster, "flat" if flat else "hierarchical"))
