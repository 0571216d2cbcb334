"""Continue prompts with a model.

examples:
  jaxml generate smollm2-135m "The capital of France is" --max-new-tokens 8
  jaxml generate smollm2-135m --chat "Name three fruits." --temperature 0.7 --top-p 0.9 --seed 1
  jaxml generate runs/quickstart/model "Once upon a time" --stop "." --no-stream
  cat prompts.txt | jaxml generate smollm2-135m -          (one prompt a line)
"""

import sys

from jaxml.cli.main import load, model_arguments


def add(sub):
    model_arguments(sub)
    sub.add_argument("prompts", nargs="+", metavar="PROMPT", help="text to continue, or - for lines of stdin")
    sub.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    sub.add_argument("--system", help="a system message (with --chat)")
    sub.add_argument("--no-stream", action="store_true", help="print each text when it is whole")
    sampling_arguments(sub)


def sampling_arguments(sub):
    sub.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    sub.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): greedy")
    sub.add_argument("--top-k", type=int, default=0, metavar="K")
    sub.add_argument("--top-p", type=float, default=1.0, metavar="P")
    sub.add_argument("--min-p", type=float, default=0.0, metavar="P")
    sub.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    sub.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    sub.add_argument("--seed", type=int, default=0)


def sampling(args):
    from jaxml.lm import Sampling

    return Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)


def run(args):
    from jaxml import lm

    how = sampling(args)  # wrong numbers are refused before the model is read
    prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()] if args.prompts == ["-"] else args.prompts
    if not prompts:
        raise ValueError("generate: at least one prompt is given, got an empty standard input.")
    if args.system and not args.chat:
        raise ValueError("generate: --system belongs to --chat.")
    model = load(args)
    if args.chat:
        system = [{"role": "system", "content": args.system}] if args.system else []
        prompts = [[*system, {"role": "user", "content": p}] for p in prompts]
    stream = len(prompts) == 1 and not args.no_stream
    texts = lm.generate(
        model,
        prompts,
        max_new_tokens=args.max_new_tokens,
        sampling=how,
        stop=args.stop,
        key=args.seed,
        on_text=(lambda row, text: print(text, end="", flush=True)) if stream else None,
    )
    if stream:
        print()
        return 0
    for prompt, text in zip(prompts, texts):
        shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        print(f"> {shown}\n{text}\n" if len(texts) > 1 else text)
    return 0
