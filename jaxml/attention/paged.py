"""Decoding over a cache in pages: rows of any length share one store of keys and values.

A page holds the keys and values of `page` successive tokens of one row; which pages a row has, and in which order, says
its line of the table. Where pages come from is the caller's business: nothing here allocates.

Reference:
    Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention".
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxml.attention import tiles, tpu_paged, triton_paged
from jaxml.attention.dispatch import flash_attention
from jaxml.attention.triton_launch import by_jax_triton
from jaxml.axes import Array, Float, Int
from jaxml.target import platform


class Kernel(NamedTuple):
    """What attends to pages: (rules, query, key, value, table, lengths) → (out, log-sum-exp).

    Example:
        >>> import numpy as np
        >>> from jaxml.target import target
        >>> query, store, table = np.ones((1, 1, 2, 64), "f"), np.ones((4, 8, 128), "f"), np.array([[0]])
        >>> with target("NVIDIA H100"):
        ...     KERNELS["triton"].supports(query, store, store, table)
        'pages hold a multiple of 16 tokens, these 8'
    """

    supports: Callable[..., str | None]  # (query, key, value, table) → the reason why not
    attend: Callable


KERNELS = {
    "mosaic_tpu": Kernel(tpu_paged.supports, tpu_paged.attend),
    "triton": Kernel(triton_paged.supports, triton_paged.attend),
    "jax_triton": Kernel(
        triton_paged.jax_triton_supports, functools.partial(triton_paged.attend, launch=by_jax_triton)
    ),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """Keys and values of all rows, the heads of a token side by side, as the TPU kernel reads them.

    Example:
        >>> pages = Pages(jnp.zeros((4, 16, 128)), jnp.zeros((4, 16, 128)), num_heads=2)
        >>> pages.size
        16
    """

    key: Float[Array, "P page K*H"]
    value: Float[Array, "P page K*H2"]
    num_heads: int = dataclasses.field(metadata=dict(static=True))  # K

    @property
    def size(self) -> int:
        """Tokens of a page."""
        return self.key.shape[1]


def init(pages: int, size: int, num_heads: int, head_dim: int, value_dim: int | None = None, dtype=jnp.bfloat16):
    """Empty `Pages` of `size` tokens each (128 is good on TPUs; multiples of 16 at least).

    Example:
        >>> init(pages=8, size=16, num_heads=2, head_dim=64).key.shape
        (8, 16, 128)
    """
    lay = lambda width: jnp.zeros((pages, size, num_heads * width), dtype)
    return Pages(lay(head_dim), lay(value_dim or head_dim), num_heads)


def write(
    pages: Pages,
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H2"],
    table: Int[Array, "B n"],
    lengths: Int[Array, "B"],
) -> Pages:
    """The pages with the last T tokens of each row written; `lengths` count them already.

    Tokens before a row's beginning (where lengths[b] < T) and beyond its last page are left out. Two rows that write
    to one page must write to different places of it.

    Raises:
        ValueError: shapes that do not agree.

    Example:
        >>> pages = init(pages=3, size=16, num_heads=1, head_dim=1, dtype=jnp.float32)
        >>> new = jnp.array([7.0, 8.0]).reshape(1, 2, 1, 1)
        >>> pages = write(pages, new, new, table=jnp.array([[2, 0]]), lengths=jnp.array([17]))  # places 15 and 16
        >>> float(pages.key[2, 15, 0]), float(pages.key[0, 0, 0]), float(pages.key.sum())
        (7.0, 8.0, 15.0)
    """
    B, T, K, _ = key.shape
    wanted = {"key": (pages.key, key), "value": (pages.value, value)}
    for name, (store, new) in wanted.items():
        if new.ndim != 4 or new.shape[:3] != (B, T, pages.num_heads) or K * new.shape[3] != store.shape[2]:
            raise ValueError(
                f"paged.write: {name} has the shape [B, T, K, H] with K = {pages.num_heads} and K·H = "
                f"{store.shape[2]}, got {new.shape}."
            )
    _check_table(table, lengths, B)
    place = _last_places(lengths, T)
    column = place // pages.size
    page = jnp.take_along_axis(table, jnp.clip(column, 0, table.shape[1] - 1), axis=1)
    page = jnp.where((place >= 0) & (column < table.shape[1]), page, pages.key.shape[0])  # out of bounds: dropped
    put = lambda store, new: store.at[page, place % pages.size].set(
        new.reshape(B, T, -1).astype(store.dtype), mode="drop"
    )
    return dataclasses.replace(pages, key=put(pages.key, key), value=put(pages.value, value))


def paged_attention(
    query: Float[Array, "B T N H"],
    pages: Pages,
    table: Int[Array, "B n"],
    lengths: Int[Array, "B"],
    *,
    scale: float | None = None,
    local_window_size: int | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    return_residual: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N H2"] | tuple[Float[Array, "B T N H2"], Float[Array, "B T N"]]:
    """Causal attention of each row's last T tokens to its keys and values in pages.

    Args:
        query: of tokens lengths[b] − T, …, lengths[b] − 1 of row b; T is 1, or a few (speculation, a chunk of a
            prompt). N is a multiple of `pages.num_heads`.
        pages: hold the keys and values of those tokens already (`write`).
        table: the pages of each row in order; entries beyond its length are not read, but are valid page numbers.
        lengths: tokens of each row, the queries included; a row of length 0 gives 0.
        scale, logits_soft_cap, sinks: as in `flash_attention`.
        local_window_size: how far a query sees to the left; every token where None.
        return_residual: return the log-sum-exp of each query's logits as well.
        implementation: "mosaic_tpu", "triton" or "jax_triton" (GPUs, by name until they have run on one) or
            "blockwise" (pages gathered, then `flash_attention`); what runs best where None.

    Returns:
        The output in query's dtype; queries before a row's beginning are 0. With `return_residual` also the
        log-sum-exp, [B, T, N].

    Raises:
        ValueError: shapes or dtypes that do not agree.
        NotImplementedError: the named implementation cannot do it; says why.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> pages = init(pages=8, size=16, num_heads=2, head_dim=64)
        >>> table, lengths = jnp.array([[3, 5], [0, 1]]), jnp.array([20, 7])
        >>> new = jax.random.normal(jax.random.key(0), (2, 1, 2, 64), jnp.bfloat16)
        >>> pages = write(pages, new, new, table, lengths)
        >>> paged_attention(jnp.ones((2, 1, 8, 64), jnp.bfloat16), pages, table, lengths).shape
        (2, 1, 8, 64)
    """
    _check(query, pages, table, lengths, local_window_size, sinks)
    rules = tpu_paged.Rules(
        scale=query.shape[3] ** -0.5 if scale is None else float(scale),
        window=local_window_size,
        soft_cap=logits_soft_cap,
        num_heads=pages.num_heads,
    )
    if implementation not in (None, "blockwise", *KERNELS):
        raise ValueError(
            f"paged_attention: implementation is one of blockwise, {', '.join(KERNELS)}, got {implementation!r}."
        )
    by = implementation or ("mosaic_tpu" if platform() == "tpu" else "blockwise")
    if by in KERNELS:
        reason = KERNELS[by].supports(query, pages.key, pages.value, table)
        if reason is not None and implementation is not None:
            raise NotImplementedError(f"paged_attention: {by} cannot do this: {reason}. blockwise can.")
        by = "blockwise" if reason is not None else by
    attend = functools.partial(_by_kernel, by) if by in KERNELS else _gathered
    out, lse = attend(rules, query, pages.key, pages.value, table, lengths)
    if sinks is not None:
        out, lse = tiles.add_sinks(out, lse, sinks[None, None])
    out = out.astype(query.dtype)
    return (out, lse) if return_residual else out


def _gathered(rules, query, key, value, table, lengths):
    """The definition: each row's pages end to end, then attention over them."""
    B, T = query.shape[:2]
    page, count = key.shape[1], table.shape[1]
    written = (jnp.arange(count * page, dtype=lengths.dtype)[None] < lengths[:, None])[..., None, None]

    def whole(a):
        a = a[table].reshape(B, count * page, rules.num_heads, -1)
        return jnp.where(written, a, 0).astype(query.dtype)  # places never written may hold anything

    key, value = whole(key), whole(value)
    at = _last_places(lengths, T)
    return flash_attention(
        query, key, value, scale=rules.scale, is_causal=True, logits_soft_cap=rules.soft_cap,
        local_window_size=None if rules.window is None else (rules.window, 0), q_positions=at,
        kv_positions=jnp.arange(key.shape[1], dtype=at.dtype)[None], return_residual=True, implementation="blockwise",
    )  # fmt: skip


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _by_kernel(by: str, rules, query, key, value, table, lengths):
    attend = jax.custom_batching.custom_vmap(functools.partial(KERNELS[by].attend, rules))
    attend.def_vmap(functools.partial(_by_kernel_mapped, by, rules))
    return attend(query, key, value, table, lengths)


