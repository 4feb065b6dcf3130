"""README.md and docs: the generated table is current, links lead somewhere, commands exist, the README is short."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks.commands import app as benchmarks_app
from tests.docs import config_table
from vllm_adapmoe.cli.app import app as adapmoe_app

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
FENCE = re.compile(r"^(```.*?^```|(?: {4}|\t).*?$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
README_LINES = 150


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        number = 0
        while (name := f"{anchor}-{number}" if number else anchor) in found:
            number += 1
        found.add(name)
    return found


def test_keys_are_those_of_the_models():
    text = config_table.DOCUMENT.read_text()
    written = text.partition(config_table.BEGIN)[2].partition(config_table.END)[0].strip()
    assert written == config_table.markdown(), "run python -m tests.docs.config_table"


def test_every_key_has_a_meaning_and_its_bounds():
    table = config_table.markdown()
    assert "| `gating.threshold` | number |  | ≥ 0 | " in table
    assert '| `cache_gb` | number or `"auto"` | `"auto"` | > 0, ≤ 1000000 | ' in table
    assert "| `prefetch.lookahead` | integer | `3` | ≥ 0, ≤ 8 | " in table
    assert not re.search(r"\| +\|$", table, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_headings_of_a_page_differ(page):
    """A link to the first would otherwise lead to whichever comes first."""
    assert not [anchor for anchor in anchors(page) if re.fullmatch(r".+-\d", anchor) and anchor[:-2] in anchors(page)]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_commands_exist(page):
    text = page.read_text()
    for pattern, app in (
        (r"python -m benchmarks ([a-z_]+)", benchmarks_app),
        (r"(?:`|^ +)adapmoe ([a-z]+)", adapmoe_app),
    ):
        known = {command.name or command.callback.__name__ for command in app.registered_commands}
        assert set(re.findall(pattern, text, re.MULTILINE)) <= known


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES
