"""What the schema says of each field, and values put into it: every mistake at once, with what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum, StrEnum
from functools import cache
from types import MappingProxyType
from typing import Any, TypeVar, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from r2m_ray.config.schema import Compare, Config, Prepares, Resume
from r2m_ray.errors import Problem, hint, shown

MISSING = "???"
"""OmegaConf's mark of a value that the user must give."""
Tree = Mapping[Any, Any]
Groups = Mapping[str, Sequence[str]]
Answer = TypeVar("Answer", bound=StrEnum)


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field of the schema.

    path: dotted, such as ``algo.steps``. kind: its type. allowed: the values it takes, in words. choices: of
    an enumeration, its values. default, sentence: as declared. resume, prepares, compare: what it decides.
    """

    path: str
    kind: Any
    allowed: str
    choices: tuple[str, ...]
    default: object
    sentence: str
    resume: Resume
    prepares: Prepares
    compare: Compare

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.partition(".")[2]

    @property
    def decides(self) -> str:
        """What the field decides beside the run itself, in words."""
        return "; ".join((self.resume, self.prepares, self.compare))


@cache
def fields() -> Mapping[str, Field]:
    """Every field of the schema by its dotted path, in the order of declaration."""
    found = {}
    for section, outer in _infos(Config).items():
        for name, info in _infos(outer.annotation).items():
            path = f"{section}.{name}"
            found[path] = Field(
                path=path,
                kind=info.annotation,
                allowed=_allowed(info),
                choices=_choices(info.annotation),
                default={} if info.default is PydanticUndefined else info.default,
                sentence=" ".join((info.description or "").split()),
                resume=_answer(Resume.never, info, outer),
                prepares=_answer(Prepares.never, info, outer),
                compare=_answer(Compare.never, info, outer),
            )
    return MappingProxyType(found)


def deciding(*answers: Resume | Prepares | Compare) -> tuple[str, ...]:
    """Paths of the fields that give one of these answers."""
    return tuple(
        path for path, field in fields().items() if {field.resume, field.prepares, field.compare} & {*answers}
    )


FORMER_FREE = ("prepare.policy",)
"""Fields of earlier versions in which compared runs may differ."""


def compared(path: str) -> Compare:
    """In which compared runs a setting must agree; an unknown one answers as its section does."""
    if path in FORMER_FREE:
        return Compare.never
    field = fields().get(field_of(path))
    section = _infos(Config).get(path.partition(".")[0])
    return field.compare if field else _answer(Compare.never, *filter(None, (section,)))


def field_of(path: str) -> str:
    """The path of the field that a path is of, or lies inside of."""
    return ".".join(path.split(".")[:2])


def names_of(section: str, answer: Resume | Prepares | Compare) -> tuple[str, ...]:
    """Names of the fields of a section that give this answer."""
    return tuple(fields()[path].name for path in deciding(answer) if path.startswith(f"{section}."))


def values(config: Config, *paths: str) -> dict[str, Any]:
    """The values of these fields by path."""
    sections = asdict(config)
    return {path: sections[path.partition(".")[0]][fields()[path].name] for path in paths}


def reference(word: str = "") -> str:
    """Markdown about every field whose path contains ``word``: values, default, sentence, what it decides."""
    lines: list[str] = []
    for path, field in fields().items():
        if word in path:
            value = shown(field.default) or '""'
            lines += [
                f"`{path}` = `{value}`: {field.allowed}",
                f"  {field.sentence}",
                f"  ({field.decides})",
                "",
            ]
    return "\n".join(lines)


def read(tree: Tree, groups: Groups) -> tuple[Config, list[Problem]]:
    """Put a nested mapping into the schema.

    Args:
        tree: sections of values; what it lacks keeps its default.
        groups: options of each configuration group, to explain an unknown name.

    Returns:
        The configuration, with defaults where a value does not fit, and a problem for each of those values
        and for each unknown name.
    """
    problems = [*_absent(tree)]
    sections = {section: dict(v) if isinstance(v, Mapping) else v for section, v in tree.items()}
    wrong = {tuple(problem.path.split(".")) for problem in problems}
    try:
        return _adapter().validate_python(_without(sections, wrong)), problems
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            place = tuple(str(part) for part in fault["loc"][:2])
            if place not in wrong:
                wrong.add(place)
                problems.append(_problem(place, fault["input"], groups))
    return _adapter().validate_python(_without(sections, wrong)), problems


def leaves(value: Any, path: str = "", *, lists: bool = False) -> Iterator[tuple[str, Any]]:
    """Every value inside nested mappings, and with ``lists`` inside lists too, with its dotted path."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}" if path else str(name), lists=lists)
    elif lists and isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{i}]", lists=True)
    else:
        yield path, value


