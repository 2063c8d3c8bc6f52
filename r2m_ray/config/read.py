"""Names, types and ranges of configuration fields, and what in a configuration does not fit them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from enum import Enum
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from r2m_ray.config.choices import Range
from r2m_ray.config.schema import Config
from r2m_ray.errors import Problem, hint, shown

MISSING = "???"
Tree = Mapping[Any, Any]
Groups = Mapping[str, Sequence[str]]


def schema() -> dict[str, Any]:
    """The annotated type of every field by its dotted path, such as ``algo.steps``."""
    return {
        f"{section}.{name}": field_type
        for section, section_type in get_type_hints(Config).items()
        for name, field_type in get_type_hints(section_type, include_extras=True).items()
    }


def range_of(field_type: Any) -> Range | None:
    """The range that a field's annotation carries; every number has one."""
    return next((extra for extra in get_args(field_type)[1:] if isinstance(extra, Range)), None)


def typed(tree: Tree, groups: Groups) -> tuple[Config, list[Problem]]:
    """Put a nested mapping into the schema, value by value.

    Returns the configuration, with defaults where a value did not fit, and what did not: unknown names and
    values of the wrong type. ``groups`` are the options of each configuration group, to explain a name.
    """
    known = schema()
    config = OmegaConf.structured(Config)
    problems: list[Problem] = []
    for section, content in tree.items():
        if section not in config:
            problems.append(_unknown_section(str(section), known, groups))
        elif not isinstance(content, Mapping):
            fields = ", ".join(_fields(known, section))
            problems.append(Problem(section, f"is a section, not a value; its fields are {fields}"))
        else:
            for name, value in content.items():
                path = f"{section}.{name}"
                if path in known:
                    problems += _assign(config, path, value, known[path])
                else:
                    problems.append(_unknown_field(path, section, known))
    result = OmegaConf.to_object(config)
    assert isinstance(result, Config)
    return result, problems


def range_problems(config: Config) -> Iterator[Problem]:
    """Every number that is out of its range or not finite, those passed through to the engines included."""
    values = asdict(config)
    for path, field_type in schema().items():
        section, name = path.split(".")
        allowed = range_of(field_type)
        value = values[section][name]
        if allowed is not None and value not in allowed:
            yield Problem(path, f"{shown(value)} is not {_allowed(field_type)}")
        elif isinstance(value, dict):
            for leaf, number in _leaves(path, value):
                if isinstance(number, float) and not math.isfinite(number):
                    yield Problem(leaf, f"{number} is not a finite number")


def _assign(config: DictConfig, path: str, value: object, field_type: Any) -> Iterator[Problem]:
    if value == MISSING:
        yield Problem(path, f"needs a value; give {path}=…")
        return
    try:
        OmegaConf.update(config, path, value, merge=False)
    except OmegaConfBaseException:
        guess = hint(str(value), _words(field_type))
        yield Problem(path, f"{shown(value)} is not {_allowed(field_type)}.{guess}")


def _unknown_section(name: str, known: Mapping[str, Any], groups: Groups) -> Problem:
    homes = [path for path in known if path.endswith(f".{name}")]
    names = sorted({path.partition(".")[0] for path in known} | set(groups))
    guess = f" Did you mean {' or '.join(homes)}?" if homes else hint(name, names)
    return Problem(name, f"no such section or group; there are {', '.join(names)}.{guess}")


def _unknown_field(path: str, section: str, known: Mapping[str, Any]) -> Problem:
    name = path.partition(".")[2]
    homes = [other for other in known if other.endswith(f".{name}")]
    guess = f" Did you mean {' or '.join(homes)}?" if homes else hint(path, list(known))
    return Problem(path, f"no such field; {section} has {', '.join(_fields(known, section))}.{guess}")


def _fields(known: Mapping[str, Any], section: str) -> list[str]:
    return [path.partition(".")[2] for path in known if path.startswith(f"{section}.")]


def _words(field_type: Any) -> list[str]:
    """The values of an enumeration; none for any other type."""
    if isinstance(field_type, type) and issubclass(field_type, Enum):
        return [str(member.value) for member in field_type]
    return []


def _allowed(field_type: Any) -> str:
    """What a field takes, in words."""
    allowed = range_of(field_type)
    if allowed is not None:
        return f"{'a whole number' if get_args(field_type)[0] is int else 'a number'} {allowed}"
    if words := _words(field_type):
        return f"one of {', '.join(words)}"
    if isinstance(field_type, UnionType):
        return "text or null"
    if get_origin(field_type) is dict:
        return "a mapping; write {name: value}"
    return "true or false" if field_type is bool else "text"


def _leaves(path: str, value: object) -> Iterator[tuple[str, object]]:
    """Every value inside nested dictionaries and lists, with its dotted path."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}", inner)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _leaves(f"{path}[{i}]", inner)
    else:
        yield path, value
