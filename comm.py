"""Sequence parallelism in one file: the Ulysses all-to-all, and who is who on a dp × sp mesh. torch only; copy it anywhere.

Attention mixes tokens but not heads, everything else mixes heads but not tokens. So tokens live split over the ranks, and
around attention the ranks trade them for heads. 4 tokens × 4 heads on 2 ranks, a cell is (token, head):

      rank 0            rank 1                               rank 0      rank 1
    00 01|02 03       20 21|22 23     scatter heads,         00 01       02 03
    10 11|12 13       30 31|32 33     gather tokens -->      10 11       12 13
                                      <-- scatter tokens,    20 21       22 23
    half the tokens, all heads            gather heads       30 31       32 33
                                                             all tokens, half the heads

The gradient rule: each collective's backward is the exact transpose of its forward, so that autograd gives, on every rank,
the gradient of the SUM over ranks of the local losses. With `local loss = sum over my tokens / global count`, a parameter's
gradient is the plain sum over all dp × sp ranks. There is no other factor, for any parameter, at any uneven length.

    $ torchrun --nproc_per_node=3 comm.py    # 7 tokens × 5 heads: what each rank holds before and after

In this order: sizes, collectives, ParallelManager; then what insures a long run, checkpoints and faults.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime  # the builtin one from Python 3.11 on
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.profiler import record_function

# --------------------------------------------------------------------------------------------------------------------
# sizes are pure functions of (length, ranks): no rank ever asks another one for a shape


def group_size(group):
    """Ranks in `group`; None is a group of one."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group):
    """This rank's place in `group`; None is a group of one."""
    return 0 if group is None else dist.get_rank(group)


def split_sizes(length, group):
    """How many of `length` each rank of `group` holds: as torch.tensor_split does, the first ranks get one more."""
    parts = group_size(group)
    return [length // parts + (rank < length % parts) for rank in range(parts)]


# --------------------------------------------------------------------------------------------------------------------
# collectives: each stands beside its transpose


@record_function("all_to_all")  # its name in profiles
def all_to_all(x, group, scatter_dim, gather_dim, scatter_sizes, gather_sizes):
    """Give away `scatter_dim`, collect `gather_dim`; the transpose, and backward, is the same call with the two swapped.

    x is whole along scatter_dim and this rank's part along gather_dim; the result is this rank's part along scatter_dim
    and whole along gather_dim. What travels together is stacked along another dim: q, k, v [B, L/P, 3, H, D].
    scatter_sizes, gather_sizes: the length that each rank has of that dim; equal on all ranks, zeros allowed.
    ValueError where x does not fit them. With a group of one, or None, it is the identity.
    Source: DeepSpeed-Ulysses, arXiv:2309.14509, section 3.
    """
    ranks, rank = group_size(group), group_rank(group)
    if len(scatter_sizes) != ranks or len(gather_sizes) != ranks:
        raise ValueError(f"{ranks} ranks need as many sizes, got {scatter_sizes} and {gather_sizes}")
    if (x.shape[scatter_dim], x.shape[gather_dim]) != (sum(scatter_sizes), gather_sizes[rank]):
        raise ValueError(
            f"rank {rank} of the group holds {list(x.shape)}, which does not fit the sizes {scatter_sizes} of "
            f"dim {scatter_dim} and {gather_sizes} of dim {gather_dim}"
        )
    if ranks == 1:
        return x
    return _AllToAll.apply(x, group, scatter_dim % x.dim(), gather_dim % x.dim(), scatter_sizes, gather_sizes)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, scatter_dim, gather_dim, scatter_sizes, gather_sizes):
        ctx.transpose = group, gather_dim, scatter_dim, gather_sizes, scatter_sizes
        # leaving[j] is for rank j, arriving[j] is what rank j has for us
        leaving = _shapes(x.shape, scatter_dim, scatter_sizes)
        arriving = _shapes(leaving[group_rank(group)], gather_dim, gather_sizes)
        counts_out, counts_in = ([math.prod(shape) for shape in shapes] for shapes in (leaving, arriving))
        received = x.new_empty(sum(counts_in))
        dist.all_to_all_single(received, _cut(x, scatter_dim, leaving), counts_in, counts_out, group=group)
        return _join(received, gather_dim, arriving)

    @staticmethod
    def backward(ctx, grad):
        return all_to_all(grad, *ctx.transpose), None, None, None, None, None


