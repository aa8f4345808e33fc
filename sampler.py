"""Which sample goes where: a batch sampler for data × sequence parallelism. torch only; copy it anywhere.

    sampler = DPSPBatchSampler(len(data), global_batch_size=16, dp_rank=dp_rank, dp_size=dp_size)
    for micro_batch in DataLoader(data, batch_sampler=sampler, num_workers=4): ...
    sampler.advance()    # after each optimizer step

It takes plain integers and never asks torch.distributed. All sp ranks of a group build it with the same dp_rank and get
the same batches, so changing sp changes nothing. An epoch is one sequence of global batches, a pure function of (seed,
epoch); a rank's micro-batch is a slice of one. So the samples of step n do not depend on dp_size or accumulation.

    $ python sampler.py    # who gets which sample, over an epoch with a tail and a resume

Already have a batch sampler? `BatchSamplerShard` deals its batches out to the dp ranks.
"""

import hashlib
import warnings
from collections import defaultdict

import torch
from torch.utils.data import Sampler


def seeded(*key):
    """Return a random stream that is a function of the key alone: never of a rank, nor of what came before."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # 63 bits: torch takes no more


class SampleIndex(int):
    """An index with two more facts: `weight` (0.0 for a duplicate that only fills a batch) and `epoch`.

    The weight has to reach the loss: the dataset is called as dataset[i], so let it return `i.weight` with the sample.
    """

    def __new__(cls, value, weight=1.0, epoch=0):
        self = super().__new__(cls, value)
        self.weight, self.epoch = weight, epoch
        return self

    def __reduce__(self):
        return SampleIndex, (int(self), self.weight, self.epoch)


class DPSPBatchSampler(Sampler):
    """Yield this dp rank's micro-batches of the current epoch: lists of SampleIndex.

    length: samples in the dataset. global_batch_size: samples of an optimizer step over all dp ranks and micro-batches.
    accumulation: micro-batches of a step. seed: the order depends on it and on the epoch.
    tail: what to do with samples that don't fill a global batch. "pad" adds duplicates of weight 0, fewer than dp_size,
    so that every sample counts exactly once; global_batch_size need not be a multiple of dp_size * accumulation. "drop"
    leaves the samples out of this epoch; the next epoch leaves out others.
    shapes: one hashable per sample, e.g. the shape of its latents. All samples of a global batch then have one shape:
    they can be stacked, and at every step all dp ranks have the same cost. Each shape has its own tail.
    names: one string per sample, e.g. its file. `load_state_dict` refuses a state saved with other shapes or names.
    ValueError for an empty dataset, sizes that don't divide, and a dataset that never fills a batch with tail="drop".

    A step of few samples has fewer micro-batches than `accumulation`: take `micro_batches`, then call `advance()`.
    Workers read ahead: what was read but not trained on is read again after a resume.
    """

    def __init__(
        self,
        length,
        global_batch_size,
        dp_rank=0,
        dp_size=1,
        accumulation=1,
        seed=0,
        tail="pad",
        shapes=None,
        names=None,
    ):
        if length < 1:
            raise ValueError(f"the dataset has {length} samples, at least 1 is needed")
        if min(global_batch_size, dp_size, accumulation) < 1 or not 0 <= dp_rank < dp_size:
            raise ValueError(
                f"global_batch_size {global_batch_size}, dp_size {dp_size}, accumulation {accumulation} must be at "
                f"least 1 and dp_rank {dp_rank} between 0 and {dp_size - 1}"
            )
        if tail not in ("pad", "drop"):
            raise ValueError(f"tail {tail!r} is neither pad nor drop")
        if tail == "drop" and global_batch_size % (dp_size * accumulation):
            share = f"dp_size {dp_size} x accumulation {accumulation}"
            raise ValueError(f"global_batch_size {global_batch_size} is not a multiple of {share}")
        for kind, given in (("shapes", shapes), ("names", names)):
            if given is not None and len(given) != length:
                raise ValueError(f"{len(given)} {kind} for {length} samples")
        self.length, self.global_batch_size, self.accumulation = length, global_batch_size, accumulation
        self.dp_rank, self.dp_size, self.seed, self.tail, self.shapes = dp_rank, dp_size, seed, tail, shapes
        self._samples = hashlib.sha256(repr((shapes and [*shapes], names and [*names])).encode()).hexdigest()[:16]
        self._read_to_end = None  # the position at which an epoch was read to its end
        if not self._start(0, []):
            raise ValueError(f"{length} samples never fill a global batch of {global_batch_size}: use tail='pad'")

    @property
    def micro_batches(self):
        """Return how many the next step has, on every rank: `accumulation`, or fewer if a rank has fewer samples."""
        return self._shares(self._batches_left[0])[1]

    def _shares(self, batch):
        """Return how many samples each rank gets of a global batch, fillers included, and in how many micro-batches."""
        samples = -(-len(batch) // self.dp_size)  # rounded up
        return samples, min(self.accumulation, samples)

    @property
    def consumed(self):
        """Return how many samples of this epoch were trained on, by all ranks and in all runs that led here."""
        return self.length - len(self._unseen(self.epoch, self.history))

    def __len__(self):
        """Return how many micro-batches are left in this epoch, equal on all ranks."""
        return sum(self._shares(batch)[1] for batch in self._batches_left)

    def __iter__(self):
        position = self.epoch, [list(entry) for entry in self.history]
        if position == self._read_to_end:
            warnings.warn("the epoch begins again: advance() was not called after its steps", stacklevel=2)
        for batch in self._batches_left:
            samples, micro_batches = self._shares(batch)
            slots = [SampleIndex(i, 1.0, self.epoch) for i in batch]
            fillers = range(samples * self.dp_size - len(batch))
            slots += [SampleIndex(batch[n % len(batch)], 0.0, self.epoch) for n in fillers]
            mine = slots[self.dp_rank :: self.dp_size]
            for n in range(micro_batches):
                yield mine[n::micro_batches]
        self._read_to_end = position

    def advance(self):
        """Move on by one optimizer step. Return True if it was the epoch's last: the next iteration is a new epoch."""
        if not self.history or self.history[-1][0] != self.global_batch_size:
            self.history.append([self.global_batch_size, 0])
        self.history[-1][1] += 1
        self._batches_left = self._batches_left[1:]
        if not self._batches_left:
            self._start(self.epoch + 1, [])
        return not self.history

    def state_dict(self):
        """Return the position in global samples: it holds for any dp_size, accumulation and global_batch_size."""
        position = dict(epoch=self.epoch, consumed=self.consumed, history=[list(entry) for entry in self.history])
        return dict(length=self.length, seed=self.seed, samples=self._samples) | position

    def load_state_dict(self, state):
        """Continue where `state` was saved, with no repeat and no gap; ValueError for other samples or another seed."""
        mine = dict(length=self.length, seed=self.seed, samples=self._samples)
        for name, value in mine.items():
            if state[name] != value:
                raise ValueError(f"the state was saved with {name} {state[name]}, this sampler has {value}")
        if not self._start(state["epoch"], [list(entry) for entry in state["history"]]):
            self._start(state["epoch"] + 1, [])  # what was left is less than a batch to drop

    def _start(self, epoch, history):
        """Plan the rest of an epoch; history: [global batch size, steps] for each run that took steps of it."""
        self.epoch, self.history = epoch, history
        self._batches_left = self._batches(self._unseen(epoch, history), self.global_batch_size)
        return self._batches_left

    def _unseen(self, epoch, history):
        """Return the epoch's order without the samples that were trained on: replayed, not stored."""
        generator = torch.Generator().manual_seed((self.seed * 2**20 + epoch) % 2**63)
        indices = torch.randperm(self.length, generator=generator).tolist()
        for global_batch_size, steps in history:
            seen = {i for batch in self._batches(indices, global_batch_size)[:steps] for i in batch}
            indices = [i for i in indices if i not in seen]
        return indices

    def _batches(self, indices, size):
        """Return global batches of one shape each, in the order of their first samples."""
        buckets = defaultdict(list)
        for i in indices:
            buckets[None if self.shapes is None else self.shapes[i]].append(i)
        batches = [b[n : n + size] for b in buckets.values() for n in range(0, len(b), size)]
        if self.tail == "drop":
            batches = [b for b in batches if len(b) == size]
        place = {i: n for n, i in enumerate(indices)}
        return sorted(batches, key=lambda batch: place[batch[0]])


