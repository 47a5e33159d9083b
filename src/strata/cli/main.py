"""The `strata` command: one thin file a verb, and the one place where errors become exit codes."""

from __future__ import annotations

import errno
import sys

import typer

from strata.errors import StrataError

app = typer.Typer(
    name="strata",
    help="Memory for language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line.

    Exit codes: 0 done, 1 the work failed, 2 the input is wrong, 130 interrupted.
    """
    try:
        app()
    except StrataError as error:
        _fail(str(error), code=2)
    except KeyboardInterrupt:
        _fail("interrupted", code=130)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _fail(f"disk full while writing {error.filename or 'output'}: free some space", code=1)
        raise


def _fail(message: str, *, code: int) -> None:
    print(f"strata: error: {message}", file=sys.stderr)
    sys.exit(code)
