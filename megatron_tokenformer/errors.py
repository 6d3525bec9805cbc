"""The error type for mistakes of the user's, and the place where a command line makes an exit code of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """A mistake of the user's, told in words without a traceback.

    Args:
        message: what is wrong, where, and if possible what to do; one line.
        exit_code: 2 for wrong usage or configuration, 1 for a failure of the run (bad data, a full disk).
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Call ``main`` and leave the process with its exit code.

    A :class:`UserError` becomes one line on standard error and its own exit code, Ctrl-C becomes 130 as in a
    shell. Any other exception is a bug of ours and keeps its traceback.
    """
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(code or 0)
