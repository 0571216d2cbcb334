"""Find the formula behind a table of numbers with a Kolmogorov–Arnold network.

examples:
  jaxml kan fit data.csv --target y --out found
  jaxml kan fit data.csv --target y --features a b --functions x sin exp --drop-outliers
"""

import argparse
import json
from pathlib import Path


def add(sub: argparse.ArgumentParser) -> None:
    what = sub.add_subparsers(dest="what", required=True, metavar="WHAT")
    fit = what.add_parser("fit", help="a formula, a picture and a network from a CSV file")
    fit.add_argument("data", metavar="DATA.csv", help="a table with a header line")
    fit.add_argument("--target", required=True, metavar="COLUMN", help="the column to predict")
    fit.add_argument(
        "--features", nargs="+", metavar="COLUMN", help="the columns to predict it from (default: all others)"
    )
    fit.add_argument("--out", default="kan-fit", metavar="FOLDER", help="for the results (default: %(default)s)")
    fit.add_argument("--hidden", type=int, nargs="+", help="widths of hidden layers (default: 5, or 3 and 2 products)")
    fit.add_argument("--grids", type=int, nargs="+", default=[10, 20], help="cells of the splines (default: 10 20)")
    fit.add_argument(
        "--sparse", type=float, default=1e-2, help="weight of the penalty that prunes (default: %(default)s)"
    )
    fit.add_argument("--restarts", type=int, default=4, help="networks to try (default: %(default)s)")
    fit.add_argument("--held-out", type=float, default=0.2, help="share of the rows to test on (default: %(default)s)")
    fit.add_argument("--drop-outliers", action="store_true", help="leave out rows with values far from all others")
    fit.add_argument("--functions", nargs="+", metavar="NAME", help="that may stand in the formula (default: all)")
    fit.add_argument("--digits", type=int, default=5, help="of the formula's numbers (default: %(default)s)")
    fit.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxml import kan, log
    from jaxml.extras import need
    from jaxml.kan import table

    sympy = need("sympy", "symbolic")
    if not 0 < args.held_out < 1:
        raise ValueError(f"kan fit: --held-out is a share between 0 and 1, got {args.held_out}.")
    if args.restarts < 1 or min([*(args.hidden or []), *args.grids]) < 1:
        raise ValueError("kan fit: --restarts, --hidden and --grids are at least 1.")
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"kan fit: --out is a folder, got the file {out}.")
    data = table.read(args.data, args.target, args.features, drop_outliers=args.drop_outliers)
    for note in data.notes:
        print(f"note: {note}")
    with jax.enable_x64(True):
        key = jax.random.key(args.seed)
        order = np.random.default_rng(args.seed).permutation(len(data.y))
        held = order[: max(1, round(args.held_out * len(order)))]
        rest = order[len(held) :]
        if len(rest) < 8:
            raise ValueError(f"kan fit: at least 8 rows are fitted, --held-out {args.held_out} leaves {len(rest)}.")
        x, y = jnp.asarray(data.x), jnp.asarray(data.y)[:, None]
        found = kan.discover(
            key, x[rest], y[rest], widths=args.hidden and [x.shape[1], *args.hidden, 1], names=data.names,
            digits=args.digits, sparse=args.sparse, grids=args.grids, restarts=args.restarts, functions=args.functions,
            progress=True,
        )  # fmt: skip
        formula = found.formulas[0]
        written = kan.function(formula, data.names)
        error = lambda predict: float(jnp.sqrt(jnp.mean((predict(x[held]) - y[held]) ** 2)) / jnp.std(y))
        errors = {
            "formula": error(written),
            "splines": error(lambda x: kan.apply(found.splines, x)),
        }
        out.mkdir(parents=True, exist_ok=True)
        kan.save(out / "formula.npz", found.params)
        kan.save(out / "splines.npz", found.splines)
        kan.plot(found.splines, x, out / "splines.png", names=data.names, outputs=[args.target])
        kan.plot(found.params, x, out / "formula.png", names=data.names, outputs=[args.target])
    told = {
        "target": args.target, "features": data.names, "rows": len(rest), "held_out_rows": len(held),
        "notes": data.notes, "formula": str(formula), "latex": sympy.latex(formula), "held_out_error": errors,
        "widths": str(found.params.widths),
        "functions": [{"layer": n, "into": i, "out": o, "function": s.name, "r2": s.r2} for n, i, o, s in found.edges],
    }  # fmt: skip
    log.write_text(out / "found.json", json.dumps(told, indent=2) + "\n")
    print(f"{args.target} = {formula}")
    print(f"error on {len(held)} held-out rows, in standard deviations of {args.target}: "
          f"formula {errors['formula']:.2g}, splines {errors['splines']:.2g}")  # fmt: skip
    if not errors["formula"] < 2 * errors["splines"] + 1e-3:
        print(
            "The formula is much worse than the splines it stands for: splines.npz predicts, the formula does not. "
            "Try --hidden, --functions or --restarts."
        )
    print(f"{out}: found.json, formula.png, splines.png, formula.npz, splines.npz (kan.load)")
    return 0
