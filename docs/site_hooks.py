"""Hooks of mkdocs, named in mkdocs.yml: pages that stand outside of docs/, and the reference of all configuration keys."""

import re
from pathlib import Path

from key_reference import key_reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
TOP_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
PLACE = re.compile("<!-- keys -->.*<!-- /keys -->", re.DOTALL)
"""What `docs/configuration.md` says in the repository, where the reference stands on the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that stand at the top of the repository, their links to docs/ made to fit."""
    for page, source in TOP_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Writes the reference where a page has a place for it; links to files that the site lacks become the files' names."""
    for name, source in TOP_PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({name}")
    markdown = re.sub(r"\[[^\]]+\]\((?:\.\./)+([^)#\s]+)[^)]*\)", r"`\1`", markdown)
    return PLACE.sub(lambda _: key_reference(), markdown)
