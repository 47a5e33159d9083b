"""A stand-in for pydantic on images where nothing can be installed: fields and defaults, unchecked.

Used by `gpu_check.py` alone, and only where the real one is missing. Values are taken as given;
validators after construction run, everything else that pydantic does is absent.
"""

from __future__ import annotations

import inspect
from typing import Any

_MISSING = object()


PositiveFloat = float
PositiveInt = int
NonNegativeInt = int
NonNegativeFloat = float


class ValidationError(ValueError):
    """Never raised here."""


class _Field:
    def __init__(self, default: Any, default_factory: Any) -> None:
        self.default, self.default_factory = default, default_factory


def Field(default: Any = _MISSING, *, default_factory: Any = None, **_: Any) -> Any:
    return _Field(default, default_factory)


def ConfigDict(**options: Any) -> dict[str, Any]:
    return options


def model_validator(*, mode: str) -> Any:
    def mark(method: Any) -> Any:
        method.runs_after = mode == "after"
        return method

    return mark


def field_validator(*_: Any, **__: Any) -> Any:
    return lambda method: method


class BaseModel:
    def __init__(self, **given: Any) -> None:
        names: list[str] = []
        for cls in reversed(type(self).__mro__):
            names += [n for n in inspect.get_annotations(cls) if not n.startswith("_")]
        for name in names:
            value = given.pop(name, _MISSING)
            if value is _MISSING:
                value = getattr(type(self), name, _MISSING)
                if isinstance(value, _Field):
                    factory = value.default_factory
                    value = factory() if factory is not None else value.default
            if value is _MISSING:
                raise TypeError(f"{type(self).__name__} needs {name}")
            object.__setattr__(self, name, value)
        if given:
            raise TypeError(f"{type(self).__name__} has no {', '.join(given)}")
        for cls in type(self).__mro__:
            for method in vars(cls).values():
                if getattr(method, "runs_after", False):
                    method(self)

    def model_copy(self, *, update: dict[str, Any]) -> Any:
        return type(self)(**{**vars(self), **update})

    def model_dump(self, **_: Any) -> dict[str, Any]:
        plain = {}
        for name, value in vars(self).items():
            value = value.model_dump() if isinstance(value, BaseModel) else value
            plain[name] = list(value) if isinstance(value, tuple) else value
        return plain
