"""A folder, or a name in it, belongs to one running program at a time. Two that wrote the same names would mix their files."""

import fcntl
import os
import socket
import sys
import time
from pathlib import Path

from full.faults import on_main

HELD = []  # the locks of this process, open until it ends


def claim(folder, name=None, lock=".lock"):
    """Make a folder and keep it, or a name in it, to this program for as long as rank 0 lives. Every rank calls it.

    lock: the lock's own name. Return who has it now. ValueError where a live program has it. What writers that were killed
    have left in a folder is removed.
    """
    file = Path(folder, f".{name}.lock" if name else lock)

    def hold():
        file.parent.mkdir(parents=True, exist_ok=True)
        held = open(file, "a+")  # a lock of POSIX: it ends with this process, and loaders don't inherit it
        until = time.monotonic() + 5  # as long as a rank of a job that was killed may take to notice
        while True:
            try:
                fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):  # a live program's
                if time.monotonic() > until:
                    owner = file.read_text().strip()
                    raise ValueError(f"{Path(folder, name or '')} is in use by another run, {owner}") from None
            except OSError as error:
                print(f"{folder} can't be locked ({error}): start no second run there", file=sys.stderr)
                break
            time.sleep(0.1)
        owner = f"process {os.getpid()} on {socket.gethostname()} since {time.time():.6f}"
        held.truncate(0)
        print(owner, file=held, flush=True)
        HELD.append(held)
        for leftover in [] if name else Path(folder).glob(".*.part"):
            leftover.unlink(missing_ok=True)
        return owner

    return on_main(hold)
