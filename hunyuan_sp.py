"""HunyuanVideo's DiT, every token on exactly one rank.

One forward, top to bottom (B batch, S video tokens, L text, N any, H heads × D dims = C hidden, P sequence-parallel ranks):

    latents [B, 16, T, h, w] ── patches, split over the ranks ──> img [B, S/P, C] ─┐
    text    [B, L, 4096] ────── token refiner, then split ──────> txt [B, L/P, C] ─┼─ 20 dual-stream blocks
    timestep, guidance, pooled [B, 768] ──> vec [B, C] (modulates every block)  ───┘  40 single-stream blocks
    velocity [B, 16, T, h, w] <── unpatchify <── gather <── final layer <── img [B, S/P, C] <──┘

Dual-stream (the release's `double_blocks`): video and text have their own qkv and meet only inside attention.
Single-stream (`single_blocks`): video and text are one sequence, joined before the first such block.
Rank r holds the r-th run of video tokens in (t, h, w) raster order and the r-th run of text tokens, `split_sizes` long.
Everything that is not per token is replicated: each rank holds all of `vec` and its modulations, and runs the text
refiner on the whole text.

Both kinds call one `attend(qkv)`. Ranks meet there, and when the velocity is gathered. `group=None` is one device.

    model = HunyuanVideo(HunyuanConfig.preset("tiny"))
    velocity = model(latents, timestep, text, lengths, pooled, group=manager.sp_group)

    $ torchrun --nproc_per_node=2 hunyuan_sp.py    # one token's journey: the shapes on each rank, stage by stage

Source of all formulas: HunyuanVideo, arXiv:2412.03603. Parameter names are the original release's.
"""

import math
import re
import zlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from comm import ParallelManager, all_to_all, gather_sequence, group_rank, group_size, split_sequence, split_sizes

# --------------------------------------------------------------------------------------------------------------------
# configuration: the defaults are the released 13B model


@dataclass(frozen=True)
class HunyuanConfig:
    """Sizes of the model: hidden size C = num_heads * sum(rope_dims).

    image_condition_type is None for text-to-video; for image-to-video "token_replace" (latent frame 0 is the image's,
    without noise, and modulated so) or "latent_concat" (in_channels 33: noisy latents, the image's latents, a mask).
    """

    num_heads: int = 24
    rope_dims: tuple = (16, 56, 56)  # of a head's dims: time, height, width
    rope_theta: float = 256.0
    double_depth: int = 20
    single_depth: int = 40
    refiner_depth: int = 2
    mlp_ratio: float = 4.0  # of the blocks; the refiner's is always 4
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple = (1, 2, 2)
    text_dim: int = 4096
    pooled_dim: int = 768
    guidance_embed: bool = True
    image_condition_type: str | None = None

    @property
    def head_dim(self):
        return sum(self.rope_dims)

    @property
    def hidden_size(self):
        return self.num_heads * self.head_dim

    @classmethod
    def preset(cls, name, **changes):
        """Return "13b", the release, or "tiny", 1M parameters for CPUs: 3 channels, no guidance embedding."""
        presets = {"13b": cls(), "tiny": TINY}
        if name not in presets:
            raise ValueError(f"no preset {name!r}: choose one of {', '.join(presets)}")
        return replace(presets[name], **changes)

    @classmethod
    def from_dict(cls, values):
        """Return the config that `asdict` or JSON made these values of."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


TINY = HunyuanConfig(
    num_heads=6,
    rope_dims=(4, 6, 6),
    double_depth=2,
    single_depth=2,
    refiner_depth=1,
    mlp_ratio=2.0,
    in_channels=3,
    out_channels=3,
    patch_size=(1, 4, 4),  # of pixels
    text_dim=32,
    pooled_dim=32,
    guidance_embed=False,
)

# --------------------------------------------------------------------------------------------------------------------
# time, guidance and place, in the form that the model takes them


def sinusoid(t):
    """Embed t [B] -> [B, 256], cosines first. It must be float32: at 6016 (guidance 6) the last bit moves the output by 2e-4."""
    angle = t.float()[:, None] * time_frequencies(t.device)
    return torch.cat((angle.cos(), angle.sin()), 1)


def time_frequencies(device=None):
    return torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=device) / 128)


def guidance_input(scale, batch, device):
    """Return the model's input [batch] for a guidance scale: the release multiplies by 1000 in bf16, so 6.0 is 6016."""
    return torch.full((batch,), scale, dtype=torch.bfloat16, device=device).mul(1000).float()


