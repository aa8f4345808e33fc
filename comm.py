"""Sequence parallelism in one file: the Ulysses all-to-all, and who is who on a dp × sp mesh. Needs torch alone.

Attention mixes tokens but not heads. Everything else mixes heads but not tokens. So tokens are split over ranks, and
around attention the ranks trade tokens for heads. 4 tokens × 4 heads on 2 ranks; a cell is (token, head):

      rank 0            rank 1                               rank 0      rank 1
    00 01|02 03       20 21|22 23     scatter heads,         00 01       02 03
    10 11|12 13       30 31|32 33     gather tokens -->      10 11       12 13
                                      <-- scatter tokens,    20 21       22 23
    half the tokens, all heads            gather heads       30 31       32 33
                                                             all tokens, half the heads

The gradient rule: each collective's backward is the exact transpose of its forward. So autograd on rank r gives the
gradient of the SUM of all ranks' losses with respect to rank r's copy of a weight. All copies are the same variable, so
by the chain rule its gradient is the plain sum over all dp × sp ranks, with `local loss = sum over my tokens / global
count`. There is no other factor, for any parameter, at any uneven length.

Copy it into any model: `split_sequence(x, group)` before the blocks, `ulysses(kernel, q, k, v, group, length)` for the
attention, `gather_sequence(x, group, length)` after the blocks. A group of None is one device, everywhere.
(In a notebook save it under another name: `comm` is Jupyter's.)

    $ torchrun --nproc_per_node=3 comm.py    # 7 tokens × 5 heads: what each rank holds before and after
"""

import math
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.profiler import record_function

# --------------------------------------------------------------------------------------------------------------------
# sizes are pure functions of (length, ranks), so ranks never send each other a shape


def group_size(group):
    """Return how many ranks `group` has."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group):
    """Return this rank's place in `group`."""
    return 0 if group is None else dist.get_rank(group)


def split_sizes(length, group):
    """Return how much of `length` each rank of `group` holds: as in torch.tensor_split, the first ranks hold one more.

    A tuple of lengths, (video, text), stands for streams that are split one by one and then joined on each rank.
    """
    if isinstance(length, tuple):
        streams = [split_sizes(stream, group) for stream in length]
        return [sum(parts) for parts in zip(*streams)]
    ranks = group_size(group)
    return [length // ranks + (rank < length % ranks) for rank in range(ranks)]


# --------------------------------------------------------------------------------------------------------------------
# collectives: each stands beside its transpose


@record_function("all_to_all")  # its name in profiles
def all_to_all(x, group, scatter_dim, gather_dim, scatter_sizes, gather_sizes):
    """Scatter `scatter_dim` over the ranks and gather `gather_dim`; the transpose, and backward, swaps the two.

    x has all of scatter_dim and this rank's part of gather_dim; the result has its part of scatter_dim and all of
    gather_dim. Tensors that travel together are stacked along another dim: q, k, v [B, L/P, 3, H, D].
    scatter_sizes, gather_sizes: one length per rank, the same lists on all ranks; a length may be 0.
    ValueError if x does not fit them. On one rank it returns x.
    Source: DeepSpeed-Ulysses, arXiv:2309.14509, section 3.
    """
    ranks, rank = group_size(group), group_rank(group)
    if len(scatter_sizes) != ranks or len(gather_sizes) != ranks:
        raise ValueError(f"{ranks} ranks need {ranks} sizes, got {scatter_sizes} and {gather_sizes}")
    if x.shape[scatter_dim] != sum(scatter_sizes) or x.shape[gather_dim] != gather_sizes[rank]:
        raise ValueError(
            f"rank {rank} of the group holds {list(x.shape)}, which does not fit the sizes {scatter_sizes} of "
            f"dim {scatter_dim} and {gather_sizes} of dim {gather_dim}"
        )
    if ranks == 1:
        return x
    dims = scatter_dim % x.dim(), gather_dim % x.dim()
    return _AllToAll.apply(x, group, *dims, scatter_sizes, gather_sizes)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, scatter_dim, gather_dim, scatter_sizes, gather_sizes):
        ctx.transpose = group, gather_dim, scatter_dim, gather_sizes, scatter_sizes

        # leaving[j] is for rank j; in the outbox the pieces lie one after another, as they may do in x already
        leaving = x.split(scatter_sizes, scatter_dim)
        counts_out = [piece.numel() for piece in leaving]
        in_order = math.prod(x.shape[:scatter_dim]) == 1
        outbox = x.flatten().contiguous() if in_order else torch.cat([piece.flatten() for piece in leaving])

        # arriving[j] is what rank j has for us: as large as our own piece, except along gather_dim
        mine = leaving[group_rank(group)]
        before, after = mine.shape[:gather_dim], mine.shape[gather_dim + 1 :]
        counts_in = [math.prod((*before, size, *after)) for size in gather_sizes]
        inbox = x.new_empty(sum(counts_in))
        dist.all_to_all_single(inbox, outbox, counts_in, counts_out, group=group)

        if math.prod(before) == 1:  # nothing lies before the gathered dim: the inbox is the result
            return inbox.view(*before, sum(gather_sizes), *after)
        arriving = zip(inbox.split(counts_in), gather_sizes)
        return torch.cat([slot.view(*before, size, *after) for slot, size in arriving], gather_dim)

    @staticmethod
    def backward(ctx, grad):
        return all_to_all(grad, *ctx.transpose), None, None, None, None, None


