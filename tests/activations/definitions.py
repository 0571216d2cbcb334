"""The definitions of fixed activations in mpmath, as their papers write them: nothing rearranged, sixty digits."""

import mpmath as mp

mp.mp.dps = 60


def sigma(x):
    return 1 / (1 + mp.exp(-x))


def softplus(x):
    return mp.log1p(mp.exp(x)) if x < 400 else x + mp.log1p(mp.exp(-x))


def cdf(x):
    return mp.erfc(-x / mp.sqrt(2)) / 2


def tanh(x):
    return mp.sign(x) * (1 - 2 / (mp.exp(2 * abs(x)) + 1)) if abs(x) > 1 else mp.tanh(x)


def num(text):
    return mp.mpf(text)


def gelu_tanh(x):
    z = mp.sqrt(2 / mp.pi) * (x + num("0.044715") * x**3)
    return x / 2 * (1 + mp.tanh(z)) if x > -3 else x / (1 + mp.exp(-2 * z))


ALPHA, SCALE = num("1.6732632423543772848170429916717"), num("1.0507009873554804934193349852946")
RICKER = 2 / (mp.sqrt(3) * mp.pi ** num("0.25"))

SMOOTH = {
    "sigmoid": sigma,
    "log_sigmoid": lambda x: -softplus(-x),
    "tanh": tanh,
    "lecun_tanh": lambda x: num("1.7159") * tanh(2 * x / 3),
    "soft_sign": lambda x: x / (1 + abs(x)),
    "arctan": mp.atan,
    "erf": mp.erf,
    "isru": lambda x: x / mp.sqrt(1 + x * x),
    "laplace": lambda x: cdf((x - mp.sqrt(0.5)) * mp.sqrt(4 * mp.pi)),
    "gompertz": lambda x: mp.exp(-mp.exp(-x)),
    "symlog": lambda x: mp.sign(x) * mp.log1p(abs(x)),
    "symexp": lambda x: mp.sign(x) * mp.expm1(abs(x)),
    "arcsinh": mp.asinh,
    "exp": mp.exp,
    "logit": lambda x: mp.log(x / (1 - x)),
    "square": lambda x: x * x,
    "bent_identity": lambda x: (mp.sqrt(x * x + 1) - 1) / 2 + x,
    "tanh_shrink": lambda x: x - tanh(x),
    "sin": mp.sin,
    "cos": mp.cos,
    "sinc": lambda x: mp.sin(x) / x if x else num(1),
    "snake": lambda x: x + mp.sin(x) ** 2,
    "gcu": lambda x: x * mp.cos(x),
    "gaussian": lambda x: mp.exp(-x * x),
    "mexican_hat": lambda x: RICKER * (1 - x * x) * mp.exp(-x * x / 2),
    "lisht": lambda x: x * tanh(x),
    "sinlu": lambda x: (x + mp.sin(x)) * sigma(x),
    "softplus": softplus,
    "shifted_softplus": lambda x: softplus(x) - mp.log(2),
    "squareplus": lambda x: (x + mp.sqrt(x * x + 4)) / 2,
    "silu": lambda x: x * sigma(x),
    "dsilu": lambda x: sigma(x) * (1 + x * sigma(-x)),
    "eswish": lambda x: num("1.375") * x * sigma(x),
    "quick_gelu": lambda x: x * sigma(num("1.702") * x),
    "gelu_exact": lambda x: x * cdf(x),
    "gelu_tanh": gelu_tanh,
    "mish": lambda x: x * mp.tanh(softplus(x)),
    "elu": lambda x: x if x > 0 else mp.expm1(x),
    "celu": lambda x: x if x > 0 else mp.expm1(x),
    "selu": lambda x: SCALE * (x if x > 0 else ALPHA * mp.expm1(x)),
    "isrlu": lambda x: x if x >= 0 else x / mp.sqrt(1 + x * x),
    "nlrelu": lambda x: mp.log1p(max(x, 0)),
    "serf": lambda x: x * mp.erf(softplus(x)),
    "tanhexp": lambda x: x * tanh(mp.exp(min(x, 300))),
    "aptx": lambda x: (1 + mp.tanh(x)) * x / 2 if x > -60 else x / (1 + mp.exp(-2 * x)),
    "logish": lambda x: x * mp.log1p(sigma(x)),
    "smish": lambda x: x * mp.tanh(mp.log1p(sigma(x))),
    "phish": lambda x: x * mp.tanh(x * cdf(x)),
    "elish": lambda x: (x if x >= 0 else mp.expm1(x)) * sigma(x),
}


def clip(x, low, high):
    return min(max(x, low), high)


PIECEWISE = {
    "relu": lambda x: max(x, 0),
    "relu6": lambda x: clip(x, 0, 6),
    "identity": lambda x: x,
    "leaky_relu": lambda x: x if x >= 0 else x / 100,
    "hard_tanh": lambda x: clip(x, -1, 1),
    "hard_sigmoid": lambda x: clip(x + 3, 0, 6) / 6,
    "hard_silu": lambda x: x * clip(x + 3, 0, 6) / 6,
    "hard_mish": lambda x: x / 2 * clip(x + 2, 0, 2),
    "hard_elish": lambda x: (x if x >= 0 else mp.expm1(x)) * clip((x + 1) / 2, 0, 1),
    "hard_shrink": lambda x: x if abs(x) > 0.5 else num(0),
    "soft_shrink": lambda x: mp.sign(x) * max(abs(x) - num("0.5"), 0),
    "threshold": lambda x: x if x > 0 else num(0),
    "relu_n": lambda x: clip(x, 0, 1),
    "shifted_relu": lambda x: max(x, -1),
    "relu_squared": lambda x: max(x, 0) ** 2,
    "star_relu": lambda x: num("0.8944") * max(x, 0) ** 2 - num("0.4472"),
    "leaky_relu_squared": lambda x: (x if x >= 0 else x / 100) ** 2,
    "absolute": abs,
    "srelu": lambda x: x if -1 < x < 1 else mp.sign(x) * (1 + (abs(x) - 1) / 10),
    "sqnl": lambda x: mp.sign(x) * (abs(x) - x * x / 4 if abs(x) <= 2 else 1),
    "triangle": lambda x: max(1 - abs(x), num(0)),
    "sparse_plus": lambda x: num(0) if x <= -1 else x if x >= 1 else (x + 1) ** 2 / 4,
    "sparse_sigmoid": lambda x: clip((x + 1) / 2, 0, 1),
}

KINKS = {  # where one-sided derivatives differ
    "elu": (), "celu": (), "selu": (0,), "nlrelu": (0,), "leaky_relu": (0,), "relu": (0,), "relu6": (0, 6),
    "hard_tanh": (-1, 1), "hard_sigmoid": (-3, 3), "hard_silu": (-3, 3), "hard_mish": (-2, 0), "hard_elish": (-1, 0, 1),
    "hard_shrink": (-0.5, 0.5), "soft_shrink": (-0.5, 0.5), "threshold": (0,), "relu_n": (0, 1), "shifted_relu": (-1,),
    "absolute": (0,), "srelu": (-1, 1), "triangle": (-1, 0, 1), "sparse_sigmoid": (-1, 1),
}  # fmt: skip

DEFINITIONS = SMOOTH | PIECEWISE
"""Name → function of an mpf."""
