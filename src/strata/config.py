"""How every piece of strata is configured: frozen pydantic models, YAML recipes, `a.b=c` overrides.

Each room owns its own configuration classes; this file owns only their base class and the way a
recipe is read, overridden and validated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from strata.errors import ConfigError


class FrozenConfig(BaseModel):
    """Base of every configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


ConfigT = TypeVar("ConfigT", bound=FrozenConfig)


def load_config(cls: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML recipe, apply `a.b=c` overrides and validate it.

    A recipe may begin with `extends: OTHER.yaml`, a file beside it, and say only what differs.

    Args:
        cls: the configuration class to build.
        path: a YAML file holding one mapping.
        overrides: strings `dotted.key=value`; the value is parsed as YAML.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, or a value is not allowed.
    """
    tree = read_tree(Path(path))
    for override in overrides:
        apply_override(tree, override)
    return validate(cls, tree, origin=str(path))


def read_tree(path: Path, *, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe as plain values, laid over the one that it extends.

    Mappings are laid over key by key, everything else is replaced; `null` leaves a section out.

    Raises:
        ConfigError: a file is missing or not YAML, or recipes extend one another in a circle.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {path}: give the path of a YAML file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder: give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text (byte {error.start}): a recipe is YAML"
        ) from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {_one_line(str(error))}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, not a mapping of recipe keys")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends holds {base!r}, not the path of a YAML file")
    place = path.parent / base
    above = (*extended_by, path.resolve())
    if place.resolve() in above:
        raise ConfigError(f"{path}: extends {base}, which extends this one in turn")
    return laid_over(read_tree(place, extended_by=above), tree)


def laid_over(base: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `tree`; of mappings in both, key by key."""
    result = dict(base)
    for key, value in tree.items():
        below = result.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            result[key] = laid_over(below, value)
        else:
            result[key] = value
    return result


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `a.b=c` override in a nested mapping, in place."""
    key, separator, value = override.partition("=")
    if not separator or not key or not all(key.split(".")):
        raise ConfigError(f"override {override!r} is not of the form a.b=value")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML") from None
    *parents, leaf = key.split(".")
    node = tree
    for depth, name in enumerate(parents, start=1):
        child = node.get(name)
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            where = ".".join(parents[:depth])
            raise ConfigError(f"override {override!r}: {where} holds {child!r}, not a mapping")
        node = child
    node[leaf] = parsed


def validate(cls: type[ConfigT], tree: dict[str, Any], *, origin: str) -> ConfigT:
    """Build `cls` from a plain mapping; the first fault becomes one line naming its path."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(the whole)"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        if first["type"] == "extra_forbidden":
            allowed = _fields_at(cls, first["loc"][:-1])
            hint = f"; allowed here: {', '.join(allowed)}" if allowed else ""
            raise ConfigError(f"{origin}: unknown key {where}{hint}{more}") from None
        if first["type"] == "missing":
            raise ConfigError(f"{origin}: {where} is required but not given{more}") from None
        message = _one_line(first["msg"].removeprefix("Value error, "))
        given = first.get("input")
        shown = f" (given {given!r})" if isinstance(given, str | int | float | bool) else ""
        raise ConfigError(f"{origin}: {where}: {message}{shown}{more}") from None


def dump_yaml(config: FrozenConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _fields_at(cls: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names of the configuration class found by walking `location` from `cls`."""
    current: type[BaseModel] | None = cls
    for part in location:
        field = current.model_fields.get(str(part)) if current is not None else None
        if field is None:
            continue  # a union tag or a list index: stay where we are
        current = _model_in(field.annotation)
    return list(current.model_fields) if current is not None else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())
