"""Wan of diffusers, made sequence parallel by hand: one paste of comm.py, to read. Every line says why it is there.

    from examples.wan import sequence_parallel
    sequence_parallel(model, group)    # a WanTransformer3DModel, 2.1 or 2.2, text or image to video

    $ torchrun --nproc_per_node=3 -m examples.wan    # a tiny one: its parts on each rank, and the error beside one device

A paste answers four questions. Where do tokens enter the blocks: split there. What else has a token dimension: split it too.
Where do tokens meet: exchange there. Where do they leave: gather there. `diffusers_any.py` answers them for other models.
"""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

from comm import ParallelManager, gather_sequence, group_rank, split_sequence, split_sizes, ulysses


def sequence_parallel(model, group):
    """Hook the model in place. It still takes whole inputs, equal on all ranks, and returns whole outputs."""
    for n, block in enumerate(model.blocks):
        # tokens enter at the first block: what is before it, patches and text, is small, and the same on every rank
        block.register_forward_pre_hook(partial(enter_block, group=group, first=n == 0))
        # attn1 is where the video's tokens meet; attn2 looks at the text, which is whole on every rank: no exchange there
        block.attn1.processor = UlyssesAttention(group)
    # tokens leave behind the last block: what follows may be modulated token by token, by what is whole
    model.blocks[-1].register_forward_hook(partial(leave_blocks, group=group))


def enter_block(block, args, group, first):
    """Give a block this rank's tokens: img [B, L, C] and all that has a token dimension."""
    img, text, time, (cos, sin) = args
    # the blocks behind the first get what the one before returned: already this rank's part
    img = split_sequence(img, group) if first else img
    # [B, 6, C] is one time for all tokens; 2.2's ti2v has one for each, [B, L, 6, C]
    time = split_sequence(time, group) if time.dim() == 4 else time
    # rope belongs to places: a rank rotates its tokens by their own. The model gives the whole table to every block, so
    # the length of the video goes with it: sizes are functions of it, and no rank asks another
    rope = split_sequence(cos, group), split_sequence(sin, group), cos.shape[1]
    return img, text, time, rope


def leave_blocks(block, args, img, group):
    """[B, L/P, C] -> [B, L, C] on every rank; the transpose sums what the ranks' losses have to say about a token."""
    length = args[3][2]
    return gather_sequence(img, group, length)


class UlyssesAttention:
    """A processor of diffusers for attn1."""

    def __init__(self, group):
        self.group = group

    def __call__(self, attn, img, text=None, mask=None, rope=None):
        cos, sin, length = rope
        # projections, norms and rope work on tokens one by one, so on this rank's: [B, L/P, C] -> [B, L/P, H, D]
        q = attn.norm_q(attn.to_q(img)).unflatten(2, (attn.heads, -1))
        k = attn.norm_k(attn.to_k(img)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(img).unflatten(2, (attn.heads, -1))
        # all tokens and some heads, then back; any kernel for one device goes in
        out = ulysses(sdpa, rotate(q, cos, sin), rotate(k, cos, sin), v, self.group, length)
        for layer in attn.to_out:
            out = layer(out if out.dim() == 3 else out.flatten(2))
        return out


def rotate(x, cos, sin):
    """Rotate pairs of neighbouring channels. x [B, L/P, H, D]; cos, sin [1, L/P, 1, D], every angle twice."""
    pairs = torch.view_as_complex(x.to(cos.dtype).unflatten(-1, (-1, 2)).contiguous())
    turn = torch.complex(cos[..., ::2], sin[..., ::2])
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def sdpa(q, k, v, mask):
    """[B, L, H/P, D] each; there is no mask: nothing is padded."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


# --------------------------------------------------------------------------------------------------------------------
# the lesson


def lesson(hook=None):
    """Print what each rank holds of 45 tokens and 5 heads, which divide by nothing here, and how far the output is off.

    hook: a function (model, group), by default this file's.
    """
    from diffusers import WanTransformer3DModel

    manager = ParallelManager(1, None, "cpu")
    torch.manual_seed(0)
    sizes = dict(in_channels=4, out_channels=4, text_dim=6, freq_dim=8, ffn_dim=16, num_layers=2)
    model = WanTransformer3DModel(num_attention_heads=5, attention_head_dim=12, **sizes)
    inputs = dict(hidden_states=torch.randn(1, 4, 5, 6, 6), encoder_hidden_states=torch.randn(1, 7, 6))
    inputs |= dict(timestep=torch.tensor([500.0]), return_dict=False)
    whole = model(**inputs)[0]
    (hook or sequence_parallel)(model, manager.sp_group)
    error = (model(**inputs)[0] - whole).abs().max().item()
    rank, held = group_rank(manager.sp_group), [split_sizes(length, manager.sp_group) for length in (45, 5)]
    lines = [None] * manager.world_size
    line = f"rank {rank}: {held[0][rank]} tokens and all heads; in attn1 all tokens and {held[1][rank]} heads"
    line += f"; {error:.1e} off"
    dist.all_gather_object(lines, line)
    if manager.is_main:
        print("\n".join(lines))
    return manager


if __name__ == "__main__":
    lesson().close()
