"""Resolves ``strategy=auto``: plans on the run's own ranks, tries the best, and returns an ordinary configuration."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from distrain.config.schema import Config
from distrain.errors import ConfigError, Stopped, first_line
from distrain.files.writing import to_json
from distrain.runtime.runtime import Runtime
from distrain.runtime.signals import RememberedRequests
from distrain.runtime.world import World
from distrain.strategies.auto import AutoConfig
from distrain.tools.planning import engine, plan_file
from distrain.tools.planning.expected import shown_ms
from distrain.tools.planning.phases import PhaseClock
from distrain.tools.planning.plan import Plan, typed
from distrain.tools.planning.plan_file import FILE
from distrain.tools.planning.plan_keys import with_keys
from distrain.tools.planning.prediction import Prediction
from distrain.training.run_plan import RunPlan
from distrain.verification.short_runs import as_single

log = logging.getLogger(__name__)

#: What is chosen where nothing is known to be faster.
USUAL = {"strategy": "ddp"}
#: Folder in the run's for the short runs, which is removed after them.
_TRIALS = ".trials"


@dataclass(frozen=True)
class Choice:
    """The run that is trained.

    Attributes:
        config: With an ordinary strategy.
        line: What was chosen and why, for the user.
        plan: What ``plan.json`` of the run's folder is to hold; ``None``: there is none, or this isn't rank 0.
    """

    config: Config
    line: str
    plan: str | None = None


def check(config: Config, world: World) -> engine.Checked:
    """Refuses what can't be trained whatever will be chosen, before any process group forms.

    Args:
        config: The run, with ``strategy=auto``.
        world: This rank's place.

    Returns:
        The training as one process does it, and its trial.

    Raises:
        ConfigError: One line that names the key.
    """
    if config.compression.name != "none":
        problem = "changes what is trained, and strategy=auto keeps what one process trains; leave it out, or name a"
        raise ConfigError("compression", config.compression.name, f"{problem} strategy")
    if world.size == 1:
        plan = RunPlan.resolve(with_keys(config, {"strategy": "single"}), world)
        return plan, plan.check(warn=False)
    return engine.check(config, world, options_for(config, world.size))


def resolve(config: Config, world: World) -> Choice:
    """Chooses a strategy; all ranks call it together.

    Args:
        config: The run, with ``strategy=auto``.
        world: This rank's place.

    Raises:
        ConfigError: As :func:`check`; or no strategy can train this.
        Failed: A rank failed.
        Stopped: The run was asked to stop before it began.
    """
    checked = check(config, world)
    if world.size == 1:
        line = "strategy=auto: strategy=single, since there is one rank"
        return Choice(with_keys(config, {"strategy": "single"}), line)
    met = _meet(config, world)
    config = dataclasses.replace(config, run_dir=met.run_dir)
    if met.kept:
        line = f"strategy=auto: {typed(met.kept)}, as chosen when this run began ({FILE})"
        return Choice(with_keys(config, met.kept), line, met.plan)
    folder = Path(met.run_dir, _TRIALS)
    with RememberedRequests() as requests:
        try:
            made = _planned(checked, config, world, folder)
        except Stopped as stopped:
            # That is the step of a short run; of this one nothing is trained yet.
            raise Stopped(stopped.reason, 0) from stopped
        finally:
            # Each host may have its own.
            if world.local_rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
    keys, why = decide(made, options_of(config))
    # Ranks have measured their blocks by themselves, and all must train the same.
    with Runtime(as_single(config), world, keep_logs=False) as runtime:
        mine = {"keys": keys, "why": why, "stop": requests.first}
        everyone = runtime.communicator().all_gather_json(mine, runtime.device)
    asked = next((rank["stop"] for rank in everyone if rank["stop"]), None)
    if asked is not None:
        raise Stopped(asked, 0)
    agreed = everyone[0]
    content = {**made.to_plain(), "chosen": {"keys": keys, "why": why, "for": met.holds_for}}
    line = f"strategy=auto: {typed(agreed['keys'])}, {agreed['why']} ({FILE})"
    return Choice(with_keys(config, agreed["keys"]), line, to_json(content) if world.rank == 0 else None)


def options_of(config: Config) -> AutoConfig:
    """The keys of ``strategy=auto``."""
    return cast(AutoConfig, config.strategy)


def options_for(config: Config, ranks: int) -> engine.Options:
    """What is asked of the plan.

    Args:
        config: The run, with ``strategy=auto``.
        ranks: Number of ranks.
    """
    strategies = tuple(options_of(config).strategies)
    if ranks == 2:
        # One rank would serve and one would train alone. Whoever starts two ranks expects both of them to train.
        strategies = tuple(name for name in strategies if name != "parameter_server") or strategies
    return engine.Options(strategies=strategies, compressors=())


# --- what an earlier start has chosen --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Met:
    """What the ranks agree on before anything is measured.

    Attributes:
        run_dir: The run's folder.
        kept: The keys that an earlier start has chosen, if that choice still holds; else empty.
        holds_for: What a choice of these ranks holds for.
        plan: Content of the ``plan.json`` with the kept choice, on rank 0.
    """

    run_dir: str
    kept: dict[str, str]
    holds_for: dict[str, Any]
    plan: str | None


def _meet(config: Config, world: World) -> _Met:
    """The ranks agree on the run's folder, and on what an earlier start has chosen.

    Raises:
        ConfigError: Hosts have different numbers of ranks.
    """
    earlier: dict[str, Any] = {}
    with Runtime(config, world) as runtime:
        if world.local_rank == 0:
            # Of a start that was killed.
            shutil.rmtree(runtime.run_dir / _TRIALS, ignore_errors=True)
        everyone = runtime.communicator()
        rows = everyone.all_gather_json({"host": world.host, "device": _device(runtime.device)}, runtime.device)
        hosts = sorted(Counter(row["host"] for row in rows).values())
        holds_for = what_it_holds_for(config, hosts, sorted({row["device"] for row in rows}))
        if runtime.is_main:
            earlier = earlier_choice(config, runtime.run_dir, holds_for)
            if not earlier and len(set(hosts)) == 1:
                log.info("strategy=auto: measuring for some seconds, to choose a strategy")
        mine = {"keys": earlier["chosen"]["keys"] if earlier else {}}
        kept = everyone.all_gather_json(mine, runtime.device)[0]["keys"]
        met = _Met(str(runtime.run_dir), kept, holds_for, to_json(earlier) if earlier else None)
    # Not inside, where an error means that this rank alone has failed.
    if not kept and len(set(hosts)) > 1:
        problem = f"needs the same number of ranks on each host, and there are {hosts}; name a strategy"
        raise ConfigError("strategy", "auto", problem)
    return met


def what_it_holds_for(config: Config, hosts: Sequence[int], devices: Sequence[str]) -> dict[str, Any]:
    """What must stay as it is so that a choice of these ranks stays right.

    Args:
        config: The run, with ``strategy=auto``.
        hosts: Number of ranks on each host.
        devices: What the ranks compute with.
    """
    own = dataclasses.asdict(config.strategy)
    return {"ranks_of_hosts": list(hosts), "devices": list(devices), "strategy": own, **plan_file.planned_part(config)}


def _device(device: torch.device) -> str:
    """What a rank computes with, as far as another host of the same kind has it too."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{device.type} of {processors} processors"


