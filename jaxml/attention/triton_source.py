"""A kernel for GPUs written with Pallas, as source of Triton itself: so that the mathematics is written down once.

Translated is what the kernels of attention and a person's score_mod are made of: whole arrays in memory, tiles whose
sides are powers of two, counted loops. Anything else is an error that names it.
"""

import functools
import linecache
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

INFIX = {
    "add": "+", "add_any": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^", "rem": "%",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=", "shift_left": "<<",
}  # fmt: skip
FUNCTIONS = {
    "exp2": "tl.exp2", "exp": "tl.exp", "log": "tl.log", "sin": "tl.sin", "cos": "tl.cos", "sqrt": "tl.sqrt",
    "rsqrt": "tl.rsqrt", "abs": "tl.abs", "floor": "tl.floor", "ceil": "tl.ceil", "erf": "tl.erf",
}  # fmt: skip
FORMULAS = {
    "neg": "-{0}",
    "square": "{0} * {0}",
    "one_minus_square": "1 - {0} * {0}",
    "logistic": "1 / (1 + tl.exp(-{0}))",
    "copy": "{0}",
    "stop_gradient": "{0}",
    "max": "tl.maximum({0}, {1})",
    "min": "tl.minimum({0}, {1})",
    "clamp": "tl.minimum(tl.maximum({1}, {0}), {2})",
    "shift_right_arithmetic": "{0} >> {1}",
}
REDUCTIONS = {"reduce_max": "tl.max({0}, {1})", "reduce_min": "tl.min({0}, {1})", "reduce_sum": "tl.sum({0}, {1})"}
INTERPRETED = {  # the same, without the layer that is compiled
    "reduce_max": "tl.reduce({0}, {1}, tl.standard._elementwise_max)",
    "reduce_min": "tl.reduce({0}, {1}, tl.standard._elementwise_min)",
    "reduce_sum": "tl.reduce({0}, {1}, tl.standard._sum_combine)",
}
INLINE = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}
LONGEST = 2**31  # numbers in an array from which on a place in it takes 64 bits


