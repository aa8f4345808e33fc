"""Compute the MLP of each block in slices of the tokens, recomputed slice by slice in backward: a block then needs about
half the memory while it works. Call `slice_mlps(model, 8)` after `add_lora` and before `shard`.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hunyuan_sp import gelu, layer_norm, modulate, rotate, split_qkv


def slice_mlps(model, count):
    """Make the blocks compute the video's MLP in `count` slices of the tokens. 1 changes nothing."""
    if count == 1:
        return
    for block in model.double_blocks:
        block.img_mlp.forward = partial(in_slices, block.img_mlp.forward, count)
    for block in model.single_blocks:
        block.forward = partial(single_block, block, count)


@torch.compiler.disable  # if compiled, a checkpoint inside a checkpoint would recompute another graph
def in_slices(function, count, *inputs):
    """Apply a function of single tokens to slices of inputs [B, L, ..] -> [B, L, C]. Backward recomputes them one by one."""
    if torch.is_grad_enabled():
        function = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    slices = zip(*(x.tensor_split(count, 1) for x in inputs))
    return torch.cat([function(*parts) for parts in slices], 1)


def single_block(block, count, x, vec, rope, attend, still=None):
    """Compute SingleBlock.forward in another order: q, k, v and attention first, then the MLP in slices."""
    (mod,) = block.modulation(vec, still)
    width = 3 * x.shape[2]
    y = modulate(layer_norm(x), mod)
    q, k, v = split_qkv(rows_of(block.linear1, y, 0, width), block.num_heads)
    q = rotate(block.q_norm(q), rope)
    k = rotate(block.k_norm(k), rope)
    qkv = torch.stack((q, k, v), 2)
    del q, k, v
    out = in_slices(partial(single_mlp, block, width), count, y, attend(qkv))
    return x + mod.gate * out


def single_mlp(block, width, y, out):
    """Compute the second half of a single-stream block. y [B, L, C]: its modulated input; out [B, L, C]: attention's
    output."""
    hidden = gelu(rows_of(block.linear1, y, width, block.linear1.out_features))
    return block.linear2(torch.cat((out, hidden), 2))


def rows_of(linear, x, start, stop):
    """Return rows start..stop of a linear layer's output, with its LoRA if it has one."""
    out = F.linear(x, linear.weight[start:stop], linear.bias[start:stop])
    if not hasattr(linear, "lora_A"):
        return out
    a = linear.lora_A.to(x.dtype)
    b = linear.lora_B[start:stop].to(x.dtype)
    return out + linear.scale * F.linear(F.linear(x, a), b)