class BatchSamplerShard(Sampler):
    """Deal out the batches of any batch sampler: dp rank r gets batches r, r + dp_size, ..; all get equally many.

    batch_sampler: yields lists of integers, in the same order on every rank (give it the same seed everywhere).
    tail: what to do if the last batches don't reach every rank. "pad": the other ranks get them again with weight 0, so
    that every sample counts exactly once. "drop": they are left out.
    It yields lists of SampleIndex. `epoch` counts the passes over it; set it after a resume.
    """

    def __init__(self, batch_sampler, dp_rank, dp_size, tail="pad"):
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank {dp_rank} is not between 0 and {dp_size - 1}")
        if tail not in ("pad", "drop"):
            raise ValueError(f"tail {tail!r} is neither pad nor drop")
        self.batch_sampler, self.tail, self.epoch = batch_sampler, tail, 0
        self.dp_rank, self.dp_size = dp_rank, dp_size

    def __len__(self):
        rounds, rest = divmod(len(self.batch_sampler), self.dp_size)
        return rounds + (rest > 0 and self.tail == "pad")

    def __iter__(self):
        hand = []  # one batch for each rank, once it is full
        for batch in self.batch_sampler:
            hand.append(batch)
            if len(hand) == self.dp_size:
                yield [SampleIndex(i, 1.0, self.epoch) for i in hand[self.dp_rank]]
                hand = []
        if hand and self.tail == "pad":
            yield [SampleIndex(i, float(self.dp_rank < len(hand)), self.epoch) for i in hand[self.dp_rank % len(hand)]]
        self.epoch += 1


def lesson(samples=13, batch=4):
    """Print one epoch with a tail, stopped after two steps and resumed on another layout. In brackets: a filler."""

    def ranks_of(dp, sp, state=None):
        print(f"dp {dp} x sp {sp}: {samples} samples, a global batch of {batch}; the ranks of a group get the same")
        samplers = [DPSPBatchSampler(samples, batch, rank, dp) for rank in range(dp)]
        for sampler in samplers if state else []:
            sampler.load_state_dict(state)
        return samplers, sp

    def step(number, samplers, sp):
        for dp_rank, sampler in enumerate(samplers):
            ranks = " ".join(str(dp_rank * sp + sp_rank) for sp_rank in range(sp))
            share = " ".join(str(int(i)) if i.weight else f"({int(i)})" for i in next(iter(sampler)))
            print(f"  step {number}, dp group {dp_rank} (ranks {ranks}): samples {share}")
        return all([sampler.advance() for sampler in samplers])

    start = ranks_of(1, 4)
    step(1, *start), step(2, *start)
    state = start[0][0].state_dict()
    print(f"stopped. The state: {state}")
    resumed = ranks_of(2, 2, state)
    assert [step(3, *resumed), step(4, *resumed)] == [False, True]
    print("the epoch is over, each sample was seen once; the next has another order")
    step(5, *resumed)


if __name__ == "__main__":
    lesson()
