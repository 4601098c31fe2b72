"""Composes configurations as Hydra does on a command line, in less of its time.

Hydra takes longer to compose a configuration than many a test takes to train with it, and reads the same files each
time. Here it composes once for each choice of groups, and then puts the values of a test into a copy of that, which is
what it does itself.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from distrain.cli import hydra_entry
from distrain.cli.arguments import open_mappings, place_loggers, quote_home_folders

CONF = Path(__file__).parent.parent / "conf"


def compose(arguments: Sequence[str]) -> DictConfig:
    """The same as ``hydra_entry.compose(CONF, "config", arguments)``."""
    overrides = [_parsed(argument) for argument in open_mappings(quote_home_folders(place_loggers(arguments)))]
    if any(each.is_sweep_override() or each.key_or_group.startswith("hydra") for each in overrides):
        return hydra_entry.compose(CONF, "config", arguments)
    config = copy.deepcopy(_chosen(tuple(str(each.input_line) for each in overrides if _is_choice(each))))
    ConfigLoaderImpl._apply_overrides_to_config([each for each in overrides if not _is_choice(each)], config)
    return config


def _is_choice(override: Override) -> bool:
    """Whether it names a file of a group."""
    return (CONF / override.key_or_group).is_dir() and not isinstance(override.value(), dict)


@functools.cache
def _parsed(argument: str) -> Override:
    return OverridesParser.create().parse_overrides([argument])[0]


@functools.cache
def _chosen(choices: tuple[str, ...]) -> DictConfig:
    return hydra_entry.compose(CONF, "config", choices)
