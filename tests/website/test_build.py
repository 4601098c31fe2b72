"""Pages on their way from the repository to the site."""

from __future__ import annotations

import pytest

from distrain.config.key_search import schema_fields
from distrain.config.registry import GROUPS, choices
from distrain.config.schema import TrainerConfig
from tests.runs import CONF
from website import build, keys


@pytest.mark.parametrize(
    ("page", "text", "adapted"),
    [
        ("model.md", "[a](data.md#b)", "[a](data.md#b)"),
        ("model.md", "[a](#b) [c](https://d.e/f)", "[a](#b) [c](https://d.e/f)"),
        ("model.md", "[a](../CONTRIBUTING.md#tests)", "[a](contributing.md#tests)"),
        ("index.md", "[a](tutorial.ipynb)", "[a](tutorial.md)"),
        ("reference/classes.md", "[a](../../CONTRIBUTING.md)", "[a](../contributing.md)"),
        ("reference/classes.md", "[a](../architecture.md)", "[a](../architecture.md)"),
        ("contributing.md", "[a](docs/architecture.md#b)", "[a](architecture.md#b)"),
        ("contributing.md", "[a](README.md)", "[a](index.md)"),
        ("model.md", r"| `a\|b` | c |", "| `a|b` | c |"),
        ("model.md", r"`a\|b`", r"`a\|b`"),
    ],
)
def test_links_and_tables_are_adapted_to_the_site(page: str, text: str, adapted: str) -> None:
    assert build.adapt(text, page) == adapted


def test_the_reference_has_every_key_of_every_choice() -> None:
    pages = keys.pages(CONF)
    general = pages["general"][1]
    assert all(f"`{key}`" in general for key, _ in schema_fields(TrainerConfig, "trainer."))
    assert "| `nproc` |" in general
    assert "outputs/&lt;date&gt;/" in general
    for group in GROUPS:
        _, text = pages[group]
        for name, choice in choices(group).items():
            assert f"\n## {name} " in text
            for key, _ in schema_fields(choice.schema, f"{group}."):
                assert key == f"{group}.name" or f"| `{key}` |" in text, (name, key)
