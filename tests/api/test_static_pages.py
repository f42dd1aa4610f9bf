"""The pages: one small file each, nothing from elsewhere, no way for text to become markup."""

import re
from pathlib import Path

import pytest

import lightllm.api

PAGES = sorted((Path(lightllm.api.__file__).parent / "static").glob("*.html"))
# Ways by which text would be read as markup or as code.
FORBIDDEN = (
    "innerHTML",
    "outerHTML",
    "insertAdjacentHTML",
    "document.write",
    "eval(",
    "new Function",
    'onclick="',
)


def test_the_pages_exist():
    assert [page.name for page in PAGES] == ["cluster.html", "dashboard.html", "index.html"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_small_and_need_nothing_else(page):
    text = page.read_text("ascii")
    assert len(text.splitlines()) < 400
    assert '<link rel="stylesheet"' not in text
    assert not re.search(r"<script[^>]+src|@import|url\(", text)
    addresses = set(re.findall(r"https?://[^\s'\"]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name space, not a resource


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_text_never_becomes_markup(page):
    text = page.read_text("ascii")
    assert [word for word in FORBIDDEN if word in text] == []
    assert "default-src 'none'" in text
    assert "connect-src 'self'" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_are_kept_for_the_tab_only(page):
    text = page.read_text("ascii")
    assert "sessionStorage.setItem" in text
    assert "localStorage" not in text
    assert "document.cookie" not in text
