"""The study's second domain: HTML, as `pydoc` renders the standard library's documentation.

Every Python has `pydoc` and the modules, so the markup is there on any machine without a package
or a download. A page belongs to its module, whose hashed name decides its split as for the
quickstart's corpora. What pydoc repeats from other modules (inherited members) is taken out, so
that training pages do not hold what is held out, and so is what depends on the machine (file
names, addresses).

Rendering imports the modules. One that cannot be imported here (another system's, or of a library
that this Python lacks) has no page, and nothing of a page is executed beyond the import.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import pydoc
import re
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))

import corpora

# Importing these prints, opens a browser or a window, or starts a program.
NOT_IMPORTED = re.compile(
    r"(this|antigravity|idlelib|turtle|turtledemo|tkinter|_sysconfigdata.*|.*__main__)(\..*)?$"
)
FILE_CELL = re.compile(r'(<td class="extra">).*?(</td>)', re.DOTALL)
INHERITED = re.compile(
    r"<hr>\s*(?:<[^>]*>)?[\w ]+ inherited from .*?(?=<hr>|</td></tr></table>)", re.DOTALL
)
WARNINGS = re.compile(r"<strong>__warningregistry__</strong>.*")
ADDRESS = re.compile(r" at 0x[0-9a-f]+", re.IGNORECASE)
SHORTEST_PAGE = 400


def clean(html: str) -> str:
    """A page without inherited members, file names and addresses, and with plain spaces."""
    html = INHERITED.sub("", FILE_CELL.sub(r"\1\2", html))
    html = WARNINGS.sub("", ADDRESS.sub("", html)).replace("&nbsp;", " ").replace("\r", "")
    return re.sub(r"\n{3,}", "\n\n", html).strip() + "\n"


def pieces(page: str, longest: int) -> list[str]:
    """A page cut before its entries, in pieces of at most `longest` characters if they allow."""
    found = [""]
    for part in re.split(r"(?=<p>|<dl>)", page):
        if found[-1] and len(found[-1]) + len(part) > longest:
            found.append("")
        found[-1] += part
    return found


def render(name: str) -> str | None:
    """The cleaned HTML page of a module, or None where it cannot be imported or rendered."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return clean(pydoc.HTMLDoc().document(importlib.import_module(name), name))
        except (Exception, SystemExit):  # whatever a module of another system raises at import
            return None


def read_documents() -> list[corpora.Document]:
    """Pages of the running Python's standard library, in pieces, in the order of hashed names."""
    names = {name for name, _, _ in corpora.standard_library(with_tests=False)}
    names |= {name for name in sys.builtin_module_names if not name.startswith("_")}
    documents = []
    for name in sorted(names):
        page = None if NOT_IMPORTED.match(name) else render(name)
        if page is not None and len(page) >= SHORTEST_PAGE:
            documents += [corpora.Document(name, text) for text in pieces(page, 8_000)]
    documents.sort(key=lambda document: corpora.position(document.source))
    return documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the datasets and manifest.json go")
    parser.add_argument("--pretraining", action="store_true", help="also what the teacher is from")
    options = parser.parse_args()
    pages, (english, _, _) = read_documents(), corpora.read_documents(with_tests=False)
    sets = corpora.slices("html", pages) | corpora.slices("english", english)
    if options.pretraining:
        sets["html_train"] = corpora.split(pages)[0]
    corpora.write_sets(sets, options.folder)


if __name__ == "__main__":
    main()
