"""Executes notebooks: NN_name.py is what one edits, NN_name.ipynb the same with its outputs.

    python colab/build.py                    # all of them, in full; minutes each on a CPU
    python colab/build.py 01_kan 02_activations
    python colab/build.py --smoke            # in their smallest sizes; writes nothing

A notebook is executed in an empty folder by the Python that runs this script, without the cells that install packages.
Needs the extra "notebooks".
"""

import argparse
import base64
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PICTURE = "05_lora_qlora_galore", "learned.png"  # the notebook whose first picture the README shows, and as what
NAMES = sorted(path.stem for path in HERE.glob("[0-9]*.py"))


def source(name: str):
    """The notebook of a name, without outputs."""
    import jupytext

    notebook = jupytext.read(HERE / f"{name}.py", fmt="py:percent")
    notebook.metadata = {
        "accelerator": "TPU",
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"{name[:2]}-{number:02d}"
        cell.metadata = {}
    return notebook


def execute(name: str, smoke: bool = False):
    """The same with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: of a cell that failed.
    """
    from nbclient import NotebookClient

    notebook = source(name)
    installing = {cell.id: cell.source for cell in notebook.cells if cell.source.startswith("%pip")}
    for cell in notebook.cells:
        cell.source = "" if cell.id in installing else cell.source
    before = dict(os.environ)
    os.environ.pop("JAXML_SMOKE", None)
    # Many small programs, each run a few times: what matters is that they compile quickly.
    os.environ |= {"JAXML_SMOKE": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if smoke else {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            where = {"metadata": {"path": folder}}
            NotebookClient(notebook, timeout=3600, coalesce_streams=True, resources=where).execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
    for cell in notebook.cells:
        cell.source = installing.get(cell.id, cell.source)
        cell.metadata = {}  # times
    return notebook


def pictures(notebook) -> list[bytes]:
    """The pictures of an executed notebook, in order."""
    shown = [out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", ())]
    return [base64.b64decode(data["image/png"]) for data in shown if "image/png" in data]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--smoke", action="store_true", help="smallest sizes; nothing is written")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in NAMES]:
        sys.exit(f"build: a notebook is one of {', '.join(NAMES)}, got {unknown[0]!r}.")
    import nbformat

    for name in options.names:
        made = execute(name, options.smoke)
        if not options.smoke:
            part = HERE / f".{name}.ipynb"
            part.write_text(nbformat.writes(made, version=4) + "\n")
            part.replace(HERE / f"{name}.ipynb")
            if name == PICTURE[0]:
                (HERE / PICTURE[1]).write_bytes(pictures(made)[0])
        print(name, flush=True)


if __name__ == "__main__":
    main()
