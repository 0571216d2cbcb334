"""Talk with a model, turn by turn; an empty line or Ctrl-D ends.

examples:
  jaxml chat smollm2-135m
  jaxml chat smollm2-135m --system "You answer in one sentence." --temperature 0.7
  echo "What is the capital of France?" | jaxml chat smollm2-135m
"""

import sys

from jaxml.cli.generate import sampling, sampling_arguments
from jaxml.cli.main import load, model_arguments


def add(sub):
    model_arguments(sub)
    sub.add_argument("--system", help="a system message")
    sampling_arguments(sub)


def run(args):
    from jaxml import lm

    how, model = sampling(args), load(args)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    while True:
        try:
            text = input("you: " if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        if not text:
            break
        messages.append({"role": "user", "content": text})
        say = lambda row, new: print(new, end="", flush=True)
        reply = lm.generate(
            model,
            [messages],
            max_new_tokens=args.max_new_tokens,
            sampling=how,
            stop=args.stop,
            key=args.seed + len(messages),
            on_text=say,
        )[0]
        print(flush=True)
        messages.append({"role": "assistant", "content": reply})
    return 0
