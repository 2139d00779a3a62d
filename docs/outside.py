"""A hook of mkdocs: files outside docs/ that pages link to become part of the site.

CONTRIBUTING.md, the models' cards, pictures and examples lie where code hosts expect them. Links
to them leave docs/, which mkdocs calls broken; here they are copied into the site and the links
led there, so that every other link out of docs/ stays an error.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = "outside"
"""Folder of the site for what lies beside docs/."""
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: Any) -> Files:
    """Add what the pages link to outside docs/."""
    found: set[str] = set()
    for page in files.documentation_pages():
        for link in _LINK.finditer(page.content_string):
            found |= {target} if (target := outside(page.src_uri, link[2])) else set()
    for target in sorted(found):
        copy = {"content": made(target), "inclusion": InclusionLevel.NOT_IN_NAV}
        files.append(File.generated(config, f"{OUTSIDE}/{target}", **copy))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links out of docs/ to the copies."""
    return _LINK.sub(lambda link: link[1] + led(page.file.src_uri, link[2]) + link[3], markdown)


def outside(page: str, link: str) -> str | None:
    """Return the path from the root of a linked file that lies outside docs/; None otherwise."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    inside = path.startswith(("docs/", "..")) or not (ROOT / path).is_file()
    return None if inside else path


def led(page: str, link: str) -> str:
    """Return where a link of a page leads within the site."""
    target = outside(page, link)
    if target is None:
        return link
    return posixpath.relpath(f"{OUTSIDE}/{target}", posixpath.dirname(page) or ".")


def made(target: str) -> str | bytes:
    """Return a file of the site; of the links in a page those to docs/ are kept."""
    content = (ROOT / target).read_bytes()
    if not target.endswith(".md"):
        return content
    return _LINK.sub(lambda link: link[1] + back(target, link[2]) + link[3], content.decode())


def back(target: str, link: str) -> str:
    """Return where a link of a file outside docs/ leads within the site."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(target), link))
    if not path.startswith("docs/"):
        return "#"
    return posixpath.relpath(path[len("docs/") :], posixpath.dirname(f"{OUTSIDE}/{target}"))
