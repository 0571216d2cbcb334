"""Quantise a model's matrices, one at a time as they are read, and write it.

examples:
  jaxml quantize smollm2-135m models/smollm2-nf4
  jaxml quantize models/mine models/mine-int8 --format int8 --targets gate,up,down

nf4, fp4 and int8 are written as bitsandbytes has them, in a Hugging Face folder that transformers loads; int4 and
tables (embed, head) as an Orbax checkpoint. Every verb reads both. An adapter is merged first (jaxml merge).
"""

from jaxml.cli.main import FORMATS, model_arguments, save


def add(sub):
    model_arguments(sub, adapter=False, quantize=False)
    sub.add_argument("out", metavar="FOLDER", help="must not exist, or be empty")
    sub.add_argument("--format", choices=FORMATS, default="nf4", help="of the matrices (default: nf4)")
    sub.add_argument("--targets", default="*", help="patterns of matrices, by comma (q,k,v,o,gate,up,down; *: all)")


def run(args):
    from jaxml import lm, paths, quant
    from jaxml.lm import hf

    hf.check_new(args.out)
    targets = args.targets.split(",")
    model = lm.load(args.model, args.dtype, quantize=args.format, targets=targets)
    found = {path: w for path, w in paths.named(model.params).items() if isinstance(w, quant.QArray)}
    save(model, args.out)
    weights = sum(w.size for w in found.values())
    bits = 8 * sum(w.nbytes for w in found.values()) / weights
    print(f"{weights / 1e6:.1f} million weights at {bits:.3f} bits in {args.format}: {args.out}")
    return 0
