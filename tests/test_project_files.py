"""The files at the top of the repository that say what the project is, agree with each other."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import distrain

ROOT = Path(__file__).parent.parent
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def load(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict)
    return content


def test_the_version_to_cite_is_the_packages() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == distrain.__version__.split(".dev")[0]
    assert {"message", "title", "authors"} <= citation.keys()


def test_the_newest_version_of_the_changelog_is_the_packages() -> None:
    newest = re.search(r"^## (\S+) - (unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == distrain.__version__.split(".dev")[0]


def test_images_carry_the_packages_version() -> None:
    files = [*(ROOT / "docker").iterdir(), *(ROOT / "launch" / "kubernetes").iterdir(), *(ROOT / "docs").glob("*.md")]
    named = re.compile(r"distrain:(\d+\.\d[\w.]*\d)|image\.version=\"(.*)\"")
    versions = {a or b for path in files if path.is_file() for a, b in named.findall(path.read_text())}
    assert versions == {distrain.__version__.split(".dev")[0]}


def test_package_citation_and_licence_file_name_the_same_licence() -> None:
    assert 'license = "Apache-2.0"\nlicense-files = ["LICENSE"]' in (ROOT / "pyproject.toml").read_text()
    assert load(ROOT / "CITATION.cff")["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_asks_what_is_needed(path: Path) -> None:
    form = load(path)
    assert {"name", "description", "body"} <= form.keys() <= {"name", "description", "body", "labels", "title"}
    fields = [item for item in form["body"] if item["type"] != "markdown"]
    assert all(item["attributes"]["label"] for item in fields)
    assert len({item["id"] for item in fields}) == len(fields)
    if path.stem == "bug":
        required = {item["id"] for item in fields if item.get("validations", {}).get("required")}
        assert {"command", "version", "doctor"} <= required


@pytest.mark.parametrize("name", ["SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/releasing.md"])
def test_what_a_file_refers_to_exists(name: str) -> None:
    path = ROOT / name
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    assert all((path.parent / target).exists() for target in targets), targets


def test_the_checklist_for_releases_names_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"make ([a-z-]+)", (ROOT / "docs" / "releasing.md").read_text()))
    assert named <= targets


def test_the_tested_versions_agree_with_each_other() -> None:
    # Else pip refuses to install them together. Looked at is what is installed here, at the version of constraints.txt:
    # more than usual where extras are installed that the tests can do without, such as mlflow.
    tested = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pinned = Requirement(line)
            if pinned.marker is None or pinned.marker.evaluate():
                tested[canonicalize_name(pinned.name)] = str(pinned.specifier).removeprefix("==")
    wrong = []
    for package in metadata.distributions():
        name = canonicalize_name(package.metadata["Name"] or "")
        # torch's CPU build is 2.13.0+cpu.
        if package.version.partition("+")[0] != tested.get(name):
            continue
        for asked in map(Requirement, package.requires or ()):
            version = tested.get(canonicalize_name(asked.name))
            is_needed = asked.marker is None or asked.marker.evaluate({"extra": ""})
            if version and is_needed and not asked.specifier.contains(version, prereleases=True):
                wrong.append(f"{name} {package.version} asks for {asked}, and constraints.txt has {version}")
    assert wrong == []
