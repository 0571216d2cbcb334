"""Optional packages: imported where they are used, with the name of the extra that brings them."""

import importlib
import importlib.metadata
from types import ModuleType


def need(module: str, extra: str) -> ModuleType:
    """Imports an optional package.

    Raises:
        ImportError: it is not installed; names the extra to install.

    Example:
        >>> need("math", "plot").sqrt(4.0)
        2.0
        >>> need("none", "plot")
        Traceback (most recent call last):
            ...
        ImportError: this needs the package 'none', which is not installed. Install it with: pip install "jaxml[plot]"
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise ImportError(
            f"this needs the package {module.split('.')[0]!r}, which is not installed. "
            f'Install it with: pip install "jaxml[{extra}]"'
        ) from error


def version(package: str) -> str | None:
    """The installed version, or None.

    Example:
        >>> version("jax") is None, version("no-such-package") is None
        (False, True)
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