def shift_sigma(u, shift):
    """Move noise levels 0..1 towards noise, more so at a larger shift: arXiv:2403.03206, equation 23."""
    return shift * u / (1 + (shift - 1) * u)


def latent_shape(config, height, width, frames):
    """Return [c, T, h, w] of a video's latents: one for 8 x 8 pixels, one for the first frame and for every 4 after it."""
    if height % 16 or width % 16 or frames % 4 != 1 or min(height, width, frames) < 1:
        rule = f"height {height} and width {width} must be multiples of 16, frames {frames} must be 4k+1"
        near = f"{max(16, height // 16 * 16)} x {max(16, width // 16 * 16)} x {max(1, (frames - 1) // 4 * 4 + 1)}"
        raise ValueError(f"{rule}: {near}{f' or {max(0, frames - 1) // 4 * 4 + 5}' * (frames % 4 != 1)} would do")
    return config.out_channels, (frames - 1) // 4 + 1, height // 8, width // 8


def rope_table(config, grid, start, stop, text_tokens=0, device=None):
    """Return cos, sin [stop - start + text_tokens, D], float32: video tokens start..stop of the raster, then text.

    The raster is (t, h, w), w fastest; each axis turns its share of a head's dims. Channels 2i and 2i+1 turn together,
    sin is negative at 2i. Text has angle 0.
    """
    index = torch.arange(start, stop, device=device)
    t, h, w = index // (grid[1] * grid[2]), index // grid[2] % grid[1], index % grid[2]
    angles = []
    for position, dim in zip((t, h, w), config.rope_dims):
        exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
        angles.append(position.float()[:, None] * (1 / config.rope_theta**exponent))
    angle = torch.cat(angles, 1)
    angle = torch.cat((angle, angle.new_zeros(text_tokens, angle.shape[1])))
    sin = torch.stack((-angle.sin(), angle.sin()), -1).flatten(1)
    return angle.cos().repeat_interleave(2, 1), sin


def with_image(latents, image, kind):
    """Return the latents [B, c, T, h, w] that an image-to-video model takes, given the image's own [B, c, 1, h, w].

    token_replace: frame 0 is the image. latent_concat: [B, 2c + 1, T, h, w], the added channels are the image's latents
    in frame 0, zeros in the others, and a mask that is 1 in frame 0. None, for text-to-video: the latents as they are.
    """
    if kind == "token_replace":
        return torch.cat((image, latents[:, :, 1:]), 2)
    if kind == "latent_concat":
        condition, mask = torch.zeros_like(latents), torch.zeros_like(latents[:, :1])
        condition[:, :, :1] = image
        mask[:, :, 0] = 1
        return torch.cat((latents, condition, mask), 1)
    return latents


def patchify(x, patch_size):
    """Cut [B, c, T, h, w] -> [B, S, c*pt*ph*pw], tokens in (t, h, w) raster order."""
    pt, ph, pw = patch_size
    return rearrange(x, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)


def unpatchify(x, grid, patch_size):
    """Join [B, S, c*pt*ph*pw] -> [B, c, T, h, w], the inverse of patchify; grid counts patches."""
    sizes = dict(zip(("t", "h", "w", "pt", "ph", "pw"), (*grid, *patch_size)))
    return rearrange(x, "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)", **sizes)


def text_lengths(mask):
    """Return the B lengths of a text mask [B, L], true for valid tokens, padding on the right. It waits for the GPU."""
    lengths = mask.sum(1).tolist()
    if not torch.equal(mask.bool().cpu(), valid_tokens(lengths, mask.shape[1])):
        raise ValueError("a text mask must be true for the first tokens of each row and false for the rest")
    return lengths


