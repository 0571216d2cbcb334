"""The tables in benchmarks/README.md are those of the newest results."""

import importlib.util
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


SCRIPTS = [
    "table", "attention", "tpu_schedule", "optim", "optim_training", "activations", "feed_forward", "kan", "kan_tables",
    "adapters", "prompts", "r_tuning",
]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_table_in_the_readme_is_what_was_measured(script):
    spec = importlib.util.spec_from_file_location(f"benchmark_{script}", BENCHMARKS / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.table() in (BENCHMARKS / "README.md").read_text()
