"""What copies and forked processes cannot take over as it is: locks, and OpenMP's threads."""

import ctypes
import os
import threading
import weakref

import torch

_PAUSE_HARD = 2  # omp_pause_hard of OpenMP 5.0


_locks: "weakref.WeakSet[Lock]" = weakref.WeakSet()


class Lock:
    """A lock that is free in a copy, in a pickle, and in a process that is forked meanwhile."""

    def __init__(self) -> None:
        self._free()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple:
        return Lock, ()

    def _free(self) -> None:
        self._lock = threading.Lock()


def _free_locks() -> None:
    for lock in list(_locks):
        lock._free()


def survive_forks(library: str) -> None:
    """Lets forked processes run networks; library: file of one that shares torch's OpenMP.

    GNU's OpenMP keeps threads for the thread that called it, and a forked process waits forever for
    threads that it has not got. So they are ended before a fork, and both processes start new ones.
    Where OpenMP is too old to end them, the forked process runs torch on one thread.
    """
    os.register_at_fork(after_in_child=_free_locks)
    pause = getattr(ctypes.CDLL(library), "omp_pause_resource_all", None)
    if pause is not None:
        os.register_at_fork(before=lambda: pause(_PAUSE_HARD))
    else:
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
