"""Let ranks ask each other, and watch over a model's first forward: for what would be silently wrong."""

import sys

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from comm import group_size


def ask(group, value):
    """Return the value of every rank of the group, in order of rank."""
    everyone = [value] * group_size(group)
    if group is not None:
        dist.all_gather_object(everyone, value, group=group)
    return everyone


def is_whole(x, group):
    """Return whether x [B, L, H, D] is the same on all ranks, up to rounding: one number for each token is compared."""
    x = x.detach().to(torch.float32).flatten(2)
    marks = x @ torch.arange(1.0, x.shape[2] + 1, device=x.device).cos()
    marks, *others = [torch.tensor(each) for each in ask(group, marks.flatten().tolist())]
    slack = 1e-3 * marks.abs().max().item() if len(marks) else 0.0
    return all(len(each) == len(marks) and torch.allclose(each, marks, 1e-3, slack) for each in others)


def check_inputs(inputs, group):
    """Raise ValueError if a tensor of {name: value} is not the same on all ranks: each would take its part of its own."""
    marks = {name: [*x.shape, x.double().mean().item()] for name, x in inputs.items() if torch.is_tensor(x)}
    everyone = ask(group, marks)
    for rank, theirs in enumerate(everyone):
        for name, mark in everyone[0].items():
            other = theirs.get(name, ())
            if len(other) != len(mark) or not np.allclose(other, mark, rtol=1e-3, equal_nan=True):
                raise ValueError(
                    f"input {name} is {mark} in shape and mean on the first rank and {other} on rank {rank}"
                )


class Watch(TorchFunctionMode):
    """ValueError for inputs that differ between ranks, and for attention outside of the exchange to keys of one rank alone.

    It works in the first forward with each set of arguments; for attention, of models that are not compiled yet.
    """

    def __init__(self, model, group):
        super().__init__()
        self.group, self.seen, self.on = group, set(), False
        model.register_forward_pre_hook(self.start, with_kwargs=True, prepend=True)
        model.register_forward_hook(self.stop, always_call=True)

    def start(self, model, args, kwargs):
        given = len(args), *sorted(name for name, value in kwargs.items() if value is not None)
        if torch.compiler.is_compiling() or given in self.seen:
            return
        self.seen.add(given)
        check_inputs(dict(enumerate(args)) | kwargs, self.group)
        if not any(module._compiled_call_impl for module in model.modules()):
            self.on = True
            self.__enter__()

    def stop(self, model, args, out):
        if self.on:
            self.on = False
            self.__exit__(None, None, None)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            key = kwargs["key"] if "key" in kwargs else args[1]
            if not is_whole(key.transpose(1, 2), self.group):
                frame = sys._getframe(1)
                while "self" not in frame.f_locals:
                    frame = frame.f_back
                kind = type(frame.f_locals["self"]).__name__
                cause = "it does not hand its _parallel_config to diffusers' dispatcher, so there is no exchange"
                raise ValueError(f"{kind} attends to the keys of one rank, {list(key.shape)}: {cause}")
        return func(*args, **kwargs)
