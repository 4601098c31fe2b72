"""The page holds what runs say, and nothing of it can become markup or code."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from distrain.tools.comparison.page import to_html
from distrain.tools.comparison.run import Run
from tests.tools.comparison.runs import CONFIG, ROWS, SUMMARY, epoch_row, read, step_row, write_run

#: Markup, letters that turn the direction or break lines, half a letter, and a name of bytes that are no text.
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u202e\n\x00\udcff\ud800数据"


class Elements(HTMLParser):
    """All elements of a page with their attributes, and the text of each kind of element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "wbr"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self._open[-1] if self._open else "", []).append(data)

    @property
    def all_closed(self) -> bool:
        return not self._open


def page_of(runs: list[Run]) -> str:
    return to_html(runs, runs[0], "2026-11-29 05:00", "0.1.0")


def data_of(page: str) -> Any:
    text = page.partition('id="data">')[2].partition("</script>")[0]
    return json.loads(text)


def test_the_page_shows_curves_figures_differences_shares_and_bytes(tmp_path: Path) -> None:
    other = {**SUMMARY, "test_accuracy": 0.95, "images_per_second": 1500.0, "bytes_sent_per_step": 500}
    config = {**CONFIG, "optimizer": {"lr": 0.2}}
    page = page_of(read(write_run(tmp_path / "a"), write_run(tmp_path / "b", config=config, summary=other)))
    elements = Elements(page)
    assert elements.all_closed
    assert elements.text["h2"] == [
        "Curves",
        "Final figures",
        "What differs in the configurations",
        "Where the time went",
        "Bytes sent",
        "Where the runs come from",
    ]
    assert [chart["title"] for chart in data_of(page)["charts"]][:2] == ["training loss", "validation loss"]
    first = data_of(page)["charts"][0]["curves"][0]
    assert (first["s"], first["v"]) == ([10, 10, 10, 10], [1, 0.5, 0.3, 0.2])
    assert {"+0.1000", "+50.0 %"} <= set(elements.text["small"])
    assert "0.2" in elements.text["td"]
    assert "optimizer.lr" in "".join(elements.text["code"])
    shares = [attributes for tag, attributes in elements.found if tag == "rect" and attributes.get("height") == "10"]
    assert sum(float(str(share["width"])) for share in shares[:4]) == pytest.approx(100)


def test_nothing_is_loaded_and_only_our_own_script_and_style_are_allowed(tmp_path: Path) -> None:
    page = page_of(read(write_run(tmp_path / "a")))
    elements = Elements(page)
    policy = next(str(a["content"]) for tag, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        source = "".join(elements.text[tag][-1:])
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'" in policy
    forbidden = {"src", "href", "style", "srcset", "data", "action"}
    assert not [a for _, a in elements.found if forbidden & a.keys() or any(name.startswith("on") for name in a)]
    assert "url(" not in page
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)


def test_text_of_a_hostile_run_stays_text(tmp_path: Path) -> None:
    config = {"strategy": {"name": HOSTILE}, HOSTILE: HOSTILE, "compression": {"name": "none"}}
    summary = {**SUMMARY, "strategy": HOSTILE, "compression": HOSTILE, "command": HOSTILE, "end": HOSTILE}
    summary |= {f"test_{HOSTILE}": 1.0, f"best_val_{HOSTILE}": 0.5}
    rows = [{**row, f"train/{HOSTILE[:60]}": 1.0, f"epoch/val_{HOSTILE[:60]}": 1.0} for row in ROWS]
    name = HOSTILE.replace("/", "\\").replace("\x00", "").replace("\ud800", "")
    folders = [
        write_run(tmp_path / name, config=config, summary=summary, rows=rows),
        write_run(tmp_path / f"{name}2", summary=None, rows=rows, failure={"error": HOSTILE, "host": HOSTILE}),
    ]
    page = page_of(read(*folders))
    assert "\u202e" not in page
    assert "\x00" not in page
    elements = Elements(page)
    assert elements.all_closed
    known = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "h1",
        "h2",
        "main",
        "section",
        "ul",
        "li",
        "p",
        "form",
    }
    known |= {
        "fieldset",
        "legend",
        "label",
        "input",
        "button",
        "span",
        "div",
        "figure",
        "figcaption",
        "svg",
        "rect",
        "table",
    }
    known |= {"thead", "tbody", "tr", "th", "td", "small", "code", "strong", "noscript", "footer", "script", "wbr"}
    assert {tag for tag, _ in elements.found} <= known
    assert [tag for tag, _ in elements.found].count("script") == 2
    assert not [a for _, a in elements.found if any(key.startswith("on") for key in a)]
    assert data_of(page)["runs"][0]["name"].startswith("<\\script><script>alert")


def test_ten_long_runs_make_a_page_below_300_kB_that_says_what_it_left_out(tmp_path: Path) -> None:
    draw = random.Random(0)
    runs = read(*(write_run(tmp_path / str(number)) for number in range(10)))
    names = ("train/loss", "train/accuracy", "train/learning_rate", "train/gradient_norm", "speed/images_per_second")
    for run in runs:
        for name in names:
            curve = type(run.metrics.curves["train/loss"])()
            for step in range(0, 100_000, 10):
                curve.add(step, draw.random())
            run.metrics.curves[name] = curve
    page = page_of(runs)
    assert len(page.encode()) < 300_000
    assert "The longest curve has 10,000 rows" in page


def test_fifty_runs_with_nothing_in_common_have_lines_of_their_own(tmp_path: Path) -> None:
    runs = read(*(write_run(tmp_path / f"{number:02}") for number in range(50)))
    styles = [run["style"] for run in data_of(page_of(runs))["runs"]]
    assert len(set(styles)) == 50
    css = (Path(to_html.__code__.co_filename).parent / "page.css").read_text()
    assert {f".{name} {{" in css for style in styles for name in style.split() if name != "d0"} == {True}


def test_broken_runs_are_on_the_page_as_what_they_are(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    (nothing / "overrides.txt").touch()
    runs = read(
        write_run(tmp_path / "running", summary=None, config=None),
        write_run(tmp_path / "nan", rows=[step_row(1, None), epoch_row(2, 0.5, 0.1)]),
        nothing,
    )
    page = page_of(runs)
    assert Elements(page).all_closed
    assert "no summary.json: it runs or was killed; last row at step 40" in page
    assert "train/loss is not finite in 1 of 1 rows, first at step 1" in page
    assert "nothing: no results: nothing is logged yet" in page
    assert "Without a readable config.yaml: running, nothing." in page


def test_a_single_run_without_anything_makes_a_page(tmp_path: Path) -> None:
    page = page_of(read(write_run(tmp_path / "a", config=None, summary={}, rows=[])))
    assert Elements(page).all_closed
    assert "No run has logged anything." in page
    assert "There is nothing to compare." in page
