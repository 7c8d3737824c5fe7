"""How long a Python process takes to answer."""

from __future__ import annotations

import resource
import subprocess
import sys

LIMIT_SECONDS = 0.3
# A machine may be slow, or slowed by its neighbours, so that bare Python takes long to start.
BARE_STARTS = 9
TRIES = 6


def best_seconds(arguments: list[str], until: float = LIMIT_SECONDS, code: int = 0) -> float:
    """Processor seconds of a Python process, the best of a few; wall time measures neighbours.

    It must end with the given exit code.
    """
    best = float("inf")
    for _ in range(TRIES):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *arguments], check=False, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == code, done.stderr.decode()
        spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        best = min(best, spent)
        if best < until:
            break
    return best


def seconds_allowed(exactly: bool = False) -> float:
    """The limit; unless exactly that is meant, on a slow machine what so many starts of bare Python
    take."""
    if exactly:
        return LIMIT_SECONDS
    return max(LIMIT_SECONDS, BARE_STARTS * best_seconds(["-c", "pass"], until=0.0))
