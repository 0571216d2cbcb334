import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml.kan import conv
from jaxml.kan import layer as layers
from jaxml.kan.layer import Spec


def by_definition(params, x, kernel):
    """Every patch through one layer of edges ("VALID", stride 1, two dimensions)."""
    spec = params.spec
    points = jnp.tile(params.points, (kernel[0] * kernel[1], 1))
    flat = layers.Layer(
        params.coef.reshape(spec.size, -1, params.coef.shape[-1]), params.base.reshape(-1, params.base.shape[-1]),
        points, None, (), spec,
    )  # fmt: skip
    rows, columns = x.shape[1] - kernel[0] + 1, x.shape[2] - kernel[1] + 1
    patches = [x[:, r : r + rows, c : c + columns] for r in range(kernel[0]) for c in range(kernel[1])]
    return layers.apply(flat, jnp.concatenate(patches, axis=-1))


@pytest.mark.parametrize("basis", ["bspline", "chebyshev"])
def test_it_is_a_layer_of_edges_at_every_patch(basis):
    params = conv.init(jax.random.key(0), (3, 5), (2, 3), Spec(grid=4, basis=basis))
    x = jax.random.uniform(jax.random.key(1), (2, 6, 7, 3), minval=-1.0)
    np.testing.assert_allclose(conv.apply(params, x, padding="VALID"), by_definition(params, x, (2, 3)), atol=1e-5)


def test_groups_are_convolved_apart():
    params = conv.init(jax.random.key(0), (4, 6), (3,), groups=2)
    x = jax.random.uniform(jax.random.key(1), (2, 9, 4))
    y = conv.apply(params, x, groups=2)
    changed = conv.apply(params, x.at[..., 2:].add(0.3), groups=2)
    np.testing.assert_array_equal(y[..., :3], changed[..., :3])
    assert np.all(np.any(y[..., 3:] != changed[..., 3:], axis=1))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_strides_padding_and_dilation_of_any_number_of_axes(axes):
    params = conv.init(jax.random.key(0), (2, 3), (3,) * axes)
    x = jnp.zeros((1, *(8,) * axes, 2))
    assert conv.apply(params, x, strides=2).shape == (1, *(4,) * axes, 3)
    assert conv.apply(params, x, padding="VALID", dilation=2).shape == (1, *(4,) * axes, 3)
    grads = jax.grad(lambda p: jnp.sum(conv.apply(p, x + 0.1) ** 2))(params)
    assert np.all(np.isfinite(grads.coef)) and np.any(grads.coef != 0)


def test_what_does_not_fit_is_told():
    params = conv.init(jax.random.key(0), (2, 3))
    with pytest.raises(ValueError, match=r"x is \[N, 2 spatial axes, 2\]"):
        conv.apply(params, jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="one to three extents"):
        conv.init(jax.random.key(0), (2, 3), ())
    for kernel in (3, np.int64(3)):
        with pytest.raises(ValueError, match=r"kernel has an extent for each spatial axis, got 3\. Write \(3, 3\)"):
            conv.init(jax.random.key(0), (2, 4), kernel)
    for groups in (2, 0):
        with pytest.raises(ValueError, match="groups divide the channels"):
            conv.init(jax.random.key(0), (3, 4), groups=groups)


def test_pixels_are_numbers():
    params = conv.init(jax.random.key(0), (2, 3))
    x = jax.random.randint(jax.random.key(1), (1, 4, 4, 2), 0, 2)
    np.testing.assert_array_equal(conv.apply(params, x), conv.apply(params, x.astype(jnp.float32)))