def valid_tokens(lengths, size):
    """Return a mask [B, size] that is true for the first lengths[b] tokens of row b."""
    return torch.arange(size) < torch.tensor(lengths)[:, None]


# --------------------------------------------------------------------------------------------------------------------
# attention: the only place where tokens, and therefore ranks, meet


def sdpa(q, k, v):
    """Attend: q, k, v [B, N, H, D] -> [B, N, H, D]. No mask: one costs 1.5x, and the lengths are known."""
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    with sdpa_kernel(backends(q.device), set_priority=True):
        out = F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    if out.requires_grad:
        # torch caches cuDNN's plan of backward by the strides of q, k and v alone: with other strides of the gradient the
        # plan would read out of bounds, so the gradient is always made contiguous
        out.register_hook(torch.Tensor.contiguous)
    return out


def backends(device):
    """Return SDPA's kernels, fastest first. On an H200 at 32k tokens: cuDNN 655 TFLOP/s, flash 350, efficient 180."""
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]  # the faster ones first, before Hopper
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        order.reverse()
    return [*order, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@torch.compiler.disable  # blocks are compiled on both sides of it
def joint_attention(qkv, video, lengths, group=None, attention=sdpa):
    """Attend over each sample's video and valid text tokens, on all ranks: `ulysses`, with q, k, v in one collective.

    qkv [B, (S+L)/P, 3, H, D], stacked so that they travel in one collective -> [B, (S+L)/P, C].
    video: S, the video tokens over all ranks. lengths: the B numbers of valid text tokens; L is the largest of them.
    On each rank video comes before text, so after the exchange the order is video0 text0 video1 text1 .. That is fine:
    attention does not depend on order, and position is in q and k already.
    """
    tokens = split_sizes((video, max(lengths)), group)
    heads = split_sizes(qkv.shape[3], group)
    q, k, v = all_to_all(qkv, group, 3, 1, heads, tokens).unbind(2)  # [B, S+L, H/P, D]
    if min(lengths) < max(lengths):
        runs = [runs_of(video, lengths, b, group) for b in range(len(lengths))]
        attention = partial(attend_to_valid, attention, runs)
    with record_function("attention"):  # its name in profiles
        out = attention(q, k, v)
    return all_to_all(out, group, 1, 2, tokens, heads).flatten(2)


def runs_of(video, lengths, b, group):
    """Return the lengths of the runs in sample b's sequence after the exchange: valid, padding, valid, padding, .."""
    runs, start = [], 0
    for video_size, text_size in zip(split_sizes(video, group), split_sizes(max(lengths), group)):
        valid = min(max(lengths[b] - start, 0), text_size)
        runs += [video_size + valid, text_size - valid]
        start += text_size
    return runs


def attend_to_valid(attention, runs, q, k, v):
    """Attend within each sample's valid tokens, one by one: q, k, v [B, N, H, D] -> [B, N, H, D], zeros for padding.

    runs[b]: lengths of the runs in sample b's sequence, valid and padding in turn.
    """
    rows = []
    for b, sizes in enumerate(runs):
        mine = [torch.cat(x[b].split(sizes)[::2])[None] for x in (q, k, v)]
        valid = attention(*mine)[0].split(sizes[::2])
        padding = [q.new_zeros(size, *q.shape[2:]) for size in sizes[1::2]]
        rows.append(torch.cat([piece for pair in zip(valid, padding) for piece in pair]))
    return torch.stack(rows)


# --------------------------------------------------------------------------------------------------------------------
# what happens to each token alone: bf16 in and out, float32 inside where the release has it


def layer_norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def gelu(x):
    return F.gelu(x, approximate="tanh")


def modulate(x, mod):
    """Scale and shift x [B, N, C] by mod, a ModulationOut."""
    return x * (1 + mod.scale) + mod.shift


def widen(x):
    """Return x in float32 at least: bf16 is widened, float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def rotate(x, rope):
    """Rotate x [B, N, H, D] by rope = cos, sin [N, D] of its tokens."""
    cos, sin = rope[0][:, None], rope[1][:, None]
    wide = widen(x)
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (wide * cos + swapped * sin).to(x.dtype)


# --------------------------------------------------------------------------------------------------------------------
# modules: only where there are parameters


class RMSNorm(nn.Module):
    """RMS norm over a head's dims. It rounds before the weight, as the release does; F.rms_norm rounds once."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = widen(x)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight


class MLP(nn.Module):
    def __init__(self, dim, hidden, activation):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.activation = activation

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class TimeEmbedder(nn.Module):
    """Embed t [B] in 0..1000 -> [B, C]."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        return self.mlp(sinusoid(t).to(self.mlp[0].weight.dtype))


class VectorEmbedder(nn.Module):
    def __init__(self, dim_in, dim):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(dim_in, dim), nn.Linear(dim, dim)

    def forward(self, x):
        return self.out_layer(F.silu(self.in_layer(x)))


class TextEmbedder(nn.Module):
    def __init__(self, dim_in, dim):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim_in, dim), nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class ModulationOut(NamedTuple):
    """Shift and scale for the input of attention or the MLP, a gate for its output; each is [B, 1 or N, C]."""

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor | None = None


class Still(NamedTuple):
    """The tokens of the given image, which has no noise: token_replace models modulate them as at time 0."""

    vec: torch.Tensor  # [B, C], of time 0
    mask: torch.Tensor  # [N, 1], true for the image's tokens


class Modulation(nn.Module):
    """Turn vec [B, C] into `count` ModulationOuts, one for each half of the block that it modulates."""

    def __init__(self, dim, count):
        super().__init__()
        self.linear, self.count = nn.Linear(dim, 3 * count * dim), count

    def forward(self, vec, still=None):
        values = self._values(vec)
        if still is not None:
            at_zero = self._values(still.vec)
            values = [torch.where(still.mask, zero, value) for zero, value in zip(at_zero, values)]
        return [ModulationOut(*values[n : n + 3]) for n in range(0, len(values), 3)]

    def _values(self, vec):
        return self.linear(F.silu(vec))[:, None].chunk(3 * self.count, 2)


class RefinerBlock(nn.Module):
    """Text alone: gates from the condition, no shift and scale, no rope, no qk-norm."""

    def __init__(self, config):
        super().__init__()
        dim, self.num_heads = config.hidden_size, config.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.self_attn_qkv, self.self_attn_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = MLP(dim, 4 * dim, F.silu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, txt, condition, attend):
        gate1, gate2 = self.adaLN_modulation(condition)[:, None].chunk(2, -1)
        qkv = self.self_attn_qkv(self.norm1(txt))
        qkv = rearrange(qkv, "b l (n h d) -> b l n h d", n=3, h=self.num_heads)
        txt = txt + gate1 * self.self_attn_proj(attend(qkv))
        return txt + gate2 * self.mlp(self.norm2(txt))


class TokenRefiner(nn.Module):
    """Refine text [B, L, 4096] at t [B] -> [B, L, C]. It is small: every sp rank runs it on the whole text."""

    def __init__(self, config):
        super().__init__()
        dim = config.hidden_size
        self.input_embedder = nn.Linear(config.text_dim, dim)
        self.t_embedder = TimeEmbedder(dim)
        self.c_embedder = TextEmbedder(config.text_dim, dim)
        self.individual_token_refiner = nn.Module()
        self.individual_token_refiner.blocks = nn.ModuleList(RefinerBlock(config) for _ in range(config.refiner_depth))

    def forward(self, text, t, lengths):
        means = [widen(row[:length]).mean(0) for row, length in zip(text, lengths)]
        condition = self.t_embedder(t) + self.c_embedder(torch.stack(means).to(text.dtype))
        txt = self.input_embedder(text)
        attend = partial(joint_attention, video=0, lengths=lengths)
        for block in self.individual_token_refiner.blocks:
            txt = block(txt, condition, attend)
        return txt


class DoubleBlock(nn.Module):
    """Dual-stream: two streams of weights, one attention. img [B, S/P, C], txt [B, L/P, C] -> the same."""

    def __init__(self, config):
        super().__init__()
        dim, self.num_heads = config.hidden_size, config.num_heads
        hidden = int(dim * config.mlp_ratio)
        self.img_mod, self.txt_mod = Modulation(dim, 2), Modulation(dim, 2)
        self.img_attn_qkv, self.txt_attn_qkv = nn.Linear(dim, 3 * dim), nn.Linear(dim, 3 * dim)
        self.img_attn_q_norm, self.img_attn_k_norm = RMSNorm(config.head_dim), RMSNorm(config.head_dim)
        self.txt_attn_q_norm, self.txt_attn_k_norm = RMSNorm(config.head_dim), RMSNorm(config.head_dim)
        self.img_attn_proj, self.txt_attn_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.img_mlp, self.txt_mlp = MLP(dim, hidden, gelu), MLP(dim, hidden, gelu)

    def forward(self, img, txt, vec, rope, attend, still=None):
        img_mod1, img_mod2 = self.img_mod(vec, still)
        txt_mod1, txt_mod2 = self.txt_mod(vec)

        # each stream has its own q, k, v [B, S/P or L/P, H, D]
        img_qkv = self.img_attn_qkv(modulate(layer_norm(img), img_mod1))
        txt_qkv = self.txt_attn_qkv(modulate(layer_norm(txt), txt_mod1))
        img_q, img_k, img_v = split_qkv(img_qkv, self.num_heads)
        txt_q, txt_k, txt_v = split_qkv(txt_qkv, self.num_heads)

        # they are joined for attention alone
        q = torch.cat((self.img_attn_q_norm(img_q), self.txt_attn_q_norm(txt_q)), 1)
        k = torch.cat((self.img_attn_k_norm(img_k), self.txt_attn_k_norm(txt_k)), 1)
        v = torch.cat((img_v, txt_v), 1)
        qkv = torch.stack((rotate(q, rope), rotate(k, rope), v), 2)
        img_out, txt_out = attend(qkv).split((img.shape[1], txt.shape[1]), 1)

        # each stream has its own projection and MLP
        img = img + img_mod1.gate * self.img_attn_proj(img_out)
        txt = txt + txt_mod1.gate * self.txt_attn_proj(txt_out)
        img = img + img_mod2.gate * self.img_mlp(modulate(layer_norm(img), img_mod2))
        txt = txt + txt_mod2.gate * self.txt_mlp(modulate(layer_norm(txt), txt_mod2))
        return img, txt


class SingleBlock(nn.Module):
    """Single-stream: attention and MLP side by side on x [B, (S+L)/P, C], this rank's video tokens, then its text."""

    def __init__(self, config):
        super().__init__()
        dim, self.num_heads = config.hidden_size, config.num_heads
        hidden = int(dim * config.mlp_ratio)
        self.modulation = Modulation(dim, 1)
        self.linear1, self.linear2 = nn.Linear(dim, 3 * dim + hidden), nn.Linear(dim + hidden, dim)
        self.q_norm, self.k_norm = RMSNorm(config.head_dim), RMSNorm(config.head_dim)

    def forward(self, x, vec, rope, attend, still=None):
        (mod,) = self.modulation(vec, still)
        widths = 3 * x.shape[2], self.linear1.out_features - 3 * x.shape[2]
        qkv, mlp = self.linear1(modulate(layer_norm(x), mod)).split(widths, 2)
        q, k, v = split_qkv(qkv, self.num_heads)
        q = rotate(self.q_norm(q), rope)
        k = rotate(self.k_norm(k), rope)
        out = attend(torch.stack((q, k, v), 2))
        return x + mod.gate * self.linear2(torch.cat((out, gelu(mlp)), 2))


def split_qkv(qkv, heads):
    """Split [B, N, 3*C] -> q, k, v [B, N, H, D]."""
    return qkv.unflatten(2, (3, heads, -1)).unbind(2)


class PatchEmbed(nn.Module):
    """The release's convolution, kernel = stride, as the matrix product it is: it works on any rank's tokens."""

    def __init__(self, config):
        super().__init__()
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, patches):
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class FinalLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim = config.hidden_size
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.linear = nn.Linear(dim, config.out_channels * math.prod(config.patch_size))

    def forward(self, img, vec):
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, -1)
        return self.linear(modulate(layer_norm(img), ModulationOut(shift, scale)))