def split_sequence(x, group, dim=1):
    """Return this rank's part of x along `dim`: [.., L, ..] -> [.., L/P, ..]. x must be equal on all ranks.

    The transpose is what autograd does for a slice: this part's gradient, and zeros for the rest. The sum over ranks is
    the gradient of x.
    """
    return x.split(split_sizes(x.shape[dim], group), dim)[group_rank(group)]


def gather_sequence(x, group, length, dim=1):
    """Return the parts of all ranks, joined, on every rank: [.., L/P, ..] -> [.., L, ..] with L = length.

    It is an all-gather, written as the all-to-all of P copies: the same bytes. Backward is then the transpose of that, a
    reduce-scatter with a plain sum: the copies' gradients come back, and autograd sums them, as for every `expand`.
    """
    dim, ranks = dim % x.dim(), group_size(group)
    copies = x.expand(ranks, *x.shape)
    sizes = split_sizes(length, group)
    joined = all_to_all(copies, group, 0, dim + 1, [1] * ranks, sizes)
    return joined.squeeze(0)


@torch.compiler.disable  # what stands before and after it may be compiled
def ulysses(attention, q, k, v, group, length, keys=None, mask=None):
    """Attend over the tokens of all ranks, some heads on each: q [B, L/P, H, D] -> [B, L/P, H, D].

    attention: any kernel (q, k, v, mask) -> out for one device. It is given all tokens, q and out [B, L, H/P, D].
    length: tokens of q over all ranks, or (video, text) for streams split one by one and then joined on each rank.
    keys: the same for k and v; by default their tokens are q's.
    mask: over this rank's keys, [B, 1 or H, 1, keys/P]; the kernel is given it over all keys, [B, H/P, 1, keys].
    Backward is exact for any lengths and any number of heads, since it is the two exchanges in reverse.
    """
    keys = length if keys is None else keys
    heads = split_sizes(q.shape[2], group)
    query_sizes, key_sizes = split_sizes(length, group), split_sizes(keys, group)
    q = all_to_all(q, group, 2, 1, heads, query_sizes)
    kv = all_to_all(torch.stack((k, v), 2), group, 3, 1, heads, key_sizes)
    if mask is not None:
        mask = mask.expand(-1, sum(heads), -1, -1)
        mask = all_to_all(mask, group, 1, 3, heads, key_sizes)
    out = attention(q, *kv.unbind(2), mask)
    return all_to_all(out, group, 1, 2, query_sizes, heads)


# --------------------------------------------------------------------------------------------------------------------
# my place on the (dp, sp) mesh, and one training step under the gradient rule


