"""Questions that come with something: countries, ParaRel's triples, places that do not exist."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxml import files
from jaxml.tune import facts
from jaxml.tune.r_tuning.items import Item

# Relation of `countries` → question about a name.
COUNTRY = {
    "capital": "What is the capital of {}?",
    "currency": "What is the currency code of {}?",
    "calling code": "What is the telephone calling code of {}?",
    "demonym": "What is a person from {} called?",
    "continent": "On which continent is {}?",
    "alpha-2 code": "What is the two-letter country code of {}?",
    "alpha-3 code": "What is the three-letter country code of {}?",
    "subregion": "In which subregion of the world is {}?",
    "domain": "What is the internet domain of {}?",
    "neighbour": "Which country borders {}?",
    "capital of": "{} is the capital of which country?",
}
NEW = ("demonym", "continent", "capital of")  # kept out of training; a small model knows some of each


def countries(relations: Sequence[str] = tuple(COUNTRY)) -> list[Item]:
    """Questions about the countries of the package ``countryinfo``, the relation as group.

    Raises:
        ValueError: an unknown relation.
        ImportError: the package is not installed.

    Example:
        >>> {item.group for item in countries(("capital",))}
        {'capital'}
    """
    if unknown := [r for r in relations if r not in COUNTRY]:
        raise ValueError(f"r_tuning.countries: relations are {', '.join(COUNTRY)}, got {unknown[0]!r}.")
    table = facts.read_files()
    names = {(c.get("ISO") or {}).get("alpha3"): c["name"] for c in table if c.get("name")}
    items = []
    for country in table:
        name, capital = country.get("name"), country.get("capital")
        if not name:
            continue
        for relation in relations:
            answers = _of(country, relation, names)
            about = capital if relation == "capital of" else name
            if about and answers:
                items.append(Item(COUNTRY[relation].format(about), answers, group=relation))
    return items


def _of(country: dict[str, Any], relation: str, names: dict[str, str]) -> tuple[str, ...]:
    """The answers, the first the one to train on."""
    iso = country.get("ISO") or {}
    found = {
        "capital": [country.get("capital")],
        "currency": facts.currencies(country),
        "calling code": [f"+{code.lstrip('+')}" for code in country.get("callingCodes") or [] if code.strip()],
        "demonym": [country.get("demonym")],
        "continent": _continents(country),
        "alpha-2 code": [iso.get("alpha2")],
        "alpha-3 code": [iso.get("alpha3")],
        "subregion": [country.get("subregion")],
        "domain": country.get("tld") or [],
        "neighbour": [names.get(code) for code in country.get("borders") or []],
        "capital of": [country.get("name")] if country.get("capital") else [],
    }[relation]
    return tuple(text.strip() for text in found if isinstance(text, str) and text.strip())


def _continents(country: dict[str, Any]) -> list[str]:
    """The region; America has two continents."""
    region, subregion = country.get("region"), country.get("subregion")
    if region != "Americas":
        return [region]
    return [region, "America", "South America" if subregion == "South America" else "North America"]


# Syllables of names that no country has: those to be asked, and those to be trained on.
SYLLABLES = {
    "test": (
        "Bal Kor Mer Tal Ves Zan Dor Fel Gri Hul Jar Lem Nov Pral Quen Rus Sor Tiv Ulm Wex".split(),
        "avia onia istan eria andor ovia uland emba arra isia".split(),
    ),
    "train": (
        "Bren Cas Dru Eld Fos Gam Hax Ith Kel Lor Mox Nar Osk Pel Rin Sav Tor Ull Vyr Yol".split(),
        "ania esia oria urgia antia opia ilia unda oland amba".split(),
    ),
}


def invented(
    count: int = 100, relations: Sequence[str] = tuple(COUNTRY), seed: int = 0, part: str = "test"
) -> list[Item]:
    """Questions about countries that do not exist, which nothing answers.

    Args:
        part: "test" or "train"; the names of one have no syllable of the other's.

    Example:
        >>> invented(2)[0].answerable
        False
    """
    rng = np.random.default_rng(seed)
    first, last = SYLLABLES[part]
    names = [f"{a}{b}" for a in first for b in last]
    names = [names[i] for i in rng.permutation(len(names))]
    if count > len(names):
        raise ValueError(f"r_tuning.invented: at most {len(names)} questions, got {count}.")
    kinds = [relations[i % len(relations)] for i in range(count)]
    return [Item(COUNTRY[kind].format(name), group=kind) for kind, name in zip(kinds, names)]


# Relation of ParaRel → question about a subject.
PARAREL = {
    "P17": "In which country is {}?",
    "P19": "Where was {} born?",
    "P20": "Where did {} die?",
    "P27": "Of which country is {} a citizen?",
    "P30": "On which continent is {}?",
    "P36": "What is the capital of {}?",
    "P37": "What is the official language of {}?",
    "P39": "Which office did {} hold?",
    "P47": "With which place does {} share a border?",
    "P101": "In which field does {} work?",
    "P103": "What is the native language of {}?",
    "P106": "What is the profession of {}?",
    "P108": "For whom does {} work?",
    "P127": "Who owns {}?",
    "P131": "In which region is {}?",
    "P136": "Which kind of music does {} play?",
    "P138": "After whom or what is {} named?",
    "P140": "Which religion is {} of?",
    "P159": "In which city are the headquarters of {}?",
    "P176": "Which company makes {}?",
    "P178": "Who developed {}?",
    "P190": "What is a twin city of {}?",
    "P264": "With which record label is {}?",
    "P276": "Where is {}?",
    "P279": "What is {} a kind of?",
    "P361": "What is {} a part of?",
    "P364": "What is the original language of {}?",
    "P407": "In which language is {} written?",
    "P413": "In which position does {} play?",
    "P449": "On which channel was {} first shown?",
    "P463": "Of which organization is {} a member?",
    "P495": "In which country was {} made?",
    "P527": "What does {} consist of?",
    "P530": "With which country does {} have diplomatic relations?",
    "P740": "Where was {} founded?",
    "P937": "In which city did {} work?",
    "P1001": "In which country does {} apply?",
    "P1303": "Which instrument does {} play?",
    "P1376": "Of what is {} the capital?",
    "P1412": "Which language does {} speak?",
}


def pararel(folder: str | Path, relations: Sequence[str] | None = None) -> list[Item]:
    """Questions from the triples of ParaRel (Elazar et al. 2021), the relation as group.

    Everything that the triples say of a subject is right.

    Args:
        folder: a copy of its repository, or the folder ``trex_lms_vocab`` in it.
        relations: their names (P17); all that a question is known for where None.

    Raises:
        FileNotFoundError, ValueError: no triples there, an unknown relation, or a line that holds none.

    Example:
        >>> import json, tempfile
        >>> triple = json.dumps({"sub_label": "Oslo", "obj_label": "Norway"})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(f"{folder}/P17.jsonl").write_text(triple)
        ...     pararel(folder)[0].answers
        ('Norway',)
    """
    folder = Path(folder)
    found = next((p for p in (folder, folder / "trex_lms_vocab", folder / "data" / "trex_lms_vocab") if
                  list(p.glob("P*.jsonl"))), None)  # fmt: skip
    if found is None:
        raise FileNotFoundError(f"{folder}: no folder of ParaRel; it has data/trex_lms_vocab with files P17.jsonl, ….")
    if unknown := [r for r in relations or () if r not in PARAREL]:
        raise ValueError(f"r_tuning.pararel: relations are {', '.join(PARAREL)}, got {unknown[0]!r}.")
    items = []
    for relation in relations or PARAREL:
        path = found / f"{relation}.jsonl"
        if not path.is_file():
            continue
        answers: dict[str, list[str]] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                triple = json.loads(line)
                subject, object_ = triple["sub_label"], triple["obj_label"]
                if not isinstance(subject, str) or not isinstance(object_, str):
                    raise TypeError("both are texts")
                answers.setdefault(subject, []).append(object_)
            except (ValueError, *files.IMPOSSIBLE) as error:
                raise ValueError(f"{path}, line {number}: a triple has sub_label and obj_label ({error}).") from error
        items += [
            Item(PARAREL[relation].format(subject), tuple(dict.fromkeys(objects)), group=relation)
            for subject, objects in answers.items()
        ]
    return items
