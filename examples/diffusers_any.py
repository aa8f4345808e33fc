"""Exact sequence parallelism, gradients included, for the transformers of diffusers: any lengths, any number of heads.

    parallelise(model, group, plan=None)    # by your plan, that of plans.py for its class, or the model's own
    $ torchrun --nproc_per_node=3 -m examples.diffusers_any    # a tiny Wan beside one device

Call it after LoRA is added and before `shard`. The model still takes whole inputs, equal on all ranks of the group, and
returns whole outputs. With the whole loss on every rank, average the gradients over all ranks (FSDP's default), or divide
the loss by the group's size and sum. With checkpointing, take the backward of one length before the forward of another.
"""

from copy import copy
from functools import partial, wraps

import torch

from comm import split_sequence, split_sizes, ulysses
from examples.plans import BACKENDS, CONFIG, add_hooks, plan_of
from examples.wan import lesson
from examples.watch import Watch, ask, is_whole


def parallelise(model, group, plan=None):
    """Hook the model in place and return it. ValueError without a plan, or for one that names what the model lacks."""
    plan, kind, lengths = plan or plan_of(model), type(model).__name__, {}
    attentions = {path: m for path, m in model.named_modules() if hasattr(getattr(m, "processor", None), CONFIG)}
    if not attentions:
        raise ValueError(f"{kind} has no attention whose processor has a {CONFIG}, for diffusers' dispatcher")
    if any(isinstance(getattr(module.processor, CONFIG), Split) for module in attentions.values()):
        raise ValueError(f"{kind} is parallel already")
    for path, module in attentions.items():
        module.processor = copy(module.processor)  # layers may share one
        setattr(module.processor, CONFIG, Split(path, group, lengths))
    add_hooks(model, plan, partial(Split, group=group, lengths=lengths))
    Watch(model, group)
    for name, native in BACKENDS.items():
        if not hasattr(native, "exchanges"):
            BACKENDS[name] = with_exchange(native)
    return model


class Split:
    """Hold, as a processor's config and for a hook, the group, and the lengths of the streams that are split so far."""

    def __init__(self, path, group, lengths):
        self.path, self.group, self.lengths, self.known = path, group, lengths, {}
        self.mask_rule = lambda mask: mask

    def once(self, numbers, decide):
        """Return decide(first number of each rank, second of each, ..), computed once for these lengths and numbers."""
        known = self.known.setdefault(tuple(self.lengths.items()), {})
        if numbers not in known:
            if known and torch._C._current_graph_task_id() != -1:  # in backward, where the other ranks may not ask
                cause = "with checkpointing, a forward of other lengths came before this backward"
                raise ValueError(f"{self.path}: {cause}")
            known[numbers] = decide(*zip(*ask(self.group, numbers)))
        return known[numbers]

    def streams(self, sizes):
        """Return the lengths of the split streams that each rank joins to these sizes, or () if there are none."""
        found = {}
        for length in self.lengths.values():
            part = split_sizes(length, self.group)
            joined = {tuple(map(sum, zip(sums, part))): (*streams, length) for sums, streams in found.items()}
            found = joined | found | {tuple(part): (length,)}
        return found.get(sizes, ())


def with_exchange(native):
    """Return an attention backend of diffusers that trades tokens for heads where the processor holds a Split."""

    @wraps(native)
    def attention(*given, **rules):
        config = rules.get(CONFIG)
        if not isinstance(config, Split):
            return native(*given, **rules)
        del rules[CONFIG]
        return exchange(native, config, *given, **rules)

    attention.exchanges = True
    return attention


@torch.compiler.disable  # blocks are compiled on both sides of it
def exchange(native, sp, query, key, value, attn_mask=None, **rules):
    """query [B, L/P, H, D] -> the same shape. The mask is over this rank's keys, or a whole one over a single stream."""
    mask = None if attn_mask is None else sp.mask_rule(attn_mask)
    if mask is not None and mask.dim() == 2:  # [B, keys] or [queries, keys]
        mask = mask[:, None, None] if len(mask) == len(query) else mask[None, None]
    if mask is not None and mask.dim() != 4:
        raise ValueError(f"{sp.path}: a mask {list(mask.shape)} has neither 2 nor 4 dimensions")
    numbers = query.shape[1], key.shape[1], *((1, key.shape[1]) if mask is None else mask.shape[2:])
    length, keys, whole_mask = sp.once(numbers, partial(layout, sp, query, key, rules.get("is_causal", False)))
    if key.shape[2] < query.shape[2]:  # grouped queries: each rank gets the heads of k and v that its own q need
        key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], 2) for x in (key, value))
    if whole_mask and mask.shape[1] > 1:
        mask = split_sequence(mask, sp.group, 1)

    def kernel(q, k, v, keys_mask):
        return native(q, k, v, attn_mask=mask if whole_mask else keys_mask, **rules)

    with torch._C.DisableTorchFunction():  # nothing here for Watch
        if not keys:
            return native(query, key, value, attn_mask=mask, **rules)
        return ulysses(kernel, query, key, value, sp.group, length, keys, None if whole_mask else mask)


def layout(sp, query, key, causal, tokens, key_tokens, rows, columns):
    """Return the lengths of queries and keys for `ulysses` (no keys: they are whole), and whether the mask is whole.

    tokens, .., columns: those of each rank, and of its mask. ValueError for what would not be exact.
    """
    length, keys = sp.streams(tokens), sp.streams(key_tokens)
    keys_mask = set(rows) == {1} and columns == key_tokens
    whole_rows = {1} if len(length) != 1 else {1, sum(tokens)}
    whole_mask = not keys_mask and len(keys) == 1 and set(columns) == {sum(key_tokens)} and set(rows) <= whole_rows
    facts = f"{sp.path}: the ranks hold {tokens} queries, {key_tokens} keys, a mask of {rows} x {columns}"
    facts += f"; the plan splits {sorted(set(sp.lengths.values()))}"
    if causal and (len(keys) > 1 or keys != length):
        raise ValueError(f"{facts}: causal attention needs one stream, since several arrive rank by rank")
    if not length and not is_whole(query, sp.group):
        raise ValueError(f"{facts}: a stream of the queries is missing in the plan")
    if keys and (keys_mask or whole_mask):
        return length or sum(tokens), keys, whole_mask
    if not is_whole(key, sp.group):
        raise ValueError(f"{facts}: a stream is missing in the plan, or its mask is not split as its tokens are")
    return length, (), False


if __name__ == "__main__":
    lesson(parallelise).close()
