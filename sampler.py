"""Which sample goes where: a batch sampler for data × sequence parallelism. torch only; copy it anywhere.

    sampler = DPSPBatchSampler(len(data), global_batch_size=16, dp_rank=dp_rank, dp_size=dp_size)
    for batch in DataLoader(data, batch_sampler=sampler, num_workers=4): ...; sampler.advance()

It takes plain integers and never asks torch.distributed. All sp ranks of a group build it with the same dp_rank and get the
same batches, so changing sp changes nothing. An epoch is one sequence of global batches, a pure function of (seed, epoch);
a rank's micro-batch is a slice of one. So the samples of step n do not depend on dp_size or accumulation either.

    $ python sampler.py    # who gets which sample, over an epoch with a tail and a resume

Whoever has a batch sampler already deals its batches out to the dp ranks with `BatchSamplerShard`.
"""

import hashlib
import warnings
from collections import defaultdict

import torch
from torch.utils.data import Sampler


def seeded(*key):
    """A random stream that is a function of the key alone: never of a rank, nor of what came before."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class SampleIndex(int):
    """An index that says two things more: `weight` (0.0 for a duplicate that only fills a batch) and `epoch`.

    The weight has to reach the loss: dataset[i] is called with it, so return `i.weight` with the sample, and collate it.
    """

    def __new__(cls, value, weight=1.0, epoch=0):
        self = super().__new__(cls, value)
        self.weight, self.epoch = weight, epoch
        return self

    def __reduce__(self):
        return SampleIndex, (int(self), self.weight, self.epoch)


class DPSPBatchSampler(Sampler):
    """Yields this dp rank's micro-batches of the current epoch: lists of SampleIndex.

    length: samples in the dataset. global_batch_size: samples of one optimizer step over all dp ranks and micro-batches.
    accumulation: micro-batches of a step. seed: of the order, a new one each epoch.
    tail: what happens to samples that don't fill a global batch. "pad": it is filled with duplicates of weight 0, so that
    every sample counts exactly once; global_batch_size need not divide by dp_size * accumulation then. There are fewer than
    dp_size of them in a step. "drop": samples are left out this epoch (another order leaves out others).
    shapes: one hashable per sample, e.g. its latent's shape. A global batch then has one shape only: its samples can be
    stacked, and the dp ranks have the same cost a*S + b*S² at every step, for any a and b. The tail is each shape's own.
    names: one string per sample, e.g. its file. `load_state_dict` refuses a state saved with other shapes or names.
    ValueError for what cannot be: an empty dataset, sizes that don't divide, a dataset too small to drop from.

    A step of few samples has fewer micro-batches than `accumulation`: take `micro_batches` of them, then call `advance()`.
    Workers read ahead, so the position is what was trained on, not what was read. Iterating starts there.
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
                f"global_batch_size {global_batch_size}, dp_size {dp_size}, accumulation {accumulation} must be at least 1 "
                f"and dp_rank {dp_rank} between 0 and {dp_size - 1}"
            )
        if tail not in ("pad", "drop"):
            raise ValueError(f"tail {tail!r} is neither pad nor drop")
        if tail == "drop" and global_batch_size % (dp_size * accumulation):
            raise ValueError(
                f"global_batch_size {global_batch_size} is not a multiple of dp_size {dp_size} x accumulation {accumulation}"
            )
        for kind, given in (("shapes", shapes), ("names", names)):
            if given is not None and len(given) != length:
                raise ValueError(f"{len(given)} {kind} for {length} samples")
        self.length, self.global_batch_size, self.accumulation = length, global_batch_size, accumulation
        self.dp_rank, self.dp_size, self.seed, self.tail, self.shapes = dp_rank, dp_size, seed, tail, shapes
        self._samples = hashlib.sha256(repr((shapes and [*shapes], names and [*names])).encode()).hexdigest()[:16]
        self._read_to_end = None  # the position at which an epoch was read whole
        if not self._start(0, []):
            raise ValueError(f"{length} samples never fill a global batch of {global_batch_size}: use tail='pad'")

    @property
    def micro_batches(self):
        """Of the next step, equal on all ranks: `accumulation`, or fewer where a rank has fewer samples."""
        return self._shares(self._batches_left[0])[1]

    def _shares(self, batch):
        """Of a global batch: samples of each rank, fillers included, and the micro-batches that they make."""
        samples = -(-len(batch) // self.dp_size)
        return samples, min(self.accumulation, samples)

    @property
    def consumed(self):
        """Samples of this epoch that were trained on, over all ranks and over all runs that led here."""
        return self.length - len(self._unseen(self.epoch, self.history))

    def __len__(self):
        """Micro-batches left in this epoch, equal on all ranks."""
        return sum(self._shares(batch)[1] for batch in self._batches_left)

    def __iter__(self):
        position = self.epoch, [list(entry) for entry in self.history]
        if position == self._read_to_end:
            warnings.warn("the epoch begins again: advance() was not called after its steps", stacklevel=2)
        for batch in self._batches_left:
            samples, micro_batches = self._shares(batch)
            slots = [SampleIndex(i, 1.0, self.epoch) for i in batch]
            for n in range(samples * self.dp_size - len(batch)):
                slots.append(SampleIndex(batch[n % len(batch)], 0.0, self.epoch))
            mine = slots[self.dp_rank :: self.dp_size]
            for n in range(micro_batches):
                yield mine[n::micro_batches]
        self._read_to_end = position

    def advance(self):
        """One optimizer step was taken. True if it was the epoch's last: the next iteration is the next epoch."""
        if not self.history or self.history[-1][0] != self.global_batch_size:
            self.history.append([self.global_batch_size, 0])
        self.history[-1][1] += 1
        self._batches_left = self._batches_left[1:]
        if not self._batches_left:
            self._start(self.epoch + 1, [])
        return not self.history

    def state_dict(self):
        """The position in global samples: it holds for any dp_size, accumulation and global_batch_size."""
        history, what = [list(entry) for entry in self.history], dict(length=self.length, seed=self.seed)
        return what | dict(samples=self._samples, epoch=self.epoch, consumed=self.consumed, history=history)

    def load_state_dict(self, state):
        """Go on where `state` stood, with no repeat and no gap. ValueError, and nothing changed, if it can't be."""
        if not isinstance(state, dict) or set(state) != set(self.state_dict()):
            raise ValueError(f"not a sampler state: {str(state)[:200]}")
        for name in ("length", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the state was saved with {name} {state[name]}, this dataset has {getattr(self, name)}"
                )
        if state["samples"] != self._samples:
            raise ValueError("the state was saved with samples of other shapes or names, or in another order")
        history, whole = state["history"], lambda n, least: type(n) is int and n >= least
        if not whole(state["epoch"], 0) or not isinstance(history, list):
            raise ValueError(f"not a sampler state: epoch {state['epoch']}, history {str(history)[:200]}")
        for entry in history:
            if not (isinstance(entry, list) and len(entry) == 2 and all(whole(n, 1) for n in entry)):
                raise ValueError(f"not a sampler state: history entry {str(entry)[:200]}")
        consumed = self.length - len(self._unseen(state["epoch"], history))
        if consumed != state["consumed"]:
            raise ValueError(
                f"the state says {state['consumed']} samples were consumed, its history {history} gives {consumed}"
            )
        if not self._start(state["epoch"], [list(entry) for entry in history]):
            self._start(state["epoch"] + 1, [])  # what was left is less than a batch to drop

    def _start(self, epoch, history):
        """Plan what is left of an epoch; history: [global batch size, steps] of it, also of earlier runs."""
        self.epoch, self.history = epoch, history
        self._batches_left = self._batches(self._unseen(epoch, history), self.global_batch_size)
        return self._batches_left

    def _unseen(self, epoch, history):
        """The epoch's order, less what was trained on: replayed, not stored."""
        generator = torch.Generator().manual_seed((self.seed * 2**20 + epoch) % 2**63)
        indices = torch.randperm(self.length, generator=generator).tolist()
        for global_batch_size, steps in history:
            seen = {i for batch in self._batches(indices, global_batch_size)[:steps] for i in batch}
            indices = [i for i in indices if i not in seen]
        return indices

    def _batches(self, indices, size):
        """Global batches of one shape each, in the order in which their first samples come."""
        buckets = defaultdict(list)
        for i in indices:
            buckets[None if self.shapes is None else self.shapes[i]].append(i)
        batches = [b[n : n + size] for b in buckets.values() for n in range(0, len(b), size)]
        if self.tail == "drop":
            batches = [b for b in batches if len(b) == size]
        place = {i: n for n, i in enumerate(indices)}
        return sorted(batches, key=lambda batch: place[batch[0]])


class BatchSamplerShard(Sampler):
    """Deals out the batches of any batch sampler: dp rank r gets the batches r, r + dp_size, ..; all ranks as many.

    batch_sampler: yields lists of integers, in the same order on every rank (seed it alike everywhere).
    tail: what happens to the last batches where they don't reach every rank. "pad": the other ranks get them again with
    weight 0, so that every sample counts exactly once. "drop": they are left out.
    Yields lists of SampleIndex. epoch counts the passes over it; set it after a resume.
    """

    def __init__(self, batch_sampler, dp_rank, dp_size, tail="pad"):
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank {dp_rank} is not between 0 and {dp_size - 1}")
        if tail not in ("pad", "drop"):
            raise ValueError(f"tail {tail!r} is neither pad nor drop")
        self.batch_sampler, self.dp_rank, self.dp_size, self.tail, self.epoch = batch_sampler, dp_rank, dp_size, tail, 0

    def __len__(self):
        full, rest = divmod(len(self.batch_sampler), self.dp_size)
        return full + (rest > 0 and self.tail == "pad")

    def __iter__(self):
        dealt = []
        for batch in self.batch_sampler:
            dealt.append(batch)
            if len(dealt) == self.dp_size:
                yield [SampleIndex(i, 1.0, self.epoch) for i in dealt[self.dp_rank]]
                dealt = []
        if dealt and self.tail == "pad":
            weight = float(self.dp_rank < len(dealt))
            yield [SampleIndex(i, weight, self.epoch) for i in dealt[self.dp_rank % len(dealt)]]
        self.epoch += 1


def lesson(samples=14, batch=4):
    """One epoch with a tail, stopped after two steps and resumed on another layout. In brackets: weight 0."""

    def ranks_of(dp, sp, state=None):
        print(f"dp {dp} x sp {sp}: {samples} samples, a global batch of {batch}; the sp ranks of a group get the same")
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

    start = ranks_of(2, 2)
    step(1, *start), step(2, *start)
    state = start[0][0].state_dict()
    print(f"stopped. The state: {state}")
    resumed = ranks_of(1, 4, state)
    assert [step(3, *resumed), step(4, *resumed)] == [False, True]
    print("the epoch is over, each sample was seen once; the next has another order")
    step(5, *resumed)


if __name__ == "__main__":
    lesson()
