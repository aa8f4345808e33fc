"""Sequence parallelism in one file: the Ulysses all-to-all, and who is who on a dp × sp mesh. torch only; copy it anywhere.

Attention mixes tokens but not heads, everything else mixes heads but not tokens. So tokens live split over the ranks, and
around attention the ranks trade them for heads. 4 tokens × 4 heads on 2 ranks, a cell is (token, head):

      rank 0            rank 1                               rank 0      rank 1
    00 01|02 03       20 21|22 23     all_to_all(q, 2, 1)    00 01       02 03
    10 11|12 13       30 31|32 33     ------------------>    10 11       12 13
                                      <------------------    20 21       22 23
    half the tokens, all heads        all_to_all(o, 1, 2)    30 31       32 33
                                                             all tokens, half the heads

The gradient rule: each collective's backward is the exact transpose of its forward, so that autograd gives, on every rank,
the gradient of the SUM over ranks of the local losses. With `local loss = sum over my tokens / global count`, a parameter's
gradient is the plain sum over all dp × sp ranks. There is no other factor, for any parameter, at any uneven length.
"""

import json
import os
import re
import shutil
import sys
import time
import zlib
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

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


def all_to_all(x, group, scatter_dim, gather_dim, scatter_sizes=None, gather_sizes=None):
    """Give away `scatter_dim`, collect `gather_dim`; the transpose (and backward) is the same call with the two swapped.

    x: a tensor, or a tuple of equally shaped ones that travel in one collective. Whole along scatter_dim, this rank's part
    along gather_dim; the result is this rank's part along scatter_dim, whole along gather_dim.
    scatter_sizes, gather_sizes: the length that each rank has of that dim, equal on all ranks, zeros allowed. By default
    `split_sizes` of the whole, and the same as here on every rank. ValueError where x does not fit them.
    With group=None it is the identity. Source: DeepSpeed-Ulysses, arXiv:2309.14509, section 3.
    """
    if group is None:
        return x
    xs = x if isinstance(x, tuple) else (x,)
    scatter_dim, gather_dim = scatter_dim % xs[0].dim(), gather_dim % xs[0].dim()
    held = (xs[0].shape[scatter_dim], xs[0].shape[gather_dim])
    scatter_sizes = scatter_sizes or split_sizes(held[0], group)
    gather_sizes = gather_sizes or [held[1]] * group_size(group)
    if len(scatter_sizes) != group_size(group) or len(gather_sizes) != group_size(group):
        raise ValueError(f"{group_size(group)} ranks need as many sizes, got {scatter_sizes} and {gather_sizes}")
    if held != (sum(scatter_sizes), gather_sizes[group_rank(group)]) or any(t.shape != xs[0].shape for t in xs):
        raise ValueError(
            f"rank {group_rank(group)} of the group holds {[tuple(t.shape) for t in xs]}, which does not fit the sizes "
            f"{scatter_sizes} of dim {scatter_dim} and {gather_sizes} of dim {gather_dim}"
        )
    out = _AllToAll.apply(group, scatter_dim, gather_dim, scatter_sizes, gather_sizes, *xs)
    return out if isinstance(x, tuple) else out[0]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, scatter_dim, gather_dim, scatter_sizes, gather_sizes, *xs):
        ctx.transpose = (group, gather_dim, scatter_dim, gather_sizes, scatter_sizes)
        return _exchange(xs, group, scatter_dim, gather_dim, scatter_sizes, gather_sizes)

    @staticmethod
    def backward(ctx, *grads):
        return (None,) * 5 + _exchange(grads, *ctx.transpose)


