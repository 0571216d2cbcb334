"""Templates that come with a model's file: they reach nothing, change nothing, and end."""

import contextlib
import contextvars
import datetime
import functools
import json
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from jaxml import files
from jaxml.extras import need

TEMPLATE = 2**17  # characters of a template; published ones have up to 20,000
TURNS = 200_000  # of all loops and macros of one rendering together
SECONDS = 10
CHARACTERS = 2**20  # of anything that a template makes, and 16 times what it is given
TOTAL = 2**28  # of all that it makes, and 1,024 times what it is given
ELEMENT = 16  # characters that an element of a list counts as
SHORT = 100  # characters of an attribute's name, and of those that are stripped
FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "indent",
    "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace",
    "reverse", "safe", "select", "selectattr", "sort", "string", "title", "tojson", "trim", "unique", "upper",
)  # fmt: skip
TEXTS = (  # methods of texts: those that pad, format or encode are left out
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal",
    "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition",
    "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split",
    "splitlines", "startswith", "strip", "swapcase", "title", "upper",
)  # fmt: skip
NAMES = ("_tick", "_join", "_made")  # what templates are rewritten to call


def render(template: str, **values: Any) -> str:
    """What a Jinja template says of these values.

    Raises:
        ValueError: it is no template, refuses the values, or does not end soon enough.
    """
    need("jinja2", "lm")
    from jinja2 import TemplateError

    try:
        if len(template) > TEMPLATE:
            raise TemplateError(f"it has more than {TEMPLATE:,} characters")
        with _metered(values):
            calls = {"_tick": _tick, "_join": _join, "_made": _made}
            return _gathered(_compiled(template).generate(**calls, **values))
    except TemplateError as error:
        raise ValueError(f"chat.render: the model's chat template refused the messages ({error}).") from error
    except (ValueError, NameError, RuntimeError, *files.IMPOSSIBLE) as error:
        said = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"chat.render: the model's chat template does not work ({said}).") from error


# ---- what one rendering may still make -------------------------------------------------------------


class Meter:
    """Counts the turns, the time and the characters of one rendering."""

    def __init__(self, values: Mapping[str, Any]):
        given = _size(values, 2**40)
        self.most, self.left = CHARACTERS + 16 * given, TOTAL + 1024 * given
        self.turns, self.until = TURNS, time.monotonic() + SECONDS

    def turn(self) -> None:
        self.turns -= 1
        if self.turns < 0:
            _refuse(f"its loops turn more than {TURNS:,} times")

    def spend(self, size: int) -> None:
        """Something of this many characters is made."""
        size = max(0, size)
        if size > self.most:
            _refuse(f"it makes more than {self.most:,} characters")
        self.left -= size
        if self.left < 0:
            _refuse("it makes too many characters in all")
        if time.monotonic() > self.until:
            _refuse(f"it takes more than {SECONDS} s")


_METER: contextvars.ContextVar[Meter] = contextvars.ContextVar("meter")


@contextlib.contextmanager
def _metered(values: Mapping[str, Any]) -> Iterator[None]:
    before = _METER.set(Meter(values))
    try:
        yield
    finally:
        _METER.reset(before)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _made(value: Any) -> Any:
    """The value, whose characters are counted as deep as it goes."""
    meter = _METER.get()
    meter.spend(_size(value, meter.most))
    return value


def _size(value: Any, most: int) -> int:
    """Characters of a value's texts and elements; the count stops where it is over `most`."""
    from jinja2.utils import Namespace

    size, left = 0, [value]
    while left and size <= most:
        one = left.pop()
        size += ELEMENT
        if isinstance(one, str | bytes):
            size += len(one)
        elif isinstance(one, int):
            size += one.bit_length() // 3
        elif isinstance(one, Namespace):
            left.append(one._Namespace__attrs)
        elif isinstance(one, Mapping):
            left += [*one.keys(), *one.values()]
        elif isinstance(one, Collection) and not isinstance(one, range):
            left += one
    return size


