"""Write a model in another format: from GGUF, Hugging Face or Orbax to Hugging Face or Orbax.

examples:
  jaxml convert smollm2-135m models/smollm2 --to hf
  jaxml convert model.gguf models/mine --to hf --dtype bfloat16
  jaxml convert models/mine models/mine-orbax --to orbax
  jaxml convert smollm2-135m models/tuned --to hf --adapter runs/mine/adapter     (merged)
"""

from jaxml.cli.main import load, model_arguments


def add(sub):
    model_arguments(sub)
    sub.add_argument("out", metavar="FOLDER", help="must not exist, or be empty")
    sub.add_argument("--to", choices=("hf", "orbax"), default="hf", help="what is written (default: hf)")
    sub.add_argument("--shard-gb", type=float, default=5.0, help="largest safetensors file (hf)")


def run(args):
    from jaxml import lm
    from jaxml.lm import hf
    from jaxml.tune import adapters

    hf.check_new(args.out)
    model = load(args)
    model = model.replace(params=adapters.merge(model.params, requantize=True))
    if args.to == "hf":
        lm.save(model, args.out, shard_bytes=int(args.shard_gb * 2**30))
    else:
        lm.save_orbax(model, args.out)
    print(args.out)
    return 0