def _exchange(xs, group, scatter_dim, gather_dim, scatter_sizes, gather_sizes):
    """On the wire the outer of the two dims comes first: what arrives along it is in order already, one copy each way."""
    outer, inner = sorted((scatter_dim, gather_dim))
    xs = [x.movedim(outer, 0) for x in xs]
    rows_first = scatter_dim == outer
    mine = scatter_sizes[group_rank(group)]

    def shapes(outer_sizes, inner_sizes):  # of the pieces, xs stacked just before the inner dim
        middle, rest = (*xs[0].shape[1:inner], len(xs)), xs[0].shape[inner + 1 :]
        return [(o, *middle, i, *rest) for o, i in zip(outer_sizes, inner_sizes)]

    same = [len(gather_sizes) * [gather_sizes[group_rank(group)]], len(gather_sizes) * [mine]]
    sent = shapes(scatter_sizes, same[0]) if rows_first else shapes(same[0], scatter_sizes)
    received = shapes(same[1], gather_sizes) if rows_first else shapes(gather_sizes, same[1])
    counts_out, counts_in = [[torch.Size(s).numel() for s in pieces] for pieces in (sent, received)]

    if rows_first:
        send = (torch.stack(xs, inner) if len(xs) > 1 else xs[0]).contiguous().flatten()
    else:
        send = xs[0].new_empty(sum(counts_out))
        columns = [x.split(scatter_sizes, inner) for x in xs]
        for piece, shape, *parts in zip(send.split(counts_out), sent, *columns):
            torch.stack(parts, inner, out=piece.view(shape))
    receive = xs[0].new_empty(sum(counts_in))
    dist.all_to_all_single(receive, send, counts_in, counts_out, group=group)
    if rows_first:
        out = torch.cat([p.view(s) for p, s in zip(receive.split(counts_in), received)], inner + 1)
    else:
        out = receive.view(sum(gather_sizes), *received[0][1:])
    return tuple(o.movedim(0, outer) for o in out.unbind(inner))


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
    if group is None:
        return x
    dim, copies = dim % x.dim(), x.unsqueeze(0).expand(group_size(group), *x.shape)
    return all_to_all(copies, group, 0, dim + 1, None, split_sizes(length, group)).squeeze(0)


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)

# --------------------------------------------------------------------------------------------------------------------
# one object that answers every "who am I", and carries the sharded model and its optimizer


