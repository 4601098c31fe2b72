"""Builds the documentation site from ``docs/`` into ``site/`` and checks it: ``python -m website.build``.

Some pages are made here, so that they can't differ from the code: the reference of every key (from the schemas), what
each command's ``--help`` says, and the tutorial with its outputs. A link, picture or anchor that leads nowhere, a page
that no menu lists, or anything that a browser would load from another server fails the build.
"""

from __future__ import annotations

import argparse
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from website import check, commands, keys, notebook

ROOT = Path(__file__).resolve().parent.parent
#: Where the pages are collected before they are built.
STAGE = ROOT / "build" / "website"
SITE = ROOT / "site"
#: Pages outside ``docs/``, by their name in the site.
OUTSIDE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md", "reporting.md": "SECURITY.md"}
#: The menu's entry below which the pages of keys stand.
REFERENCE = "Reference"


def main() -> None:
    """Builds the site; exits with 1 and one line for each problem if there are any."""
    parser = argparse.ArgumentParser(description="Builds the documentation site and checks it.")
    parser.parse_args()
    shutil.rmtree(STAGE, ignore_errors=True)
    collect(STAGE)
    built = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", str(STAGE / "mkdocs.yml")],
        cwd=STAGE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    # What stands before its traceback names the page, the line and the fault. It is coloured even in a file.
    print(re.sub(r"\x1b\[[\d;]*m", "", built.stdout.split("Traceback")[0]).rstrip())
    if built.returncode:
        sys.exit("the site was not built")
    found = check.problems(STAGE / "site")
    if found:
        sys.exit("\n".join([*found, f"{len(found)} problems"]))
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(STAGE / "site", SITE)
    pages = sum(1 for _ in SITE.rglob("*.html"))
    print(f"{pages} pages in {SITE.relative_to(ROOT)}/; look at them: {sys.executable} -m http.server -d {SITE}")


def collect(stage: Path) -> None:
    """Writes all pages and the settings of the generator into a folder.

    Args:
        stage: The folder; it must not exist.
    """
    docs = stage / "docs"
    shutil.copytree(ROOT / "docs", docs)
    shutil.copytree(ROOT / "website" / "theme", docs / "theme")
    for page, source in OUTSIDE.items():
        (docs / page).write_text((ROOT / source).read_text())
    reference = docs / "reference"
    reference.mkdir(exist_ok=True)
    settings = yaml.safe_load((ROOT / "website" / "mkdocs.yml").read_text())
    menu = next(entry[REFERENCE] for entry in settings["nav"] if REFERENCE in entry)
    for name, (title, text) in keys.pages(ROOT / "conf").items():
        (reference / f"{name}.md").write_text(text)
        menu.append({title: f"reference/{name}.md"})
    (reference / "commands.md").write_text(commands.page())
    tutorial = docs / "tutorial.ipynb"
    with tempfile.TemporaryDirectory() as folder:
        executed = notebook.run(tutorial, Path(folder), Path(sys.executable).parent)
        tutorial.with_suffix(".md").write_text(notebook.to_markdown(executed, Path(folder), docs))
    tutorial.unlink()
    for path in docs.rglob("*.md"):
        page = path.relative_to(docs).as_posix()
        path.write_text(adapt(path.read_text(), page))
    (stage / "mkdocs.yml").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def adapt(text: str, page: str) -> str:
    """Changes a page of the repository into one of the site: its links, and ``|`` in its tables.

    Args:
        text: The page's Markdown. Its links lead to files of the repository.
        page: The page's path in the site.
    """
    source = posixpath.dirname(OUTSIDE.get(page, f"docs/{page}"))
    pages = {file: name for name, file in OUTSIDE.items()} | {"README.md": "index.md"}

    def link(found: re.Match[str]) -> str:
        file = posixpath.normpath(posixpath.join(source, found[1]))
        target = pages.get(file, file.removeprefix("docs/")).replace(".ipynb", ".md")
        return f"]({posixpath.relpath(target, posixpath.dirname(page) or '.')}{found[2] or ''})"

    text = re.sub(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)", link, text)
    # In the code of a table GitHub needs \| for |, and shows |; the site's Markdown would show both characters.
    return "\n".join(
        re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), line) if line.startswith("|") else line
        for line in text.split("\n")
    )


if __name__ == "__main__":
    main()
