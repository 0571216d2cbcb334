"""One table of calls: heads of real models and ugly edges. Every test and benchmark of attention takes it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxml.attention import masks


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes of a call, and a function (case, random generator) → its other arguments."""

    name: str
    B: int = 1
    T: int = 64
    S: int | None = None
    N: int = 2
    K: int = 2
    H: int = 16
    H2: int | None = None
    options: Callable[["Case", np.random.Generator], dict[str, Any]] = lambda case, rng: {}

    def arrays(self, dtype=jnp.float32, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
        """query, key, value."""
        S, H2 = self.S or self.T, self.H2 or self.H
        shapes = (self.B, self.T, self.N, self.H), (self.B, S, self.K, self.H), (self.B, S, self.K, H2)
        keys = jax.random.split(jax.random.key(seed), 3)
        return tuple(jax.random.normal(k, shape, jnp.float32).astype(dtype) for k, shape in zip(keys, shapes))

    def kwargs(self, dtype=jnp.float32, seed: int = 0) -> dict[str, Any]:
        """The other arguments; floating arrays in the given dtype."""
        out = self.options(self, np.random.default_rng(seed))
        cast = lambda a: jnp.asarray(a, dtype if np.issubdtype(a.dtype, np.floating) else None)
        return {k: cast(v) if isinstance(v, np.ndarray) else v for k, v in out.items()}

    def scaled(self, **fields) -> "Case":
        """The same case in another size."""
        return dataclasses.replace(self, **fields)


def _fixed(**options):
    return lambda case, rng: dict(options)


def _segments(case, rng):
    ids = lambda n: np.sort(rng.integers(0, 4, (case.B, n)), axis=1).astype(np.int32)
    q = ids(case.T)
    return dict(is_causal=True, q_segment_ids=q, kv_segment_ids=q if case.S is None else ids(case.S))


def _bias(*axes: str):
    """A bias that has the named axes of B, N, T, S and broadcasts the others."""

    def options(case, rng):
        full = dict(B=case.B, N=case.N, T=case.T, S=case.S or case.T)
        return dict(bias=rng.standard_normal([full[a] if a in axes else 1 for a in "BNTS"]).astype(np.float32))

    return options


def _positions(case, rng):
    S = case.S or case.T
    q = np.stack([rng.permutation(case.T) for _ in range(case.B)]).astype(np.int32)
    kv = np.stack([rng.permutation(S) for _ in range(case.B)]).astype(np.int32)
    return dict(is_causal=True, q_positions=q, kv_positions=kv)


def _lengths(case, rng):
    draw = lambda n: rng.integers(0, n + 1, case.B).astype(np.int32)
    return dict(query_seq_lengths=draw(case.T), key_value_seq_lengths=draw(case.S or case.T))


def _dense(case, rng):
    mask = rng.random((case.B, 1, case.T, case.S or case.T)) < 0.4
    mask[:, :, ::7] = False  # rows that see nothing
    return dict(mask=mask)


def _sinks(case, rng):
    return dict(is_causal=True, sinks=rng.standard_normal(case.N).astype(np.float32))


def _alibi(case, rng):
    slopes = jnp.asarray(2.0 ** -np.arange(1, case.N + 1), jnp.float32)
    return dict(is_causal=True, score_mod=lambda s, b, h, q, k: s - slopes[h] * (q - k))


def _algebra(case, rng):
    prefix = masks.Prefix(jnp.asarray(rng.integers(0, case.T, case.B), jnp.int32))
    odd = masks.Fn(lambda b, h, q, k: (q + k + h) % 3 == 0)
    return dict(mask=((masks.Causal() & masks.Window(left=9)) | prefix) & ~odd)


def _dropout(case, rng):
    return dict(is_causal=True, dropout_rate=0.3, dropout_key=jax.random.key(5))


CASES = (
    Case("plain"),
    Case("causal", options=_fixed(is_causal=True)),
    Case("one query", T=1, S=70, N=4, options=_fixed()),
    Case("one key", T=9, S=1),
    Case("odd lengths", B=2, T=67, S=41, N=3, K=1, H=20, options=_fixed(is_causal=True)),
    Case("more queries than keys, causal", T=70, S=33, options=_fixed(is_causal=True)),
    Case("grouped heads", B=2, N=6, K=2, options=_fixed(is_causal=True)),
    Case("multi-query", N=4, K=1, options=_fixed(is_causal=True, scale=0.3)),
    Case("wide values", H=24, H2=16, options=_fixed(is_causal=True)),
    Case("narrow heads", H=3, H2=5),
    Case("window", T=75, options=_fixed(is_causal=True, local_window_size=(11, 0))),
    Case("window to both sides", T=75, options=_fixed(local_window_size=(5, 17))),
    Case("packed", B=2, T=71, options=_segments),
    Case("packed, other keys", B=2, T=40, S=71, options=_segments),
    Case("lengths", B=4, options=_lengths),
    Case("positions", B=2, T=50, S=66, N=4, options=_positions),
    Case("dense mask, rows without keys", B=2, T=70, N=4, options=_dense),
    Case("bias", B=2, T=70, N=4, K=2, options=_bias("B", "N", "T", "S")),
    Case("bias of heads", B=2, N=4, options=_bias("N", "T", "S")),
    Case("bias of keys", B=2, T=70, options=_bias("B", "S")),
    Case("bias of queries", B=2, T=70, options=_bias("N", "T")),
    Case("soft cap", T=70, options=_fixed(is_causal=True, logits_soft_cap=1.5)),
    Case("sinks", B=2, T=70, N=4, options=_sinks),
    Case("ALiBi", T=70, N=4, options=_alibi),
    Case("algebra of masks", B=2, T=75, options=_algebra),
    Case("dropout", B=2, T=70, options=_dropout),
)

# Heads of real models, for benchmarks (the length is the benchmark's own).
MODELS = (
    Case("SmolLM2-135M", N=9, K=3, H=64, options=_fixed(is_causal=True)),
    Case("Llama 3 8B", N=32, K=8, H=128, options=_fixed(is_causal=True)),
    Case("Gemma 2 9B, local", N=16, K=8, H=256, options=_fixed(is_causal=True, local_window_size=(4095, 0))),
    Case("DeepSeek V3 (MLA)", N=128, K=128, H=192, H2=128, options=_fixed(is_causal=True)),
    Case("BERT base", N=12, K=12, H=64),
)
