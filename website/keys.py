"""Makes the reference of every key from the schemas and the YAML files, so that it can't say anything else."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from distrain.cli import hydra_entry
from distrain.cli.key_help import NEEDED, Key, keys_of
from distrain.config.registry import GROUPS, choice
from distrain.config.schema import Config
from distrain.tools.launching import launch_keys

#: Name and title of the page of all keys that belong to no group.
GENERAL = ("general", "Training, checkpoints and processes")

#: What each group chooses, as the title of its page.
TITLES = {
    "strategy": "How the work is divided",
    "compression": "How gradients are compressed",
    "model": "The model",
    "data": "The data set",
    "task": "What the model is trained to do",
    "loss": "The loss",
    "optimizer": "The optimizer",
    "scheduler": "The learning rate's schedule",
    "logger": "Where metrics are logged",
}


#: A longer value is shown below its table, in characters.
_LONGEST = 80


def pages(conf: Path) -> dict[str, tuple[str, str]]:
    """All pages of the reference of keys: the file's name without suffix, its title in the menu and its Markdown.

    Args:
        conf: The folder of YAML files.
    """
    name, title = GENERAL
    made = {name: (title, "\n".join(_general(conf)))}
    for group in GROUPS:
        made[group] = (group, "\n".join(_group(conf, group, TITLES.get(group, group))))
    return made


def _general(conf: Path) -> Iterator[str]:
    yield f"# {GENERAL[1]}"
    yield ""
    yield "The keys that every training has, whatever its strategy, model and data."
    keys = [key for key in keys_of(Config, hydra_entry.compose(conf, "config")) if key.name.split(".")[0] not in GROUPS]
    for section in ("", *dict.fromkeys(key.name.rpartition(".")[0] for key in keys if "." in key.name)):
        yield ""
        yield f"## {section}" if section else "## The run"
        yield ""
        yield from _table(key for key in keys if key.name.rpartition(".")[0] == section)
    yield ""
    yield "## Ranks and hosts"
    yield ""
    yield "By these `distrain train`, `evaluate`, `predict` and `doctor` start their own ranks."
    yield "They are no part of a run's configuration."
    yield ""
    yield from _table(keys_of(launch_keys.LaunchSettings, launch_keys.defaults()))


def _group(conf: Path, group: str, title: str) -> Iterator[str]:
    composed = hydra_entry.compose(conf, "config")
    chosen = OmegaConf.select(composed, f"{group}.name")
    names = sorted(path.stem for path in (conf / group).glob("*.yaml"))
    keys = {name: _keys_of_choice(conf, group, name) for name in names}
    # A key with one meaning and one value in all choices is shown once.
    shared = [key for key in keys[chosen] if len(names) > 1 and all(key in others for others in keys.values())]
    yield f"# {title}"
    yield ""
    yield f"`{group}=NAME` on the command line chooses one of: {_links(names)}."
    yield f"The default is `{group}={chosen}`. Set a key as `KEY=VALUE`, after the choice or before it."
    if shared:
        yield ""
        yield "## Keys of every choice"
        yield ""
        yield from _table(shared)
    for name in names:
        yield ""
        yield f"## {name} {{ #{name} }}"
        yield ""
        yield _purpose(group, name)
        own = [key for key in keys[name] if key not in shared]
        yield ""
        yield from _table(own) if own else ["It has no keys of its own."]


def _keys_of_choice(conf: Path, group: str, name: str) -> list[Key]:
    """The keys of a choice with its values, without ``name``, which the choice itself sets."""
    composed = hydra_entry.compose(conf, "config", [f"{group}={name}"])
    return [key for key in keys_of(Config, composed, only=group) if key.name != f"{group}.name"]


def _purpose(group: str, name: str) -> str:
    """The first sentence that the code says about a choice."""
    found = choice(group, name)
    text = inspect.getdoc(found.target) or inspect.getdoc(found.schema) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    # References of docstrings become plain code.
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", paragraph).replace("``", "`")


def _links(names: Iterable[str]) -> str:
    return ", ".join(f"[`{name}`](#{name})" for name in names)


def _table(keys: Iterable[Key]) -> Iterator[str]:
    """A table of keys. It has two columns, so that it can be read on a phone."""
    yield "| key | meaning |"
    yield "| --- | --- |"
    long = []
    for key in keys:
        default = "No default: you must set it." if key.value == NEEDED else f"Default: `{key.value}`."
        if len(key.value) > _LONGEST:
            default = "The default is below this table."
            long.append(key)
        yield f"| `{key.name}` | {_cell(key.doc)}<br>*{_cell(key.kind[:1].upper() + key.kind[1:])}.* {default} |"
    for key in long:
        yield f"\nDefault of `{key.name}`:\n\n```yaml"
        yield yaml.safe_dump(yaml.safe_load(key.value), sort_keys=False).rstrip()
        yield "```"


def _cell(text: str) -> str:
    """Plain text as Markdown inside a table: no mark of Markdown's or HTML's has a meaning."""
    escaped = re.sub(r"([\\`*_{}\[\]|#])", r"\\\1", text)
    return escaped.replace("<", "&lt;").replace(">", "&gt;")