class ParallelManager:
    """The (dp, sp) DeviceMesh of this job, sp the inner axis (neighbouring GPUs), and the engine on top of it.

    data_parallel_size: by default world size / sequence_parallel_size; and the other way round where that one is None.
    device_type: "cuda" (NCCL) where there is a GPU,
    else "cpu" (gloo). timeout: seconds until a collective that some rank never joins is an error.
    Started without torchrun, it is a world of one on the same code path. ValueError for sizes that don't multiply up.

    mesh, device; rank, world_size; dp_rank, dp_size, dp_group; sp_rank, sp_size, sp_group; is_main (rank 0).
    """

    def __init__(self, data_parallel_size=None, sequence_parallel_size=1, device_type=None, timeout=600.0):
        world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
        sp = world // (data_parallel_size or 1) if sequence_parallel_size is None else sequence_parallel_size
        if sp < 1 or world % sp:
            raise ValueError(f"world size {world} is not a multiple of sequence_parallel_size {sp}")
        dp = world // sp if data_parallel_size is None else data_parallel_size
        if dp * sp != world:
            raise ValueError(f"data_parallel_size {dp} x sequence_parallel_size {sp} is not the world size {world}")
        device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
        local = int(os.environ.get("LOCAL_RANK", 0))
        if device_type == "cuda" and local >= torch.cuda.device_count():
            raise ValueError(f"local rank {local} has no GPU of its own: this host has {torch.cuda.device_count()}")
        self.device = torch.device("cuda", local) if device_type == "cuda" else torch.device("cpu")
        if device_type == "cuda":
            torch.cuda.set_device(self.device)
        wait = timedelta(seconds=timeout)
        if not dist.is_initialized():
            _init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", wait)
        self.mesh = init_device_mesh(device_type, (dp, sp), mesh_dim_names=("dp", "sp"))
        self.rank, self.world_size, self.is_main = dist.get_rank(), world, dist.get_rank() == 0
        self.dp_group, self.sp_group = self.mesh.get_group("dp"), self.mesh.get_group("sp")
        self.dp_rank, self.dp_size = self.mesh.get_local_rank("dp"), dp
        self.sp_rank, self.sp_size = self.mesh.get_local_rank("sp"), sp
        for group in (self.dp_group, self.sp_group):
            _set_pg_timeout(wait, group)  # sub-groups don't inherit it: pytorch issue 119574
        self.model = self.optimizer = None

    def shard(self, model, blocks, param_dtype=None, shard_size=None, reshard_after_forward=True):
        """FSDP2 over all ranks, dp and sp together, block by block; the model becomes self.model.

        param_dtype: compute in it, with weights, gradients and their reduction kept as they are (float32).
        shard_size: HSDP, shard inside groups of so many neighbouring ranks, replicate across them.
        A model on the meta device is given (uninitialised) memory for its shards only.
        """
        shard_size = shard_size or self.world_size
        if self.world_size % shard_size:
            raise ValueError(f"world size {self.world_size} is not a multiple of shard_size {shard_size}")
        shape, names = (self.world_size // shard_size, shard_size), ("replicate", "shard")
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        mesh = mesh["shard"] if shard_size == self.world_size else mesh
        # casting inputs would round t = 999.0 to 1000.0 in bf16
        reduce_dtype = torch.float32 if param_dtype else None
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
            module.set_gradient_divide_factor(1.0)  # the gradient rule: a plain sum
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
        if any(p.is_meta for p in model.parameters()):
            model.to_empty(device=self.device)
        self.model = model
        return model

    def sum(self, value, group=None):
        """The sum of a number or tensor over `group` (default: all ranks)."""
        value = torch.as_tensor(value, device=self.device).clone()
        dist.all_reduce(value, group=group)
        return value

    def backward(self, loss, last=True):
        """Accumulate gradients; they are exchanged on the `last` micro-batch of a step."""
        self.model.set_requires_gradient_sync(last)
        loss.backward()

    def clip_grad_norm(self, max_norm):
        """Scale the gradients to a global L2 norm of at most max_norm; returns the norm before, equal on all ranks."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def step(self):
        """One optimizer step, then forget the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder, step, extra):
        """Write folder/step-N: weights and optimizer as safetensors, each rank its own part, and state.json with `extra`.

        Everything is written under a temporary name and state.json, which lists every file's size and crc32, comes last;
        one rename then makes it step-N. So what is called step-N is complete, and no pickle is ever read.
        """
        final, temporary = Path(folder) / f"step-{step}", Path(folder) / f"tmp-step-{step}"
        if self.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        dcp.save(self._tensors()[0], storage_writer=writer)
        found = self._checksums(temporary, sorted(p.name for p in temporary.iterdir() if p.is_file()))
        if self.is_main:
            with open(temporary / "state.json", "w") as file:
                json.dump(dict(extra, step=step, saved=time.time(), files=found), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(final, ignore_errors=True)
            os.rename(temporary, final)
        dist.barrier()

    def resume(self, folder):
        """Load the newest step-N of folder into the model (and the optimizer, if there is one); returns its `extra`.

        On any layout, sharded or not. Every file is checked before any is loaded: ValueError names a damaged one,
        FileNotFoundError says that there is no checkpoint.
        """
        path = latest_checkpoint(folder)
        extra = json.loads((path / "state.json").read_text())
        wanted = extra.pop("files")
        found = self._checksums(path, sorted(wanted))
        if bad := [name for name in sorted(wanted) if found[name] != wanted[name]]:
            raise ValueError(f"{path / bad[0]} is not what was saved: {found[bad[0]]} against {wanted[bad[0]]}")
        tensors, optimizer_state = self._tensors()
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
        if self.optimizer:
            loaded = {k: tensors.get(f"optimizer.{k}", v) for k, v in optimizer_state.items()}
            set_optimizer_state_dict(self.model, self.optimizer, loaded, options=FLAT)
        return extra

    def _tensors(self):
        """Everything that training changes, by name; learning rate and the like belong to the command line."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        state = get_optimizer_state_dict(self.model, self.optimizer, options=FLAT) if self.optimizer else {}
        return tensors | {f"optimizer.{k}": v for k, v in state.items() if isinstance(v, torch.Tensor)}, state

    def _checksums(self, path, names):
        """[bytes, crc32] of each file, the work shared out over the ranks, the answer equal on all of them."""
        mine, everyone = {name: _checksum(path / name) for name in names[self.rank :: self.world_size]}, {}
        parts = [None] * self.world_size
        dist.all_gather_object(parts, mine)
        for part in parts:
            everyone |= part
        return everyone

    def close(self):
        """Leave the job with status 0. Python's own way out crashes in gloo's threads in every second run."""
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def latest_checkpoint(folder):
    """The step-N in folder that was completed last; FileNotFoundError if there is none."""
    states = [p for p in Path(folder).glob("step-*/state.json") if re.fullmatch(r"step-\d+", p.parent.name)]
    if not states:
        raise FileNotFoundError(f"no checkpoint in {folder}: there is no step-N folder with a state.json")
    return max(states, key=lambda path: json.loads(path.read_text())["saved"]).parent


def _checksum(path):
    if not path.is_file():
        return "missing"
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return [path.stat().st_size, crc]


def _init_process_group(backend, timeout):
    """torchrun's rendezvous, or a world of one without it (no port, no environment)."""
    env = os.environ
    if "RANK" not in env:
        return dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    store, one_node = None, env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]
    if "TORCHELASTIC_RESTART_COUNT" in env and one_node:
        # a restarted job finds the addresses of its dead predecessor under the same names: pytorch issue 135712
        store = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, timeout=timeout)
        store = dist.PrefixStore(f"attempt{env['TORCHELASTIC_RESTART_COUNT']}", store)
    ranks = dict(store=store, rank=int(env["RANK"]), world_size=int(env["WORLD_SIZE"])) if store else {}
    dist.init_process_group(backend, timeout=timeout, **ranks)
