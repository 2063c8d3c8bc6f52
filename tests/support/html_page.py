"""What a reader of an HTML page gets: its elements, its text, and the cells of its tables."""

from __future__ import annotations

from html.parser import HTMLParser


class HtmlPage(HTMLParser):
    """elements: each with its attributes. text: outside of tags. rows: the cells of every table's rows."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.rows[-1] and self.elements[-1][0] in ("td", "th"):
            self.rows[-1][-1] += data.strip()

    @property
    def pictures(self) -> list[str]:
        """Where each picture comes from."""
        return [attrs["src"] or "" for tag, attrs in self.elements if tag == "img"]
