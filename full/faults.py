"""End the whole job soon, with one sentence and status 1, when anything ends one of its ranks; and turn signals into
requests.

`init` makes the process group with our time-outs and hands the mesh to a ParallelManager; `exit_after` calls a program's main;
`together` and `on_main` raise one rank's error on all ranks; `catch_signals` notes who was asked to save or stop.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from comm import ParallelManager
from full.files import printable

# --------------------------------------------------------------------------------------------------------------------
# the process group


def init(dp=None, sp=1, device_type=None, timeout=600.0):
    """Return a ParallelManager whose groups all wait `timeout` seconds for a rank that never comes.

    ValueError if this rank would never meet the others, or has no GPU of its own.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if not dist.is_initialized():
        check_launch()
        local = int(os.environ.get("LOCAL_RANK", 0))
        if device_type == "cuda" and local >= torch.cuda.device_count():
            raise ValueError(f"local rank {local} has no GPU of its own: this host has {torch.cuda.device_count()}")
        init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", timedelta(seconds=timeout))
    pm = ParallelManager(dp, sp, device_type)
    limit_waits(pm.mesh, timeout)
    return pm


def limit_waits(mesh, timeout):
    """Set the time-out of a mesh's groups, in seconds: as init_device_mesh makes them, they wait for 30 minutes."""
    # public from torch 2.14 on
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in mesh.get_all_groups():
        set_timeout(timedelta(seconds=timeout), group)


def check_launch():
    """Raise ValueError if the ranks would never meet: each would train alone, into the same folder."""
    env, how = os.environ, "start this with torchrun, once on each host"
    if "RANK" not in env:
        for name in ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if env.get(name, "1") != "1":
                raise ValueError(f"{name} is {env[name]}, but there is no RANK: {how}")
    elif missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]:
        raise ValueError(f"RANK is {env['RANK']}, but there is no {' and no '.join(missing)}: {how}")


def init_process_group(backend, timeout):
    """Meet the other ranks by torchrun's rendezvous; without torchrun be a world of one, which needs no port."""
    env = os.environ
    if "RANK" not in env:
        return dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    store, one_node = None, env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and one_node:
        # a restarted job finds the addresses of its dead predecessor under the same names: pytorch issue 135712
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, timeout=timeout)
        store = dist.PrefixStore(f"attempt{env['TORCHELASTIC_RESTART_COUNT']}", store)
    ranks = {}
    if store:
        ranks = dict(store=store, rank=int(env["RANK"]), world_size=int(env["WORLD_SIZE"]))
    dist.init_process_group(backend, timeout=timeout, **ranks)


def together(function):
    """Run `function` on every rank and return the list of results in rank order.

    If it raises OSError or ValueError on any rank, every rank raises it.
    """
    result = error = None
    try:
        result = function()
    except (OSError, ValueError) as raised:
        where = f"rank {dist.get_rank()}: " if dist.get_world_size() > 1 else ""
        error = (OSError if isinstance(raised, OSError) else ValueError), f"{where}{raised}"
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (result, error))
    for _, error in everyone:
        if error:
            raise error[0](error[1])
    return [result for result, _ in everyone]


def on_main(function):
    """Run `function` on rank 0 and return its result on every rank. Every rank raises its OSError or ValueError."""
    return together(function if dist.get_rank() == 0 else lambda: None)[0]


# --------------------------------------------------------------------------------------------------------------------
# the end of a process


