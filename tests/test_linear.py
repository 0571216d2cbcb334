import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxml.linear import linear

calls = []


@jax.custom_jvp
def layer(x, w):
    return jnp.sin(x @ w)


@layer.defjvp
def _(primals, dots):
    def forward(xw, dots):
        return jnp.cos(xw[0] @ xw[1]) * (dots[0] @ xw[1] + xw[0] @ dots[1])

    def transpose(xw, ct):
        calls.append(1)
        ct = ct * jnp.cos(xw[0] @ xw[1])
        return ct @ xw[1].T, xw[0].T @ ct

    return layer(*primals), linear(forward, transpose, primals, dots)


plain = lambda x, w: jnp.sin(x @ w)
loss = lambda f: lambda x, w: jnp.sum(f(x, w) ** 3)
both = lambda x: jnp.stack([x, 0.5 * x])
WAYS = {
    "grad": lambda f: jax.grad(loss(f), (0, 1)),
    "jit of grad": lambda f: jax.jit(jax.grad(loss(f), (0, 1))),
    "jacfwd": lambda f: jax.jacfwd(loss(f), (0, 1)),
    "forward over reverse": lambda f: jax.hessian(loss(f), (0, 1)),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(loss(f))),
    "reverse over reverse": lambda f: jax.jacrev(jax.jacrev(loss(f), (0, 1)), (0, 1)),
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(loss(f), (0, 1)), (0, 1)),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(loss(f)), (0, 1)),
    "vmap of grad": lambda f: lambda x, w: jax.vmap(jax.grad(loss(f), (0, 1)), (0, None))(both(x), w),
    "grad of vmap": lambda f: jax.grad(lambda x, w: jnp.sum(jax.vmap(f, (None, 0))(x, both(w)) ** 2), (0, 1)),
    "hessian of vmap": lambda f: jax.hessian(lambda x, w: jnp.sum(jax.vmap(f, (0, None))(both(x), w) ** 2)),
    "scan": lambda f: jax.grad(
        lambda x, w: jax.lax.scan(lambda c, _: (c + jnp.sum(f(x, w) * c), None), 1.0, length=3)[0], (0, 1)
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_transformation_equals_plain_autodiff(way):
    x, w = jax.random.normal(jax.random.key(0), (3, 4)), jax.random.normal(jax.random.key(1), (4, 5))
    calls.clear()
    ours, theirs = WAYS[way](layer)(x, w), WAYS[way](plain)(x, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), ours, theirs)
    assert calls or way in ("jacfwd", "forward over forward")  # the transpose given is the one that runs


def test_inside_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    x, w = jax.random.normal(jax.random.key(0), (8, 4)), jax.random.normal(jax.random.key(1), (4, 5))
    grad = lambda f: jax.grad(loss(f), (0, 1))
    ours = jax.shard_map(grad(layer), mesh=mesh, in_specs=(P("data"), P()), out_specs=(P("data"), P()))(x, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, grad(plain)(x, w))
