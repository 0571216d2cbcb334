"""The tables of both READMEs are those of the newest results; what is proved in minutes is proved here."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

from tests.scripts import load

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


SCRIPTS = [
    "lm", "attention", "tpu_schedule", "gpu_registers", "optim", "optim_training", "activations", "feed_forward", "kan",
    "kan_tables", "adapters", "prompts", "r_tuning", "rag", "plan", "parallel", "elastic", "fuzz", "imports",
]  # fmt: skip


def script(name: str):
    return load(BENCHMARKS / f"{name}.py")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_table_in_the_readme_is_what_was_measured(name):
    assert script(name).table() in (BENCHMARKS / "README.md").read_text()


def test_the_readmes_figures_are_the_newest_results():
    for name in ("quickstart", "headlines"):
        assert f"{script(name).table()}\n" in (BENCHMARKS.parent / "README.md").read_text()


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_what_a_script_imports_is_there(path):
    """Inside its functions as well: most of them run on other machines, and seldom."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jaxml":
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                known = hasattr(module, name) or importlib.util.find_spec(f"{node.module}.{name}")
                assert known, f"{node.module} has no {name}"


@pytest.mark.slow
@pytest.mark.optimised
def test_certainty_tells_what_was_told_from_what_was_not():
    found = script("r_tuning").proof(seed=1)
    assert found["knows_told"] > 0.95 and found["knows_untold"] < 0.3
    assert found["auroc_sure"] > 0.95
