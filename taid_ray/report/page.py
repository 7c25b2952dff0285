"""One self-contained HTML page for people: style, notes, tables and pictures. No scripts, nothing loaded from elsewhere."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

DPI = 120
STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { white-space: normal; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
tr.best { font-weight: 600; background: var(--soft); }
img { max-width: 100%; background: white; border-radius: 6px; }
pre { background: var(--soft); padding: 1rem; border-radius: 6px; overflow-x: auto; font-size: .8125rem; }
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
{parts}
</body>
</html>
"""


def page(title: str, summary: str, parts: Iterable[str]) -> str:
    """A whole page. title and summary are text; parts are HTML, as the functions below make it."""
    return PAGE.format(title=escape(title), style=STYLE, summary=escape(summary), parts="\n".join(parts))


def notes_part(notes: Iterable[str]) -> str:
    """A list of sentences."""
    items = "\n".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<h2>Notes</h2>\n<ul>\n{items}\n</ul>"


def table_part(
    title: str, heading: Sequence[str], rows: Iterable[Sequence[str]], best: Sequence[str] | None = None
) -> str:
    """A table, its first two columns aligned to the left, the others to the right. best: the row that stands out, if any."""
    lines = [_row("th", heading)] if heading else []
    lines += [_row("td", row, "best" if row is best else "") for row in rows]
    table = "<table>\n" + "\n".join(lines) + "\n</table>"
    return f'<h2>{escape(title)}</h2>\n<div class="wide">\n{table}\n</div>'


def picture_part(title: str, figure: Figure, path: Path) -> str:
    """A picture inside of the page, which is written to `path` as PNG, too. Raises OSError."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=DPI)
    path.write_bytes(image.getvalue())
    encoded, title = base64.b64encode(image.getvalue()).decode(), escape(title)
    return f'<h2>{title}</h2>\n<img alt="{title}" src="data:image/png;base64,{encoded}">'


def details_part(title: str, text: str) -> str:
    """Text that a click unfolds."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _row(tag: str, cells: Sequence[str], style: str = "") -> str:
    content = "".join(f"<{tag}>{escape(cell).replace('.', '.<wbr>' if tag == 'th' else '.')}</{tag}>" for cell in cells)
    return f'<tr class="{style}">{content}</tr>' if style else f"<tr>{content}</tr>"