def _tick(characters: int) -> str:
    """A loop turns, whose body has this much text."""
    meter = _METER.get()
    meter.turn()
    meter.spend(characters)
    return ""


def _each(items: Iterator[Any]) -> Iterator[Any]:
    """What a filter makes one by one, counted when it is taken."""
    for one in items:
        _METER.get().turn()
        yield _made(one)


def _listed(value: Any) -> Any:
    """A list in the place of what is made one by one."""
    return list(_each(value)) if isinstance(value, Iterator) else value


def _join(*parts: Any) -> str:
    """`a ~ b`."""
    return _made("".join(str(_made(part)) for part in parts))


def _gathered(parts: Iterable[str]) -> str:
    """Texts as one, added up while they are made."""
    made, length = [], 0
    for part in parts:
        made.append(part)
        length += len(part)
        if length > (most := _METER.get().most):
            _refuse(f"it makes more than {most:,} characters")
    return "".join(made)


# ---- the template, rewritten -----------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    """The template, which counts the turns of its loops, the calls of its macros and what it makes."""
    from jinja2 import nodes

    environment = _environment()
    tree = environment.parse(template)
    if own := [node.name for node in tree.find_all(nodes.Name) if node.name in NAMES]:
        _refuse(f"{own[0]} is a name of the sandbox's own")
    unknown = (
        nodes.Block, nodes.FloorDiv, nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends,
        nodes.ScopedEvalContextModifier, nodes.EvalContextModifier,
    )  # fmt: skip
    if found := next(tree.find_all(unknown), None):
        _refuse(f"it has a {type(found).__name__}, which is not supported")
    for node in tree.find_all(nodes.For):
        if node.test is not None:  # turns that the condition leaves out count as well
            node.test = nodes.And(nodes.Not(_call("_tick", [nodes.Const(0)])), node.test)
    for kind in (nodes.For, nodes.Macro, nodes.CallBlock):
        for node in tree.find_all(kind):
            text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            node.body.insert(0, nodes.Output([_call("_tick", [nodes.Const(text)])]))
    _counted(tree)
    for node in tree.find_all(nodes.Node):
        node.lineno = node.lineno or 1
    return environment.from_string(nodes.Template(tree.body, lineno=1).set_environment(environment))


def _call(name: str, args: list[Any]) -> Any:
    from jinja2 import nodes

    return nodes.Call(nodes.Name(name, "load"), args, [], None, None)


def _counted(node: Any) -> None:
    """Within a node: `a ~ b`, lists and dicts as calls that look at the size."""
    from jinja2 import nodes

    def of(child: Any) -> Any:
        if isinstance(child, nodes.Node):
            _counted(child)
        if isinstance(child, nodes.Concat):
            return _call("_join", child.nodes)
        written = isinstance(child, nodes.List | nodes.Dict) or (isinstance(child, nodes.Tuple) and child.ctx == "load")
        return _call("_made", [child]) if written else child

    for name, child in node.iter_fields():
        if isinstance(child, list):
            child[:] = map(of, child)
        else:
            setattr(node, name, of(child))


# ---- what it may call --------------------------------------------------------------------------------


