"""Every example in a docstring runs, and the README says what is there."""

import contextlib
import doctest
import importlib
import inspect
import io
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


BLOCKS = re.findall(r"```python\n(.*?)```\n```\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_readmes_examples_print_what_it_says(number, smollm2, tmp_path, monkeypatch):
    code, printed = BLOCKS[number]
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert said.getvalue() == printed


def test_the_readme_has_examples():
    assert len(BLOCKS) == 3


PACKAGES = ["jaxml", *(m.name for m in pkgutil.walk_packages(jaxml.__path__, "jaxml.") if m.ispkg)]


@pytest.mark.parametrize("name", [name for name in PACKAGES if name != "jaxml.cli"])
def test_every_public_name_has_an_example(name):
    package = importlib.import_module(name)
    public = [getattr(package, known) for known in package.__all__]
    for module in filter(inspect.ismodule, list(public)):  # names that are said after their module's
        if not hasattr(module, "__path__"):
            there = [o for known, o in vars(module).items() if not known.startswith("_")]
            public += [o for o in there if getattr(o, "__module__", "") == module.__name__]
    ours = [o for o in public if (inspect.isfunction(o) or inspect.isclass(o)) and o.__module__.startswith("jaxml")]
    assert not [f"{o.__module__}.{o.__qualname__}" for o in ours if ">>>" not in (inspect.getdoc(o) or "")]


WANTS = README.read_text().partition("## I want to …")[2].partition("## Measured")[0]
ROWS = [line for line in WANTS.splitlines() if line.startswith("| ") and "`" in line]


def test_the_readme_names_what_there_is():
    from jaxml import tune

    inside = {"adapters": tune.adapters, "prompt": tune.prompt, "r_tuning": tune.r_tuning}
    dotted = r"(?<![\w/.\"])(" + "|".join([*jaxml.__all__, *inside]) + r")((?:\.[A-Za-z_]\w*)+)"
    found = [match for code in re.findall(r"`([^`]+)`", WANTS) for match in re.findall(dotted, code)]
    assert len(found) > 80
    for first, rest in found:
        value = inside.get(first) or getattr(jaxml, first)
        for name in rest.split(".")[1:]:
            assert hasattr(value, name), f"{first}{rest}"
            value = getattr(value, name)


@pytest.mark.parametrize("row", [row for row in ROWS if "](colab/" in row], ids=lambda row: row[2:40])
def test_a_notebook_that_the_readme_names_shows_the_thing(row):
    [name] = re.findall(r"\(colab/(\w+)\.ipynb\)", row)
    source = (README.parent / "colab" / f"{name}.py").read_text()
    called = {word for code in re.findall(r"`([^`]+)`", row) for word in re.findall(r"\b([A-Za-z_]{4,})[(\[]", code)}
    assert not called or any(word in source for word in called), called


def test_the_readme_tree_names_every_file_and_only_those():
    text = README.read_text()
    tree = text[text.index("```\njaxml/") :].split("```")[1]
    named = set(re.findall(r"[\w]+\.py\b", tree))
    there = {p.name for p in Path(jaxml.__path__[0]).rglob("*.py")} - {"__init__.py"}
    assert named == there, f"only in README: {named - there}; only on disk: {there - named}"
