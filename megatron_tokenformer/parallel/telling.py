"""What a rank says when it ends early, and that all ranks end together."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

from megatron_tokenformer.errors import UserError, in_words
from megatron_tokenformer.parallel import lifeline
from megatron_tokenformer.parallel.environment import find_processes

# A launcher ends all ranks when one has ended; the main rank, which tells what is wrong, may be slower.
PATIENCE_S = 10.0
NEWS_S = 3.0
"""within which a rank that fails in a collective hears that another had failed before"""


def tell(error: Exception) -> int:
    """Say once what every rank ends with, and a failure of one rank with its number; the exit code.

    A rank that fails because another ended says nothing: that one, or its host, has been named.

    Raises:
        Exception: the error itself, if it can only be a bug of ours.
    """
    try:
        told = in_words(error)
    except Exception:
        if lifeline.ends_because_of_another(NEWS_S):
            return 1
        lifeline.report(f"{type(error).__name__}: {error}")
        raise
    rank, world_size = 0, 1
    with contextlib.suppress(UserError):
        here = find_processes()
        rank, world_size = here.rank, here.world_size
    alone = told.exit_code == 1 and world_size > 1 and not told.everywhere
    if alone:
        print(f"error: rank {rank}: {told}", file=sys.stderr, flush=True)
    elif rank == 0:
        print(f"error: {told}", file=sys.stderr, flush=True)
    if not told.everywhere:
        lifeline.report(str(told))
    if not alone and rank > 0:
        # A launcher that ends this rank meanwhile (srun) reports the highest exit code of all.
        before = signal.signal(signal.SIGTERM, lambda *_: os._exit(told.exit_code))
        time.sleep(PATIENCE_S)
        signal.signal(signal.SIGTERM, before)
    return told.exit_code
