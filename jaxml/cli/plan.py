"""Show what a training step needs on a TPU slice, without one: memory, products, bytes, collectives, whether it fits.

examples:
  jaxml plan llama-3.1-8b --topology v5e:2x2 --method qlora --length 2048
  jaxml plan llama-3.1-70b --topology v5p --method full
  jaxml plan path/to/model --topology v6e:4x4 --method lora --mesh fsdp=4,tensor=4 --rows 2

The step that `jaxml finetune` would run there is compiled ahead of time by libtpu (pip install "jaxml[tpu]"). Without a
size, as in --topology v5p, ever larger slices are tried until it fits. MODEL is a model folder (config.json is enough),
a GGUF file, or one of the published: llama-3.1-8b, -70b, -405b, llama-3.2-1b, -3b, qwen3-0.6b, -8b, -32b, smollm2-135m.
"""

import dataclasses
import json
from pathlib import Path

from jaxml.cli.finetune import around, attached, check, step_arguments
from jaxml.cli.main import FORMATS


def add(sub):
    sub.add_argument("model", metavar="MODEL", help="a published name, a model folder or a GGUF file; only its numbers")
    sub.add_argument("--topology", required=True, metavar="SLICE", help="v4, v5e, v5p, v6e, tpu7x, as v5e:8x8 or v5e")
    sub.add_argument("--mesh", default="fsdp=-1", metavar="AXES", help="devices by axis (default: fsdp=-1)")
    sub.add_argument("--rows", type=int, default=1, help="of --length tokens, on each part of the mesh")
    sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the model's weights")
    sub.add_argument("--quantize", choices=FORMATS, help="its matrices")
    step_arguments(sub, batch_size=None, length=2048)
    sub.set_defaults(compute="bfloat16")
    sub.add_argument("--json", action="store_true", help="print one JSON object a slice")


def run(args):
    from rich.console import Console

    from jaxml.parallel import topology
    from jaxml.tune import place
    from jaxml.tune import plan as plans

    args.adapter = None
    check(args, "plan")
    if args.batch_size is not None:
        raise ValueError("plan: a batch has --rows rows on each part of the mesh. Leave --batch-size out.")
    if args.rows < 1:
        raise ValueError(f"plan: --rows is at least 1, got {args.rows}.")
    config = _config(args.model)
    place.check_length("plan", config, args.length)
    params, options, tx = _step(args, config)
    make = lambda name: plans.plan(config, params, options, tx, name, args.mesh, rows=args.rows)
    console, errors = Console(), Console(stderr=True)
    if ":" in args.topology:
        topology.parse(args.topology)
        with errors.status(f"compiling for {args.topology}"):
            made = [make(args.topology)]
    elif args.topology not in topology.GENERATIONS:
        raise ValueError(f"plan: --topology is of {', '.join(topology.GENERATIONS)}, got {args.topology!r}.")
    else:
        held = lambda name: plans.held(params, options, tx, name, args.mesh)
        with errors.status("compiling") as status:

            def shown(name):
                status.update(f"compiling for {name}")
                return make(name)

            made = list(plans.smallest(shown, held, args.topology))
        if not made or not made[-1].fits:
            sizes = topology.GENERATIONS[args.topology].slices
            errors.print(f"plan: it fits on no slice of {args.topology} up to {sizes[-1]}.", highlight=False)
    if args.json:
        for one in made:
            print(json.dumps(dataclasses.asdict(one) | {"fits": one.fits}))
    elif made:
        console.print(plans.table(made, f"{Path(args.model).name}, {args.method}, rows of {args.length:,} tokens"))
    return 0 if made and made[-1].fits else 1


def _config(model: str):
    """The numbers of a model."""
    from jaxml.lm import gguf, hf, published, zoo
    from jaxml.lm.config import DecoderConfig

    if model in published.CONFIGS:
        return published.CONFIGS[model]
    decoders = [name for name, entry in zoo.NAMES.items() if entry.kind == "decoder"]
    if model in zoo.NAMES and model not in decoders:
        raise ValueError(
            f"plan: {model} is no decoder, but an {zoo.NAMES[model].kind}. Take one of {', '.join(decoders)}."
        )
    path = zoo.find(model) if model in decoders else Path(model)
    if path.is_dir():
        return hf.read_config(path)
    if path.is_file():
        return DecoderConfig.from_gguf(gguf.read_metadata(path))
    known = ", ".join((*published.CONFIGS, *decoders))
    raise FileNotFoundError(f"plan: no file or folder is called {model!r}, and published are {known}.")


def _step(args, config):
    """(parameters as shapes, options, optimizer), as `jaxml finetune` would have them."""
    import jax

    from jaxml import tune
    from jaxml.quant import quantize_params
    from jaxml.tune import plan as plans
    from jaxml.tune.adapters import starts

    options = tune.Options(
        steps=1000, accumulate=args.accumulate, length=args.length, clip=args.clip or None, remat=args.remat,
        unroll=args.unroll, dtype=args.compute, seed=args.seed,
    )  # fmt: skip
    params = plans.shapes(config, args.dtype)
    if args.quantize:
        params = jax.eval_shape(lambda p: quantize_params(p, args.quantize), params)
    if args.start:
        starts.parse(args.start)
        args.start = "default"  # where A and B begin is no matter of their shapes
    params = jax.eval_shape(lambda p: attached(args, p), params)
    return params, options, tune.optimizer(options, 1000, around=lambda adamw: around(args, adamw, 1000))