def value_problems(config: Config) -> Iterator[Problem]:
    """Every value of a configuration that its field does not take, those inside options included."""
    yield from read(asdict(config), {})[1]
    options = [path for path, field in fields().items() if get_origin(field.kind) is dict]
    for path, content in values(config, *options).items():
        for leaf, number in leaves(content, path, lists=True):
            if isinstance(number, float) and not math.isfinite(number):
                yield Problem(leaf, f"{number} is not a finite number")


@cache
def _adapter() -> TypeAdapter[Config]:
    return TypeAdapter(Config)


def _infos(record: Any) -> dict[str, FieldInfo]:
    infos: dict[str, FieldInfo] = record.__pydantic_fields__
    return infos


def _answer(usual: Answer, *infos: FieldInfo) -> Answer:
    """The answer of the innermost annotation that gives one."""
    given = (extra for info in infos for extra in info.metadata if isinstance(extra, type(usual)))
    return next(given, usual)


def _absent(tree: Tree) -> Iterator[Problem]:
    for section, content in tree.items():
        for name, value in content.items() if isinstance(content, Mapping) else ():
            if value == MISSING:
                yield Problem(f"{section}.{name}", f"needs a value; give {section}.{name}=…")


def _without(sections: Mapping[Any, Any], places: set[tuple[str, ...]]) -> dict[Any, Any]:
    """The sections without the fields, or complete sections, at these places."""
    return {
        section: {name: value for name, value in content.items() if (str(section), str(name)) not in places}
        if isinstance(content, Mapping)
        else content
        for section, content in sections.items()
        if (str(section),) not in places
    }


def _problem(place: tuple[str, ...], value: object, groups: Groups) -> Problem:
    path, known = ".".join(place), fields()
    if path in known:
        field = known[path]
        return Problem(path, f"{shown(value)} is not {field.allowed}.{hint(str(value), field.choices)}")
    section, name = place[0], place[-1]
    homes = [field.path for field in known.values() if field.name == name]
    likely = f" Did you mean {' or '.join(homes)}?" if homes else ""
    names = [field.name for field in known.values() if field.path.startswith(f"{section}.")]
    if len(place) == 2:
        near = likely or hint(path, [*known])
        return Problem(path, f"no such field; {section} has {', '.join(names)}.{near}")
    if names:
        return Problem(path, f"is a section, not a value; its fields are {', '.join(names)}")
    sections = sorted({path.partition(".")[0] for path in known} | {*groups})
    near = likely or hint(name, sections)
    return Problem(path, f"no such section or group; there are {', '.join(sections)}.{near}")


def _choices(kind: Any) -> tuple[str, ...]:
    is_choice = isinstance(kind, type) and issubclass(kind, Enum)
    return tuple(str(member.value) for member in kind) if is_choice else ()


def _allowed(info: FieldInfo) -> str:
    """What a field takes, in words."""
    kind = info.annotation
    if kind in (int, float):
        return f"{'a whole number' if kind is int else 'a number'} {_range(info.metadata)}"
    if choices := _choices(kind):
        return f"one of {', '.join(choices)}"
    if get_origin(kind) is dict:
        return "a mapping; write {name: value}"
    return "true or false" if kind is bool else "text" if kind is str else "text or null"


def _range(bounds: Sequence[object]) -> str:
    low = high = ""
    for bound in bounds:
        match bound:
            case Ge(ge=number):
                low = f"[{number}"
            case Gt(gt=number):
                low = f"({number}"
            case Le(le=number):
                high = f"{number}]"
            case Lt(lt=number):
                high = f"{number})"
    if high:
        return f"in {low}, {high}"
    return f"{'≥' if low[0] == '[' else '>'} {low[1:]}"
