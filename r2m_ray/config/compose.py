"""From YAML files and command-line overrides to a typed, checked configuration.

hydra merges the files of ``conf/`` over the schema's defaults, without types; every value is then put into
the schema by itself. So a typo in a file and one on the command line are reported alike, and all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from r2m_ray.config.fields import fields, read
from r2m_ray.config.rules import validate
from r2m_ray.config.schema import Config
from r2m_ray.errors import InputError, Problem, hint, refuse, shown

DEFAULTS = "schema"
"""Name under which conf/config.yaml finds the schema's defaults."""
_SUBJECT = "the configuration"
_UNREADABLE = (HydraException, OmegaConfBaseException, YAMLError)


@cache
def store_defaults() -> None:
    """Let hydra know every field with its default, for overrides, ``--cfg`` and tab completion."""
    plain = OmegaConf.to_container(OmegaConf.structured(Config()), enum_to_str=True)
    ConfigStore.instance().store(name=DEFAULTS, node=plain)


def config_dir() -> Path:
    """The directory of YAML files: inside the package once installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for directory in (package / "conf", package.parent / "conf"):
        if (directory / "config.yaml").is_file():
            return directory
    raise InputError(f"{package}: conf/config.yaml is missing beside it; install the package again")


@cache
def groups() -> dict[str, list[str]]:
    """The options of each configuration group, as ``conf/`` offers them."""
    return {
        directory.name: sorted(file.stem for file in directory.glob("*.yaml"))
        for directory in sorted(config_dir().iterdir())
        if directory.is_dir()
    }


def load_config(overrides: Sequence[str]) -> Config:
    """The configuration that ``conf/`` and the overrides describe.

    Raises InputError with every problem at once: unknown names, wrong types, ranges, contradictions.
    """
    choices, values, problems = _sorted(overrides)
    tree, unknown = _composed(choices)
    return config_of(tree, values, [*problems, *unknown])


def load_saved(path: Path, overrides: Sequence[str]) -> Config:
    """The configuration that a run wrote to ``path``, with overrides of single fields.

    Raises InputError if the file is no configuration, and with every problem of the overrides at once.
    """
    choices, values, problems = _sorted(overrides)
    message = "chooses from a group, which a finished run no longer has; override its fields instead"
    problems += [Problem(_text(choice), message) for choice in choices]
    try:
        tree = OmegaConf.load(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the directory of a run") from error
    except (*_UNREADABLE, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a configuration ({_one_line(error)}); restore the file") from error
    if not isinstance(tree, DictConfig):
        raise InputError(f"{path}: not a configuration; restore the file")
    return config_of(tree, values, problems)


def config_of(tree: DictConfig, values: Sequence[Override] = (), problems: Sequence[Problem] = ()) -> Config:
    """The configuration in what hydra composed, with overrides of single fields.

    Raises InputError with every problem at once, those that are known already included.
    """
    found = [*problems, *(problem for override in values for problem in _apply(tree, override))]
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        refuse([*found, Problem(error.full_key or _SUBJECT, _one_line(error))], _SUBJECT)
        raise
    assert isinstance(plain, dict)
    config, unread = read(plain, groups())
    wrong = {problem.path for problem in unread}
    refuse([*found, *unread, *validate(config, wrong)], _SUBJECT)
    return config


def for_hydra(overrides: Sequence[str]) -> list[str]:
    """The overrides as hydra's main takes them: options that no file names are added, others are set.

    Raises InputError for what is no override.
    """
    lines = []
    parsed, problems = parse_overrides(overrides)
    refuse(problems, _SUBJECT)
    for override in parsed:
        path, _, value = _text(override).lstrip("+").partition("=")
        if override.is_hydra_override() or override.is_delete():
            lines.append(_text(override))
        elif _is_choice(override):
            lines.append(_line(override))
        else:
            # hydra adds no key to a mapping that a field holds unless it is told to.
            known = path in fields() and not isinstance(override.value(), dict)
            lines.append(f"{'' if known else '++'}{path}={value}")
    return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlugins:
    """hydra's sweeper and launcher, by name, and what files give the sweeper; ``basic`` is a grid."""

    sweeper: str = "basic"
    launcher: str = "basic"
    overrides: tuple[str, ...] = ()


