"""Makes a plan: measures or reads what there is, predicts all configurations, and ranks them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from distrain.compression.base import compressor_class
from distrain.config.groups import CompressionConfig
from distrain.config.schema import Config
from distrain.data.base import Splits
from distrain.errors import ConfigError, config_error
from distrain.models.trial import ModelTrial
from distrain.optim.optimizers import trial as optimizer_trial
from distrain.runtime.first_rank import of_rank_0
from distrain.runtime.world import World
from distrain.strategies.base import strategy_class
from distrain.tools.planning import candidates, cluster_file
from distrain.tools.planning.calibration import Calibrated, ShortRuns, calibrated
from distrain.tools.planning.cluster import Cluster
from distrain.tools.planning.divided_model import Divisions
from distrain.tools.planning.measurement import measure
from distrain.tools.planning.phases import PhaseClock
from distrain.tools.planning.plan import Plan, Trial
from distrain.tools.planning.plan_file import planned_part
from distrain.tools.planning.plan_keys import COMPRESSORS, STRATEGIES
from distrain.tools.planning.prediction import Prediction
from distrain.tools.planning.robust_mean import undisturbed
from distrain.tools.planning.steps.common import setting_of
from distrain.tools.planning.workload import Workload
from distrain.training import batch_sizes
from distrain.training.run_plan import RunPlan, check_steps
from distrain.verification.short_runs import as_single


@dataclass(frozen=True)
class Options:
    """What is asked of a plan.

    Attributes:
        cluster: Description of a cluster that isn't here; ``None``: these ranks.
        strategies: Names of the strategies to look at.
        compressors: Names of the compressors to time.
        block_mb: As ``strategy.block_mb`` of ``fsdp``.
    """

    cluster: Path | None = None
    strategies: Sequence[str] = STRATEGIES
    compressors: Sequence[str] = COMPRESSORS
    block_mb: float | None = None


#: The training with the keys of a configuration in place of its own strategy and compressor.
ConfigOf = Callable[[Mapping[str, str]], Config]
#: The training as one process does it, and its trial.
Checked = tuple[RunPlan, ModelTrial]


def check(config: Config, world: World, options: Options) -> Checked:
    """Refuses what can't be planned, before any process group forms.

    Returns:
        The training as one process does it, and its trial.

    Raises:
        ConfigError: One line that names the key.
    """
    if options.cluster is not None:
        cluster_file.read(options.cluster)
        if world.size > 1:
            raise config_error("nproc", "has no meaning with cluster=…, which says how many ranks there are")
    alone = dataclasses.replace(world, rank=0, size=1)
    plan = RunPlan.resolve(as_single(config), alone)
    return plan, plan.check(warn=False)


def make_plan(
    checked: Checked, world: World, options: Options, config_of: ConfigOf, folder: Path, clock: PhaseClock
) -> Plan:
    """Makes a plan; all ranks call it together.

    Args:
        checked: The training, as :func:`check` returns it.
        world: This rank's place.
        options: What is asked.
        config_of: The training with the keys of a configuration.
        folder: For short runs.
        clock: Times the phases.

    Returns:
        Rank 0 has the plan to show; on other ranks the times of blocks differ a little.

    Raises:
        ConfigError: The training can't run, or the cluster's file is wrong.
        Failed: A rank failed.
    """
    run, trial = checked
    described = None if options.cluster is None else cluster_file.read(options.cluster)
    compressors, remarks = _compressors(world, options, config_of)
    with clock.phase("data"):
        splits = run.load()
    with contextlib.closing(splits):
        run.check_sizes(splits, trial)
        sizes = _SizeCheck(splits, trial) if trial.problem_with(1, training=True) else None
        most = _most_samples(run.config.data.batch_size, described)
        ranks = world.size if described is None else described.ranks
        divisions, refusal = _divisions(ranks, described, options, config_of)
        measured = measure(run, world, splits, compressors, clock, most, divisions)
        workload = dataclasses.replace(measured.workload, block_mb=options.block_mb)
        short_runs = Calibrated(workload, [], [])
        if described is None or described.accelerator is None:
            runs = ShortRuns(world, splits, config_of, folder)
            with clock.phase("short runs"):
                short_runs = calibrated(workload, measured.cluster, options.strategies, runs)
    workload, cluster = short_runs.workload, measured.cluster
    if described is not None:
        cluster = described
        if cluster.accelerator is not None:
            workload = workload.on(cluster.accelerator)
    with clock.phase("predictions"):
        plan = predict(workload, cluster, options, [*measured.remarks, *remarks, *refusal])
        plan = _without_refused(plan, config_of, trial.model, sizes)
    return dataclasses.replace(
        plan,
        calibrated_on=short_runs.done,
        not_calibrated=short_runs.skipped,
        training=planned_part(run.config),
        planning_seconds=dict(clock.seconds),
    )


def _most_samples(batch_size: int, described: Cluster | None) -> int | None:
    """Most samples of a step that is measured for a cluster that isn't here; ``None`` for these ranks."""
    if described is None:
        return None
    # With an accelerator the times come from the number of operations.
    return -(-batch_size // described.ranks) if described.accelerator is None else 1


def _compressors(world: World, options: Options, config_of: ConfigOf) -> tuple[dict[str, CompressionConfig], list[str]]:
    """Configurations of the compressors to time, and why others can't be used; none if there is nobody to send to."""
    found: dict[str, CompressionConfig] = {}
    remarks = []
    if world.size > 1 and "ddp" in options.strategies:
        for name in options.compressors:
            try:
                config = config_of({"strategy": "ddp", "compression": name})
                compressor_class(config).check(config)
                check_steps(config, strategy_class(config))
            except ConfigError as error:
                remarks.append(f"no compression={name}: {error}")
            else:
                found[name] = config.compression
    return found, remarks


def _divisions(
    ranks: int, described: Cluster | None, options: Options, config_of: ConfigOf
) -> tuple[Divisions | None, list[str]]:
    """The training with divided layers, if it is asked for and allowed; and why it isn't allowed."""
    if ranks == 1 or not {"tensor_parallel", "mesh"}.intersection(options.strategies):
        return None, []
    try:
        config = config_of({"strategy": "tensor_parallel"})
        strategy_class(config).check(config, ranks)
        check_steps(config, strategy_class(config))
    except ConfigError as error:
        return None, [f"no layers are divided: {error}"]
    return Divisions(config, options.strategies, described), []


@dataclass(frozen=True)
class _SizeCheck:
    """What is needed to find out whether some pass has a single sample, which the model can't run."""

    splits: Splits
    trial: ModelTrial

    def __call__(self, config: Config, ranks: int) -> None:
        """Refuses a configuration that leaves a sample alone.

        Raises:
            ConfigError: The message says which size to type.
        """
        batch_sizes.check(config, ranks, strategy_class(config), self.splits, self.trial)


def _without_refused(plan: Plan, config_of: ConfigOf, model: nn.Module, sizes: _SizeCheck | None) -> Plan:
    """The plan without what the training's other keys, or a model that needs several samples, don't allow.

    Raises:
        ConfigError: Nothing is left.
    """
    ranks = plan.cluster.ranks
    problems: dict[tuple[str, ...], ConfigError | None] = {}
    left = []
    for prediction in plan.predictions:
        kind = _kind(prediction.keys)
        # To compose a configuration takes a while, and strategies refuse the training whatever their other keys are.
        if kind not in problems or sizes is not None:
            problem = _problem(config_of, prediction.keys, ranks, model, sizes)
            problems[kind] = problems.get(kind) or problem
        else:
            problem = problems[kind]
        if problem is None:
            left.append(prediction)
    refused = {name: problem for (name, *_), problem in problems.items() if problem is not None}
    if not left:
        raise next(iter(refused.values()))
    possible = {prediction.keys["strategy"] for prediction in left}
    remarks = [f"{'not all of' if name in possible else 'no'} {name}: {problem}" for name, problem in refused.items()]
    return dataclasses.replace(plan, predictions=left, remarks=[*plan.remarks, *remarks])


def _kind(keys: Mapping[str, str]) -> tuple[str, ...]:
    """Of a configuration: its strategy, what that shards, and the dimensions of a mesh."""
    return keys["strategy"], keys.get("strategy.shard", ""), *(key for key in keys if key.startswith("strategy.mesh."))


def _problem(
    config_of: ConfigOf, keys: Mapping[str, str], ranks: int, model: nn.Module, sizes: _SizeCheck | None
) -> ConfigError | None:
    """Why a configuration can't run on so many ranks; ``None`` if it can, as far as is known."""
    try:
        config = config_of(keys)
        strategy = strategy_class(config)
        strategy.check(config, ranks)
        check_steps(config, strategy)
        optimizer_trial.check(
            config.optimizer, model, divided=strategy.divides_model, sliced=strategy.slices_parameters
        )
        if sizes is not None:
            sizes(config, ranks)
    except ConfigError as error:
        return error
    return None


def try_out(
    plan: Plan,
    asked: Sequence[Prediction],
    config_of: ConfigOf,
    world: World,
    folder: Path,
    timed_seconds: float | None = None,
) -> Plan:
    """Runs configurations for a few steps; all ranks call it together.

    Args:
        plan: The plan.
        asked: Its predictions to try, in this order; those of rank 0 count.
        config_of: The training with the keys of a configuration.
        world: This rank's place.
        folder: For the runs; all hosts see it.
        timed_seconds: Seconds of steps that are timed in each run; ``None``: some.

    Returns:
        The plan with its trials; configurations that can't run are among its remarks.

    Raises:
        Failed: A rank failed.
    """
    trials: list[Trial] = []
    remarks = list(plan.remarks)
    mine = {"all": [{"keys": one.keys, "seconds": one.seconds} for one in asked]}
    # Ranks have measured their blocks by themselves, and all must try the same.
    chosen = of_rank_0(config_of({}), world, mine)["all"]
    if not chosen:
        return plan
    predictions = {tuple(prediction.keys.items()): prediction for prediction in plan.predictions}
    run = RunPlan.resolve(config_of(chosen[0]["keys"]), world)
    with contextlib.closing(run.load()) as splits:
        runs = ShortRuns(world, splits, config_of, folder, timed_seconds)
        for number, one in enumerate(chosen):
            keys: dict[str, str] = one["keys"]
            try:
                seconds = runs.seconds(keys, one["seconds"], f"trial_{number}")
            except ConfigError as error:
                remarks.append(f"not tried: {error}")
                continue
            # Another rank may have left it out.
            if prediction := predictions.get(tuple(keys.items())):
                trials.append(Trial(prediction, seconds))
    return dataclasses.replace(plan, trials=trials, remarks=remarks)


def try_twice(plan: Plan, asked: Sequence[Prediction], config_of: ConfigOf, world: World, folder: Path) -> Plan:
    """As :func:`try_out`, each configuration twice: in this order, and in the reverse one.

    So a machine that becomes faster or slower meanwhile does it to all of them.
    """
    tried = try_out(plan, [*asked, *asked[::-1]], config_of, world, folder)
    times: dict[tuple[tuple[str, str], ...], list[Trial]] = {}
    for trial in tried.trials:
        times.setdefault(tuple(trial.prediction.keys.items()), []).append(trial)
    trials = [Trial(same[0].prediction, undisturbed([one.seconds for one in same])) for same in times.values()]
    return dataclasses.replace(tried, trials=trials, remarks=list(dict.fromkeys(tried.remarks)))


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
        ranks = "1 rank" if cluster.ranks == 1 else f"{cluster.ranks} ranks"
        problem = f"can't divide this model and a batch of {workload.batch_size} samples among {ranks}"
        raise ConfigError("strategies", ", ".join(options.strategies), problem, STRATEGIES)
    return Plan(workload, cluster, ranked, list(remarks))