def translate(
    kernel: Callable,
    operands: list[Any],
    out_shape: list[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    name: str,
    interpreted: bool = False,
) -> str:
    """The source of a function of pointers to the operands and the results, in that order.

    Args:
        kernel, grid, out_shape: as `pl.pallas_call` takes them; every reference is to a whole array.
        operands: arrays, or what has their shape and dtype.
        interpreted: for Triton's interpreter; it multiplies bfloat16 as float32, where the interpreter multiplies bits.

    Raises:
        NotImplementedError: an operation that is not translated.
    """
    plain = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
    call = pl.pallas_call(kernel, grid=grid, out_shape=[plain(a) for a in out_shape], name=name)
    traced = jax.make_jaxpr(call)(*[plain(a) for a in operands]).jaxpr
    jaxpr = next(eqn.params["jaxpr"] for eqn in traced.eqns if eqn.primitive.name == "pallas_call")
    writer = _Writer(interpreted)
    arguments = [writer.define(v, f"p{i}") for i, v in enumerate(jaxpr.invars)]
    writer.equations(jaxpr)
    return "\n".join([f"def {name}({', '.join(arguments)}):", *writer.lines, ""])


@functools.lru_cache(maxsize=1024)
def function(source: str) -> Callable:
    """The function that a source defines, such that Triton can read it again."""
    import triton.language as tl  # where it is used: it is an extra

    file = f"<triton source {hash(source):x}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    names = {"tl": tl, "__name__": __name__}
    exec(compile(source, file, "exec"), names)
    return names[source[len("def ") : source.index("(")]]


class _Writer:
    """Lines of source, and the expression that stands for each variable of a jaxpr."""

    def __init__(self, interpreted: bool):
        self.lines, self.names, self.count, self.depth = [], {}, 0, 1
        self.interpreted = interpreted

    def define(self, variable, name: str) -> str:
        self.names[variable] = name
        return name

    def fresh(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def value(self, expression: str) -> str:
        """A new name for an expression."""
        name = self.fresh()
        self.line(f"{name} = {expression}")
        return name

    def read(self, v) -> str:
        return _number(v.val) if hasattr(v, "val") else self.names[v]

    def held(self, v) -> str:
        """Like `read`, of Triton's own type where it is a number."""
        return self.value(_full(v.val, v.aval.dtype)) if hasattr(v, "val") else self.read(v)

    def equations(self, jaxpr) -> list[str]:
        """Writes them all; what stands for the results."""
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            if name in INLINE:
                inner = eqn.params[INLINE[name]]
                results = self.inline(inner, [self.held(v) for v in eqn.invars])
            elif _is_constant(eqn):
                results = [self.value(_folded(eqn))]
            else:
                results = self.equation(name, eqn)
            for v, result in zip(eqn.outvars, results):
                self.define(v, result)
        return [self.read(v) for v in jaxpr.outvars]

    def inline(self, closed, arguments: list[str]) -> list[str]:
        jaxpr = closed.jaxpr if hasattr(closed, "consts") else closed
        for v, constant in zip(jaxpr.constvars, getattr(closed, "consts", ())):
            self.define(v, self.value(_full(constant, v.aval.dtype)))
        for v, argument in zip(jaxpr.invars, arguments, strict=True):
            self.define(v, argument)
        return self.equations(jaxpr)

    def equation(self, name: str, eqn) -> list[str]:
        """What stands for its results."""
        if write := getattr(self, f"_{name}", None):
            written = write(eqn)
            return written if isinstance(written, list) else [self.value(written)]
        x = [self.read(v) for v in eqn.invars]
        if name in INFIX:
            return [self.value(f"{x[0]} {INFIX[name]} {x[1]}")]
        if name in FUNCTIONS:
            return [self.value(f"{FUNCTIONS[name]}({x[0]})")]
        if name in FORMULAS:
            return [self.value(FORMULAS[name].format(*x))]
        if name in REDUCTIONS:
            for axis in sorted(eqn.params["axes"], reverse=True):
                x[0] = (INTERPRETED if self.interpreted else REDUCTIONS)[name].format(x[0], axis)
            return [self.value(x[0])]
        raise NotImplementedError(
            f"attention's jax_triton backend does not translate {name!r}; take the triton backend, or write score_mod "
            "or the mask's function with other operations."
        )

    # ---- arithmetic whose result has not the type that Triton gives it ----

    def _div(self, eqn):
        a, b = (self.read(v) for v in eqn.invars)
        whole = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.integer)
        return f"{a} // {b}" if whole else f"({a} / {b}).to({_type(eqn.outvars[0].aval.dtype)})"

    def _not(self, eqn):
        flag = eqn.outvars[0].aval.dtype == jnp.bool_
        return f"{self.read(eqn.invars[0])} == 0" if flag else f"~{self.read(eqn.invars[0])}"

    def _sign(self, eqn):
        x, dtype = self.read(eqn.invars[0]), _type(eqn.outvars[0].aval.dtype)
        return f"({x} > 0).to({dtype}) - ({x} < 0).to({dtype})"

    def _shift_right_logical(self, eqn):
        a, n = (self.read(v) for v in eqn.invars)
        dtype = eqn.outvars[0].aval.dtype
        unsigned = f"uint{8 * dtype.itemsize}"
        same = dtype.name == unsigned
        return f"{a} >> {n}" if same else f"({a}.to(tl.{unsigned}, bitcast=True) >> {n}).to({_type(dtype)})"

    def _integer_pow(self, eqn):
        x, y = self.read(eqn.invars[0]), eqn.params["y"]
        power = " * ".join([x] * abs(y)) or f"{x} * 0 + 1"
        return power if y >= 0 else f"1 / ({power})"

    def _pow(self, eqn):
        x, y = (self.read(v) for v in eqn.invars)
        return f"tl.exp2({y} * tl.log2({x}))"

    def _tanh(self, eqn):
        """Near 0 a quotient of exponentials has lost its digits: there it is a series."""
        x = self.read(eqn.invars[0])
        e = self.value(f"tl.exp2(-2.885390081777927 * tl.abs({x}))")
        far = self.value(f"(1 - {e}) / (1 + {e})")
        s = self.value(f"{x} * {x}")
        near = self.value(f"{x} * (1 + {s} * (-0.3333333333333333 + {s} * (0.13333333333333333 - {s} * 0.05396825)))")
        return f"tl.where({s} < 0.01, {near}, tl.where({x} < 0, -{far}, {far}))"

    def _log1p(self, eqn):
        x = self.read(eqn.invars[0])
        y = self.value(f"1 + {x}")
        return f"tl.where({y} == 1, {x}, tl.log({y}) * ({x} / tl.where({y} == 1, 1, {y} - 1)))"

    def _expm1(self, eqn):
        x = self.read(eqn.invars[0])
        y = self.value(f"tl.exp({x})")
        some = self.value(f"(tl.abs({x}) < 0.5) & ({y} != 1)")
        small = self.value(f"({y} - 1) * ({x} / tl.where({some}, tl.log({y}), 1))")
        return f"tl.where({some}, {small}, tl.where({y} == 1, {x}, {y} - 1))"

    def _select_n(self, eqn):
        which, if_false, if_true = (self.read(v) for v in eqn.invars)
        both = f"tl.where({which}, {if_true}, {if_false})"
        literal = all(hasattr(v, "val") for v in eqn.invars[1:])
        return f"{both}.to({_type(eqn.outvars[0].aval.dtype)})" if literal else both

    def _convert_element_type(self, eqn):
        (v,), dtype = eqn.invars, eqn.params["new_dtype"]
        if v.aval.dtype == dtype:
            return [self.read(v)]
        return f"{self.read(v)} != 0" if dtype == jnp.bool_ else f"{self.read(v)}.to({_type(dtype)})"

    def _bitcast_convert_type(self, eqn):
        return f"{self.read(eqn.invars[0])}.to({_type(eqn.params['new_dtype'])}, bitcast=True)"

    # ---- shapes ----

    def _iota(self, eqn):
        shape, dimension, dtype = (eqn.params[k] for k in ("shape", "dimension", "dtype"))
        return self._wide(_along(shape[dimension], dimension, len(shape)), shape, dimension) + f".to({_type(dtype)})"

    def _broadcast_in_dim(self, eqn):
        v, shape, dims = eqn.invars[0], eqn.params["shape"], eqn.params["broadcast_dimensions"]
        if v.aval.shape == tuple(shape) and not hasattr(v, "val"):
            return [self.read(v)]
        if v.aval.shape == ():
            return f"tl.full({list(shape)}, {self.read(v)}, {_type(v.aval.dtype)})"
        index = ", ".join(":" if axis in dims else "None" for axis in range(len(shape)))
        x = self.read(v) if len(dims) == len(shape) else f"{self.read(v)}[{index}]"
        kept = tuple(v.aval.shape[dims.index(axis)] if axis in dims else 1 for axis in range(len(shape)))
        return x if kept == tuple(shape) else f"tl.broadcast_to({x}, {list(shape)})"

    def _transpose(self, eqn):
        return f"tl.permute({self.read(eqn.invars[0])}, {list(eqn.params['permutation'])})"

    def _reshape(self, eqn):
        shape = eqn.outvars[0].aval.shape
        if eqn.invars[0].aval.shape == shape:
            return [self.read(eqn.invars[0])]
        if shape == ():
            raise NotImplementedError("attention's jax_triton backend takes no number out of an array of one.")
        return f"tl.reshape({self.read(eqn.invars[0])}, {list(shape)})"

    _squeeze = _expand_dims = _reshape

    @staticmethod
    def _wide(x: str, shape: tuple[int, ...], axis: int) -> str:
        return x if all(n == 1 for i, n in enumerate(shape) if i != axis) else f"tl.broadcast_to({x}, {list(shape)})"

    def _dot_general(self, eqn):
        (((left,), (right,)), (batch, _)), out = eqn.params["dimension_numbers"], eqn.outvars[0].aval
        if batch:
            raise NotImplementedError("attention's jax_triton backend multiplies matrices, not stacks of them.")
        a, b = (self.read(v) for v in eqn.invars)
        dtype = eqn.invars[0].aval.dtype
        if self.interpreted and dtype == jnp.bfloat16:
            a, b = f"{a}.to(tl.float32)", f"{b}.to(tl.float32)"
        a = a if left == 1 else f"tl.trans({a})"
        b = b if right == 0 else f"tl.trans({b})"
        three = eqn.params["precision"] == jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = ', input_precision="tf32x3"' if three else ', input_precision="ieee"' if dtype.itemsize > 2 else ""
        return f"tl.dot({a}, {b}{precision}, out_dtype={_type(out.dtype)})"

    # ---- memory ----

    def _program_id(self, eqn):
        return f"tl.program_id({eqn.params['axis']})"

    def _get(self, eqn):
        ref, *rest = eqn.invars
        indexers = jax.tree.unflatten(eqn.params["tree"], rest)
        return f"tl.load({self._pointer(ref, indexers)})"

    def _swap(self, eqn):
        ref, x, *rest = eqn.invars
        return self._store(self._pointer(ref, jax.tree.unflatten(eqn.params["tree"], rest)), x, None)

    def _masked_load(self, eqn):
        ref, indexers, mask, other = jax.tree.unflatten(eqn.params["args_tree"], eqn.invars)
        more = "" if mask is None else f", mask={self.read(mask)}"
        more += "" if other is None else f", other={self.read(other)}"
        return f"tl.load({self._pointer(ref, indexers)}{more})"

    def _masked_swap(self, eqn):
        ref, indexers, x, mask = jax.tree.unflatten(eqn.params["args_tree"], eqn.invars)
        return self._store(self._pointer(ref, indexers), x, mask)

    _load = _masked_load

    def _store(self, pointer: str, x, mask) -> list:
        self.line(f"tl.store({pointer}, {self.read(x)}{'' if mask is None else f', mask={self.read(mask)}'})")
        return []  # what was there before is not read

    def _pointer(self, ref, indexers) -> str:
        """Where a tile's numbers lie: the place of the first, and how far from it the others are."""
        shape = ref.aval.shape
        (indexer,) = indexers if indexers else (None,)
        if indexer is None:
            raise NotImplementedError("attention's jax_triton backend reads parts of arrays, by their indices.")
        strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
        long = int(np.prod(shape)) >= LONGEST
        sides = [i.size for i in indexer.indices if hasattr(i, "size") and hasattr(i, "start")]
        first, along, axis = [self.names[ref]], [], 0
        for index, stride in zip(indexer.indices, strides, strict=True):
            if hasattr(index, "start"):
                if index.stride not in (None, 1):
                    raise NotImplementedError("attention's jax_triton backend reads neighbours, not every n-th.")
                along.append(f"{_along(index.size, axis, len(sides))} * {stride}")
                axis, index = axis + 1, index.start
            first.append(f"{self._index(index, long)} * {stride}")
        start = " + ".join(part for part in first if not part.startswith("0 *"))
        return " + ".join([self.value(start) if start != first[0] else start, *along])

    def _index(self, index, long: bool) -> str:
        if not hasattr(index, "aval"):
            return str(int(index))
        read = self.read(index)
        return f"{read}.to(tl.int64)" if long and not hasattr(index, "val") else read

    # ---- loops ----

    def _while(self, eqn):
        p = eqn.params
        test, body = p["cond_jaxpr"].jaxpr, p["body_jaxpr"]
        outs, ins = body.jaxpr.outvars, body.jaxpr.invars[p["body_nconsts"] :]
        counted = (
            p["cond_nconsts"] == 0
            and [e.primitive.name for e in test.eqns] == ["lt"]
            and list(test.eqns[0].invars) == list(test.invars[:2])
            and outs[1] is ins[1]
        )
        if not counted:
            raise NotImplementedError("attention's jax_triton backend translates counted loops only.")
        values = [self.held(v) for v in eqn.invars]
        constants, (_, end, *carry) = values[: p["body_nconsts"]], values[p["body_nconsts"] :]
        index = lambda turn: self.value(f"tl.full([], {turn}, {_type(ins[0].aval.dtype)})")
        turn = lambda i, names: self.inline(body, [*constants, index(i), end, *names])[2:]
        low, high = (self.read(v) for v in eqn.invars[p["body_nconsts"] :][:2])  # numbers as such, where they are known
        return [end, end, *self._loop(f"{low}, {high}", carry, turn)]

    def _scan(self, eqn):
        p = eqn.params
        inner = getattr(p["jaxpr"], "jaxpr", p["jaxpr"])
        pairs = [*zip(eqn.invars, inner.invars, strict=True), *zip(eqn.outvars, inner.outvars, strict=True)]
        if any(a.aval.shape != b.aval.shape for a, b in pairs):  # a part of an array each turn
            raise NotImplementedError("attention's jax_triton backend translates counted loops only.")
        values, constants = [self.held(v) for v in eqn.invars], len(eqn.invars) - len(eqn.outvars)
        constants, carry = values[:constants], values[constants:]
        return self._loop(f"{p['length']}", carry, lambda _, names: self.inline(p["jaxpr"], [*constants, *names]))

    def _loop(self, bounds: str, carry: list[str], body: Callable) -> list[str]:
        names = [self.value(a) for a in carry]
        turn = self.fresh()
        self.line(f"for {turn} in range({bounds}):")
        self.depth += 1
        results = body(turn, names)
        if names:
            self.line(f"{', '.join(names)} = {', '.join(results)}")
        self.depth -= 1
        return names


def _is_constant(eqn) -> bool:
    """Whether it makes a number of numbers that are known."""
    return bool(eqn.invars) and all(hasattr(v, "val") for v in eqn.invars) and eqn.outvars[0].aval.shape == ()


def _folded(eqn) -> str:
    with jax.ensure_compile_time_eval():
        out = eqn.primitive.bind(*[v.val for v in eqn.invars], **eqn.params)
    return _full(out, out.dtype)


def _along(size: int, axis: int, rank: int) -> str:
    """0 … size − 1 along one axis of several."""
    index = ", ".join(":" if i == axis else "None" for i in range(rank))
    return f"tl.arange(0, {size})" + ("" if rank == 1 else f"[{index}]")


def _type(dtype) -> str:
    name = jnp.dtype(dtype).name
    return "tl.int1" if name == "bool" else f"tl.{name}"


def _full(x, dtype) -> str:
    return f"tl.full([], {_number(x)}, {_type(dtype)})"


def _number(x) -> str:
    x = np.asarray(x)
    if x.shape != ():
        raise NotImplementedError(f"attention's jax_triton backend takes numbers as constants, got an array {x.shape}.")
    if x.dtype == np.bool_ or np.issubdtype(x.dtype, np.integer):
        return repr(x.item())
    x = float(x)
    return repr(x) if np.isfinite(x) else f'float("{x}")'
