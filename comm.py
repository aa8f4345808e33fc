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
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
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


def all_to_all(x, group, scatter_dim, gather_dim, scatter_sizes=None, gather_sizes=None, async_op=False):
    """Give away `scatter_dim`, collect `gather_dim`; the transpose (and backward) is the same call with the two swapped.

    x: a tensor, or a tuple of equally shaped ones that travel in one collective. Whole along scatter_dim, this rank's part
    along gather_dim; the result is this rank's part along scatter_dim, whole along gather_dim.
    scatter_sizes, gather_sizes: the length that each rank has of that dim, equal on all ranks, zeros allowed. By default
    `split_sizes` of the whole, and the same as here on every rank. ValueError where x does not fit them.
    async_op: return at once, with a function that waits and gives the result. What is computed before it is called runs
    beside the exchange, and its backward beside the exchange of backward.
    With group=None, or a group of one, it is the identity. Source: DeepSpeed-Ulysses, arXiv:2309.14509, section 3.
    """
    one = not isinstance(x, tuple)
    xs = (x,) if one else x
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
    if group_size(group) == 1:
        return (lambda: x) if async_op else x
    there = _Exchange(group, scatter_dim, gather_dim, scatter_sizes, gather_sizes, async_op)
    back = _Exchange(group, gather_dim, scatter_dim, gather_sizes, scatter_sizes, async_op)
    ticket = _Send.apply(there, back, *xs)

    def wait():
        out = _Receive.apply(there, back, ticket)
        return out[0] if one else out

    return wait if async_op else wait()


class _Send(torch.autograd.Function):
    """Forward sends, backward receives: what lies between the two in forward lies between them in backward.

    The ticket, an empty tensor, is what ties them together for autograd.
    """

    @staticmethod
    def forward(ctx, there, back, *xs):
        ctx.back = back
        there.send(xs)
        return xs[0].new_empty(0)

    @staticmethod
    def backward(ctx, _):
        return None, None, *ctx.back.receive()


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, there, back, ticket):
        ctx.back = back
        return there.receive()

    @staticmethod
    def backward(ctx, *grads):
        ctx.back.send(grads)
        return None, None, grads[0].new_empty(0)


class _Exchange:
    """One all-to-all of some tensors, begun by `send` and ended by `receive`.

    On the wire the outer of the two dims comes first: what arrives along it is in order already, one copy each way.
    """

    def __init__(self, group, scatter_dim, gather_dim, scatter_sizes, gather_sizes, async_op):
        self.group, self.async_op = group, async_op
        self.scatter_sizes, self.gather_sizes = scatter_sizes, gather_sizes
        self.outer, self.inner = sorted((scatter_dim, gather_dim))
        self.rows_first = scatter_dim == self.outer

    def shapes(self, scattered, gathered):
        """Of the pieces on the wire, one a rank: [outer, .., tensors, inner, ..]."""
        outer, inner = (scattered, gathered) if self.rows_first else (gathered, scattered)
        return [(o, *self.middle, i, *self.rest) for o, i in zip(outer, inner)]

    @record_function("all_to_all")  # its name in profiles
    def send(self, xs):
        """Begin: a buffer with one piece for each rank leaves, another one waits for as many."""
        xs = [x.movedim(self.outer, 0) for x in xs]
        self.middle, self.rest = (*xs[0].shape[1 : self.inner], len(xs)), xs[0].shape[self.inner + 1 :]
        rank, ranks = group_rank(self.group), group_size(self.group)
        sent = self.shapes(self.scatter_sizes, ranks * [self.gather_sizes[rank]])
        self.received = self.shapes(ranks * [self.scatter_sizes[rank]], self.gather_sizes)
        counts, self.counts = [[torch.Size(shape).numel() for shape in shapes] for shapes in (sent, self.received)]
        if self.rows_first:
            buffer = (torch.stack(xs, self.inner) if len(xs) > 1 else xs[0]).contiguous().flatten()
        else:
            buffer = xs[0].new_empty(sum(counts))
            columns = zip(*(x.split(self.scatter_sizes, self.inner) for x in xs))
            for piece, shape, parts in zip(buffer.split(counts), sent, columns):
                _copy(piece.view(shape).unbind(self.inner), parts)
        self.buffer = buffer.new_empty(sum(self.counts))
        self.work = dist.all_to_all_single(
            self.buffer, buffer, self.counts, counts, group=self.group, async_op=self.async_op
        )
        if self.async_op and buffer.is_cuda:
            torch.cuda._sleep(10_000)  # 5 us: a matrix product that starts first has all multiprocessors until it ends

    @record_function("all_to_all")
    def receive(self):
        """End: what has arrived, as tensors."""
        if self.work:
            self.work.wait()
        if self.rows_first:
            *middle, count = self.middle
            shape = (self.received[0][0], *middle, sum(self.gather_sizes), *self.rest)
            outs = [self.buffer.new_empty(shape) for _ in range(count)]
            columns = zip(*(out.split(self.gather_sizes, self.inner) for out in outs))
            for piece, shape, parts in zip(self.buffer.split(self.counts), self.received, columns):
                _copy(parts, piece.view(shape).unbind(self.inner))
        else:
            outs = self.buffer.view(sum(self.gather_sizes), *self.received[0][1:]).unbind(self.inner)
        self.buffer = self.work = None
        return tuple(out.movedim(0, self.outer) for out in outs)


