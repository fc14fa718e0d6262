"""A run's report as one HTML page without a script or anything from elsewhere.

Pictures are PNGs inside the page, and everything from a file is escaped by jinja2, which is
optional and imported where it is used. A section without data is one line that says why.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_moe_inject.host.errors import (
    RecipeError,
)


@dataclass(frozen=True)
class Table:
    """Rows of cells, the header first; the first ``names`` columns are words, the rest numbers."""

    rows: Sequence[Sequence[str]]
    names: int = 1


@dataclass(frozen=True)
class Picture:
    """A PNG and what it shows, in words."""

    png: bytes
    caption: str

    @property
    def source(self) -> str:
        """As the address of an ``img``."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Code:
    """Text as it is; ``title`` folds it away under these words."""

    text: str
    title: str = ""


@dataclass(frozen=True)
class Section:
    """One heading of the page; ``missing`` says why there is nothing under it.

    Attributes:
        parts: paragraphs (plain strings), tables, pictures and code, in their order.
    """

    title: str
    parts: Sequence[str | Table | Picture | Code] = field(default_factory=list)
    missing: str = ""


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src \
'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
p { margin: .4rem 0; }
img { max-width: 100%; height: auto; display: block; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .85rem; margin: .6rem 0; display: block;
  overflow-x: auto; }
th, td { padding: .15rem .7rem; border-bottom: 1px solid #eee; white-space: nowrap; }
th { text-align: left; border-bottom: 1px solid #999; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; font-size: .78rem; line-height: 1.35; }
.missing { color: #666; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ subtitle }}</p>
{% for section in sections if not section.missing %}
<h2>{{ section.title }}</h2>
{% for part in section.parts %}
{% if part.rows is defined %}
<table>
{% for row in part.rows %}
{% set tag = "th" if loop.first else "td" %}
<tr>{% for cell in row %}<{{ tag }}{% if loop.index > part.names %} class="number"{% endif %}>\
{{ cell }}</{{ tag }}>{% endfor %}</tr>
{% endfor %}
</table>
{% elif part.png is defined %}
<img src="{{ part.source }}" alt="{{ part.caption }}">
{% elif part.text is defined %}
{% if part.title %}<details><summary>{{ part.title }}</summary><pre>{{ part.text }}</pre></details>\
{% else %}<pre>{{ part.text }}</pre>{% endif %}
{% else %}
<p>{{ part }}</p>
{% endif %}
{% endfor %}
{% endfor %}
{% for section in sections if section.missing %}
{% if loop.first %}<h2>Not here</h2>{% endif %}
<p class="missing">{{ section.title }}: {{ section.missing }}</p>
{% endfor %}
</body>
</html>
"""


def render_page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The page.

    Raises:
        RecipeError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise RecipeError(
            "a report needs jinja2, which is not installed; "
            "pip install 'megatron-moe-inject[report]'"
        ) from None
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(_PAGE)
    return page.render(title=title, subtitle=subtitle, sections=sections)
