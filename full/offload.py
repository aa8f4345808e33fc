"""Activations in the host's memory: `with offloaded(): train_step(..)`. What checkpointing keeps of a block, its inputs, is
copied to pinned memory while the GPU goes on, and comes back for that block's backward. Needs nothing more.

(Weights, gradients and the optimizer's state are FSDP2's own business: `shard(.., offload_policy=CPUOffloadPolicy())`.)
"""

import torch

SIDE, LARGE = {}, 1 << 20  # each GPU's stream for copies beside the computation; values that are worth a copy


def offloaded():
    """Return a context in which what is saved for backward lies in the host's memory. With checkpointing alone it pays."""
    return torch.autograd.graph.saved_tensors_hooks(to_host, from_host)


def to_host(x):
    """Copy a tensor that is saved for backward to pinned memory; small ones stay."""
    if x.device.type != "cuda" or x.numel() < LARGE:
        return x
    if x.device not in SIDE:
        SIDE[x.device] = torch.cuda.Stream(x.device)
    side = SIDE[x.device]
    side.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(side):
        kept = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
        x.record_stream(side)
    return kept, x.device


def from_host(kept):
    if isinstance(kept, torch.Tensor):
        return kept
    kept, device = kept
    torch.cuda.current_stream(device).wait_stream(SIDE[device])
    return kept.to(device, non_blocking=True)
