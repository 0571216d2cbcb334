"""Every example in a docstring runs, and the README says what is there."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import jaxml

MODULES = sorted(m.name for m in pkgutil.walk_packages(jaxml.__path__, "jaxml."))
LONG = {"jaxml.kan.discover", "jaxml.kan.fit", "jaxml.kan.attribution"}
NEEDS = {"jaxml.quant.kernel_jax_triton": "triton", "jaxml.rag.qdrant": "qdrant_client"}
README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("name", [pytest.param(m, marks=pytest.mark.slow) if m in LONG else m for m in MODULES])
def test_examples_in_docstrings_run(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    assert doctest.testmod(module).failed == 0


def test_the_readme_tree_names_every_file_and_only_those():
    text = README.read_text()
    tree = text[text.index("```\njaxml/") :].split("```")[1]
    named = set(re.findall(r"[\w]+\.py\b", tree))
    there = {p.name for p in Path(jaxml.__path__[0]).rglob("*.py")} - {"__init__.py"}
    assert named == there, f"only in README: {named - there}; only on disk: {there - named}"
