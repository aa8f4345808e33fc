"""Keep activations in the host's memory: `with offloaded(): train_step(..)`. The inputs of a block, which checkpointing
keeps, are copied to pinned memory while the GPU computes, and come back for that block's backward.

(FSDP2 itself does this for weights, gradients and the optimizer's state: `shard(.., offload_policy=CPUOffloadPolicy())`.)
"""

import torch

SIDE, LARGE = {}, 1 << 20  # each GPU's stream for copies during the computation; tensors with fewer elements stay


def offloaded():
    """Return a context in which tensors saved for backward lie in the host's memory. It pays only with checkpointing."""
    return torch.autograd.graph.saved_tensors_hooks(to_host, from_host)


def to_host(x):
    """Copy a tensor that is saved for backward to pinned memory. Small ones stay."""
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
