"""The check of the built site finds what a reader would stumble over."""

from __future__ import annotations

from pathlib import Path

import pytest

from website import check

INDEX = """<html><head><link rel="stylesheet" href="style.css"></head><body id="top">
<h2 id="here">Here</h2><a href="other.html#there">other</a> <a href="#here">here</a> <a href="https://example.org">out</a>
<img src="picture.png"><link rel="canonical" href="https://example.org/page">{}</body></html>"""


def site(folder: Path, addition: str = "") -> Path:
    """Two pages that link to each other, with something added to the first one."""
    (folder / "index.html").write_text(INDEX.format(addition))
    (folder / "other.html").write_text('<p id="there">There</p> <a href="index.html">back</a>')
    (folder / "style.css").write_text("body { color: black }")
    (folder / "picture.png").write_bytes(b"")
    return folder


def test_a_site_without_faults_has_no_problems(tmp_path: Path) -> None:
    assert check.problems(site(tmp_path)) == []


@pytest.mark.parametrize(
    ("addition", "problem"),
    [
        ('<a href="gone.html">x</a>', "index.html: gone.html leads to no file of the site"),
        ('<a href="../index.html">x</a>', "index.html: ../index.html leads to no file of the site"),
        ('<img src="gone.png">', "index.html: gone.png leads to no file of the site"),
        ('<a href="other.html#here">x</a>', "index.html: other.html#here leads to a page without that anchor"),
        ('<a href="#nowhere">x</a>', "index.html: #nowhere leads to a page without that anchor"),
        (
            '<script src="https://cdn.example/a.js"></script>',
            "index.html: a browser would load https://cdn.example/a.js",
        ),
        ('<img src="//cdn.example/a.png">', "index.html: a browser would load //cdn.example/a.png"),
        ('<link rel="stylesheet" href="https://f.example/">', "index.html: a browser would load https://f.example/"),
    ],
)
def test_a_fault_of_a_page_is_named(addition: str, problem: str, tmp_path: Path) -> None:
    (found,) = check.problems(site(tmp_path, addition))
    assert found.startswith(problem)


def test_a_page_that_nothing_leads_to_is_named(tmp_path: Path) -> None:
    (site(tmp_path) / "lost.html").write_text("<p>lost</p>")
    assert check.problems(tmp_path) == ["lost.html: no page or menu leads there"]


def test_a_style_that_loads_a_font_from_elsewhere_is_named(tmp_path: Path) -> None:
    (site(tmp_path) / "style.css").write_text("@import 'https://fonts.example/css';")
    assert check.problems(tmp_path) == ["style.css: a browser would load something from another server"]
