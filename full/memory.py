"""Limit this process's memory on a GPU, find out what the host has left, and say what to change where either is short."""

import math
import os
from pathlib import Path

import torch


def limit_memory(gib, device_type):
    """Limit this process to gib - 1 GiB of its GPU: the context and NCCL take the rest. None: no limit. ValueError on a CPU.

    Call it before anything is on the GPU: it also makes segments expandable, so that near the limit no memory lies idle.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if gib and (device_type == "cpu" or not torch.cuda.device_count()):
        raise ValueError("--memory limits a GPU, and this runs on a CPU")
    if gib and local < torch.cuda.device_count():
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        total = torch.cuda.get_device_properties(local).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (gib - 1) * 2**30 / total), local)


def pinned(size):
    """Return the bytes that `size` bytes of pinned memory take: torch asks for powers of two."""
    return 2 ** math.ceil(math.log2(size)) if size > 0 else 0


def host_left():
    """Return the bytes of memory that this host, or this container, has left; infinity if it does not say."""
    left = [math.inf]
    try:
        meminfo = Path("/proc/meminfo").read_text()
        left.append(int(meminfo.partition("MemAvailable:")[2].split()[0]) * 1024)
        limit, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
        cache = Path("/sys/fs/cgroup/memory.stat").read_text().partition("inactive_file ")[2].split()[0]
        left.append(int(limit) - int(used) + int(cache))
    except (OSError, ValueError, IndexError):
        pass  # another operating system, or no limit
    return min(left)


def check_host(offload, each, world):
    """Raise ValueError if the host lacks the memory for what --offload keeps there. Call it on every rank, before loading.

    offload: that flag's values. each: the bytes of a rank. world: the number of ranks that share the host.
    """
    needed, left = each * int(os.environ.get("LOCAL_WORLD_SIZE", world)), host_left()
    if needed > left:
        flags = " ".join(f"--offload {name}" for name in offload)
        raise ValueError(
            f"{flags} needs {needed / 2**30:.1f} GiB of this host's memory, and {left / 2**30:.1f} are left"
        )


def cure(args):
    """Return the flags that would need less of a GPU's memory and are not set yet, the cheapest first."""
    training = hasattr(args, "checkpointing")
    ways = ["--compile"] * (not args.compile)
    ways += ["--checkpointing full"] * (training and args.checkpointing != "full")
    names = ("activations", "weights") if training else ("weights", "encoders")
    ways += [f"--offload {name}" for name in names if name not in args.offload]
    ways += ["--mlp_slices 8"] * (args.mlp_slices == 1)
    return ", ".join([*ways, "more GPUs, or a smaller --height, --width or --frames"])
