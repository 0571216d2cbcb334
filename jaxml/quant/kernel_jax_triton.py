"""Products with quantised matrices on GPUs, in Triton itself (called by jax-triton): for few rows of x (decoding).

One launch: the scales' own codes are looked up in the kernel as well, and long sums are split over programs. A tile of
codes is looked up in a table of sixteen numbers that stays in the L1 cache, and multiplied by tensor cores. The two
halves of a byte are neighbours in a row: each has a product of its own, with the even or the odd columns of x.
"""

import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxml import triton_call
from jaxml.axes import Array, Float
from jaxml.quant import codebook
from jaxml.quant.qarray import NESTED_BLOCK, QArray
from jaxml.target import INTERPRET_GPU, platform

ROWS = 16  # of x in a tile: the least that tensor cores multiply
BYTES = 64  # of a tile of codes
PROGRAMS = 512  # as many as fill the largest GPUs a few times
LEAST = 4  # steps of a sum that is split


def product(q: QArray, x: Float[Array, "... M C"], along: bool) -> Float[Array, "... M N"]:
    """x S, or x Sᵀ where the sum goes `along` the stored rows S of stacked matrices; `kernel.product` says of what."""
    (R, run), lead, halves = q.rows, q.codes.shape[:-2], 1 if q.kind == "int8" else 2
    rows = x.reshape(math.prod(lead), -1, x.shape[-1])
    L, M, _ = rows.shape
    N = R if along else run
    held, blocks = q.codes.shape[-1], q.scales.shape[-1]
    stored = 32 if x.dtype == jnp.float32 else 64  # of a tile of codes; twice as many float32 would leave the registers
    kept, summed = (
        (triton.cdiv(R, stored), triton.cdiv(held, BYTES))
        if along
        else (triton.cdiv(held, BYTES), triton.cdiv(R, stored))
    )
    down = triton.cdiv(M, ROWS)
    splits = max(1, min(PROGRAMS // (kept * down * L), summed // LEAST))
    none = jnp.zeros(1)
    nested = (none, none) if q.nested is None else (q.nested.scales, q.nested.offset)
    values = jnp.asarray(codebook.TABLES[q.kind] if halves == 2 else [0.0], jnp.float32)
    partial = jax.ShapeDtypeStruct((L, splits, M, N), x.dtype if splits == 1 else jnp.float32)
    sizes = dict(
        M=M, R=R, HELD=held, BLOCKS=blocks, LANES=held // blocks, HALVES=halves, NESTED=q.nested is not None,
        GROUPS=triton.cdiv(R * blocks, NESTED_BLOCK), GROUP=NESTED_BLOCK, ALONG=along, SPLITS=splits,
        STEPS=triton.cdiv(summed, splits), BM=ROWS, BR=stored, BB=BYTES, UNIT=1 / 127 if q.kind == "int8" else 1.0,
        PRECISION="ieee" if x.dtype == jnp.float32 else "tf32",
        WIDE=platform() == INTERPRET_GPU and x.dtype == jnp.bfloat16,
    )  # fmt: skip
    arguments = rows, q.codes, q.scales, *nested, values, jnp.asarray(codebook.dynamic(), jnp.float32)
    (y,) = triton_call.call(_product, list(arguments), [partial], (kept, down, L * splits), warps=4, stages=4, **sizes)
    y = y[:, 0] if splits == 1 else jnp.sum(y, axis=1).astype(x.dtype)
    return y.reshape(*x.shape[:-1], N)


def _product(
    x, codes, scales, nested, offset, values, dynamic, y,
    M: tl.constexpr, R: tl.constexpr, HELD: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
    HALVES: tl.constexpr, NESTED: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, ALONG: tl.constexpr,
    SPLITS: tl.constexpr, STEPS: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BB: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    of = (tl.program_id(2) // SPLITS).to(tl.int64)
    split = tl.program_id(2) % SPLITS
    C: tl.constexpr = HELD * HALVES if ALONG else R
    N: tl.constexpr = R if ALONG else HELD * HALVES
    S: tl.constexpr = BB // LANES if LANES < BB else 1  # scales of a row of a tile
    x += of * M * C
    codes += of * R * HELD
    scales += of * R * BLOCKS
    nested += of * GROUPS
    y += (of * SPLITS + split) * M * N
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    if NESTED:
        mean = tl.load(offset + of)
    first = tl.full((BR, BM) if ALONG else (BM, BB), 0.0, tl.float32)
    second = tl.full((BR, BM) if ALONG else (BM, BB), 0.0, tl.float32)
    for step in range(split * STEPS, split * STEPS + STEPS):
        row = (tl.program_id(0) if ALONG else step) * BR
        byte = (step if ALONG else tl.program_id(0)) * BB
        r, b = row + tl.arange(0, BR), byte + tl.arange(0, BB)
        inside = (r < R)[:, None] & (b < HELD)[None, :]
        code = tl.load(codes + r[:, None].to(tl.int64) * HELD + b[None, :], mask=inside, other=0)
        block = byte // LANES + tl.arange(0, S)
        place = r[:, None] * BLOCKS + block[None, :]
        some = (r < R)[:, None] & (block < BLOCKS)[None, :]
        scale = tl.load(scales + place, mask=some, other=0)
        if NESTED:
            of_group = tl.load(nested + place // GROUP, mask=some, other=0.0)
            scale = tl.load(dynamic + scale.to(tl.int32)) * of_group + mean
        scale = scale.to(tl.float32) * UNIT
        if HALVES == 1:
            w = code.to(tl.float32)
        else:
            w = tl.load(values + (code >> 4).to(tl.int32))
            v = tl.load(values + (code & 15).to(tl.int32))
            v = (tl.reshape(v, (BR, S, BB // S)) * scale[:, :, None]).reshape(BR, BB).to(x.dtype.element_ty)
        w = (tl.reshape(w, (BR, S, BB // S)) * scale[:, :, None]).reshape(BR, BB).to(x.dtype.element_ty)
        c = byte * HALVES + tl.arange(0, HALVES * BB) if ALONG else r
        of_x = tl.load(x + m[:, None] * C + c[None, :], mask=(m < M)[:, None] & (c < C)[None, :], other=0.0)
        if WIDE:  # the interpreter multiplies the bits of bfloat16
            of_x, w = of_x.to(tl.float32), w.to(tl.float32)
            if HALVES == 2:
                v = v.to(tl.float32)
        if ALONG and HALVES == 2:
            even, odd = tl.split(tl.reshape(of_x, (BM, BB, 2)))
            first = tl.dot(w, tl.trans(even), first, input_precision=PRECISION)
            second = tl.dot(v, tl.trans(odd), second, input_precision=PRECISION)
        elif ALONG:
            first = tl.dot(w, tl.trans(of_x), first, input_precision=PRECISION)
        else:
            first = tl.dot(of_x, w, first, input_precision=PRECISION)
            if HALVES == 2:
                second = tl.dot(of_x, v, second, input_precision=PRECISION)
    if ALONG:
        out = tl.trans(first + second)
        n = tl.program_id(0) * BR + tl.arange(0, BR)
    elif HALVES == 2:
        out = tl.reshape(tl.join(first, second), (BM, 2 * BB))
        n = tl.program_id(0) * BB * 2 + tl.arange(0, 2 * BB)
    else:
        out = first
        n = tl.program_id(0) * BB + tl.arange(0, BB)
    tl.store(y + m[:, None] * N + n[None, :], out.to(y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
