"""An exponential moving average of what is trained, sharded as that is. Needs nothing more."""

import contextlib

import torch


class Average:
    """Follow the model's trained parameters: `update` after each step. Decay 0: there is no average, and nothing to do."""

    def __init__(self, model, decay):
        self.decay, trained = decay, ((n, p) for n, p in model.named_parameters() if decay and p.requires_grad)
        self.params = {name: param.detach() for name, param in trained}
        self.values = {name: param.clone() for name, param in self.params.items()}

    def update(self, skip=False):
        """Take in the parameters after an optimizer step; `skip` if that was skipped."""
        if self.params and not skip:
            values, params = ([x.to_local() for x in tensors.values()] for tensors in (self.values, self.params))
            torch._foreach_lerp_(values, params, 1 - self.decay)

    @contextlib.contextmanager
    def used(self):
        """Give the model the average's values inside of this, and its own afterwards."""
        self._swap()
        yield
        self._swap()

    def _swap(self):
        for name, param in self.params.items():
            own = param.clone()
            param.copy_(self.values[name])
            self.values[name].copy_(own)