def _shapes(shape, dim, sizes):
    """Those of the pieces when `shape` is cut along dim into these sizes."""
    return [shape[:dim] + (size,) + shape[dim + 1 :] for size in sizes]


def _cut(x, dim, shapes):
    """x as a flat buffer in which its pieces along dim lie one after another; not copied where they do so already."""
    if math.prod(x.shape[:dim]) == 1:
        return x.contiguous().flatten()
    buffer = x.new_empty(x.numel())
    for piece, part in zip(_pieces(buffer, shapes), x.split([shape[dim] for shape in shapes], dim)):
        piece.copy_(part)
    return buffer


def _join(buffer, dim, shapes):
    """The way back: pieces that lie one after another in a flat buffer, joined along dim; a view where possible."""
    if math.prod(shapes[0][:dim]) == 1:
        return buffer.view(*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :])
    return torch.cat(_pieces(buffer, shapes), dim)


def _pieces(buffer, shapes):
    pieces = buffer.split([math.prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes)]


def split_sequence(x, group, dim=1):
    """This rank's part of x along `dim`: [.., L, ..] -> [.., L/P, ..]. x must be equal on all ranks of the group.

    Its transpose is what autograd does for a slice: the local gradient beside zeros; the sum over ranks is the whole one.
    """
    return x.split(split_sizes(x.shape[dim], group), dim)[group_rank(group)]


def gather_sequence(x, group, length, dim=1):
    """The parts of all ranks, whole on every rank: [.., L/P, ..] -> [.., L, ..] with L = length.

    The transpose of an all-gather is a reduce-scatter with a plain sum. Both are one all_to_all of P copies, and summing
    the copies is what autograd does for `expand`.
    """
    dim, ranks = dim % x.dim(), group_size(group)
    copies = x.expand(ranks, *x.shape)
    return all_to_all(copies, group, 0, dim + 1, [1] * ranks, split_sizes(length, group)).squeeze(0)


# --------------------------------------------------------------------------------------------------------------------
# one object that answers every "who am I", and the engine on top of it


