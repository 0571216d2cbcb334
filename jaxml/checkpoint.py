"""Checkpoints through Orbax: `save`, `restore`, `latest`; written whole or not at all."""

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxml import files
from jaxml.checksum import checksum
from jaxml.parallel import hosts
from jaxml.paths import path_of

Tree = TypeVar("Tree")
DELETED = ".deleted"  # of a run's folder: checkpoints that are being deleted
CHECKSUM = "checksum"  # of a checkpoint's arrays, in its metadata


class Checkpoints:
    """The checkpoints of one run, in one folder; use it as a context manager.

    `save` returns while the files are still being written; the next `save`, `wait` or the end of the
    context waits for them and raises what went wrong. A checkpoint gets its name only when it is whole, so
    a crash or a full disk leaves the ones before it as they were.

    Args:
        folder: made if it is not there.
        keep: how many of the latest to keep (None: all).
        best: name of a metric given to `save`, the lowest of which is kept as well.
        read_only: delete nothing, not even what a killed process left half deleted.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, keep=1, best="loss") as checkpoints:
        ...     for step, loss in [(10, 0.5), (20, 0.7), (30, 0.6)]:
        ...         checkpoints.save(step, {"w": jnp.arange(3) + step}, {"loss": loss})
        ...     checkpoints.wait()
        ...     print(checkpoints.steps(), checkpoints.restore({"w": jnp.zeros(3, int)}, 10)["w"])
        [10, 30] [10 11 12]
    """

    def __init__(self, folder: str | Path, *, keep: int | None = 3, best: str | None = None, read_only: bool = False):
        import orbax.checkpoint as ocp

        policies = [ocp.checkpoint_managers.LatestN(keep)]
        if best is not None:
            number = lambda m: m[best] if math.isfinite(m[best]) else math.inf  # NaN is none of the lowest
            lowest = dict(get_metric_fn=number, reverse=True, n=1)
            policies.append(ocp.checkpoint_managers.BestN(**lowest, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=None if best is None else number,  # makes Orbax write the metrics
            best_mode="min",
            create=True,
            # What is deleted loses its name first: a process that is killed meanwhile leaves no half of it behind.
            todelete_subdir=DELETED,
        )
        where, handler = Path(folder).absolute(), ocp.StandardCheckpointHandler()
        if not read_only:
            hosts.together(lambda: _check_writable(where))
        with files.reading(where, "a run's checkpoints", more=(ValueError,)):
            self._manager = ocp.CheckpointManager(where, item_handlers=handler, options=options)
        self._writes = not read_only
        self._purge()

    def save(self, step: int, tree: Any, metrics: dict[str, float] | None = None) -> None:
        """Starts writing; overwrites nothing: a step that exists already is left as it is."""
        import orbax.checkpoint as ocp

        if step not in self._manager.all_steps():
            kept = {CHECKSUM: checksum(tree)}
            with self._writing():
                self._manager.wait_until_finished()
                self._purge()
                self._manager.save(step, args=ocp.args.StandardSave(tree), metrics=metrics, custom_metadata=kept)

    def wait(self) -> None:
        """Until all that was saved is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Orbax's errors, of this checkpoint or the one before it, as what they are."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            said = " ".join((str(error).splitlines() or [type(error).__name__])[0].split())[:300]
            many = jax.process_count() > 1
            see = (
                "see that all processes run, and to the disk, and start them all again"
                if many
                else "see to the disk, and start again"
            )
            raise OSError(
                f"{self._manager.directory}: a checkpoint could not be written ({said}). Those before it are whole: "
                f"{see}."
            ) from error

    def steps(self) -> list[int]:
        """The steps that are there, in order."""
        return sorted(self._manager.all_steps())

    def restore(self, template: Tree, step: int | None = None) -> Tree:
        """The tree saved at `step` (the latest where None), with the template's structure and shardings."""
        import orbax.checkpoint as ocp

        steps = self.steps()
        step = steps[-1] if step is None and steps else step
        folder = self._manager.directory
        if step not in steps:
            raise FileNotFoundError(f"{folder}: no checkpoint of step {step}; there are {steps or 'none'}.")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        with self._reading(step):
            saved = self._manager.item_metadata(step)
            saved = getattr(saved, "tree", saved)
            there, there_dtypes = (None, None) if saved is None else (_shapes(saved), _dtypes(saved))
        self._check(step, there, _shapes(abstract))
        with self._reading(step):
            told = (self._manager.metadata(step).custom_metadata or {}).get(CHECKSUM)
            tree = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        if told and there_dtypes == _dtypes(abstract) and told != checksum(tree):
            raise ValueError(self._damaged(step, "its numbers are not those that were saved"))
        return tree

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Whatever is raised is of a damaged checkpoint: that it fits the template is checked apart."""
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise plain Exception, too
            if closed := _closed(Path(self._manager.directory) / str(step)):
                raise PermissionError(f"{closed}: may not be read. See to its rights.") from error
            said = (str(error).splitlines() or [type(error).__name__])[0].partition("See full TensorStore")[0][:300]
            raise ValueError(self._damaged(step, said.strip())) from error

    def _damaged(self, step: int, said: str) -> str:
        folder = self._manager.directory
        return (
            f"{folder}: checkpoint {step} cannot be read ({said}). It is damaged; remove the folder "
            f"{folder / str(step)} to go on from the one before it."
        )

    def _check(self, step: int, there: dict[str, tuple] | None, wanted: dict[str, tuple]) -> None:
        """Paths and shapes first: Orbax's own complaint about them is pages long."""
        if there is None:
            raise ValueError(self._damaged(step, "it has no metadata"))
        differ = [k for k in sorted(set(there) | set(wanted)) if there.get(k) != wanted.get(k)]
        if differ:
            k = differ[0]
            raise ValueError(
                f"{self._manager.directory}: checkpoint {step} does not fit the template: {k} is "
                f"{there.get(k, 'absent')} in the checkpoint, {wanted.get(k, 'absent')} in the template. "
                "It belongs to another model, adapter or optimizer."
            )

    def close(self) -> None:
        with self._writing():
            self._manager.close()
        self._purge()
        if self._may_delete and self._deleted.is_dir() and not any(self._deleted.iterdir()):
            self._deleted.rmdir()

    @property
    def _deleted(self) -> Path:
        return Path(self._manager.directory) / DELETED

    @property
    def _may_delete(self) -> bool:
        """Who reads deletes nothing, and a link leads out of the folder."""
        return self._writes and hosts.is_main() and not self._deleted.is_symlink()

    def _purge(self) -> None:
        if self._may_delete:
            for path in self._deleted.glob("*"):
                shutil.rmtree(path, ignore_errors=True)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _closed(folder: Path) -> Path | None:
    """A file or folder of it that is there and may not be read."""
    for where, folders, names in os.walk(folder):
        for path in [Path(where), *(Path(where) / name for name in (*folders, *names))]:
            if path.exists() and not os.access(path, os.R_OK):
                return path
    return None


def _check_writable(folder: Path) -> None:
    """Raises OSError before Orbax's threads do: a process does not end by those.

    One try, not a look at the rights: whose they are, and of what file system, only that shows.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        Path(tempfile.mkdtemp(prefix=".try.", dir=folder)).rmdir()
    except OSError as error:
        raise OSError(
            f"{folder}: checkpoints cannot be written there ({error.strerror or error}). Choose a folder that can be "
            "written."
        ) from error


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path → shape; named fields, keys and indices are spelled alike, since Orbax stores all as keys."""
    return {path_of(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _dtypes(tree: Any) -> dict[str, str]:
    return {path_of(path): str(leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def save(
    folder: str | Path,
    step: int,
    tree: Any,
    *,
    metrics: dict[str, float] | None = None,
    keep: int | None = 3,
    best: str | None = None,
) -> None:
    """Writes a pytree of arrays as the checkpoint of `step` and waits until it is on disk.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, 10, {"w": jnp.arange(3.0)})
        ...     print(latest(folder), restore(folder, {"w": jnp.zeros(3)})["w"])
        10 [0. 1. 2.]
    """
    with Checkpoints(folder, keep=keep, best=best) as checkpoints:
        checkpoints.save(step, tree, metrics)


def restore(folder: str | Path, template: Tree, step: int | None = None) -> Tree:
    """Reads a checkpoint into the template's structure, dtypes and shardings; the latest where step is None.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: it does not fit the template, or is damaged.
        PermissionError: its files may not be read.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, 10, {"w": jnp.arange(3.0), "b": jnp.ones(2)})
        ...     tree = restore(folder, {"w": jnp.zeros(3, jnp.bfloat16), "b": jnp.zeros(2)})
        >>> tree["w"].dtype.name, tree["w"].tolist(), tree["b"].tolist()
        ('bfloat16', [0.0, 1.0, 2.0], [1.0, 1.0])
    """
    with _existing(folder) as checkpoints:
        return checkpoints.restore(template, step)


def latest(folder: str | Path) -> int | None:
    """The last step that was written whole, or None.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, 10, {"w": jnp.ones(3)})
        ...     print(latest(folder), latest(f"{folder}/another"))
        10 None
    """
    if not Path(folder).is_dir():
        return None
    with _existing(folder) as checkpoints:
        steps = checkpoints.steps()
    return steps[-1] if steps else None


@contextlib.contextmanager
def _existing(folder: str | Path) -> Iterator[Checkpoints]:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder.")
    with Checkpoints(folder, keep=None, read_only=True) as checkpoints:
        yield checkpoints
