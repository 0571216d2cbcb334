"""Every activation that torch has too, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxml import activations
from jaxml.activations import learnable

torch = pytest.importorskip("torch")
F = torch.nn.functional

FIXED = {
    "relu": F.relu, "relu6": F.relu6, "leaky_relu": F.leaky_relu, "identity": torch.nn.Identity(), "elu": F.elu,
    "celu": F.celu, "selu": F.selu, "gelu_exact": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu, "mish": F.mish, "softplus": F.softplus, "soft_sign": F.softsign, "sigmoid": torch.sigmoid,
    "log_sigmoid": F.logsigmoid, "tanh": torch.tanh, "tanh_shrink": F.tanhshrink, "hard_tanh": F.hardtanh,
    "hard_sigmoid": F.hardsigmoid, "hard_silu": F.hardswish, "hard_shrink": F.hardshrink, "soft_shrink": F.softshrink,
    "threshold": lambda x: F.threshold(x, 0.0, 0.0), "erf": torch.erf, "arctan": torch.atan, "arcsinh": torch.asinh,
    "sin": torch.sin, "cos": torch.cos, "exp": torch.exp, "square": torch.square, "sign": torch.sign,
    "sinc": lambda x: torch.sinc(x / torch.pi), "absolute": torch.abs, "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, -1), "softmin": lambda x: F.softmin(x, -1), "glu": F.glu,
    "logsumexp": lambda x: torch.logsumexp(x.flatten(), 0), "relu_n": lambda x: F.hardtanh(x, 0.0, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
def test_equal_to_torch_in_value_and_gradient(name):
    x = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32) * 3
    ours, vjp = jax.vjp(getattr(activations, name), jnp.asarray(x))
    tensor = torch.tensor(x, requires_grad=True)
    theirs = FIXED[name](tensor)
    weights = np.random.default_rng(1).normal(size=ours.shape).astype(np.float32)
    theirs.backward(torch.tensor(weights))
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=2e-6, atol=2e-6)
    if name != "sign":  # straight through here, 0 in torch
        np.testing.assert_allclose(vjp(jnp.asarray(weights))[0], tensor.grad.numpy(), rtol=5e-6, atol=5e-6)


def test_prelu_is_torchs_with_its_parameters():
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    module = torch.nn.PReLU(4)
    params = learnable.prelu.init((4,))
    np.testing.assert_allclose(params["alpha"], module.weight.detach().numpy())
    np.testing.assert_allclose(learnable.prelu.apply(params, x), module(torch.tensor(x)).detach().numpy(), rtol=1e-6)
    module(torch.tensor(x)).sum().backward()
    ours = jax.grad(lambda p: learnable.prelu.apply(p, x).sum())(params)
    np.testing.assert_allclose(ours["alpha"], module.weight.grad.numpy(), rtol=1e-5)


def test_rrelu_draws_slopes_in_torchs_interval_and_its_mean_is_torchs_evaluation():
    x = -np.ones(4000, np.float32)
    drawn = activations.noisy.rrelu(jax.random.key(0), x)
    assert -1 / 3 <= drawn.min() < -0.32 and -0.13 < drawn.max() <= -1 / 8
    expected = F.rrelu(torch.tensor(x[:1]), training=False).item()
    assert abs(float(drawn.mean()) - expected) < 5e-3
    np.testing.assert_allclose(activations.leaky_relu(x[:1], (1 / 8 + 1 / 3) / 2), expected, rtol=1e-6)