def _copy(tos, xs):
    """Each to.copy_(x), 16 bytes at a time where rows allow it: a strided copy of bf16 has half the memory's speed otherwise."""
    for to, x in zip(tos, xs):
        step = 16 // x.itemsize
        numbers = [n for t in (to, x) for n in (t.shape[-1], t.storage_offset(), *t.stride()[:-1])]
        if to.stride(-1) == x.stride(-1) == 1 and not any(n % step for n in numbers):
            to, x = to.view(torch.complex128), x.view(torch.complex128)
        to.copy_(x)


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
    device_type: by default "cuda" (NCCL) where there is a GPU, else "cpu" (gloo). timeout: seconds until a collective
    that some rank never joins is an error.
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
        self.save_group = dist.new_group(backend="gloo", timeout=wait)  # saving goes on beside training
        self.model = self.optimizer = self._saving = None

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
        dtype = torch.float64 if isinstance(value, float) else None  # token counts stay exact
        value = torch.as_tensor(value, dtype=dtype, device=self.device).clone()
        dist.all_reduce(value, group=group)
        return value

    def backward(self, loss, last=True):
        """Accumulate gradients; they are exchanged on the `last` micro-batch of a step."""
        self.model.set_requires_gradient_sync(last)
        loss.backward()

    def clip_grad_norm(self, max_norm):
        """Scale the gradients to a global L2 norm of at most max_norm; returns the norm before, equal on all ranks."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()

    def step(self, skip=False):
        """One optimizer step (or none), then forget the gradients."""
        if not skip:
            self.optimizer.step()
        self.optimizer.zero_grad()

    # A checkpoint is a folder step-N: safetensors that torch.distributed.checkpoint wrote, each rank its own part, and
    # manifest.json with every file's size and crc32. It is written as tmp-step-N, the manifest last, and then renamed:
    # what is called step-N was complete once, and the manifest tells whether it still is. Nothing is ever unpickled.

    def save(self, folder, step, extra, keep=0):
        """Start saving weights, optimizer and `extra` (JSON) as folder/step-N; training may go on at once.

        Every rank calls it; it returns when the state is copied to the CPU. `finish_save` completes it. keep: so many
        checkpoints of this run stay (0: all). OSError, on every rank, if the folder can't be written.
        """
        self.finish_save()
        final, temporary = Path(folder) / f"step-{step}", Path(folder) / f"tmp-step-{step}"

        def make_room():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        self.on_main(make_room)
        writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        written = dcp.async_save(self._tensors()[0], storage_writer=writer, process_group=self.save_group)
        summed = ThreadPoolExecutor(1).submit(self._checksums_when, written, temporary)
        self._saving = summed, temporary, final, dict(extra, step=step), keep

    def _checksums_when(self, written, folder):
        """In a thread: wait until all ranks have written, then read back what this rank wrote."""
        written.result()
        return {p.name: checksum(p) for p in sorted(folder.glob("*.safetensors"))[self.rank :: self.world_size]}

    def save_ready(self):
        """Whether finish_save would not wait for this rank."""
        return self._saving is not None and self._saving[0].done()

    def finish_save(self):
        """Complete the save under way, if any, on every rank. OSError, on every rank, if it failed; nothing is lost then."""
        if self._saving is None:
            return
        (summed, temporary, final, manifest, keep), self._saving, files = self._saving, None, {}

        def written():
            try:
                return summed.result()
            except (Exception, CheckpointException) as error:  # the latter is no Exception
                raise OSError(f"{temporary} could not be written: {_first_line(error)}") from None

        try:
            for part in self._together(written):
                files |= part
        except OSError:  # on a full disk it takes what the next try needs
            self.on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
            raise

        def complete():
            write_manifest(temporary, dict(manifest, saved=time.time(), files=files))
            if final.exists():
                remove(final)
            os.rename(temporary, final)
            mine = [p for p in checkpoints(final.parent) if read_manifest(p, "run") == manifest.get("run")]
            for path in mine[keep:] if keep else []:
                remove(path)

        self.on_main(complete)

    def find(self, folder, run=None):
        """The newest checkpoint in folder that is whole: (path, manifest). Damaged ones are named and passed over.

        run: only those whose manifest says so. Equal on all ranks; FileNotFoundError, on all, if there is none.
        """

        def candidates():  # those of another run need not be read
            return [p for p in checkpoints(folder) if run is None or read_manifest(p, "run") in (None, run)]

        problems = []
        for path in self.on_main(candidates):
            problem, manifest = self._verify(path)
            if problem is None and (run is None or manifest.get("run") == run):
                return path, manifest
            problems += [problem] if problem else []
            if problem and self.is_main:
                print(f"skipping {path}: {problem}", file=sys.stderr, flush=True)
        told = f"no checkpoint in {folder}: there is no step-N folder in it"
        raise FileNotFoundError(f"no whole checkpoint in {folder}: {problems[0]}" if problems else told)

    def _verify(self, path):
        """(what is wrong or None, manifest); the files are shared out over the ranks."""
        try:
            manifest = read_manifest(path)
        except ValueError as error:
            manifest, mine = dict(files={}), [str(error)]
        else:
            names = sorted(manifest["files"])[self.rank :: self.world_size]
            mine = [f"{n} {told}" for n in names if (told := _difference(path / n, manifest["files"][n]))]
        problems = [p for part in self._together(lambda: mine) for p in part]
        return (problems[0] if problems else None), manifest

    def load(self, path):
        """Load a checkpoint into the model (and the optimizer, if there is one): any layout, sharded or not."""
        tensors, optimizer_state = self._tensors()
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
        if self.optimizer:
            loaded = {k: tensors.get(f"optimizer.{k}", v) for k, v in optimizer_state.items()}
            set_optimizer_state_dict(self.model, self.optimizer, loaded, options=FLAT)

    def _tensors(self):
        """Everything that training changes, by name; learning rate and the like belong to the command line."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        state = get_optimizer_state_dict(self.model, self.optimizer, options=FLAT) if self.optimizer else {}
        return tensors | {f"optimizer.{k}": v for k, v in state.items() if isinstance(v, torch.Tensor)}, state

    def _together(self, function):
        """Call it on every rank (None: nothing) and exchange the results; an OSError on one is raised on all."""
        mine, results = [None, None], [None] * self.world_size
        try:
            mine[0] = function() if function else None
        except OSError as error:
            mine[1] = f"rank {self.rank}: {error}" if self.world_size > 1 else str(error)
        dist.all_gather_object(results, mine, group=self.save_group)
        if failed := [told for _, told in results if told]:
            raise OSError(failed[0])
        return [result for result, _ in results]

    def on_main(self, function):
        """What `function` returns on rank 0, on every rank; its OSError is raised on every rank."""
        return self._together(function if self.is_main else None)[0]

    def check_equal(self, **facts):
        """Refuse the classic silent bug, sp ranks that work on different things: ValueError names ranks and facts."""
        parts = [None] * self.sp_size
        dist.all_gather_object(parts, facts, group=self.sp_group)
        first = self.rank - self.sp_rank
        for rank, other in enumerate(parts, first):
            if wrong := [name for name in facts if other[name] != parts[0][name]]:
                values = f"{parts[0][wrong[0]]} and {other[wrong[0]]}"
                raise ValueError(f"ranks {first} and {rank} share a sample but differ in {', '.join(wrong)}: {values}")

    def close(self):
        """Leave the job with status 0. Python's own way out crashes in gloo's threads in every second run."""
        self.finish_save()
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def checkpoints(folder):
    """The step-N folders in `folder`, the one completed last first; never a link that leads out of it."""
    found = [p for p in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    found = [p for p in found if not p.is_symlink()]
    return sorted(found, key=lambda p: (read_manifest(p, "saved") or 0.0, int(p.name[5:])), reverse=True)


def remove(checkpoint):
    """Delete a step-N folder; killed halfway, it leaves nothing behind that is called so."""
    leaving = checkpoint.with_name(f"tmp-{checkpoint.name}-leaving")
    shutil.rmtree(leaving, ignore_errors=True)
    os.rename(checkpoint, leaving)
    shutil.rmtree(leaving)


def failed_ranks():
    """Ranks that have said that a collective failed on them."""
    store = dist.distributed_c10d._get_default_store()
    return [rank for rank in range(dist.get_world_size()) if store.check([_failure_of(rank)])]


def silent_ranks(seconds=1.0):
    """Who is missing, asked when a collective has failed here: ranks that have not said so too within some seconds."""
    try:
        dist.distributed_c10d._get_default_store().set(_failure_of(dist.get_rank()), "1")
        time.sleep(seconds)
        return sorted(set(range(dist.get_world_size())) - set(failed_ranks()))
    except dist.DistError:  # without torchrun the store is rank 0's, and gone with it
        return [0]


def _failure_of(rank):
    return f"failed{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{rank}"


def write_manifest(folder, manifest):
    """manifest.json with its own crc32, on the disk when this returns."""
    text = json.dumps(manifest, sort_keys=True)
    with open(folder / "manifest.json", "w") as file:
        json.dump(dict(manifest, crc32=zlib.crc32(text.encode())), file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder, key=None):
    """The manifest of a checkpoint; ValueError says why it is none. With a key: that entry, or None."""
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_text())
        text = json.dumps({k: v for k, v in manifest.items() if k != "crc32"}, sort_keys=True)
        if zlib.crc32(text.encode()) != manifest["crc32"]:
            raise ValueError("its crc32 is another")
        if any(not re.fullmatch(r"[\w.-]+\.safetensors", name) for name in manifest["files"]):
            raise ValueError("it names files outside its folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if key is not None:
            return None
        raise ValueError(f"manifest.json is not what was saved: {_first_line(error)}") from None
    return manifest if key is None else manifest.get(key)


def checksum(path):
    """[bytes, crc32] of a file."""
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _difference(path, wanted):
    """How a file differs from the [bytes, crc32] it had, or None. Sizes are looked at before anything is read."""
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != wanted[0]:
        return f"has {path.stat().st_size} bytes, {wanted[0]} were saved"
    return None if checksum(path) == wanted else "has another crc32 than was saved"


def _first_line(error):
    """Of an exception that may carry other ranks' tracebacks: the sentence that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if re.match(r"\s*[\w.]*(Error|Exception)", line)]
    return lines[-1] if lines else (str(error).splitlines() or [type(error).__name__])[0]


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