class ParallelManager:
    """The (dp, sp) DeviceMesh of this job, sp the inner axis (neighbouring GPUs); FSDP2, and a step under the gradient rule.

    data_parallel_size: by default world size / sequence_parallel_size; and the other way round where that one is None.
    device_type: by default "cuda" (NCCL) where there is a GPU, else "cpu" (gloo). timeout: seconds until a collective
    that some rank never joins is an error. mesh: your own DeviceMesh instead, its dims named dp and sp, over all ranks.
    Started without torchrun, it is a world of one on the same code path. ValueError for sizes that don't multiply up.

    mesh, device; rank, world_size, is_main (rank 0); dp_rank, dp_size, dp_group; sp_rank, sp_size, sp_group.
    """

    def __init__(self, data_parallel_size=None, sequence_parallel_size=1, device_type=None, timeout=600.0, mesh=None):
        self.timeout = timedelta(seconds=timeout)
        if mesh is None:
            mesh = self._own_mesh(data_parallel_size, sequence_parallel_size, device_type)
        elif set(mesh.mesh_dim_names or ()) != {"dp", "sp"} or mesh.size() != dist.get_world_size():
            told = f"{mesh.mesh_dim_names} over {mesh.size()} of {dist.get_world_size()} ranks"
            raise ValueError(f"a mesh needs the dims dp and sp over all ranks, got {told}")
        self.mesh, device_type = mesh, mesh.device_type
        self.device = torch.device(device_type, torch.cuda.current_device() if device_type == "cuda" else None)
        self.rank, self.world_size, self.is_main = dist.get_rank(), dist.get_world_size(), dist.get_rank() == 0
        self.dp_group, self.sp_group = mesh.get_group("dp"), mesh.get_group("sp")
        self.dp_rank, self.dp_size = mesh.get_local_rank("dp"), group_size(self.dp_group)
        self.sp_rank, self.sp_size = mesh.get_local_rank("sp"), group_size(self.sp_group)
        self.cpu_group = dist.new_group(backend="gloo", timeout=self.timeout)  # for what is said, not computed

    def _own_mesh(self, dp, sp, device_type):
        env = os.environ
        if not dist.is_initialized():
            _check_launch()
        world = dist.get_world_size() if dist.is_initialized() else int(env["WORLD_SIZE"] if "RANK" in env else 1)
        if sp is None and world % (dp or 1):
            raise ValueError(f"world size {world} is not a multiple of data_parallel_size {dp}")
        sp = world // (dp or 1) if sp is None else sp
        if sp < 1 or world % sp:
            raise ValueError(f"world size {world} is not a multiple of sequence_parallel_size {sp}")
        dp = world // sp if dp is None else dp
        if dp * sp != world:
            raise ValueError(f"data_parallel_size {dp} x sequence_parallel_size {sp} is not the world size {world}")
        device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
        if device_type == "cuda":
            local = int(env.get("LOCAL_RANK", 0))
            if local >= torch.cuda.device_count():
                raise ValueError(f"local rank {local} has no GPU of its own: this host has {torch.cuda.device_count()}")
            torch.cuda.set_device(local)
        if not dist.is_initialized():
            _init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", self.timeout)
        return self._mesh_of(device_type, dp, sp, ("dp", "sp"))

    def _mesh_of(self, device_type, rows, columns, names):
        """A mesh whose groups have our time-out; those that init_device_mesh makes wait for 30 minutes."""
        grid = torch.arange(rows * columns).view(rows, columns)
        groups = [dist.new_subgroups_by_enumeration(g.tolist(), timeout=self.timeout)[0] for g in (grid.T, grid)]
        return DeviceMesh.from_group(groups, device_type, mesh=grid, mesh_dim_names=names)

    def shard(self, model, blocks, param_dtype=None, shard_size=None, reshard_after_forward=True, offload=False):
        """FSDP2 over all ranks, dp and sp together, block by block, in place.

        param_dtype: compute in it, with weights, gradients and their reduction kept as they are (float32).
        shard_size: HSDP, shard inside groups of so many neighbouring ranks, replicate across them.
        offload: weights, gradients and the optimizer's state live in the host's memory, and the optimizer works there.
        A model on the meta device is given (uninitialised) memory for its shards only.
        """
        kept = set(model.state_dict())
        if lost := [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in kept]:
            raise ValueError(f"buffer {lost[0]} is on the meta device and in no state dict: nothing would ever fill it")
        shard_size = self.world_size if shard_size is None else shard_size
        if shard_size < 1 or self.world_size % shard_size:
            raise ValueError(f"world size {self.world_size} is not a multiple of shard_size {shard_size}")
        mesh = self._mesh_of(self.device.type, self.world_size // shard_size, shard_size, ("replicate", "shard"))
        mesh = mesh["shard"] if shard_size == self.world_size else mesh
        # casting inputs would round t = 999.0 to 1000.0 in bf16
        reduce_dtype = torch.float32 if param_dtype else None
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
        where = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if offload else OffloadPolicy()
        rules = dict(mesh=mesh, mp_policy=policy, offload_policy=where, reshard_after_forward=reshard_after_forward)
        for module in (*blocks, model):
            fully_shard(module, **rules)
            module.set_gradient_divide_factor(1.0)  # the gradient rule: a plain sum
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
        if any(p.is_meta for p in model.parameters()):
            model.to_empty(device="cpu" if offload else self.device)

    def backward(self, model, loss, last=True):
        """Accumulate gradients of a sharded model; they are exchanged on the `last` micro-batch of a step.

        Until then every rank holds them whole, in the dtype of the reduction: four bytes a parameter.
        """
        model.set_requires_gradient_sync(last)
        loss.backward()

    def clip_grad_norm(self, model, max_norm):
        """Scale the gradients to a global L2 norm of at most max_norm; returns the norm before, equal on all ranks."""
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()

    def step(self, optimizer, skip=False):
        """One optimizer step (or none), then forget the gradients."""
        if not skip:
            optimizer.step()
        optimizer.zero_grad()

    def sum(self, value, group=None):
        """The sum of a number or tensor over `group` (default: all ranks)."""
        dtype = torch.float64 if isinstance(value, float) else None  # token counts stay exact
        value = torch.as_tensor(value, dtype=dtype, device=self.device).clone()
        dist.all_reduce(value, group=group)
        return value

    def together(self, function):
        """Call it on every rank; the results of all, in order of rank. An OSError or ValueError on one is raised on all."""
        result = error = None
        try:
            result = function()
        except (OSError, ValueError) as raised:
            where = f"rank {self.rank}: " if self.world_size > 1 else ""
            error = (OSError if isinstance(raised, OSError) else ValueError), f"{where}{raised}"
        everyone = [None] * self.world_size
        dist.all_gather_object(everyone, (result, error), group=self.cpu_group)
        for _, error in everyone:
            if error:
                raise error[0](error[1])
        return [result for result, _ in everyone]

    def on_main(self, function):
        """What `function` returns on rank 0, on every rank; its OSError or ValueError is raised on every rank."""
        return self.together(function if self.is_main else lambda: None)[0]

    def check_equal(self, facts, group=None):
        """ValueError, on all ranks of `group` (default: all), where one has another value of a fact: {name: value}.

        The classic silent bugs: ranks with other flags, or sp ranks that work on different samples.
        """
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        parts = [None] * len(ranks)
        dist.all_gather_object(parts, facts, group=group or self.cpu_group)
        for rank, other in zip(ranks, parts):
            if wrong := [name for name in facts if other.get(name) != parts[0].get(name)]:
                values = " and ".join(str(part.get(wrong[0]))[:200] for part in (parts[0], other))
                raise ValueError(f"ranks {ranks[0]} and {rank} differ in {', '.join(wrong)}: {values}")

    def close(self):
        """End the process, with status 0. Python's own way out crashes in gloo's threads in every second run."""
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _check_launch():
    """ValueError where other ranks would never be met: each would train alone, into the same folder."""
    env, how = os.environ, "start this with torchrun, once on each host"
    if "RANK" not in env:
        for name in ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if env.get(name, "1") != "1":
                raise ValueError(f"{name} is {env[name]}, but there is no RANK: {how}")
    elif missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]:
        raise ValueError(f"RANK is {env['RANK']}, but there is no {' and no '.join(missing)}: {how}")


