"""Locks that a fork waits for: its child has none of the threads that could give them back."""

from __future__ import annotations

import os
import threading
from weakref import WeakSet

_locks: WeakSet[threading.Lock] = WeakSet()
_forking = threading.Lock()  # guards `_locks` and `_held`
_held: list[threading.Lock] = []


def lock_for_forks() -> threading.Lock:
    """A new lock, free in both processes after a fork; a fork in any thread waits until it is free."""
    lock = threading.Lock()
    with _forking:
        _locks.add(lock)
    return lock


def _before() -> None:
    _forking.acquire()
    for lock in list(_locks):
        lock.acquire()
        _held.append(lock)


def _after() -> None:
    while _held:
        _held.pop().release()
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after)