def _by_kernel_mapped(by: str, rules, size: int, batched, query, key, value, table, lengths):
    """The kernel under `vmap`: more rows, and where the pages are mapped as well, more pages."""
    spread = lambda a, has: a if has else jnp.broadcast_to(a, (size, *a.shape))
    flat = lambda a: a.reshape(-1, *a.shape[2:])
    query, table, lengths = (spread(a, has) for a, has in zip((query, table, lengths), (batched[0], *batched[3:])))
    if batched[1] or batched[2]:
        key, value = spread(key, batched[1]), spread(value, batched[2])
        table = table + key.shape[1] * jnp.arange(size, dtype=table.dtype)[:, None, None]
        key, value = flat(key), flat(value)
    out = _by_kernel(by, rules, flat(query), key, value, flat(table), flat(lengths))
    return tuple(a.reshape(size, -1, *a.shape[1:]) for a in out), (True, True)


@_by_kernel.defjvp
def _(by, rules, primals, dots):
    return _by_kernel(by, rules, *primals), jax.jvp(functools.partial(_gathered, rules), primals, dots)[1]


def _last_places(lengths: Int[Array, "B"], T: int) -> Int[Array, "B T"]:
    """Where the last T tokens of each row are; below 0 before its beginning."""
    return lengths[:, None] - T + jnp.arange(T, dtype=lengths.dtype)[None]


