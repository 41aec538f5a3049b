"""Hooks of mkdocs: what the site takes from outside of ``docs/`` (``make docs``).

The pages are written for a plain Git host, with links relative to the file. The site holds a copy of every
page in :data:`PAGES`, and of every other file that a page links to: source is shown as highlighted text.
mkdocs warns of a link to a file that does not exist, and ``strict`` makes that an error.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "services/models/mini/README.md")
"""Pages outside of ``docs/`` and ``benchmarks/``."""

LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".toml": "toml", ".proto": "protobuf"}
"""The lexer of a source page, by suffix. Other text is shown as it is."""

_CODE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)((?:#[^)\s]*)?\))")
_FETCHED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")


def _pages() -> list[str]:
    benchmarks = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").glob("*.md"))
    return [*PAGES, *benchmarks]


def _prose(markdown: str) -> Iterator[tuple[bool, str]]:
    """Split ``markdown`` into pieces: whether the piece is prose rather than code, and its text."""
    for number, piece in enumerate(_CODE.split(markdown)):
        yield number % 2 == 0, piece


def _targets(source: str, markdown: str) -> Iterator[str]:
    """Yield the path from the repository's root of every file that the page ``source`` links to."""
    for is_prose, piece in _prose(markdown):
        if is_prose:
            for match in _LINK.finditer(piece):
                yield _resolve(source, match[2])


def _resolve(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _source_of(src_uri: str) -> str:
    """Return the place of a page of the site in the repository, from its root."""
    return src_uri if src_uri in _pages() else f"docs/{src_uri}"


def _site_uri(path: str) -> str:
    """Return where the site has the file ``path`` of the repository, from the site's root."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path in _pages() or path.endswith((".png", ".svg")) else f"source/{path}.md"


def _source_page(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    language = LANGUAGES.get(Path(path).suffix, "text")
    fence = "`" * 6
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n{fence} {language}\n{text}\n{fence}\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside of ``docs/``, and a page for each source file that a page links to."""
    sources = {_source_of(file.src_uri): file.content_string for file in files.documentation_pages()}
    for path in _pages():
        sources[path] = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, path, content=sources[path]))
    linked = {target for source, text in sources.items() for target in _targets(source, text)}
    for path in sorted(linked):
        if not path.startswith("docs/") and path not in sources and (ROOT / path).is_file():
            files.append(File.generated(config, _site_uri(path), content=_source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a page to the site's copies."""
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown
    source = _source_of(here)

    def point(match: re.Match[str]) -> str:
        target = _resolve(source, match[2])
        if not (ROOT / target).is_file():
            return match[0]
        return match[1] + posixpath.relpath(_site_uri(target), posixpath.dirname(here) or ".") + match[3]

    return "".join(_LINK.sub(point, text) if is_prose else text for is_prose, text in _prose(markdown))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that makes the browser fetch something from another host."""
    found = _FETCHED.search(output)
    if found is not None:
        raise PluginError(f"{page.file.src_uri} fetches {found[1]}")
    return output
