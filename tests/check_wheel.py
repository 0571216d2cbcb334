"""What must hold of an installed wheel with its base dependencies and nothing else; run by that environment's Python.

python -m venv clean && clean/bin/pip install dist/*.whl && clean/bin/python tests/check_wheel.py
"""

import contextlib
import importlib
import io
import json
import sys
import tempfile
from pathlib import Path

NEEDS = {  # extra → a call that needs it
    "lm": lambda folder: importlib.import_module("jaxml.lm.sandbox").render("x"),
    "facts": lambda folder: importlib.import_module("jaxml.tune.facts").make(),
    "prompts": lambda folder: importlib.import_module("jaxml.prompts").Endpoint("http://localhost/v1", "x"),
    "rag": lambda folder: list(importlib.import_module("jaxml.rag.read").read(folder / "a.pdf")),
    "plot": lambda folder: importlib.import_module("jaxml.activations.plot").gallery(folder / "a.png"),
    "symbolic": lambda folder: importlib.import_module("jaxml.kan").discover(None, [[0.0]], [0.0]),
    "pykan": lambda folder: importlib.import_module("jaxml.kan.pykan").load(folder / "a"),
    "tpu": lambda folder: importlib.import_module("jaxml.parallel.topology").devices("v5e:2x2"),
}


def main() -> None:
    import jaxml

    here = Path(jaxml.__file__)
    assert "site-packages" in here.parts, f"this is not an installed wheel: {here}"
    for name in jaxml.__all__:
        importlib.import_module(f"jaxml.{name}")
    loaded = {"torch", "transformers", "matplotlib", "sympy", "tokenizers", "httpx", "jinja2"} & set(sys.modules)
    assert not loaded, f"importing jaxml imports {loaded}"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.pdf").write_bytes(b"%PDF-1.4")
        for extra, call in NEEDS.items():
            try:
                call(Path(folder))
            except ImportError as error:
                assert f"jaxml[{extra}]" in str(error), f"{extra}: {error}"
            else:
                raise AssertionError(f"{extra}: no error without its packages")
    from jaxml.cli.main import main as cli

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert cli(["doctor", "--json"]) == 0
    report = json.loads(said.getvalue())
    assert report["packages"]["jaxml"] == jaxml.__version__ and report["extras_missing"]["lm"], report

    import jax

    from jaxml import kan

    assert kan.apply(kan.init(jax.random.key(0), [2, 3, 1]), jax.numpy.zeros((4, 2))).shape == (4, 1)
    print(f"jaxml {jaxml.__version__} with jax {jax.__version__}, Python {sys.version.split()[0]}: good")


if __name__ == "__main__":
    main()