def _check(query, pages, table, lengths, window, sinks) -> None:
    if query.ndim != 4 or 0 in query.shape:
        raise ValueError(f"paged_attention: query has 4 axes [B, T, N, H], none of them empty, got {query.shape}.")
    B, _, N, H = query.shape
    K = pages.num_heads
    if N % K:
        raise ValueError(f"paged_attention: query's heads are a multiple of the pages' {K}, got {N}.")
    if pages.key.ndim != 3 or pages.key.shape[2] != K * H:
        raise ValueError(
            f"paged_attention: pages.key has the shape [P, page, K·H] with K·H = {K} · {H}, got {pages.key.shape}."
        )
    if pages.value.shape[:2] != pages.key.shape[:2] or pages.value.shape[2] % K:
        raise ValueError(
            f"paged_attention: pages.value has the shape [P, page, K·H2] = {(*pages.key.shape[:2], f'{K}·H2')}, "
            f"got {pages.value.shape}."
        )
    _check_table(table, lengths, B)
    if window is not None and window < 0:
        raise ValueError(f"paged_attention: local_window_size is at least 0, got {window}.")
    if sinks is not None and sinks.shape != (N,):
        raise ValueError(f"paged_attention: sinks have the shape [N] = {(N,)}, got {sinks.shape}.")


def _check_table(table, lengths, B: int) -> None:
    if table.ndim != 2 or table.shape[0] != B or not jnp.issubdtype(table.dtype, jnp.integer):
        raise ValueError(
            f"paged attention: the table holds page numbers, [B, n] with B = {B}, got {table.dtype}{table.shape}."
        )
    if lengths.shape != (B,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"paged attention: lengths are integers [B] = {(B,)}, got {lengths.dtype}{lengths.shape}.")
