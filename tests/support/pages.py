"""Read a report as a browser without JavaScript would: its text, and the addresses it names."""

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img", "br", "input"}
UNSEEN = {"script", "style", "title"}


class Page(HTMLParser):
    """Collects the addresses and the visible text of a page, and checks that its tags balance."""

    def __init__(self, text: str):
        super().__init__()
        self.addresses: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.addresses += [(tag, value) for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not UNSEEN & {*self.open}:
            self.texts.append(data)

    @property
    def visible(self) -> str:
        return " ".join(" ".join(self.texts).split())


def read_page(path: Path) -> Page:
    """Return the page; no number on it may be missing without a word."""
    page = Page(path.read_text())
    assert "nan" not in page.visible
    return page