def _init_process_group(backend, timeout):
    """torchrun's rendezvous, or a world of one without it (no port, no environment)."""
    env = os.environ
    if "RANK" not in env:
        return dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    store, one_node = None, env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and one_node:
        # a restarted job finds the addresses of its dead predecessor under the same names: pytorch issue 135712
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, timeout=timeout)
        store = dist.PrefixStore(f"attempt{env['TORCHELASTIC_RESTART_COUNT']}", store)
    ranks = dict(store=store, rank=int(env["RANK"]), world_size=int(env["WORLD_SIZE"])) if store else {}
    dist.init_process_group(backend, timeout=timeout, **ranks)


# --------------------------------------------------------------------------------------------------------------------
# Whoever pastes the collectives or the manager elsewhere can stop here. What follows insures a long run.
# --------------------------------------------------------------------------------------------------------------------
# checkpoints: a folder step-N of safetensors that torch.distributed.checkpoint wrote, each rank its own part, and
# manifest.json with every file's size and crc32. In it: weights, the optimizer's state, and what the caller adds as JSON
# (train_min.py: the sampler's position, config, flags). Nothing is ever unpickled. A save goes through four stages:
#   1. `save` copies the state to the CPU and returns; 2. beside training every rank writes its part into tmp-step-N,
#   3. and reads its share of the files back for their checksums; 4. `finish` writes the manifest and renames the folder.
# So what is called step-N was complete once, and the manifest tells whether it still is

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FILE_BYTES = 2 << 30  # about so many in each file that a rank writes


