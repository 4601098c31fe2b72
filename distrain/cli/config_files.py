"""The YAML files of which a command's configuration is composed: distrain's, and those of a user's ``--config-dir``."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from distrain.cli.arguments import open_mappings, parse, place_loggers, quote_home_folders
from distrain.config.registry import GROUPS, selectable
from distrain.errors import ConfigError

#: Behaviour of this release of Hydra, also in later ones.
HYDRA_VERSION_BASE = "1.3"


@dataclass(frozen=True)
class ConfigFiles:
    """Where a command finds its keys and choices.

    Attributes:
        conf: distrain's folder of YAML files.
        own: The folder of ``--config-dir``, if one is given; no file has the name of one of distrain's.
        name: Name of the primary file, without ``.yaml``.
    """

    conf: Path
    own: Path | None
    name: str

    @classmethod
    def of_command(cls, conf: Path, name: str, arguments: Sequence[str]) -> ConfigFiles:
        """The files of a command line, with those of its ``--config-dir``.

        Args:
            conf: distrain's folder of YAML files.
            name: Name of the primary file, without ``.yaml``.
            arguments: The command line.

        Raises:
            ConfigError: ``--config-dir`` names no folder, or one with files that would not be read.
        """
        conf = conf.resolve()
        own = parse(arguments).config_dir
        if own is None:
            return cls(conf, None, name)
        folder = Path(own)
        if not folder.is_dir():
            problem = "must be the folder that your groups are in" if folder.exists() else "there is no such folder"
            raise ConfigError("--config-dir", own, problem)
        for path in sorted(conf.rglob("*.yaml")):
            file = path.relative_to(conf).as_posix()
            # Hydra would read distrain's.
            if (folder / file).exists():
                raise ConfigError("--config-dir", own, f"distrain has a {file} too; give yours another name")
        return cls(conf, folder.resolve(), name)

    def compose(self, overrides: Sequence[str] = ()) -> DictConfig:
        """Composes the configuration as Hydra does on a command line.

        Args:
            overrides: Settings, in Hydra's syntax.
        """
        version.setbase(HYDRA_VERSION_BASE)
        # A Python program that calls distrain may use Hydra itself.
        shared = GlobalHydra.instance()
        before, shared.hydra = shared.hydra, None
        search_path = create_config_search_path(str(self.conf))
        if self.own is not None:
            search_path.prepend("command-line", f"file://{self.own}", SearchPathQuery(provider="schema"))
        try:
            Hydra.create_main_hydra2("distrain", search_path)
            return hydra.compose(self.name, open_mappings(quote_home_folders(place_loggers(overrides))))
        finally:
            shared.hydra = before

    def groups(self) -> set[str]:
        """The groups of choices, such as ``optimizer``."""
        ours = {path.relative_to(self.conf).as_posix() for path in self.conf.rglob("*") if path.is_dir()}
        return ours | {path.name for path in (self.own.iterdir() if self.own else ()) if path.is_dir()}

    def choices(self, group: str) -> list[str]:
        """The names of a group's choices that a command can choose; without a group, those of the primary files."""
        return selectable(sorted(path.stem for path in self._files(group)))

    def keys_of_choices(self) -> dict[str, str]:
        """Every key in the files of choices, dotted, with the choices that have it: ``model=a or model=b``."""
        found: dict[str, list[str]] = {}
        for group in sorted(self.groups() & GROUPS.keys()):
            for path in sorted(self._files(group), key=lambda path: path.stem):
                if not selectable([path.stem]):
                    continue
                content: Any = {}
                # A user's file with an error in it is refused when it is chosen.
                with contextlib.suppress(YAMLError, OmegaConfBaseException, OSError):
                    content = OmegaConf.to_container(OmegaConf.load(path))
                for key in leaves(content, f"{group}."):
                    found.setdefault(key, []).append(f"{group}={path.stem}")
        return {key: " or ".join(names) for key, names in found.items()}

    def _files(self, group: str) -> list[Path]:
        folders = [self.conf, self.own] if self.own else [self.conf]
        return [path for folder in folders for path in (folder / group).glob("*.yaml")]


def leaves(content: Any, prefix: str = "") -> list[str]:
    """The dotted keys of nested mappings that hold no mapping."""
    if not isinstance(content, dict) or not content:
        return [prefix.removesuffix(".")] if prefix else []
    return [leaf for key, value in content.items() for leaf in leaves(value, f"{prefix}{key}.")]
