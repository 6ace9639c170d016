"""What the site takes from elsewhere, so that no text stands twice: the cards, and parts of README and CONTRIBUTING.

A line ``{{ README.md: Use a model }}`` in a page stands for the text below that heading, with its subsections; without
a heading, for the text before the first one. Links lead to the page that shows their target; those to files that the
site does not show keep their text alone.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = re.compile(r"^{{ ([\w.]+)(?:: (.*))? }}$", re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]*)(#[^)]*)?\)")
PAGES = {ROOT / "README.md": "index.md", ROOT / "CONTRIBUTING.md": "add_a_family.md"}


CARDS = sorted((ROOT / "model_cards").glob("*.md"))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The cards are a section of the navigation."""
    config.nav.append({"Cards": [f"cards/{card.name}" for card in CARDS]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The cards become pages."""
    for card in CARDS:
        files.append(File.generated(config, f"cards/{card.name}", abs_src_path=str(card)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page with what it includes."""
    source = Path(page.file.abs_src_path)
    if source.parent == ROOT / "model_cards":
        markdown = relink(markdown, source.parent, page.file.src_uri, files)
    return INCLUDE.sub(lambda m: relink(section(ROOT / m[1], m[2]), ROOT, page.file.src_uri, files), markdown)


def section(file: Path, heading: str | None) -> str:
    """The text below a heading of a file, as `{{ }}` names it."""
    outside_code = re.split(r"(^```.*?^```$)", file.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = "".join(part if i % 2 == 0 else part.replace("\n#", "\n\0#") for i, part in enumerate(outside_code))
    start = rf"^(#+) {re.escape(heading)}\n" if heading else r"^(#+) .*\n"
    found = re.search(start, text, re.MULTILINE)
    if not found:
        raise PluginError(f"{file.name} has no heading {heading!r}")
    level = len(found[1]) if heading else 6
    return (
        re.split(rf"^#{{1,{level}}} ", text[found.end() :], maxsplit=1, flags=re.MULTILINE)[0].replace("\0", "").strip()
    )


def relink(text: str, folder: Path, page: str, files: Files) -> str:
    """`text` from a file in `folder` with links as they are from `page`."""

    def link(found: re.Match) -> str:
        picture, label, target, anchor = found.groups()
        if not target or "://" in target:
            return found[0]
        path = Path(os.path.normpath(folder / target))
        name = PAGES.get(path) or f"{'cards/' if path.parent.name == 'model_cards' else ''}{path.name}"
        if not files.get_file_from_path(name):
            return label
        return f"{picture}[{label}]({os.path.relpath(name, Path(page).parent)}{anchor or ''})"

    return LINK.sub(link, text)