def exit_after(main, folder, debug=False, cure=None):
    """Call main(), which returns a ParallelManager, and end the process: with status 0, or with one sentence and status 1.

    torchrun shows that sentence as the cause. folder: where main writes, since the error of a full disk does not say where.
    cure: a function that returns what would need less of a GPU's memory.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    exit_with_launcher()
    try:
        main().close()
    except BaseException as error:  # CheckpointException, for one, is not an Exception
        sentence, lost = explain(error, folder)
        if isinstance(error, torch.OutOfMemoryError):
            sentence = about_gpu(error, cure)
        sentence = printable(sentence)
        with contextlib.suppress(OSError):
            if debug:
                traceback.print_exc()
            print(f"error: {sentence}\n", end="", file=sys.stderr, flush=True)  # in one piece: other ranks print too
        to_launcher(sentence)
        if not dist.is_initialized():
            time.sleep(0.5)  # other ranks print the same, but torchrun ends them as soon as one is gone
        elif not lost:
            # give the other ranks time to hit the same error: if rank 0, which hosts the store, left first, they would
            # report a lost connection instead
            say_and_wait("leaving", 5.0)
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        if restarts and isinstance(error, ValueError | FileNotFoundError):
            # by the first rank that ends; a later one would be too late
            why = f"another try would end in the same way, so torchrun is stopped, with --max-restarts {restarts}"
            print(why, file=sys.stderr)
            os.kill(os.getppid(), signal.SIGTERM)
        os._exit(1)  # a normal exit could wait for ranks that never answer


def explain(error, folder):
    """Return one sentence on what happened, and whether it happened because another rank is lost."""
    first = str(error).split("\n\n")[0]
    message = " ".join(first.split()) or type(error).__name__
    if str(error).startswith("Caught "):  # raised in a process that loads data, with its traceback
        return f"loading data: {sentence_of(error).partition(': ')[2]}{about_memory(str(error))}", False
    if isinstance(error, OSError):
        if error.errno and not error.filename:
            full = shutil.disk_usage("/dev/shm").free < 1 << 20 if os.path.isdir("/dev/shm") else False
            message = f"{'/dev/shm' if full else folder}: {message}"
        return message, False
    if isinstance(error, ValueError):
        return message, False
    if isinstance(error, KeyboardInterrupt):
        return "stopped from the keyboard", False
    if message.startswith("DataLoader"):
        return f"loading data: {message}{about_memory(message)}", False
    if dist.is_initialized() and re.search(r"timed? ?out|connection|peer|nccl|gloo", message, re.I):
        silent = ", ".join(map(str, silent_ranks())) or "unknown"
        return f"rank {silent} does not answer ({message[:200]})", True
    return f"{type(error).__name__}: {message} (--debug shows where)", False


def sentence_of(error):
    """Return the line of an exception that says what happened; it may carry tracebacks of other ranks."""
    lines = [line.strip() for line in str(error).splitlines() if re.match(r"\s*[\w.]*(Error|Exception)", line)]
    return lines[-1] if lines else (str(error).splitlines() or [type(error).__name__])[0]


def about_memory(message):
    shared = re.search(r"shared memory|/torch_|Bus error|shm", message)
    return " (/dev/shm is too small: docker run --shm-size=8g, or --workers 0)" if shared else ""


def about_gpu(error, cure):
    """Return one sentence on a GPU whose memory is too small, with the cure."""
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    limit = re.search(r"([\d.]+ \w+) allowed", str(error)) or re.search(r"total capacity of ([\d.]+ \w+)", str(error))
    numbers = f"{asked[1]} more" if asked else "more"
    return f"the GPU's memory{f' of {limit[1]}' * bool(limit)} is too small: it needs {numbers}{'; less with ' + cure() if cure else ''}"


def to_launcher(sentence):
    """Write the sentence that torchrun shows as the cause."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = dict(py_callstack=sentence, timestamp=str(int(time.time())))
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps(dict(message=dict(message=sentence, extraInfo=extra))))


def exit_with_launcher():
    """End this rank as soon as its torchrun is gone: an orphan would keep writing while the next job does."""
    launcher = os.getppid()

    def watch():
        while os.getppid() == launcher:
            time.sleep(0.2)
        print(f"error: torchrun, process {launcher}, is gone", file=sys.stderr, flush=True)
        os._exit(1)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=watch, daemon=True).start()


# --------------------------------------------------------------------------------------------------------------------
# who is missing, and signals


def silent_ranks():
    """Return the ranks that are missing after a collective failed here: those that do not report a failure within a
    second."""
    return say_and_wait("failed", 1.0)


def failed_ranks():
    """Return the ranks that have reported a failure."""
    store = dist.distributed_c10d._get_default_store()
    return [rank for rank in range(dist.get_world_size()) if store.check([key_of("failed", rank)])]


def say_and_wait(word, seconds):
    """Report to all ranks that this one has "failed" or is "leaving". Wait until all have, at most `seconds`; return the
    rest."""
    try:
        store, others = dist.distributed_c10d._get_default_store(), set(range(dist.get_world_size()))
        store.set(key_of(word, dist.get_rank()), "1")
        until = time.monotonic() + seconds
        while others and time.monotonic() < until:
            time.sleep(0.02)
            others = {rank for rank in others if not store.check([key_of(word, rank)])}
        time.sleep(0.1)  # the store may live in rank 0: give the others time to read it
        return sorted(others)
    except dist.DistError:  # without torchrun the store lives in rank 0, and is gone with it
        return [0]


def key_of(word, rank):
    return f"{word}{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{rank}"


def catch_signals():
    """Return {"save", "stop"}, which signals set. SIGUSR1: save. SIGTERM (Slurm, spot hosts, torchrun) and Ctrl-C: save and
    stop. A second Ctrl-C stops at once. (torchrun passes the first one on, so each rank gets it twice within a moment.)
    """
    requests, first = dict(save=False, stop=False), []

    def stop_or_exit(number, _):
        if failed := failed_ranks():  # torchrun ends the other ranks, too: there is no next step
            if dist.get_rank() in failed:
                return  # this rank is about to print its own sentence
            os.write(2, f"error: rank {failed[0]} has failed\n".encode())
            os._exit(1)
        if number == signal.SIGINT:
            first.append(time.monotonic())
            if first[-1] - first[0] > 1:
                os._exit(130)
        requests["stop"] = True

    signal.signal(signal.SIGUSR1, lambda *_: requests.update(save=True))
    signal.signal(signal.SIGTERM, stop_or_exit)
    signal.signal(signal.SIGINT, stop_or_exit)
    return requests


def ignore_signals(_):
    """Ignore signals in a process that loads data: launchers signal whole groups, and training decides what to do."""
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
