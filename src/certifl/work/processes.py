"""Processes beside the one that was asked."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait

__all__ = ["follow_parent"]


def follow_parent() -> None:
    """In a process started by multiprocessing: Ctrl-C is left to the parent, and so is life.

    Ctrl-C reaches all processes of a terminal; the one that asked decides what follows. Should the
    parent be killed, this process ends at once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
