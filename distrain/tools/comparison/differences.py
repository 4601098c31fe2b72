"""Tells runs apart: short names, and the keys in which their configurations differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from distrain.files.escaping import escaped
from distrain.tools.comparison.run import Run, shortened

#: Longer names make tables and legends hard to read.
_LONGEST_NAME = 48
#: As many letters of a commit tell it from others.
_LONGEST_ORIGIN = 16
#: Differs between all runs, and the name already says it.
_OF_EACH_RUN = frozenset({"run_dir"})
#: Parts of ``summary.json`` that say where a run comes from, and how they are called beside the keys.
_ORIGIN = {
    "versions.distrain": "version of distrain",
    "versions.torch": "version of torch",
    "versions.python": "version of Python",
    "git.commit": "git commit",
}


@dataclass(frozen=True)
class Difference:
    """A key whose value is not the same in all runs.

    Attributes:
        key: The dotted key.
        values: Its value in each run, in their order; ``None`` where a run's configuration lacks it.
    """

    key: str
    values: tuple[str | None, ...]


def name_runs(runs: Sequence[Run]) -> None:
    """Gives each run a name: as few of the last folders of its path as tell all runs apart, without odd characters."""
    parts = [run.path.resolve().parts for run in runs]
    counts = [1] * len(runs)
    while True:
        names = ["/".join(own[-count:]) for own, count in zip(parts, counts, strict=True)]
        used = Counter(names)
        longer = [used[name] > 1 and count < len(own) for name, count, own in zip(names, counts, parts, strict=True)]
        if not any(longer):
            break
        counts = [count + more for count, more in zip(counts, longer, strict=True)]
    taken: set[str] = set()
    for run, name in zip(runs, names, strict=True):
        run.name = _unique(shortened(escaped(name), _LONGEST_NAME), taken)
        taken.add(run.name)


def _unique(name: str, taken: set[str]) -> str:
    """The name, with a number if another run has it: shortened names may be equal."""
    unique, number = name, 2
    while unique in taken:
        unique, number = f"{name} ({number})", number + 1
    return unique


def find_differences(runs: Sequence[Run]) -> list[Difference]:
    """The keys that differ; runs without a configuration count for nothing.

    Those that all runs have come first, in the order of the configurations.
    """
    known = [run for run in runs if run.config is not None]
    keys = list(dict.fromkeys(key for run in known for key in run.config or {}))
    # A key that only a later run has stands beside the others of its group.
    groups = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    keys.sort(key=lambda key: groups.index(key.partition(".")[0]))
    found = []
    for key in keys:
        if key not in _OF_EACH_RUN and len({(run.config or {}).get(key) for run in known}) > 1:
            found.append(Difference(key, tuple((run.config or {}).get(key) for run in runs)))
    found.sort(key=lambda difference: any(difference.key not in (run.config or {}) for run in known))
    # Keys don't say it all: the number of replicas may follow from that of the ranks.
    meshes = tuple(run.mesh for run in runs)
    if len(set(meshes) - {None}) > 1:
        found.append(Difference("mesh", meshes))
    for path, label in _ORIGIN.items():
        values = tuple(None if (text := run.text(path)) is None else text[:_LONGEST_ORIGIN] for run in runs)
        if len(set(values) - {None}) > 1:
            found.append(Difference(label, values))
    return found


def describe_runs(runs: Sequence[Run], differences: Sequence[Difference], most: int = 3) -> list[str]:
    """What distinguishes each run in a few words: the first keys by which it differs from most runs.

    Choices come before other keys, since ``strategy=ddp`` says more than ``strategy.batchnorm=sync``. What the name
    says is not repeated.
    """
    choices = [difference for difference in differences if difference.key.endswith(".name")]
    # A key that only some runs have follows from a choice.
    others = [difference for difference in differences if "." in difference.key and None not in difference.values]
    others = [difference for difference in others if difference not in choices]
    descriptions = []
    for index, run in enumerate(runs):
        said = []
        for difference in [*choices, *others]:
            value = difference.values[index]
            text = f"{difference.key.removesuffix('.name')}={value}"
            is_usual = 2 * difference.values.count(value) > len(runs)
            if value is not None and not is_usual and text not in run.name and value not in run.name.split("_"):
                said.append(shortened(escaped(text), _LONGEST_NAME))
        descriptions.append(" ".join(said[:most]))
    return descriptions
