"""The notebooks run, in their smallest sizes, and what is stored of them is what they say."""

import re
import warnings
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="the extra 'notebooks' is not installed")
pytest.importorskip("jupytext", reason="the extra 'notebooks' is not installed")
import nbformat

from tests.scripts import load

COLAB = Path(__file__).parents[1] / "colab"


BUILD = load(COLAB / "build.py")


def outputs(notebook):
    return [(cell, out) for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]


def test_the_readme_shows_the_notebooks_picture():
    name, picture = BUILD.PICTURE
    stored = nbformat.read(COLAB / f"{name}.ipynb", as_version=4)
    assert (COLAB / picture).read_bytes() == BUILD.pictures(stored)[0]
    assert f"(colab/{picture})" in (COLAB.parent / "README.md").read_text()


def test_there_are_nine():
    assert [name[:2] for name in BUILD.NAMES] == [f"{n:02}" for n in range(1, 10)]


@pytest.mark.parametrize("name", BUILD.NAMES)
def test_what_is_stored_is_the_source_with_its_outputs(name):
    stored = nbformat.read(COLAB / f"{name}.ipynb", as_version=4)
    nbformat.validate(stored)
    source = BUILD.source(name)
    assert [(c.cell_type, c.source) for c in stored.cells] == [(c.cell_type, c.source) for c in source.cells]
    title, *_, last = stored.cells
    assert title.source.startswith("# ") and f"blob/main/colab/{name}.ipynb" in title.source
    assert sum(c.source.startswith("%pip install") for c in stored.cells) == 1
    assert "jax.devices()" in "".join(c.source for c in stored.cells) and last.cell_type == "markdown"
    found = outputs(stored)
    assert not [out for _, out in found if out.output_type == "error" or out.get("name") == "stderr"]
    assert len(BUILD.pictures(stored)) >= 1
    made = re.compile(r"^(\w+(, \w+)* = |def |import |from )", re.MULTILINE)
    for cell in stored.cells:  # no dead cells: each draws, prints or defines what a later one takes
        if cell.cell_type == "code" and not cell.source.startswith("%pip"):
            assert cell.outputs or made.search(cell.source), cell.source


@pytest.mark.parametrize("name", BUILD.NAMES)
def test_every_plot_says_what_it_shows(name):
    for cell in BUILD.source(name).cells:
        if "plt.show()" in cell.source:
            for word in ("title=", "xlabel=", "ylabel="):
                assert word in cell.source, f"{name}: a plot without {word}"


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILD.NAMES)
def test_it_runs(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Jupyter's own packages
        made = BUILD.execute(name, smoke=True)
    said = [out.text for _, out in outputs(made) if out.get("name") == "stderr"]
    assert not said, said