class ParallelManager:
    """The (dp, sp) DeviceMesh of this job, FSDP2 over all of its ranks, and a step under the gradient rule.

    sp is the inner axis, so the ranks that share a sample are neighbouring GPUs. A size of None is
    computed from the other.
    device_type: by default "cuda" (NCCL) if there is a GPU, else "cpu" (gloo). mesh: your own DeviceMesh instead, with
    dims named dp and sp. Without torchrun this process is a world of one.

    rank, world_size, world_group: all ranks; is_main is true on rank 0
    dp_rank, dp_size, dp_group:    ranks with the same part of other samples
    sp_rank, sp_size, sp_group:    ranks that share a sample, each with its part of the tokens
    mesh, device:                  the DeviceMesh, and the device of this rank
    """

    def __init__(self, data_parallel_size=None, sequence_parallel_size=1, device_type=None, timeout=600.0, mesh=None):
        if mesh is None:
            mesh = _make_mesh(data_parallel_size, sequence_parallel_size, device_type, timedelta(seconds=timeout))
        names = mesh.mesh_dim_names or ()
        if {*names} != {"dp", "sp"} or mesh.size() != dist.get_world_size():
            raise ValueError(f"a mesh needs the dims dp and sp over all ranks, got {names} over {mesh.size()} ranks")
        self.mesh = mesh
        index = torch.cuda.current_device() if mesh.device_type == "cuda" else None
        self.device = torch.device(mesh.device_type, index)
        self.rank, self.world_size, self.world_group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
        self.is_main = self.rank == 0
        self.dp_group, self.sp_group = mesh.get_group("dp"), mesh.get_group("sp")
        self.dp_size, self.sp_size = mesh["dp"].size(), mesh["sp"].size()
        self.dp_rank = mesh.get_coordinate()[names.index("dp")]
        # in a mesh of permuted ranks not the coordinate, but the place in the group, which the collectives go by
        self.sp_rank = group_rank(self.sp_group)

    def shard(self, model, blocks, param_dtype=None, shard_size=None, reshard_after_forward=True, offload_policy=None):
        """Shard the model in place with FSDP2, block by block, over all ranks, dp and sp together.

        param_dtype: the dtype to compute in; weights, gradients and their sums keep their dtype (float32).
        shard_size: HSDP, which shards inside groups of this many neighbouring ranks and replicates across the groups.
        A model on the meta device gets memory for its shards only, uninitialised.
        """
        kept = set(model.state_dict())
        for name, buffer in model.named_buffers():
            if buffer.is_meta and name not in kept:
                raise ValueError(
                    f"buffer {name} is on the meta device and in no state dict: nothing would ever fill it"
                )
        shard_size = self.world_size if shard_size is None else shard_size
        if shard_size < 1 or self.world_size % shard_size:
            raise ValueError(f"world size {self.world_size} is not a multiple of shard_size {shard_size}")
        if shard_size == self.world_size:
            mesh = init_device_mesh(self.device.type, (shard_size,), mesh_dim_names=("shard",))
        else:
            shape = (self.world_size // shard_size, shard_size)
            mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))
        policy = MixedPrecisionPolicy(
            param_dtype=param_dtype,
            reduce_dtype=torch.float32 if param_dtype else None,
            cast_forward_inputs=False,  # casting would round t = 999.0 to 1000.0 in bf16
        )
        for module in (*blocks, model):
            fully_shard(
                module,
                mesh=mesh,
                mp_policy=policy,
                reshard_after_forward=reshard_after_forward,
                offload_policy=offload_policy or OffloadPolicy(),
            )
            module.set_gradient_divide_factor(1.0)  # the gradient rule: a plain sum
            module.set_force_sum_reduction_for_comms(True)  # gloo can't scale while it sums
        if any(p.is_meta for p in model.parameters()):
            model.to_empty(device="cpu" if offload_policy else self.device)

    def backward(self, model, loss, last=True):
        """Accumulate the gradients of a sharded model; the ranks sum them on the `last` micro-batch of a step.

        Until then every rank holds all gradients, unsharded and in float32: 51 GB for the 13B.
        """
        model.set_requires_gradient_sync(last)
        loss.backward()

    def clip_grad_norm(self, model, max_norm):
        """Scale the gradients to a global L2 norm of at most max_norm; return the norm before, equal on all ranks."""
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()

    def step(self, optimizer, skip=False):
        """Take the optimizer step, or `skip` it, and clear the gradients."""
        if not skip:
            optimizer.step()
        optimizer.zero_grad()

    def sum(self, value, group):
        """Return the sum of a number or tensor over `group`: world_group, dp_group or sp_group."""
        dtype = torch.float64 if isinstance(value, float) else None  # token counts stay exact
        value = torch.as_tensor(value, dtype=dtype, device=self.device).clone()
        if group is not None:
            dist.all_reduce(value, group=group)
        return value

    def check_equal(self, facts, group):
        """Raise ValueError on all ranks of `group` if they disagree about a fact. facts: {name: value}.

        It catches the classic silent bugs: ranks with other flags or, given a batch's `samples`, sp ranks with other samples.
        """
        if group is None:
            return
        ranks = dist.get_process_group_ranks(group)
        everyone = [None] * len(ranks)
        dist.all_gather_object(everyone, facts, group=group)
        for rank, theirs in zip(ranks, everyone):
            wrong = [name for name in facts if theirs.get(name) != everyone[0].get(name)]
            if wrong:
                values = " and ".join(str(part.get(wrong[0]))[:200] for part in (everyone[0], theirs))
                raise ValueError(f"ranks {ranks[0]} and {rank} differ in {', '.join(wrong)}: {values}")

    def close(self):
        """End the process with status 0, at once: in Python's own exit gloo's threads crash every other time."""
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)


