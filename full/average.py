"""An average of what is trained, sharded as that is: of all steps so far while these are fewer than 1 / (1 - decay), from then
on an exponential moving one. So the initial values never have a weight. Needs nothing more.
"""

import contextlib

import torch


class Average:
    """Follow the model's trained parameters: `update` after each step. Decay 0: there is no average, and nothing to do.

    updates: how many it has taken in; a resumed run continues at that.
    """

    def __init__(self, model, decay):
        self.updates, self.decay, trained = (
            0,
            decay,
            ((n, p) for n, p in model.named_parameters() if decay and p.requires_grad),
        )
        self.params = {name: param.detach() for name, param in trained}
        self.values = {name: param.clone() for name, param in self.params.items()}

    def update(self, skip=False):
        """Take in the parameters after an optimizer step; `skip` if that was skipped."""
        if self.params and not skip:
            values, params = ([x.to_local() for x in tensors.values()] for tensors in (self.values, self.params))
            self.updates += 1
            torch._foreach_lerp_(values, params, max(1 - self.decay, 1 / self.updates))

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
