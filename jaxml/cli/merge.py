"""Merge an adapter into its model and write the plain model.

examples:
  jaxml merge smollm2-135m runs/mine/adapter models/mine
  jaxml merge models/smollm2-nf4 runs/mine/adapter models/mine-nf4 --requantize

What `jaxml quantize` writes as an Orbax checkpoint stays one with --requantize.
"""

from jaxml.cli.main import load, model_arguments, save


def add(sub):
    model_arguments(sub, adapter=False)
    sub.add_argument("adapter", metavar="ADAPTER", help="a PEFT adapter folder")
    sub.add_argument("out", metavar="FOLDER", help="must not exist, or be empty")
    sub.add_argument("--requantize", action="store_true", help="quantised weights stay so, rounded once more")


def run(args):
    from jaxml.lm import hf
    from jaxml.tune import adapters

    hf.check_new(args.out)
    model = load(args)
    model = model.replace(params=adapters.merge(model.params, requantize=args.requantize))
    save(model, args.out)
    print(args.out)
    return 0
