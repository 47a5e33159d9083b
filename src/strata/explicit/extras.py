"""Packages that only some of strata needs, imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any, Literal

from strata.errors import StrataError


class MissingPackageError(StrataError):
    """What was asked for needs a package that is not installed."""


def require(
    module: str, *, extra: Literal["bank", "documents", "ray", "s3", "tune"], purpose: str
) -> Any:
    """Import a module that comes with one of strata's extras.

    Args:
        module: dotted name.
        extra: which extra brings it.
        purpose: what needs it, as the line begins: "reading pdf files".

    Raises:
        MissingPackageError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        known = isinstance(error, ModuleNotFoundError) and error.name == package
        reason = "which is not installed" if known else f"which fails to import ({error})"
        raise MissingPackageError(
            f'{purpose} needs {package}, {reason}: pip install "strata-lm[{extra}]"'
        ) from error