@functools.cache
def _environment() -> Any:
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what an assistant wrote, for masks; its text is rendered as it stands."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    class Bounded(ImmutableSandboxedEnvironment):
        """The sandbox, whose operators make nothing that is very large."""

        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "*":
                for one, times in ((left, right), (right, left)):
                    if isinstance(times, int) and hasattr(one, "__len__"):
                        _METER.get().spend(len(one) * max(times, 0))
            whole = isinstance(left, int) and isinstance(right, int)
            if operator in ("*", "**") and whole and left.bit_length() * (right if operator == "**" else 1) > 2**16:
                _refuse("it makes a very large number")
            if operator == "%" and isinstance(left, str):
                _refuse("it formats with %; only {{ }} is supported")
            return _made(super().call_binop(context, operator, left, right))

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            if isinstance(obj, str | bytes | int | float | type):
                return isinstance(obj, str) and attr in TEXTS
            return super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> None:
            return None  # no text's attribute `format` is safe

        def getitem(self, obj: Any, argument: Any) -> Any:
            found = super().getitem(obj, argument)
            return _made(found) if isinstance(argument, slice) else found

        def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            _made((args, kwargs))
            args = tuple(map(_listed, args))
            if isinstance(getattr(function, "__self__", None), str):
                if function.__name__.endswith("strip") and args and len(str(args[0])) > SHORT:
                    _refuse(f"it strips at most {SHORT} characters")
                _METER.get().spend(_in_many_places(function.__name__, function.__self__, args))
            return _made(super().call(context, function, *args, **kwargs))

    environment = Bounded(
        trim_blocks=True, lstrip_blocks=True, finalize=_made, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals["raise_exception"] = lambda message: _refuse(str(message))
    environment.globals["strftime_now"] = _now
    environment.filters["tojson"] = _tojson
    for name in set(environment.filters) - set(FILTERS):  # widths, copies, and nothing that a chat needs
        environment.filters.pop(name)
    for name in ("lipsum", "cycler"):
        environment.globals.pop(name, None)
    for name, function in environment.filters.items():
        environment.filters[name] = _bounded(name, function)
    return environment


def _now(form: str) -> str:
    if len(form) > 200 or re.search(r"%[^a-zA-Z%]*\d", form):
        _refuse("a date has a short format without widths")
    return datetime.datetime.now().strftime(form)


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers hands it to templates."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        _refuse("an indent is from 0 to 16")
    encoder = json.JSONEncoder(
        ensure_ascii=bool(ensure_ascii), indent=indent, separators=separators, sort_keys=bool(sort_keys)
    )
    return _gathered(encoder.iterencode(x))


def _in_many_places(method: str, text: str, args: tuple[Any, ...]) -> int:
    """How much a method or filter of a text puts a long one in the place of short ones."""
    if method == "replace" and len(args) > 1:
        return (text.count(str(args[0])) if args[0] else len(text) + 1) * len(str(args[1]))
    if method == "join" and args and hasattr(args[0], "__len__"):
        return len(text) * len(args[0])
    if method == "indent" and args:
        return (len(text.splitlines()) + 1) * (len(args[0]) if isinstance(args[0], str) else int(args[0]))
    return 0


def _bounded(name: str, function: Any) -> Any:
    """A filter that is given and makes nothing very large."""
    import inspect

    from jinja2 import Environment
    from jinja2.nodes import EvalContext
    from jinja2.runtime import Context

    signature = inspect.signature(function)
    looks = name in ("length", "count", "first", "last", "default", "d")  # and copies nothing

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        told = isinstance(args[0], Environment | EvalContext | Context) if args else False
        front, given = args[:told], tuple(map(_listed, args[told:]))
        for one in () if looks else (*given, *kwargs.values()):
            _made(one)
        named = signature.bind(*front, *given, **kwargs).arguments
        # Names of attributes, filters and tests, and what is stripped; in the others a second text is content.
        second = () if name in ("replace", "join", "default", "d") else given[1:2]
        options = (named.get("attribute"), kwargs.get("attribute"), *second)
        if any(isinstance(value, str) and len(value) > SHORT for value in options):
            _refuse(f"a name has at most {SHORT} characters")
        if given and name == "join":
            _METER.get().spend(_in_many_places(name, str(named.get("d", "")), given[:1]))
        elif given and name == "replace":
            _METER.get().spend(_in_many_places(name, str(given[0]), (named.get("old", ""), named.get("new", ""))))
        elif given and name == "indent":
            _METER.get().spend(_in_many_places(name, str(given[0]), (named.get("width", 4),)))
        made = function(*front, *given, **kwargs)
        return _each(made) if isinstance(made, Iterator) else _made(made)

    call.__signature__ = signature
    return call