def _make_mesh(dp, sp, device_type, timeout):
    """Return the (dp, sp) mesh; start the process group if nobody has."""
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        alone = "RANK" not in os.environ  # no torchrun: a world of one, which needs no port
        world = dict(store=dist.HashStore(), rank=0, world_size=1) if alone else {}
        dist.init_process_group(backend, timeout=timeout, **world)
    world_size = dist.get_world_size()
    for name, size in (("data_parallel_size", dp), ("sequence_parallel_size", sp)):
        if size is not None and (size < 1 or world_size % size):
            raise ValueError(f"world size {world_size} is not a multiple of {name} {size}")
    sp = world_size // (dp or 1) if sp is None else sp
    dp = world_size // sp if dp is None else dp
    if dp * sp != world_size:
        raise ValueError(f"data_parallel_size {dp} x sequence_parallel_size {sp} is not the world size {world_size}")
    return init_device_mesh(device_type, (dp, sp), mesh_dim_names=("dp", "sp"))


# --------------------------------------------------------------------------------------------------------------------
# the lesson


def lesson(tokens=7, heads=5):
    """Print what each rank holds before and after the exchange, and check the transpose; a cell is token and head."""
    manager = ParallelManager(1, None, "cpu")
    group, rank = manager.sp_group, manager.rank
    token_sizes, head_sizes = split_sizes(tokens, group), split_sizes(heads, group)
    cells = 10.0 * torch.arange(tokens)[:, None] + torch.arange(heads)  # [L, H]
    x = split_sequence(cells, group, 0).clone().requires_grad_()  # [L/P, H]
    out = all_to_all(x, group, 1, 0, head_sizes, token_sizes)  # [L, H/P]
    y = 100.0 * rank + torch.arange(out.numel()).view(out.shape)  # stands for the gradient of out
    (out * y).sum().backward()
    back = all_to_all(y, group, 0, 1, token_sizes, head_sizes)
    there = manager.sum((out * y).sum().detach(), group)
    here = manager.sum((x * back).sum().detach(), group)

    def rows(cells):
        return [" ".join(f"{int(cell):02d}" for cell in row) for row in cells.tolist()]

    everyone = [None] * manager.world_size
    mine = rows(x), rows(out), torch.equal(x.grad, back)
    dist.all_gather_object(everyone, mine)
    if manager.is_main:
        for other, (before, after, same) in enumerate(everyone):
            print(f"rank {other} before: {' | '.join(before)}\n       after:  {' | '.join(after)}")
            print(f"       the gradient of `before` is the opposite exchange of the gradient of `after`: {same}")
        sides = f"<all_to_all(x), y> = {there:.0f}, <x, transpose(y)> = {here:.0f}"
        print(f"{sides}, summed over {manager.world_size} ranks")
    return manager


if __name__ == "__main__":
    lesson().close()
