"""Loaded at the start of Flower's processes in tests: they poll more often, and notice sooner.

A SuperNode sleeps 3 seconds between polls, and a node counts as online until it has been silent
for a minute, or 12 seconds here; neither can be set from outside.
"""

import contextlib
import time

_sleep = time.sleep


def _shorter(seconds: float) -> None:
    _sleep(0.25 if seconds in (0.5, 3) else seconds)


time.sleep = _shorter
with contextlib.suppress(ImportError):
    from flwr.common import constant

    constant.HEARTBEAT_DEFAULT_INTERVAL = constant.HEARTBEAT_MIN_INTERVAL = 6  # not 30, 10