def earlier_choice(config: Config, run_dir: Path, holds_for: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``plan.json`` of the run that goes on, if its choice holds; else empty.

    Args:
        config: The run, with ``strategy=auto``.
        run_dir: Its folder.
        holds_for: What a choice holds for here.
    """
    if config.resume == "never":
        return {}
    folders = [run_dir]
    if config.resume != "auto":
        # A checkpoint lies in the folder `checkpoints` of its run.
        folders.append(Path(config.resume).resolve().parent.parent)
    for folder in folders:
        try:
            content = plan_file.read(folder / FILE)
            if "chosen" not in content:
                continue
            keys = content["chosen"]["keys"]
            with_keys(config, keys)
            changed = plan_file.what_changed(content["chosen"]["for"], holds_for)
        except FileNotFoundError:
            continue
        except (LookupError, TypeError, AttributeError, ValueError, OSError) as error:
            # The file may come from anywhere. A new plan takes its place.
            log.warning("strategy=auto: %s is not used (%s)", folder / FILE, first_line(error))
            continue
        if not changed:
            return content
        log.info("strategy=auto: chosen anew, since %s", changed)
    return {}


# --- a new choice ----------------------------------------------------------------------------------------------------


def _planned(checked: engine.Checked, config: Config, world: World, folder: Path) -> Plan:
    """A plan, with short runs of what may be better than plain ddp, and of that itself."""
    asked = options_of(config)

    def config_of(keys: Mapping[str, str]) -> Config:
        return with_keys(config, keys)

    clock = PhaseClock()
    made = engine.make_plan(checked, world, options_for(config, world.size), config_of, folder, clock)
    with clock.phase("trials"):
        made = engine.try_out(made, to_try(made, asked), config_of, world, folder, asked.trial_seconds)
    return dataclasses.replace(made, planning_seconds=clock.seconds)


def to_try(made: Plan, asked: AutoConfig) -> list[Prediction]:
    """The configurations to run for some steps, in the order of the runs.

    Each one is run twice, in an order and its reverse, so that a machine that becomes faster or slower meanwhile does
    it to all of them.

    Args:
        made: The plan.
        asked: The keys of ``strategy=auto``.
    """
    usual, better = _candidates(made, asked.min_gain)
    best = better[: asked.trials]
    return [usual, *best, *best[::-1], usual] if usual is not None and best else []


def _candidates(made: Plan, min_gain: float) -> tuple[Prediction | None, list[Prediction]]:
    """Plain ddp, and what trains the same and is predicted to be faster by so much; all of it, if ddp isn't there."""
    exact = [one for one in made.predictions if one.same_as_single and made.fits(one)]
    usual = next((one for one in exact if one.keys == USUAL), None)
    if usual is None:
        return None, exact
    return usual, [one for one in exact if one.seconds <= (1 - min_gain) * usual.seconds and one is not usual]


def decide(made: Plan, asked: AutoConfig) -> tuple[dict[str, str], str]:
    """The keys of the configuration to train with, and why.

    Args:
        made: The plan, with its trials.
        asked: The keys of ``strategy=auto``.
    """
    usual, better = _candidates(made, asked.min_gain)
    among = f"chosen among {_among(made)}"
    if usual is None:
        if not better:
            return USUAL, "since nothing that was planned trains what one process trains"
        return better[0].keys, f"{_ms(better[0].seconds)} a step predicted; {among}, ddp is not among them"
    if not better:
        enough = f" by {asked.min_gain:.0%}" if asked.min_gain else ""
        return USUAL, f"{_ms(usual.seconds)} a step predicted; of {_among(made)} none is faster{enough}"
    first = better[0]
    if not asked.trials:
        return first.keys, f"{_ms(first.seconds)} a step predicted, ddp {_ms(usual.seconds)}; {among}"
    measured = _measured(made)
    tried = [one for one in better if typed(one.keys) in measured]
    if not tried or typed(USUAL) not in measured:
        return USUAL, f"since {typed(first.keys)}, which was predicted to be faster, can't run; {among}"
    # A run that is disturbed is slower, and one that was lucky is faster: neither may speak for another than ddp.
    plain = min(measured[typed(USUAL)])
    best = min(tried, key=lambda one: max(measured[typed(one.keys)]))
    seconds = max(measured[typed(best.keys)])
    if seconds <= (1 - asked.min_gain) * plain:
        return best.keys, f"{_ms(seconds)} a step measured, ddp {_ms(plain)}; {among}"
    hoped = f"{typed(best.keys)} was predicted to take {_ms(best.seconds)} instead of {_ms(usual.seconds)}"
    return USUAL, f"{_ms(plain)} a step measured; {hoped}, but took {_ms(seconds)}; {among}"


def _measured(made: Plan) -> dict[str, list[float]]:
    """Seconds of a step of each configuration that was run, in each of its runs."""
    found: dict[str, list[float]] = {}
    for trial in made.trials:
        found.setdefault(typed(trial.prediction.keys), []).append(trial.seconds)
    return found


def _among(made: Plan) -> str:
    exact = [one for one in made.predictions if one.same_as_single and made.fits(one)]
    count = "1 configuration" if len(exact) == 1 else f"{len(exact)} configurations"
    return f"{count} of {', '.join(dict.fromkeys(one.keys['strategy'] for one in exact))}"


def _ms(seconds: float) -> str:
    return shown_ms(1000 * seconds)
