"""Reserve a folder, or a name in it, for one running program: two that wrote the same names would mix their files."""

import fcntl
import os
import socket
import sys
import time
from pathlib import Path

from full.faults import on_main

LOCKS = []  # the lock files of this process, open until it ends


def claim(folder, name=None, lock=".lock"):
    """Make a folder and reserve it, or a name in it, for this program until rank 0 ends. Every rank calls it.

    lock: the name of the lock file. Return a sentence that identifies this process. ValueError if a live program has it.
    Unfinished files of writers that were killed are removed.
    """
    file = Path(folder, f".{name}.lock" if name else lock)

    def hold():
        file.parent.mkdir(parents=True, exist_ok=True)
        lock_file = open(file, "a+")  # a POSIX lock ends with this process, and loader processes don't inherit it
        until = time.monotonic() + 5  # a rank of a killed job may take that long to notice
        while True:
            try:
                fcntl.lockf(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):  # a live program has it
                if time.monotonic() > until:
                    owner = file.read_text().strip()
                    raise ValueError(f"{Path(folder, name or '')} is in use by another run, {owner}") from None
            except OSError as error:
                print(f"{folder} can't be locked ({error}): start no second run there", file=sys.stderr)
                break
            time.sleep(0.1)
        owner = f"process {os.getpid()} on {socket.gethostname()} since {time.time():.6f}"
        lock_file.truncate(0)
        print(owner, file=lock_file, flush=True)
        LOCKS.append(lock_file)
        for leftover in [] if name else Path(folder).glob(".*.part"):
            leftover.unlink(missing_ok=True)
        return owner

    return on_main(hold)
