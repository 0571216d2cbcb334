"""Show activations: formula, range, traits, gain, the names elsewhere; or draw them.

examples:
  jaxml activations
  jaxml activations --name gelu
  jaxml activations --kind gated
  jaxml activations --plot gallery.png
  jaxml activations --name gelu --name silu --name mish --plot three.svg
  jaxml activations --json
"""

import json
import math

KINDS = ("fixed", "gated", "learnable", "simplex", "features", "noisy")


def add(sub):
    sub.add_argument("--name", action="append", metavar="NAME", help="only this one, with everything known; repeatable")
    sub.add_argument("--kind", choices=KINDS, help="only this kind")
    sub.add_argument("--plot", metavar="FILE", help="write a picture of functions and derivatives (.png, .svg, .pdf)")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def run(args):
    from jaxml.activations import catalogue

    entries = [catalogue.find(name) for name in args.name] if args.name else list(catalogue.CATALOGUE.values())
    if args.kind:
        entries = [a for a in entries if a.kind == args.kind]
    if not entries:
        raise ValueError(f"activations: something is left to show, got --kind {args.kind}. Leave --kind out.")
    if args.plot:
        _plot(args, entries)
    elif args.json:
        print(json.dumps({a.name: facts(a) for a in entries}, indent=2, ensure_ascii=False))
    elif args.name:
        for entry in entries:
            _one(entry)
    else:
        _table(entries)
    return 0


def facts(entry) -> dict:
    """What is known of an entry, as JSON has it: infinities are strings, unknowns are left out."""
    number = lambda v: str(v) if isinstance(v, float) and math.isinf(v) else v
    values = {key: getattr(entry, key) for key in entry.__dataclass_fields__ if key not in ("name", "traits")}
    if entry.range is not None:
        values |= {key: getattr(entry, key) for key in ("monotonic", "parity", "zero_centred", "saturating")}
    values = {key: [*map(number, v)] if isinstance(v, tuple) else number(v) for key, v in values.items()}
    return {key: value for key, value in values.items() if value not in (None, "")}


def _plot(args, entries):
    from jaxml.activations import plot

    drawable = {a.name for a in plot.drawable()}
    chosen = [a for a in entries if a.name in drawable]
    if not chosen:
        raise ValueError(f"activations: a curve is drawn, got {', '.join(a.name for a in entries)}. Name another.")
    suffix = args.plot.rpartition(".")[2].lower()
    if suffix not in ("png", "svg", "pdf"):
        raise ValueError(f"activations: --plot ends in .png, .svg or .pdf, got {args.plot!r}. Choose one of them.")
    print(f"{plot.gallery(args.plot, chosen)}: {len(chosen)} activations")


def _one(entry):
    print(f"{entry.name}(x) = {entry.formula}")
    for key, value in facts(entry).items():
        if key != "formula":
            text = ", ".join(map(_number, value)) if isinstance(value, list) else _number(value)
            print(f"  {key:13} {text}")
    print()


def _number(value) -> str:
    words = {True: "yes", False: "no", None: "none"}
    return words[value] if value is None or isinstance(value, bool) else f"{value}".replace("inf", "∞")


def _table(entries):
    import rich.box
    from rich.console import Console
    from rich.table import Table

    from jaxml.activations import catalogue

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for kind in catalogue.KINDS:
        rows = [a for a in entries if a.kind == kind]
        if not rows:
            continue
        numbers = kind == "fixed"
        table = Table(title=f"{kind} ({len(rows)})", box=rich.box.SIMPLE, title_justify="left", pad_edge=False)
        table.add_column("name", no_wrap=True)
        table.add_column("formula", min_width=30)
        for column in ("range", "smooth", "traits", "flat", "Lipschitz", "gain") if numbers else ():
            right = column in ("Lipschitz", "gain")
            table.add_column(column, justify="right" if right else "left", no_wrap=True)
        for column in ("torch", "keras"):
            table.add_column(column)
        for a in rows:
            table.add_row(*_cells(a, numbers))
        console.print(table, markup=False)


def _cells(a, numbers):
    cells = [a.name, a.formula]
    if numbers:
        short = lambda v: "∞" if v == math.inf else "−∞" if v == -math.inf else f"{v:.4g}".replace("-", "−")
        smooth = "jumps" if a.smooth < 0 else f"C{short(a.smooth)}"
        marks = dict(monotonic="monotonic", odd="odd", even="even", zero_centred="centred")
        traits = " ".join(marks[word] for word in a.traits.split())
        gain = "" if a.gain is None else f"{a.gain:.4f}"
        cells += [f"{short(a.range[0])} … {short(a.range[1])}", smooth, traits, a.saturating, short(a.lipschitz), gain]
    return [*cells, a.torch, a.keras]
