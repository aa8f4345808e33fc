"""Keep activations in the host's memory: `with offloaded(): train_step(..)`. What checkpointing keeps, the input of each block
and with `attention` the output of its attention, is copied to pinned memory while the GPU computes, and is on its way back
before backward asks for it.

(FSDP2 itself does this for weights, gradients and the optimizer's state: `shard(.., offload_policy=CPUOffloadPolicy())`.)
"""

import contextlib
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from hunyuan_sp import CHECKPOINTING, KEPT

SIDE, LARGE = {}, 1 << 20  # each GPU's stream for copies during the computation; tensors with fewer elements stay


@contextlib.contextmanager
def offloaded():
    """Return a context in which tensors kept for backward lie in the host's memory. It pays only with checkpointing."""
    # of blocks and of attention, in the order of forward; backward asks for the last ones first
    inputs, outputs = [], []

    def to_host(waiting, x):
        if not is_large(x):
            return x
        waiting.append(OnHost(x))
        return waiting[-1]

    def from_host(waiting, others, kept):
        if not isinstance(kept, OnHost):
            return kept
        if kept in waiting:
            waiting.remove(kept)
        # what is asked for next sets out, too: after a block's input its attention, then the input of the block before
        for one in (kept, *(others or waiting)[-1:]):
            one.fetch()
        return kept.take()

    plain = CHECKPOINTING["attention"]
    ways = partial(to_host, outputs), partial(from_host, outputs, inputs)
    CHECKPOINTING["attention"] = partial(attention_on_host, *ways)
    try:
        with torch.autograd.graph.saved_tensors_hooks(partial(to_host, inputs), partial(from_host, inputs, outputs)):
            yield
    finally:
        CHECKPOINTING["attention"] = plain


def is_large(x):
    return torch.is_tensor(x) and x.device.type == "cuda" and x.numel() >= LARGE


class OnHost:
    """A tensor of a GPU that is copied to pinned memory at once, and back when it is fetched."""

    def __init__(self, x):
        self.device = x.device
        if x.device not in SIDE:
            SIDE[x.device] = torch.cuda.Stream(x.device)
        self.side, self.back = SIDE[x.device], None
        self.side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self.side):
            # the strides stay: an attention's backward may be planned for those of its output
            self.host = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
            x.record_stream(self.side)

    def fetch(self):
        """Begin to copy it to the GPU, once."""
        if self.back is None:
            with torch.cuda.stream(self.side):
                self.back = self.host.to(self.device, non_blocking=True)
                self.arrived = self.side.record_event()

    def take(self):
        """Return it on the GPU; what is computed next waits for it."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self.arrived)
        self.back.record_stream(current)
        back, self.back = self.back, None
        return back


def attention_on_host(to_host, from_host):
    """Return the two contexts of a block's forward and of its recomputation, which takes attention's output from the host."""
    kept = []

    def run(kernel, *args, **kwargs):
        out = kernel(*args, **kwargs)
        kept.append(tree_map(lambda x: to_host(x.detach() if torch.is_tensor(x) else x), out))
        return out

    return Kernels(run), Kernels(lambda *_, **__: tree_map(from_host, kept.pop(0)))


class Kernels(TorchDispatchMode):
    """Give the attention kernels that checkpointing keeps, with their arguments, to `run`."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    @classmethod
    def ignore_compile_internals(cls):
        return True  # blocks may be compiled under it, as under torch's own modes of checkpointing

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        if kernel in KEPT:
            return self.run(kernel, *args, **kwargs or {})
        return kernel(*args, **kwargs or {})
