"""Measure a model on a JSONL file: perplexity of what it should say, and exact match of what it says.

examples:
  jaxml evaluate smollm2-135m held.jsonl
  jaxml evaluate smollm2-135m held.jsonl --adapter runs/mine/adapter --json
"""

import json
import math

from jaxml.cli.main import load, model_arguments


def add(sub):
    model_arguments(sub)
    sub.add_argument("data", metavar="DATA", help="JSONL in the forms of jaxml finetune")
    sub.add_argument("--length", type=int, default=512, help="tokens a row")
    sub.add_argument("--batch-size", type=int, default=16)
    sub.add_argument("--max-new-tokens", type=int, default=32, help="for exact match, on prompt and response")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def run(args):
    from jaxml import lm, tune
    from jaxml.tune import data, facts

    examples, model = data.read_jsonl(args.data), load(args)
    length = min(args.length, model.config.max_length)
    loss = tune.loss_of(model, examples, tune.Options(length=length, batch_size=min(args.batch_size, 8)))
    report = {"examples": len(examples), "loss": loss, "perplexity": math.exp(loss)}
    pairs = [e for e in examples if "response" in e]
    if pairs:
        texts = lm.generate(
            model,
            [e["prompt"] for e in pairs],
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            stop=["\n"] if all("\n" not in e["response"].strip() for e in pairs) else [],
        )
        right = sum(facts.normalise(t) == facts.normalise(e["response"]) for t, e in zip(texts, pairs))
        accuracy = facts.Accuracy(right, len(pairs))
        report |= {"exact_match": accuracy.value, "exact_match_interval": list(accuracy.interval)}
    if args.json:
        print(json.dumps(report))
        return 0
    print(f"{report['examples']} examples: perplexity {report['perplexity']:.3f} (loss {loss:.4f} nats a token)")
    if pairs:
        print(f"exact match: {accuracy}")
    return 0
