"""GaLore, Fira and APOLLO in float64 numpy, one matrix, written from their papers, with canonical signs.

Directions only: each yields the update before the learning rate, so that W ← W − lr · update.
"""

import numpy as np


def adam(b1=0.9, b2=0.999, eps=1e-8):
    """A function from gradients to bias-corrected Adam directions (Kingma & Ba 2015, algorithm 1)."""
    m = v = 0.0
    t = 0

    def step(g):
        nonlocal m, v, t
        t += 1
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        return (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)

    return step


def leading(g, rank):
    """The first left singular vectors, each with its largest element positive."""
    u = np.linalg.svd(g, full_matrices=False)[0][:, :rank]
    return u * np.sign(u[np.abs(u).argmax(axis=0), np.arange(rank)])


def galore(gradients, *, rank, gap, scale, side, eps=1e-8):
    """Zhao et al. 2024, algorithm 2; side "left", "right" or "full". Yields α P N."""
    p = q = None
    inner = adam(eps=eps)
    for t, g in enumerate(gradients):
        if t % gap == 0:
            p = leading(g, rank) if side in ("left", "full") else None
            q = leading(g.T, rank) if side in ("right", "full") else None
        low = g if p is None else p.T @ g
        low = low if q is None else low @ q
        n = inner(low)
        n = n if p is None else p @ n
        yield scale * (n if q is None else n @ q.T)


def _limited(gamma=1.01):
    """The norm-growth limiter: ‖x_t‖ ≤ γ ‖x_{t−1}‖."""
    last = None

    def limit(x):
        nonlocal last
        norm = np.linalg.norm(x)
        if last is not None and norm > gamma * last:
            x = x * (gamma * last / norm)
        last = np.linalg.norm(x)
        return x

    return limit


def fira(gradients, *, rank, gap, scale):
    """Chen et al. 2024, "Fira", algorithm 1 with its code's residual G − α P PᵀG; basis on the left."""
    inner, limit, p = adam(), _limited(), None
    for t, g in enumerate(gradients):
        if t % gap == 0:
            p = leading(g, rank)
        low = p.T @ g
        n = inner(low)
        factor = np.linalg.norm(n, axis=0) / (np.linalg.norm(low, axis=0) + 1e-8)
        yield scale * p @ n + limit((g - scale * p @ low) * factor)


def apollo(gradients, bases, *, scale, whole):
    """Zhu et al. 2024, "APOLLO", algorithm 1; `bases`: the random one of each step, `whole`: one factor a matrix."""
    inner, limit = adam(), _limited()
    for g, p in zip(gradients, bases):
        low = p.T @ g
        n = inner(low)
        axis = None if whole else 0
        factor = np.linalg.norm(n, axis=axis) / (np.linalg.norm(low, axis=axis) + 1e-8)
        yield limit(np.sqrt(scale) * g * factor)
