"""Templates that come with a model's file: they reach nothing, change nothing, and end."""

import datetime
import functools
import json
import time
from collections.abc import Iterable
from typing import Any

from jaxml import files
from jaxml.extras import need

TURNS = 200_000  # of all loops and macros of one rendering together
SECONDS = 10
CHARACTERS = 2**20  # of anything that a template makes
FILTERS = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby",
    "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr",
    "replace", "reverse", "safe", "select", "selectattr", "sort", "string", "title", "tojson", "trim", "unique",
    "upper",
)  # fmt: skip
PADDING = ("center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill")  # of texts


def render(template: str, **values: Any) -> str:
    """What a Jinja template says of these values.

    Raises:
        ValueError: it is no template, refuses the values, or does not end soon enough.
    """
    need("jinja2", "lm")
    from jinja2 import TemplateError

    left, until = [TURNS], time.monotonic() + SECONDS

    def tick() -> str:
        left[0] -= 1
        if left[0] < 0:
            raise TemplateError(f"its loops turn more than {TURNS:,} times")
        if left[0] % 64 == 0 and time.monotonic() > until:
            raise TemplateError(f"it takes more than {SECONDS} s")
        return ""

    try:
        return _gathered(_compiled(template).generate(_tick=tick, _join=_join, **values))
    except TemplateError as error:
        raise ValueError(f"chat.render: the model's chat template refused the messages ({error}).") from error
    except (ValueError, *files.IMPOSSIBLE) as error:
        said = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"chat.render: the model's chat template does not work ({said}).") from error


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    """The template, which counts the turns of its loops and the calls of its macros."""
    from jinja2 import TemplateError, nodes

    environment = _environment()
    tree = environment.parse(template)
    if own := [node.name for node in tree.find_all(nodes.Name) if node.name in ("_tick", "_join")]:
        raise TemplateError(f"{own[0]} is a name of the sandbox's own")
    if any(tree.find_all(nodes.Block)) or any(tree.find_all(nodes.FloorDiv)):
        raise TemplateError("it has blocks or whole quotients; neither is supported")
    for node in tree.find_all(nodes.For):
        if node.test is not None:  # turns that the condition leaves out count as well
            node.test = nodes.And(nodes.Not(nodes.Call(nodes.Name("_tick", "load"), [], [], None, None)), node.test)
    tick = lambda: nodes.Output([nodes.Call(nodes.Name("_tick", "load"), [], [], None, None)])
    for kind in (nodes.For, nodes.Macro, nodes.CallBlock):
        for node in tree.find_all(kind):
            node.body.insert(0, tick())
    _joined(tree)
    for node in tree.find_all(nodes.Node):
        node.lineno = node.lineno or 1
    return environment.from_string(nodes.Template(tree.body, lineno=1).set_environment(environment))


def _joined(node: Any) -> None:
    """`a ~ b` as a call that looks at the length."""
    from jinja2 import nodes

    for name, child in node.iter_fields():
        if isinstance(child, list):
            child[:] = [_concat(one) if isinstance(one, nodes.Concat) else one for one in child]
        elif isinstance(child, nodes.Concat):
            setattr(node, name, _concat(child))
    for child in node.iter_child_nodes():
        _joined(child)


def _concat(node: Any) -> Any:
    from jinja2 import nodes

    return nodes.Call(nodes.Name("_join", "load"), node.nodes, [], None, None, lineno=node.lineno)


def _join(*parts: Any) -> str:
    return _short("".join(map(str, parts)))


def _gathered(parts: Iterable[str]) -> str:
    """Texts as one, added up while they are made."""
    made, length = [], 0
    for part in parts:
        made.append(part)
        length += len(part)
        _affordable(length)
    return "".join(made)


def _short(made: Any) -> Any:
    if isinstance(made, str | list | tuple | bytes):
        _affordable(len(made))
    return made


def _affordable(length: int) -> None:
    """Refuses what is longer than anything that a chat needs."""
    if length > CHARACTERS:
        from jinja2 import TemplateError

        raise TemplateError(f"it makes more than {CHARACTERS:,} characters")


@functools.cache
def _environment() -> Any:
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Bounded(ImmutableSandboxedEnvironment):
        """The sandbox, whose operators make nothing that is very large."""

        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "*":
                for one, times in ((left, right), (right, left)):
                    if isinstance(times, int) and hasattr(one, "__len__"):
                        _affordable(len(one) * times)
            whole = isinstance(left, int) and isinstance(right, int)
            if operator in ("*", "**") and whole and left.bit_length() * (right if operator == "**" else 1) > 2**16:
                raise TemplateError("it makes a very large number")
            if operator == "%" and isinstance(left, str):
                raise TemplateError("it formats with %; only {{ }} is supported")
            return _short(super().call_binop(context, operator, left, right))

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return not (isinstance(obj, str) and attr in PADDING) and super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> None:
            if isinstance(getattr(value, "__self__", None), str) and value.__name__ in ("format", "format_map"):
                raise TemplateError("it formats with str.format; only {{ }} is supported")

        def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(getattr(function, "__self__", None), str):
                _affordable(_in_many_places(function.__name__, function.__self__, args))
            return _short(super().call(context, function, *args, **kwargs))

    def refuse(message: Any) -> None:
        raise TemplateError(str(message))

    environment = Bounded(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = _tojson
    for name in set(environment.filters) - set(FILTERS):  # widths, copies, and nothing that a chat needs
        environment.filters.pop(name)
    for name in ("lipsum", "cycler"):
        environment.globals.pop(name, None)
    for name in ("indent", "replace", "join"):
        environment.filters[name] = _bounded(environment.filters[name])
    return environment


def _tojson(x: Any, indent: int | None = None) -> str:
    from jinja2 import TemplateError

    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise TemplateError("an indent is from 0 to 16")
    return _gathered(json.JSONEncoder(ensure_ascii=False, indent=indent).iterencode(x))


def _in_many_places(method: str, text: str, args: tuple[Any, ...]) -> int:
    """How much a method of a text puts a long one in the place of short ones."""
    if method == "replace" and len(args) > 1:
        return (text.count(str(args[0])) if args[0] else len(text) + 1) * len(str(args[1]))
    if method == "join" and args and hasattr(args[0], "__len__"):
        return len(text) * len(args[0])
    return 0


def _bounded(function: Any) -> Any:
    """A filter whose result is not very large."""
    import inspect

    from jinja2 import Environment
    from jinja2.nodes import EvalContext

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        sizes = [a for a in (*args, *kwargs.values()) if isinstance(a, int) and not isinstance(a, bool)]
        if any(size > 1000 for size in sizes):
            from jinja2 import TemplateError

            raise TemplateError("a width is at most 1,000")
        given = args[1:] if isinstance(args[0], Environment | EvalContext) else args
        if given and function.__name__.endswith("replace"):
            _affordable(_in_many_places("replace", str(given[0]), given[1:]))
        if given and function.__name__.endswith("join"):
            _affordable(_in_many_places("join", str((*given[1:], kwargs.get("d", ""))[0]), given[:1]))
        return _short(function(*args, **kwargs))

    call.__signature__ = inspect.signature(function)
    return call