class Checkpoints:
    """The step-N checkpoints in `folder`, saved beside training and loaded on any layout. Every rank makes each call.

    Every problem with the disk is an OSError on all ranks; what was saved before stays. A disk that does not answer for
    the manager's time-out is one. All ranks must see the folder, and one run at a time writes there: `claim` it first.
    """

    def __init__(self, manager, folder):
        self.manager, self.folder = manager, Path(folder)
        self.group = dist.new_group(backend="gloo", timeout=manager.timeout)  # saving goes on beside training
        self._written, self._complete = Future(), None

    def claim(self):
        """Keep the folder to this run for as long as rank 0 lives. ValueError where a live run has it, or a rank can't see it."""
        file = self.folder / "lock"

        def hold():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(file, "a+")  # a lock of POSIX: it ends with this process, and loaders don't inherit it
            until = time.monotonic() + 5  # as long as a rank of a job that was killed may take to notice
            while True:
                try:
                    fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except (BlockingIOError, PermissionError):  # a live run's
                    if time.monotonic() > until:
                        raise ValueError(
                            f"{self.folder} is in use by another run, {file.read_text().strip()}"
                        ) from None
                except OSError as error:
                    print(f"{self.folder} can't be locked ({error}): start no second run there", file=sys.stderr)
                    break
                time.sleep(0.1)
            told = f"process {os.getpid()} on {socket.gethostname()} since {time.time():.6f}"
            self._lock.truncate(0)
            print(told, file=self._lock, flush=True)
            return told

        told = self.manager.on_main(hold)

        def look():
            until = time.monotonic() + 10
            while not file.is_file() or file.read_text().strip() != told:
                if time.monotonic() > until:
                    missing = f"{file}, which rank 0 wrote, is not there"
                    raise ValueError(f"{missing}: all ranks must see the same {self.folder}")
                time.sleep(0.1)

        # not rank 0: a lock of POSIX is lost when its process closes the file, however often it has it open
        self.manager.together((lambda: None) if self.manager.is_main else look)

    def save(self, step, model, optimizer, extra, tag="", keep=0, more=None, copy=True):
        """Start saving weights, optimizer and `extra` (JSON) as step-N; training may go on when this returns.

        `finish` completes it. keep: so many checkpoints with this tag stay, the newest (0: all). more: other tensors, by name.
        copy: the state is copied to the CPU and written beside training; without it this returns when all is written.
        """
        self.finish()
        manager, temporary = self.manager, self.folder / f"tmp-step-{step}"
        manager.on_main(partial(make_empty, temporary))
        tensors, held, files = _tensors(model, optimizer, more), 0, {}
        for name, tensor in tensors.items():  # each rank builds a file in memory before it writes it
            files[name], held = 1 + held // (FILE_BYTES * manager.world_size), held + tensor.numel() * tensor.itemsize
        writer = dcp.HuggingFaceStorageWriter(str(temporary), files, save_distributed=True)
        start = dcp.async_save if copy else _save_at_once
        written = start(tensors, storage_writer=writer, process_group=self.group)
        self._written = ThreadPoolExecutor(1).submit(self._read_back, written, temporary)
        manifest = extra | dict(step=step, tag=tag, saved=time.time())
        patience = 0.9 * manager.timeout.total_seconds()  # less than that of ranks that wait for this one
        self._complete = partial(self._finish_save, temporary, manifest, keep, patience)

    def _read_back(self, written, temporary):
        """In a thread, when all ranks have written: the names of all files, and the checksums of this rank's share."""
        written.result()
        files, manager = sorted(temporary.glob("*.safetensors")), self.manager
        sums = {file.name: checksum(file) for file in files[manager.rank :: manager.world_size]}
        return {file.name for file in files}, sums

    def _finish_save(self, temporary, manifest, keep, patience):
        def wait():
            try:
                return self._written.result(patience)
            except NotInTime:
                raise OSError(f"the disk has not answered for {patience:.0f} seconds") from None

        try:
            parts = self.manager.together(partial(_or_oserror, f"{temporary} could not be written", wait))
        except OSError:  # on a full disk it takes what the next try needs
            self.manager.on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
            raise
        sums = {name: sums for _, part in parts for name, sums in part.items()}
        self.manager.on_main(partial(self._publish, temporary, manifest, keep, [names for names, _ in parts], sums))

    def _publish(self, temporary, manifest, keep, seen, files):
        """On rank 0: the manifest, then the name that says that all is there. seen: the files that each rank saw."""
        for rank, names in enumerate(seen):  # a folder that not all share
            if odd := sorted(names ^ set(files)):
                told = f"{odd[0]} is not seen by all, rank {rank} among them"
                raise OSError(f"{temporary} is not the same on all ranks: {told}")
        final = self.folder / f"step-{manifest['step']}"
        # the order is a counter's: a clock may be set back
        serial = 1 + max([there["serial"] for _, there in manifests(self.folder) if there], default=0)
        write_manifest(temporary, manifest | dict(serial=serial, files=files))
        if final.exists():
            remove(final)
        os.rename(temporary, final)
        same = [path for path, there in manifests(self.folder) if there and there["tag"] == manifest["tag"]]
        for path in same[keep:] if keep else []:
            remove(path)

    def ready(self):
        """Whether there is a save to finish, for which this rank need not wait."""
        return self._written.done()

    def finish(self):
        """Complete the save under way, if there is one. OSError if it failed."""
        complete, self._complete = self._complete, None
        if complete:
            complete()
        self._written = Future()

    def find(self, tag=None):
        """The newest checkpoint (with this tag) that is whole: (path, manifest). Damaged ones are named and passed over.

        FileNotFoundError if there is none.
        """
        manager, problems = self.manager, []
        for path, manifest in manager.on_main(lambda: manifests(self.folder)):
            if manifest and tag not in (None, manifest["tag"]):
                continue
            try:
                manifest = manager.on_main(partial(read_manifest, path))
                mine = dict(sorted(manifest["files"].items())[manager.rank :: manager.world_size])
                manager.together(partial(check_files, path, mine))
                return path, manifest
            except (OSError, ValueError) as problem:
                problems += [problem] if manifest or tag is None else []  # else nobody knows whose it is
                if manager.is_main:
                    print(f"skipping {path}: {problem}", file=sys.stderr, flush=True)
        if problems:
            raise FileNotFoundError(f"no whole checkpoint in {self.folder}: {problems[0]}")
        raise FileNotFoundError(f"no checkpoint in {self.folder}: there is no step-N folder in it")

    def load(self, path, model=None, optimizer=None, more=None):
        """Load what `find` gave into the model, the optimizer, more: any layout, sharded or not. Frozen weights stay."""
        told, reader = f"{path} could not be loaded", dcp.HuggingFaceStorageReader(str(path))
        tensors, saved = _tensors(model, optimizer, more), _or_oserror(told, reader.read_metadata).state_dict_metadata
        # a parameter that never had a gradient has no state, there or here
        stateful = {key.rpartition(".")[0] for key in saved}
        params = {f"optimizer.state.{name}": param for name, param in model.named_parameters()} if optimizer else {}
        fresh = {name: param for name, param in params.items() if name not in stateful}
        wanted = {key: value for key, value in tensors.items() if key.rpartition(".")[0] not in fresh}
        _or_oserror(told, partial(dcp.load, wanted, storage_reader=reader))
        if optimizer:
            state = get_optimizer_state_dict(model, optimizer, options=FLAT)
            loaded = {name: tensors.get(f"optimizer.{name}", value) for name, value in state.items()}
            set_optimizer_state_dict(model, optimizer, loaded, options=FLAT)
            for param in fresh.values():
                optimizer.state.pop(param, None)


