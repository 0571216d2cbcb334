"""An answer as a web page: the groups side by side, what contradicts marked, citations linked, every prompt to unfold.

The page is one file without scripts; whatever models and documents said is escaped.
"""

import html
from collections.abc import Sequence
from pathlib import Path

from jaxml import log
from jaxml.lm.generate import Prompt
from jaxml.rag.trace import Answer, Evidence, Group

STYLE = """
:root { --ink: #1c2430; --soft: #5b6676; --line: #d9dee6; --paper: #ffffff; --back: #f4f6f9; --good: #1d6f42;
  --good-back: #e8f5ee; --bad: #a8401f; --bad-back: #fcefe9; --memory: #5a3fa0; --memory-back: #f0ecfa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa5b5; --line: #343d4a; --paper: #1b212a;
  --back: #12161c; --good: #7bd3a2; --good-back: #16301f; --bad: #f0a483; --bad-back: #38201a; --memory: #bba6f2;
  --memory-back: #29213f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
article + article { margin-top: 4rem; }
h1 { font-size: 1.35rem; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 2.25rem 0 .75rem; color: var(--soft); font-weight: 600; }
.answer { background: var(--paper); border: 1px solid var(--line); border-left: 5px solid var(--good);
  padding: 1rem 1.25rem; border-radius: 6px; }
.answer.none { border-left-color: var(--bad); }
.answer p { margin: 0; } .answer .main { font-size: 1.5rem; font-weight: 650; overflow-wrap: anywhere; }
.soft { color: var(--soft); font-size: .9rem; }
.groups { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem; }
.group { background: var(--paper); border: 1px solid var(--line); border-radius: 6px; padding: 1rem 1.1rem;
  min-width: 0; }
.group.chosen { border-color: var(--good); box-shadow: inset 0 3px 0 var(--good); }
.group h3 { margin: 0 0 .25rem; font-size: 1.1rem; overflow-wrap: anywhere; }
.group p { margin: .4rem 0; overflow-wrap: anywhere; }
.bar { height: 6px; border-radius: 3px; background: var(--line); margin: .5rem 0 .75rem; }
.bar i { display: block; height: 100%; border-radius: 3px; background: var(--soft); }
.chosen .bar i { background: var(--good); }
.tag { display: inline-block; font-size: .8rem; border-radius: 4px; padding: 0 .45rem; margin: 0 .25rem .25rem 0;
  border: 1px solid var(--line); text-decoration: none; color: inherit; overflow-wrap: anywhere; }
.tag.good { color: var(--good); background: var(--good-back); border-color: transparent; }
.tag.bad { color: var(--bad); background: var(--bad-back); border-color: transparent; }
.tag.memory { color: var(--memory); background: var(--memory-back); border-color: transparent; }
.texts { display: grid; gap: .6rem; }
.text { background: var(--paper); border: 1px solid var(--line); border-radius: 6px; padding: .7rem 1rem;
  min-width: 0; }
.text:target { outline: 3px solid var(--good); } .text.unused { opacity: .65; }
.text blockquote { margin: .4rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
details { border-top: 1px solid var(--line); padding: .5rem 0; } summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--paper); border: 1px solid var(--line);
  padding: .7rem; border-radius: 6px; font-size: .85rem; }
"""


def page(answers: Sequence[Answer], title: str = "Answers") -> str:
    """HTML of one or several answers.

    Example:
        >>> "<script>" in page([Answer("<script>who?", "plain", "me")])
        False
    """
    parts = [_article(answer, number) for number, answer in enumerate(answers, 1)]
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{_safe(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{STYLE}</style></head>\n<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def write(answers: Sequence[Answer], path: str | Path, title: str = "Answers") -> Path:
    """The page in a file, whole or not at all.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write([Answer("who?", "plain", "me")], f"{folder}/answers.html").name
        'answers.html'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(path, page(answers, title))
    return path


def _article(answer: Answer, number: int) -> str:
    by_number = {e.number: e for e in answer.evidence}
    links = "".join(_link(by_number[n], number) for n in answer.cited)
    sure = "" if answer.confidence is None else f", confidence {answer.confidence:.2f}"
    found = (
        f'<div class="answer{"" if answer.text else " none"}"><p class="main">{_safe(str(answer))}</p>'
        f'<p class="soft">{_safe(answer.method)}{sure}</p>' + (f"<p>{links}</p>" if links else "") + "</div>"
    )
    groups = "".join(_group(answer, place, by_number, number) for place in range(len(answer.groups)))
    used = {n for group in answer.groups for n in group.members}
    texts = "".join(_text(e, number, bool(answer.groups) and e.number not in used) for e in answer.evidence)
    steps = "".join(
        f"<details><summary>{_safe(step.name)}</summary><pre>{_safe(_spoken(step.prompt))}</pre>"
        f"<pre>{_safe(step.reply)}</pre></details>"
        for step in answer.steps
    )
    notes = "".join(f'<p><span class="tag bad">note</span>{_safe(note)}</p>' for note in answer.notes)
    sections = (
        ("What was said", f'<div class="groups">{groups}</div>' if groups else ""),
        ("By whom", f'<div class="texts">{texts}</div>' if texts else ""), ("What did not go as it should", notes),
        ("Prompts and replies", steps),
    )  # fmt: skip
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections if content)
    return f"<article><h1>{_safe(answer.question)}</h1>{found}{body}</article>"


def _group(answer: Answer, place: int, by_number: dict[int, Evidence], number: int) -> str:
    group: Group = answer.groups[place]
    against = "".join(
        f'<span class="tag bad">against {_safe(answer.groups[c].answer or f"group {c + 1}")}</span>'
        for c in group.conflicts
    )
    chosen = ' <span class="tag good">chosen</span>' if place == answer.chosen else ""
    claim = f"<p>{_safe(group.claim)}</p>" if group.claim != group.answer else ""
    return (
        f'<div class="group{" chosen" if place == answer.chosen else ""}"><h3>{_safe(group.answer or "—")}{chosen}</h3>'
        f'<div class="soft">confidence {group.confidence:.2f}</div>'
        f'<div class="bar"><i style="width: {100 * min(max(group.confidence, 0), 1):.0f}%"></i></div>{claim}'
        f"<p>{''.join(_link(by_number[n], number) for n in group.members)}</p>{against}</div>"
    )


def _link(e: Evidence, number: int) -> str:
    kind = " memory" if e.memory else ""
    return f'<a class="tag{kind}" href="#a{number}-{e.number}">{e.number} · {_safe(e.source)}</a>'


def _text(e: Evidence, number: int, unused: bool) -> str:
    kind = ' <span class="tag memory">memory</span>' if e.memory else ""
    rest = ' <span class="tag">not used</span>' if unused else ""
    place = "" if e.memory else f"<strong>{_safe(e.source)}</strong>"
    return (
        f'<div class="text{" unused" if unused else ""}" id="a{number}-{e.number}">{e.number} · {place}{kind}{rest}'
        f"<blockquote>{_safe(e.text if e.passage is None else e.passage.text)}</blockquote></div>"
    )


def _spoken(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _safe(text: str) -> str:
    return html.escape(str(text), quote=True)
