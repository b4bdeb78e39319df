"""Make HTML from small pieces. Text from files is escaped; the page loads nothing external."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b636d; --line: #d9dee3; --paper: #fff;
  --wash: #f4f6f8; --link: #0b62a8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --soft: #9aa4ae; --line: #343b43; --paper: #14171a; --wash: #1e2328;
    --link: #7db8ec; }
  figure img { filter: invert(1) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-top: .6rem;
  border-top: 1px solid var(--line); }
p, li, figcaption { max-width: 46rem; }
.question, figcaption, .note { color: var(--soft); }
.question { font-size: 1.1rem; }
.lead { font-size: 1.1rem; }
figcaption, .note, table { font-size: .88rem; }
figure { margin: 1rem 0 2rem; }
.panels { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); }
.panels img { width: 100%; max-width: 30rem; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .65rem .3rem 0; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--soft); white-space: normal; vertical-align: bottom; }
tbody th { font-weight: 500; white-space: normal; min-width: 9.5rem; }
pre { background: var(--wash); padding: .8rem; overflow-x: auto; font-size: .82rem;
  border-radius: 4px; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--link); }
a { color: var(--link); }
"""


def page(title: str, body: Iterable[str]) -> str:
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style>"
    )
    content = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>\n{content}\n'
        "</main></body></html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(items: Iterable[str]) -> str:
    inside = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{inside}</ul>" if inside else ""


def table(rows: Sequence[Sequence[str]]) -> str:
    """Make a table; the first row is its header, and the first cell of each row names the row."""
    header = "".join(f'<th scope="col">{escape(text)}</th>' for text in rows[0])
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(text)}</td>" for text in rest)
        + "</tr>"
        for first, *rest in rows[1:]
    )
    return (
        f'<div class="scroll"><table><thead><tr>{header}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def details(summary: str, *inside: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{''.join(inside)}</details>"


def code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def figure(panels: Iterable[tuple[str, bytes]], caption: str) -> str:
    """Show SVG panels side by side on wide screens, one below another on narrow ones."""
    images = "".join(_image(title, svg) for title, svg in panels)
    return (
        f'<figure><div class="panels">{images}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def link(text: str, address: str) -> str:
    return f'<a href="{escape(address)}">{escape(text)}</a>'


def _image(title: str, svg: bytes) -> str:
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    return f'<img alt="{escape(title)}" src="{source}">'
