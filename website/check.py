"""Looks at each page of the built site as a browser would: what does it link to, and what would it load?"""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Attributes by which an element makes a browser load something, rather than only link to it.
_LOADS = {
    ("img", "src"),
    ("script", "src"),
    ("iframe", "src"),
    ("source", "src"),
    ("video", "src"),
    ("audio", "src"),
    ("object", "data"),
    ("embed", "src"),
}
#: Relations of a <link> that only say what the page is about.
_SAID = {"canonical", "prev", "next", "edit", "alternate"}


@dataclass
class _Page(HTMLParser):
    """The addresses and anchors of a page.

    Attributes:
        links: Targets of links.
        loads: Addresses that a browser requests to show the page.
        anchors: What a link to a place of this page may name.
    """

    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes the addresses and anchors of an element."""
        given = {name: value for name, value in attrs if value is not None}
        self.anchors.update(given[name] for name in ("id", "name") if name in given)
        for name, value in given.items():
            if (tag, name) in _LOADS:
                self.loads.append(value)
            elif name == "href" and tag == "link":
                (self.links if set(given.get("rel", "").split()) <= _SAID else self.loads).append(value)
            elif name == "href":
                self.links.append(value)


def problems(site: Path) -> list[str]:
    """What is wrong with a site, one line each; empty if nothing is.

    Args:
        site: The folder of HTML files.
    """
    pages = {path: _read(path) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site)
        # Shown at any address that doesn't exist, so its links begin at the site's root.
        base = site if path == site / "404.html" else path.parent
        for address in dict.fromkeys(page.loads):
            if urlsplit(address).netloc:
                found.append(f"{name}: a browser would load {address} from another server")
        for address in dict.fromkeys(page.links + page.loads):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            file = unquote(parts.path)
            target = (site / file.lstrip("/") if file.startswith("/") else base / file).resolve() if file else path
            if target.is_dir():
                target /= "index.html"
            anchor = unquote(parts.fragment)
            if not target.is_relative_to(site.resolve()) or not target.is_file():
                found.append(f"{name}: {address} leads to no file of the site")
            # The theme's own script understands these.
            elif anchor and not anchor.startswith("__") and target in pages and anchor not in pages[target].anchors:
                found.append(f"{name}: {address} leads to a page without that anchor")
    for style in site.rglob("*.css"):
        if "url(http" in style.read_text() or "@import" in style.read_text():
            found.append(f"{style.relative_to(site)}: a browser would load something from another server")
    linked = {
        (path.parent / unquote(urlsplit(address).path)).resolve()
        for path, page in pages.items()
        for address in page.links
    }
    for path in pages:
        if path.resolve() not in linked and path.name != "404.html":
            found.append(f"{path.relative_to(site)}: no page or menu leads there")
    return found


def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text())
    return page
