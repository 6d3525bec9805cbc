"""Keep what third-party libraries say while they start out of the log; errors still raise."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """For imports: no warnings, no log lines below errors.

    Standard output stays: a logger that is made in here would keep a redirected one for ever.
    """
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@contextlib.contextmanager
def quiet_start() -> Iterator[None]:
    """For building engines and groups: no prints either."""
    with quiet_imports(), contextlib.redirect_stdout(io.StringIO()):
        yield
