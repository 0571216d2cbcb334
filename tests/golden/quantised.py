"""Writes quantised.npz: what bitsandbytes' CPU implementation makes of small matrices (needs the extra "oracle").

python tests/golden/quantised.py
"""

from pathlib import Path

import numpy as np

# (rows, run) as torch stores a matrix: whole blocks a row, blocks over rows' ends, odd sizes, a block of zeros.
SHAPES = {"rows": (24, 128), "across": (20, 48), "odd": (7, 9), "zeros": (6, 64), "long": (140, 128)}
CASES = [
    (kind, shape, dtype, block)
    for kind in ("nf4", "fp4")
    for shape in SHAPES
    for dtype, block in (("float32", 64), ("bfloat16", 64), ("float32", 128))
]


def matrix(shape: str) -> np.ndarray:
    """[rows, run] float32."""
    w = 0.02 * np.random.default_rng(len(shape)).standard_normal(SHAPES[shape]).astype(np.float32)
    if shape == "zeros":
        w[2] = 0
    return w


def main() -> None:
    import bitsandbytes.functional as bnb
    import torch

    out = {}
    for kind, shape, dtype, block in CASES:
        w = torch.from_numpy(matrix(shape)).to(getattr(torch, dtype))
        for double in (False, True):
            codes, state = bnb.quantize_4bit(w, blocksize=block, compress_statistics=double, quant_type=kind)
            key = f"{kind} {shape} {dtype} {block}"
            if not double:
                out[f"{key} codes"], out[f"{key} scales"] = codes.numpy().reshape(-1), state.absmax.numpy()
                continue
            out[f"{key} nested codes"], out[f"{key} offset"] = state.absmax.numpy(), state.offset.numpy()
            out[f"{key} nested scales"] = state.state2.absmax.numpy()
    np.savez_compressed(Path(__file__).parent / "quantised.npz", **out)


if __name__ == "__main__":
    main()