# --------------------------------------------------------------------------------------------------------------------
# the model


class HunyuanVideo(nn.Module):
    """The DiT. For another attention kernel set `model.attention = f`, with f(q, k, v) -> out, all [B, N, H, D]: no mask."""

    def __init__(self, config):
        super().__init__()
        dim = config.hidden_size
        self.config, self.attention = config, sdpa
        self.img_in = PatchEmbed(config)
        self.txt_in = TokenRefiner(config)
        self.time_in = TimeEmbedder(dim)
        self.vector_in = VectorEmbedder(config.pooled_dim, dim)
        if config.guidance_embed:
            self.guidance_in = TimeEmbedder(dim)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.double_depth))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.single_depth))
        self.final_layer = FinalLayer(config)

    def forward(
        self, latents, timestep, text, lengths, pooled, guidance=None, group=None, gather=True, checkpointing="none"
    ):
        """Return the velocity [B, out_channels, T, h, w]; with gather=False this rank's patches [B, S/P, out*pt*ph*pw].

        latents [B, in_channels, T, h, w], in whole patches; timestep [B] float in 0..1000 (1000 = noise);
        text [B, L, text_dim], padded on the right; lengths: a list of the B numbers of valid text tokens;
        pooled [B, pooled_dim]; guidance [B], for models that embed it: see guidance_input.
        group: the sp process group. All its ranks pass the same inputs, none of them split, and hold the same weights.
        checkpointing: of activations: none, full or attention.
        Padding influences nothing, and each sample is computed exactly as if it were alone.
        ValueError for inputs that do not fit, before anything is exchanged.
        """
        self._check(latents, timestep, text, lengths, pooled, guidance, group)
        grid = [size // patch for size, patch in zip(latents.shape[2:], self.config.patch_size)]
        dtype = self.img_in.proj.weight.dtype
        latents, pooled = latents.to(dtype), pooled.to(dtype)
        text = text[:, : max(lengths)].to(dtype)
        if min(lengths) < max(lengths):  # padding may hold NaN, and in backward 0 times NaN is NaN
            valid = valid_tokens(lengths, max(lengths)).to(text.device)
            text = torch.where(valid[..., None], text, 0)

        # what modulates every token: [B, C], equal on every rank
        vec = self.time_in(timestep) + self.vector_in(pooled)
        if self.config.guidance_embed:
            vec = vec + self.guidance_in(guidance)

        # from here on every token lives on one rank
        patches = patchify(latents, self.config.patch_size)
        img = self.img_in(split_sequence(patches, group))  # [B, S/P, C]
        txt = split_sequence(self.txt_in(text, timestep, lengths), group)  # [B, L/P, C]
        # contiguous, since torch.compile would build another graph for a slice's strides
        txt = txt.clone(memory_format=torch.contiguous_format)

        # where this rank's tokens are, and how they meet the others
        video = math.prod(grid)
        start = sum(split_sizes(video, group)[: group_rank(group)])
        stop = start + img.shape[1]
        rope = rope_table(self.config, grid, start, stop, txt.shape[1], img.device)
        attend = partial(joint_attention, video=video, lengths=lengths, group=group, attention=self.attention)
        still_img, still_all = self._still(timestep, pooled, grid, range(start, stop), txt.shape[1])

        run = partial(run_block, checkpointing)
        for n, block in enumerate(self.double_blocks):
            img, txt = run(f"double_block {n}", block, img, txt, vec, rope, attend, still_img)
        x = torch.cat((img, txt), 1)
        for n, block in enumerate(self.single_blocks):
            x = run(f"single_block {n}", block, x, vec, rope, attend, still_all)
        out = self.final_layer(x[:, : img.shape[1]], vec)

        if not gather:
            return out.clone()  # FSDP2 needs an output that is no view
        # 64 numbers a token are cheaper to gather than 3072
        return unpatchify(gather_sequence(out, group, video), grid, self.config.patch_size)

    def _still(self, timestep, pooled, grid, place, text_tokens):
        """Return a Still for this rank's video tokens, and one for video and text tokens; None, None without an image.

        The image is latent frame 0: the first tokens of the raster. Its vec is of time 0, without guidance.
        place: the range of this rank's video tokens in the raster.
        """
        if self.config.image_condition_type != "token_replace":
            return None, None
        vec = self.time_in(torch.zeros_like(timestep)) + self.vector_in(pooled)
        index = torch.arange(place.start, place.stop, device=pooled.device)[:, None]
        video_mask = index < grid[1] * grid[2]
        text_mask = video_mask.new_zeros(text_tokens, 1)
        return Still(vec, video_mask), Still(vec, torch.cat((video_mask, text_mask)))

    @property
    def blocks(self):
        return [*self.double_blocks, *self.single_blocks]

    def compile_blocks(self):
        """Compile both sides of each block's attention. All ranks compile the same graphs, and blocks of a kind share them.

        The first size gets graphs of its own, a second one graphs for all sizes; after eight, further sizes run uncompiled. The
        embedders, the refiner and the final layer stay as they are: they are too small to matter.
        """
        options = {"triton.mix_order_reduction": False}  # else modulation's gradients are lost (pytorch issue 193061)
        options["shape_padding"] = False  # else recomputation may choose another graph than forward
        for block in self.blocks:
            block.compile(options=options)

    def _check(self, latents, timestep, text, lengths, pooled, guidance, group):
        """Raise ValueError for what would otherwise go wrong in silence, or on some ranks only."""
        config, size = self.config, latents.shape[2:]
        if group_size(group) > config.num_heads:
            raise ValueError(f"{group_size(group)} sequence-parallel ranks are more than the {config.num_heads} heads")
        if any(n % patch for n, patch in zip(size, config.patch_size)):
            raise ValueError(f"latents of {list(size)} are not a multiple of the patch size {config.patch_size}")
        if config.guidance_embed != (guidance is not None):
            raise ValueError(f"guidance must {'' if config.guidance_embed else 'not '}be given to this model")
        batch = dict(latents=latents, timestep=timestep, text=text, lengths=lengths, pooled=pooled)
        samples = {name: len(value) for name, value in batch.items()}
        if len({*samples.values(), len(latents if guidance is None else guidance)}) > 1:
            raise ValueError(f"every input is for as many samples, got {samples}")
        if min(lengths) < 1 or max(lengths) > text.shape[1]:
            raise ValueError(f"text lengths {lengths} are not in 1 .. {text.shape[1]}")


# --------------------------------------------------------------------------------------------------------------------
# activation checkpointing

# `checkpointing="attention"` keeps what these return, the output and its log-sum-exp: at 118,800 tokens attention is
# 87 % of recomputing a block. The exchanges are recomputed, and so is a kernel that is not listed.
KEPT = [
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]
CHECKPOINTING = dict(none=None, full=noop_context_fn, attention=partial(create_selective_checkpoint_contexts, KEPT))


def run_block(checkpointing, name, block, *args):
    """Run a block under its name in profiles, also where backward recomputes it."""

    def named(*args):
        with record_function(name):
            return block(*args)

    if checkpointing == "none" or not torch.is_grad_enabled():
        return named(*args)
    rules = dict(use_reentrant=False, preserve_rng_state=False, context_fn=CHECKPOINTING[checkpointing])
    return checkpoint(named, *args, **rules)


# --------------------------------------------------------------------------------------------------------------------
# weights, one parameter at a time: the full tensors of a sharded model are never all in memory


@torch.no_grad()
def assign(param, full):
    """Copy a full tensor, equal on all ranks, into a parameter; if that is sharded, each rank keeps its part."""
    if isinstance(param, DTensor):
        full = distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)
    param.copy_(full)


