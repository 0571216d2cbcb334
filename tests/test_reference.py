"""The API reference builds, and its links lead somewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("pdoc", reason="the extra 'docs' is not installed")
MAKEFILE = Path(__file__).parents[1] / "Makefile"


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.names = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.add(given["href"])


@pytest.mark.slow
def test_every_link_of_the_reference_leads_somewhere(tmp_path):
    [line] = re.findall(r"-m pdoc (.*)", MAKEFILE.read_text())
    options = line.replace("'", "").replace("build/api", str(tmp_path / "api")).split()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-m", "pdoc", *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    pages = {path: Page(path.read_text()) for path in (tmp_path / "api").rglob("*.html")}
    assert len(pages) > 20
    there = {str(path.relative_to(tmp_path / "api").with_suffix("")) for path in pages}
    for name in ("kan", "lm/cache", "lm/encoder", "tune/adapters", "tune/prompt", "tune/r_tuning", "parallel/hosts"):
        assert f"jaxml/{name}" in there
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if link.startswith("www."):  # of a docstring of Optax, whose optimizers are handed on
                continue
            if parts.scheme:
                assert parts.scheme in ("https", "http"), link
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target not in pages or (parts.fragment and unquote(parts.fragment) not in pages[target].names):
                broken.append(f"{path.name}: {link}")
    assert not broken, broken[:10]