def sweep_plugins(overrides: Sequence[str]) -> SweepPlugins:
    """What files and overrides choose for a sweep."""
    choices = [_line(override) for override in parse_overrides(overrides)[0] if _is_choice(override)]
    store_defaults()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            chosen = compose("config", overrides=choices, return_hydra_config=True).hydra
        except _UNREADABLE:
            # What is wrong is found, with all other mistakes, where the configuration is read.
            return SweepPlugins()
    return SweepPlugins(
        sweeper=str(chosen.runtime.choices["hydra/sweeper"]),
        launcher=str(chosen.runtime.choices["hydra/launcher"]),
        overrides=tuple(f"{path}={value}" for path, value in (chosen.sweeper.params or {}).items()),
    )


def parse_overrides(overrides: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """The overrides that follow hydra's grammar, and a problem for each that does not."""
    parser = OverridesParser.create()
    parsed, problems = [], []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            message = f"not of the form field=value ({_one_line(error)}); quote special characters"
            problems.append(Problem(shown(text), message))
    return parsed, problems


def _sorted(overrides: Sequence[str]) -> tuple[list[Override], list[Override], list[Problem]]:
    """Overrides that choose from groups, those that set fields, and a problem for each that is neither."""
    parsed, problems = parse_overrides(overrides)
    message = "is several values; add --multirun for one job each, or quote the value"
    problems += [Problem(_text(override), message) for override in parsed if override.is_sweep_override()]
    single = [override for override in parsed if not override.is_sweep_override()]
    choices = [override for override in single if _is_choice(override)]
    return choices, [override for override in single if not _is_choice(override)], problems


def _is_choice(override: Override) -> bool:
    """Whether an override chooses a file of a group, or speaks to hydra, rather than setting a field."""
    is_field = isinstance(override.value(), dict | int | float)
    is_group = override.key_or_group in groups() and not is_field
    return is_group or override.package is not None or override.is_hydra_override()


def _composed(choices: Sequence[Override]) -> tuple[DictConfig, list[Problem]]:
    """The files that were chosen, merged; a choice that cannot be merged becomes a problem."""
    lines: list[str] = []
    problems: list[Problem] = []
    store_defaults()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            return _merged([_line(choice) for choice in choices]), problems
        except _UNREADABLE:
            # hydra stops at the first fault; one choice after another shows them all.
            for choice in sorted(choices, key=lambda choice: not choice.is_hydra_override()):
                try:
                    _merged([*lines, _line(choice)])
                    lines.append(_line(choice))
                except _UNREADABLE as error:
                    problems.append(_choice_problem(choice, error))
        return _merged(lines), problems


def _line(choice: Override) -> str:
    """A choice as hydra takes it; every group has a default, so ``+`` adds nothing and ``null`` removes."""
    return _text(choice).lstrip("+") if choice.is_delete() or choice.value() else f"~{choice.key_or_group}"


def _merged(lines: list[str]) -> DictConfig:
    tree: DictConfig = compose("config", overrides=lines)
    OmegaConf.set_struct(tree, False)
    return tree


def _apply(tree: DictConfig, override: Override) -> list[Problem]:
    path = override.key_or_group
    try:
        if override.is_delete():
            parent, _, leaf = path.rpartition(".")
            del OmegaConf.select(tree, parent)[leaf]
        else:
            OmegaConf.update(tree, path, override.value(), merge=True, force_add=True)
    except (OmegaConfBaseException, KeyError, TypeError):
        remedy = "there is nothing to delete" if override.is_delete() else "a part of the path is no section"
        return [Problem(_text(override), remedy)]
    return []


def _choice_problem(choice: Override, error: Exception) -> Problem:
    if isinstance(error, MissingConfigException) and error.options is not None:
        value, known = str(choice.value()), sorted(error.options)
        message = f"no such option; there are {', '.join(known)}.{hint(value, known)}"
        return Problem(f"{choice.key_or_group}={shown(value)}", message)
    return Problem(_text(choice), _one_line(error))


def _text(override: Override) -> str:
    return str(override.input_line)


def _one_line(error: Exception) -> str:
    return shown(" ".join(str(error).split()))
