"""The pages: no link is dead, the README stays short, and each page begins with what its reader can do."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links() -> list[tuple[Path, str]]:
    return [(page, link) for page in PAGES for link in LINK.findall(page.read_text(encoding="utf-8"))]


def test_pages_and_links_are_there():
    assert len(PAGES) >= 5 and len(links()) >= 10


@pytest.mark.parametrize("page,link", links(), ids=lambda value: value if isinstance(value, str) else value.name)
def test_a_link_leads_somewhere(page, link):
    if link.startswith(("http://", "https://")):
        return  # no network here; that it is an address is all that can be said
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    assert target.exists(), f"{page.name} links to {link}"
    if anchor:
        assert anchor in anchors(target), f"{page.name} links to {link}"


def test_the_readme_is_read_in_two_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if page.name != "recipes.md"], ids=lambda page: page.name)
def test_a_page_begins_with_what_its_reader_can_do(page):
    assert "you can" in page.read_text(encoding="utf-8")[:400]