def load_release(model, path):
    """Load the release's weights in their own names, strictly. path: a .safetensors or .pt file, or a folder."""
    path = Path(path)
    params = dict(model.named_parameters())
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        for name, tensor in stored_tensors(file):
            param = params.pop(name, None)
            # fp8 weights need a scale that is stored elsewhere: refused
            if param is None or param.shape != tensor.shape or tensor.itemsize == 1:
                raise ValueError(f"{name} {list(tensor.shape)} {tensor.dtype} in {file} does not fit the model")
            assign(param, tensor.to(param.dtype))
    if params:
        raise ValueError(f"{path} lacks {len(params)} of the model's weights, {next(iter(params))} among them")


def stored_tensors(file):
    """Yield the (name, tensor) pairs of a .safetensors file, or of the release's .pt, one at a time."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as handle:
            yield from ((name, handle.get_tensor(name)) for name in handle.keys())
    else:
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        yield from stored.get("module", stored).items()


def init_weights(model, seed=0, only="", device=None):
    """Initialise for training from scratch; values depend on (seed, parameter name, kind of device), not on the layout.

    only: parameters with this in their name. device: where numbers are drawn, by default where the parameter is.
    """
    shapes = {name: param.shape for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        if only in name:
            generator = torch.Generator(device or param.device).manual_seed(zlib.crc32(name.encode()) + seed)
            assign(param, initial_values(name, shapes, generator))


def initial_values(name, shapes, generator):
    """Return the first values of a parameter. shapes: those of all parameters, by name.

    Modulations and the last layer start at zero, so that every block starts as the identity. So does a LoRA's B.
    """
    module, _, kind = name.rpartition(".")
    full = torch.empty(shapes[name], device=generator.device)
    if re.search(r"mod\.linear|modulation|final_layer\.linear|lora_B", name) or name == "img_in.proj.bias":
        return full.zero_()
    if re.search(r"norm\d?$", module):
        return full.fill_(1.0 if kind == "weight" else 0.0)
    if re.search(r"(time_in|guidance_in|t_embedder)\.mlp", name) and kind == "weight":
        return full.normal_(0, 0.02, generator=generator)
    fan_out, *rest = shapes[module + ".weight"]
    fan_in = math.prod(rest)
    bound = math.sqrt(6 / (fan_in + fan_out)) if name == "img_in.proj.weight" else 1 / math.sqrt(fan_in)
    return full.uniform_(-bound, bound, generator=generator)


# --------------------------------------------------------------------------------------------------------------------
# the lesson


def lesson(token=30):
    """Follow one token through a tiny model of 45 video and 7 text tokens: print what each rank holds at each stage."""
    manager, stages = ParallelManager(1, None, "cpu"), []
    group = manager.sp_group
    model = HunyuanVideo(HunyuanConfig.preset("tiny", double_depth=1, single_depth=1))
    (double,), (single,) = model.double_blocks, model.single_blocks

    def see(name, *tensors):
        stages.append((name, " and ".join(str(list(x.shape)) for x in tensors)))

    def watch(module, name):
        module.register_forward_hook(lambda _, args, out: see(name, *(out if isinstance(out, tuple) else (out,))))

    def attention(q, k, v):
        see("  after the all-to-all, q, k and v each: all tokens, some heads", q)
        return sdpa(q, k, v)

    model.attention = attention
    watch(model.img_in, "video: patches, split, then embedded")
    watch(model.txt_in, "text: refined whole on every rank, then split as well")
    watch(double.img_attn_qkv, "dual-stream block: video's q k v")
    watch(double.txt_attn_qkv, "  text's q k v")
    watch(double.img_attn_proj, "  after the way back: video's tokens, all heads")
    watch(double, "  video and text")
    watch(single.linear1, "single-stream block, video and text joined: q k v and MLP")
    watch(single, "  the block's output")
    watch(model.final_layer, "final layer, video alone")
    inputs = torch.randn(1, 3, 3, 12, 20), torch.tensor([500.0]), torch.randn(1, 7, 32), [7], torch.randn(1, 32)
    see("gathered, for sampling only", model(*inputs, group=group))

    everyone = [None] * manager.world_size
    dist.all_gather_object(everyone, [shapes for _, shapes in stages])
    if manager.is_main:
        places = [(rank, row, size) for rank, size in enumerate(split_sizes(45, group)) for row in range(size)]
        print("video token {} of 45 lives on rank {}, as row {} of its {}".format(token, *places[token]))
        for n, (name, _) in enumerate(stages):
            print(f"{name:64}" + "   ".join(f"rank {r}: {shapes[n]}" for r, shapes in enumerate(everyone)))
    return manager


if __name__ == "__main__":
    lesson().close()
