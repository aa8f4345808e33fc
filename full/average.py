"""Average the trained parameters over the steps, sharded as they are. While there are fewer than 1 / (1 - decay) steps it is
the plain mean of all of them, from then on an exponential moving average. So the initial values never count.
"""

import contextlib

import torch


class Average:
    """Follow the model's trained parameters: call `update` after each step. With decay 0 there is no average, and nothing to
    do.

    updates: the number of steps that are in it. Set it when a run is resumed.
    """

    def __init__(self, model, decay):
        self.updates = 0
        self.decay = decay
        trained = {name: param for name, param in model.named_parameters() if decay and param.requires_grad}
        self.params = {name: param.detach() for name, param in trained.items()}
        self.values = {name: param.clone() for name, param in self.params.items()}

    def update(self, skip=False):
        """Add the parameters after an optimizer step, unless that step was skipped (`skip`)."""
        if self.params and not skip:
            values = [value.to_local() for value in self.values.values()]
            params = [param.to_local() for param in self.params.values()]
            self.updates += 1
            torch._foreach_lerp_(values, params, max(1 - self.decay, 1 / self.updates))

    @contextlib.contextmanager
    def used(self):
        """Give the model the average's values inside the block, and its own ones afterwards."""
        self._swap()
        yield
        self._swap()

    def _swap(self):
        for name, param in self.params.items():
            own = param.clone()
            param.copy_(self.values[name])
            self.values[name].copy_(own)