def _save_at_once(tensors, **rules):
    """What dcp.async_save does, done when this returns."""
    written = Future()
    try:
        written.set_result(dcp.save(tensors, **rules))
    except (Exception, CheckpointException) as error:
        written.set_exception(error)
    return written


def _tensors(model, optimizer, more):
    """Everything that training changes, by name: no frozen weights; learning rate and the like belong to the command line."""
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad} if model else ()
    state = get_optimizer_state_dict(model, optimizer, options=FLAT) if optimizer else {}
    for name, value in state.items():
        if name.startswith("state.") and not isinstance(value, torch.Tensor | None):
            raise ValueError(f"optimizer {name} is of type {type(value).__name__}: only tensors are saved")
    weights = model.state_dict() if model else {}
    named = {f"model.{name}": value for name, value in weights.items() if name not in frozen}
    named |= {f"more.{name}": value for name, value in (more or {}).items()}
    return named | {f"optimizer.{name}": value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _or_oserror(told, function):
    """Call it. Whatever goes wrong in torch.distributed.checkpoint is an OSError of one sentence."""
    try:
        return function()
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        raise OSError(f"{told}: {_sentence(error)}") from None


def manifests(folder):
    """[(step-N folder, its manifest)]: the damaged, whose manifest is None, then the one completed last; never links."""
    found = [p for p in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    read = []
    for path in (p for p in found if not p.is_symlink()):
        try:
            read.append((path, read_manifest(path)))
        except ValueError:
            read.append((path, None))
    return sorted(read, key=lambda r: (r[1]["serial"] if r[1] else math.inf, int(r[0].name[5:])), reverse=True)


def make_empty(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def remove(checkpoint):
    """Delete a step-N folder; killed halfway, it leaves nothing behind that is called so."""
    leaving = checkpoint.with_name(f"tmp-{checkpoint.name}-leaving")
    shutil.rmtree(leaving, ignore_errors=True)
    os.rename(checkpoint, leaving)
    shutil.rmtree(leaving)


def write_manifest(folder, manifest):
    """manifest.json with its own crc32, on the disk when this returns."""
    text = json.dumps(manifest, sort_keys=True)
    with open(folder / "manifest.json", "w") as file:
        json.dump(manifest | dict(crc32=zlib.crc32(text.encode())), file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder):
    """The manifest of a checkpoint; ValueError says why it is none, and which other weights lie beside it."""
    file = Path(folder) / "manifest.json"
    try:
        if not file.is_file() or file.stat().st_size > 1 << 26:
            raise ValueError("it is no file of at most 64 MiB")
        manifest = json.loads(file.read_text())
        text = json.dumps({k: v for k, v in manifest.items() if k != "crc32"}, sort_keys=True)
        if zlib.crc32(text.encode()) != manifest["crc32"]:
            raise ValueError("its crc32 is another")
        manifest.setdefault("serial", 0)
        if any(type(manifest.get(name)) is not kind for name, kind in (("step", int), ("tag", str), ("serial", int))):
            raise ValueError("it lacks its step, tag or serial number")
        if any(not re.fullmatch(r"[\w.-]+\.safetensors", name) for name in manifest["files"]) or not manifest["files"]:
            raise ValueError("it names no files, or files outside its folder")
        if any([type(n) for n in sums] != [int, int] for sums in manifest["files"].values()):
            raise ValueError("a file's size and crc32 are no numbers")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"manifest.json is not what was saved: {_sentence(error)}") from None
    if foreign := sorted({path.name for path in Path(folder).glob("*.safetensors")} - set(manifest["files"])):
        raise ValueError(f"{foreign[0]} is not in its manifest")
    return manifest


def checksum(path):
    """[bytes, crc32] of a file."""
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def fingerprint(paths):
    """Of files that all ranks should see alike: their names and sizes, and a sample of what is in them; a hex string."""
    digest, paths = hashlib.sha256(), [Path(path) for path in paths]
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    for path in paths[:: max(1, len(paths) // 16)]:
        with open(path, "rb") as file:
            for part in range(16):
                file.seek(path.stat().st_size * part // 16)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def check_files(folder, saved):
    """ValueError for a file that is not the [bytes, crc32] that was saved. Sizes are looked at before anything is read."""
    for name, (size, crc) in saved.items():
        file = Path(folder) / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{name} has {file.stat().st_size} bytes, {size} were saved")
        if checksum(file) != [size, crc]:
            raise ValueError(f"{name} has another crc32 than was saved")


def _sentence(error):
    """Of an exception that may carry other ranks' tracebacks: the line that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if re.match(r"\s*[\w.]*(Error|Exception)", line)]
    return lines[-1] if lines else (str(error).splitlines() or [type(error).__name__])[0]


# --------------------------------------------------------------------------------------------------------------------
# faults: whatever ends a rank ends it with one sentence and status 1


def run(main, folder, debug=False):
    """Call main(), which gives back a ParallelManager, and end the process: with status 0, or one sentence and status 1.

    The sentence is also the cause that torchrun shows. folder: where main writes; a full disk does not say where.
    """
    sys.stdout, sys.stderr = Screen(sys.stdout), Screen(sys.stderr)
    _watch_launcher()
    try:
        main().close()
    except BaseException as error:  # CheckpointException, say, is no Exception
        told, lost = _told(error, folder)
        if debug:
            traceback.print_exc()
        print(f"error: {told}\n", end="", file=sys.stderr, flush=True)  # in one piece, as other ranks print beside it
        _to_launcher(told)
        if not dist.is_initialized():
            time.sleep(0.5)  # others say the same; torchrun ends them as soon as one is gone
        elif not lost:
            _say_and_wait("leaving", 5.0)  # others find the same fault soon; without rank 0 they would find another one
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        if restarts and isinstance(error, ValueError | FileNotFoundError):
            # the first rank that ends asks, or it is too late
            told = f"another try would end the same: torchrun is stopped, with --max-restarts {restarts}"
            print(told, file=sys.stderr)
            os.kill(os.getppid(), signal.SIGTERM)
        os._exit(1)  # what other ranks wait for may never come


def _told(error, folder):
    """What happened, in one sentence; and whether it is that another rank is lost."""
    told = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
    if str(error).startswith("Caught "):  # in a process that loads data: its traceback comes along
        return f"loading data: {_sentence(error).partition(': ')[2]}{_about_memory(str(error))}", False
    if isinstance(error, OSError):
        if error.errno and not error.filename:
            full = shutil.disk_usage("/dev/shm").free < 1 << 20 if os.path.isdir("/dev/shm") else False
            told = f"{'/dev/shm' if full else folder}: {told}"
        return told, False
    if isinstance(error, ValueError):
        return told, False
    if isinstance(error, KeyboardInterrupt):
        return "stopped from the keyboard", False
    if told.startswith("DataLoader"):
        return f"loading data: {told}{_about_memory(told)}", False
    if dist.is_initialized() and re.search(r"timed? ?out|connection|peer|nccl|gloo", told, re.I):
        silent = ", ".join(map(str, silent_ranks())) or "unknown"
        return f"rank {silent} does not answer ({told[:200]})", True
    return f"{type(error).__name__}: {told} (--debug shows where)", False


def _about_memory(told):
    shared = re.search(r"shared memory|/torch_|Bus error|shm", told)
    return " (/dev/shm is too small: docker run --shm-size=8g, or --workers 0)" if shared else ""


def _to_launcher(told):
    """The cause that torchrun shows."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = dict(py_callstack=told, timestamp=str(int(time.time())))
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps(dict(message=dict(message=told, extraInfo=extra))))


class Screen:
    """A stream that never ends a run: what it can't encode is replaced, and once it is closed nothing is printed."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


def _watch_launcher():
    """End this rank as soon as its torchrun is gone: an orphan would go on writing beside the next job."""
    launcher = os.getppid()

    def watch():
        while os.getppid() == launcher:
            time.sleep(0.2)
        print(f"error: torchrun, process {launcher}, is gone", file=sys.stderr, flush=True)
        os._exit(1)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=watch, daemon=True).start()


def silent_ranks():
    """Who is missing, asked when a collective has failed here: ranks that have not said so too within a second."""
    return _say_and_wait("failed", 1.0)


def failed_ranks():
    """Ranks that have said that a collective failed on them."""
    store = dist.distributed_c10d._get_default_store()
    return [rank for rank in range(dist.get_world_size()) if store.check([_key("failed", rank)])]


def _say_and_wait(word, seconds):
    """Tell all ranks that this one has failed, or is leaving; the ranks that have not said so after some seconds."""
    try:
        store, others = dist.distributed_c10d._get_default_store(), set(range(dist.get_world_size()))
        store.set(_key(word, dist.get_rank()), "1")
        until = time.monotonic() + seconds
        while others and time.monotonic() < until:
            time.sleep(0.02)
            others = {rank for rank in others if not store.check([_key(word, rank)])}
        time.sleep(0.1)  # where the store is rank 0's, the others have yet to look
        return sorted(others)
    except dist.DistError:  # without torchrun the store is rank 0's, and gone with it
        return [0]


def _key(word, rank):
    return f"{word}{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{rank}"


# --------------------------------------------------------------------------------------------------------------------
# the lesson


def lesson(tokens=7, heads=5):
    """What each rank holds before and after the exchange, a cell is token·head; and that backward is the transpose."""
    manager = ParallelManager(1, None, "cpu")
    group, rank = manager.sp_group, manager.rank
    token_sizes, head_sizes = split_sizes(tokens, group), split_sizes(heads, group)
    whole = torch.tensor([[10.0 * t + h for h in range(heads)] for t in range(tokens)], device=manager.device)
    x = split_sequence(whole, group, 0).clone().requires_grad_()  # [L/P, H]
    there = all_to_all(x, group, 1, 0, head_sizes, token_sizes)  # [L, H/P]
    y = torch.arange(there.numel(), device=there.device).view(there.shape) + 100.0 * rank
    (there * y).sum().backward()
    back = all_to_all(y, group, 0, 1, token_sizes, head_sizes)
    sides = manager.sum(torch.stack(((there * y).sum(), (x * back).sum())).detach()).tolist()

    def rows(cells):
        return [" ".join(f"{int(cell):02d}" for cell in row) for row in cells.tolist()]

    for other, (before, after, same) in enumerate(
        manager.together(lambda: (rows(x), rows(there), torch.equal(x.grad, back)))
    ):
        if manager.is_main:
            print(f"rank {other} before: {' | '.join(before)}\n       after:  {' | '.join(after)}")
            print(f"       the gradient of `before` is the opposite exchange of the gradient of `after`: {same}")
    if manager.is_main:
        print(
            f"<all_to_all(x), y> = {sides[0]:.0f}, <x, transpose(y)> = {sides[1]:.0f}, summed over {manager.world_size} ranks"
        )
    return manager


if __name__ == "__main__":
    run(lesson, ".")
