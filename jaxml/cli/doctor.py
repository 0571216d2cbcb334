"""Show versions, devices, and which backend serves what, and why the others do not.

examples:
  jaxml doctor
  jaxml doctor --json
"""

import importlib.metadata
import json
import platform
import re

from jaxml.extras import version

BASE = ("jaxml", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "chex", "jaxtyping", "numpy", "rich")


def add(sub):
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def run(args):
    report = examine()
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"python {report['python']}, {report['platform']}")
    print("\npackages")
    for name, installed in report["packages"].items():
        print(f"  {name:18} {installed}")
    print("\nextras")
    for extra, missing in report["extras_missing"].items():
        print(f"  {extra:18} {'installed' if not missing else 'missing: ' + ', '.join(missing)}")
    print("\ndevices")
    for device in report["devices"]:
        print(f"  {device}")
    print("\nattention backends")
    for name, why in report["attention"].items():
        print(f"  {name:18} {why}")
    print("\nother kernels")
    for name, why in report["kernels"].items():
        print(f"  {name:18} {why}")
    print("\nmodels")
    for name, where in report["models"].items():
        print(f"  {name:18} {where}")
    return 0


def examine() -> dict:
    """All that `jaxml doctor` prints, as a dictionary."""
    import jax

    from jaxml.lm import zoo

    extras = {extra: [p for p in packages if not version(p)] for extra, packages in _extras().items()}
    models = {}
    for name in zoo.NAMES:
        try:
            models[name] = str(zoo.find(name))
        except FileNotFoundError as error:
            models[name] = str(error)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {p: version(p) or "not installed" for p in BASE},
        "extras_missing": extras,
        "devices": [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()],
        "default_backend": jax.default_backend(),
        "attention": _attention(),
        "kernels": _kernels(),
        "models": models,
    }


BROUGHT = {"jax[cuda13]": "jax-cuda13-plugin", "jax[tpu]": "libtpu"}  # what an extra of another package installs


def _extras() -> dict[str, list[str]]:
    """Extra → packages that it brings, as this package's own metadata has them."""
    found: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("jaxml") or []:
        requirement, _, marker = line.partition(";")
        name = re.match(r"[\w.-]+(\[[\w,-]+\])?", requirement.strip())
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        if name and extra:
            found.setdefault(extra[1], []).append(BROUGHT.get(name[0], name[0]))
    for packages in found.values():
        for package in [p for p in packages if p.startswith("jaxml[")]:
            packages.remove(package)
            packages += [p for inner in package[6:-1].split(",") for p in found.get(inner, [])]
    return {extra: sorted({p for p in packages if not p.startswith("jaxml[")}) for extra, packages in found.items()}


def _attention() -> dict[str, str]:
    """Backend → why it runs or not, for a plain causal call on this machine."""
    import jax

    from jaxml.attention import explain

    q = jax.ShapeDtypeStruct((1, 1024, 8, 64), "float32")
    explained = explain(q, q, q, is_causal=True)
    runs = {explained.chosen: f"runs on {jax.default_backend()}"}
    return runs | explained.refused | {"reference": "the definition; runs where it is asked for by name"}


def _kernels() -> dict[str, str]:
    """Part that has a kernel beside XLA's products → whether it could run on this machine, in float32."""
    import jax

    from jaxml import kernels, triton_call
    from jaxml.kan import kernel, layer

    reasons = {
        "kan": kernel.unsupported(layer.Spec(), "float32"),
        "gated_feed_forward": kernels.unsupported("float32"),
    }
    may = f'runs on {jax.default_backend()} where implementation="kernel"; XLA otherwise'
    found = {name: may if why is None else f"XLA; no kernel: {why}" for name, why in reasons.items()}
    jax_triton = triton_call.unsupported() or f"works with jax {jax.__version__}, on a GPU"
    return found | {"quantised products": _quantised(), "jax-triton": jax_triton}


def _quantised() -> str:
    """What multiplies bfloat16 rows by an NF4 matrix, and why nothing else."""
    import jax

    from jaxml import quant

    x = jax.ShapeDtypeStruct((8, 1024), "bfloat16")
    q = jax.eval_shape(quant.nf4.quantize, jax.ShapeDtypeStruct((1024, 1024), "bfloat16"))
    said = quant.explain(x, q)
    return f"{said.chosen} runs; " + "; ".join(f"not {name}: {why}" for name, why in said.refused.items())
