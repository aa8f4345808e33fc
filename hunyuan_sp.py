"""HunyuanVideo's DiT, every token on exactly one rank. One forward, top to bottom (B batch, S video and L text tokens,
H heads × D dims = C hidden, P sequence-parallel ranks):

    latents [B, 16, T, h, w] ── patches, split over the ranks ──> img [B, S/P, C] ─┐
    text    [B, L, 4096] ────── token refiner, then split ──────> txt [B, L/P, C] ─┼─ 20 dual-stream blocks
    timestep, guidance, pooled [B, 768] ──> vec [B, C] (modulates every block)  ───┘  40 single-stream blocks
    velocity [B, 16, T, h, w] <── unpatchify <── gather <── final layer <── img [B, S/P, C] <──┘

Dual-stream (the release's `double_blocks`): video and text have their own qkv and meet only inside attention.
Single-stream (`single_blocks`): video and text are one sequence, joined before the first such block.
Rank r holds the r-th run of video tokens in (t, h, w) raster order and the r-th run of text tokens, `split_sizes` long. What
is no token is whole on every rank: vec, the modulations it gives, and the refiner's work on text.

Both kinds call one `attend(qkv)`. Ranks meet there, and when the velocity is gathered. `group=None` is one device; the same lines run.

    model = HunyuanVideo(HunyuanConfig.preset("tiny"))
    velocity = model(latents, timestep, text, text_mask, pooled, guidance, group=manager.sp_group)

    $ torchrun --nproc_per_node=2 hunyuan_sp.py    # one token's journey: the shapes on each rank, stage by stage

Source of all formulas: HunyuanVideo, arXiv:2412.03603. Parameter names are the original release's.
"""

import json
import math
import os
import re
import zipfile
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from comm import ParallelManager, all_to_all, gather_sequence, group_rank, group_size, run, split_sequence, split_sizes

# --------------------------------------------------------------------------------------------------------------------
# configuration: the defaults are the released 13B model


@dataclass(frozen=True)
class HunyuanConfig:
    """hidden size C = num_heads * sum(rope_dims).

    image_condition_type, of image-to-video: "token_replace" (latent frame 0 is the image's, clean, and modulated as such) or
    "latent_concat" (in_channels 33: noisy latents, the image's latents, a mask); None for text-to-video.
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
        """ "13b": the release. "tiny": 1M parameters for CPUs, 3 channels, no guidance embedding."""
        presets = {"13b": cls(), "tiny": TINY}
        if name not in presets:
            raise ValueError(f"no preset {name!r}: there are {', '.join(presets)}")
        return replace(presets[name], **changes)

    @classmethod
    def from_dict(cls, values):
        known = {f.name for f in fields(cls)}
        values = dict(image_condition_type=None) | values  # checkpoints from before there was one
        if set(values) != known:
            raise ValueError(f"config fields differ: missing {known - set(values)}, unknown {set(values) - known}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


TINY = HunyuanConfig(
    num_heads=6,
    rope_dims=(4, 6, 6),
    double_depth=2,
    single_depth=2,
    refiner_depth=1,
    mlp_ratio=2.0,
    in_channels=3,
    out_channels=3,
    text_dim=32,
    pooled_dim=32,
    guidance_embed=False,
)

# --------------------------------------------------------------------------------------------------------------------
# time, guidance and place, as the model is told of them


def sinusoid(t):
    """t [B] -> [B, 256], cosines first. float32 is part of the definition: at t = 6016 its last bit moves the output 2e-4."""
    angle = t.float()[:, None] * time_frequencies(t.device)
    return torch.cat((angle.cos(), angle.sin()), 1)


def time_frequencies(device=None):
    return torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=device) / 128)


def guidance_input(scale, batch, device):
    """What the model is told of a guidance scale, [batch]: the release multiplies by 1000 in bf16, so 6.0 is 6016."""
    return torch.full((batch,), scale, dtype=torch.bfloat16, device=device).mul(1000).float()


def shift_sigma(u, shift):
    """Noise levels 0..1 moved towards noise as resolution grows: arXiv:2403.03206, equation 23. A timestep is 1000 sigma."""
    return shift * u / (1 + (shift - 1) * u)


def latent_shape(config, height, width, frames):
    """[C, T, h, w] of a video's latents: the VAE takes 8 x 8 pixels, and 4 frames after the first. ValueError if it can't."""
    if height % 16 or width % 16 or frames % 4 != 1 or min(height, width, frames) < 1:
        raise ValueError(
            f"height {height} and width {width} must be multiples of 16, frames {frames} must be 4k+1: "
            f"{max(16, height // 16 * 16)} x {max(16, width // 16 * 16)} x {max(1, (frames - 1) // 4 * 4 + 1)} would do"
        )
    return config.out_channels, (frames - 1) // 4 + 1, height // 8, width // 8


def rope_table(config, grid, start, stop, text=0, device=None):
    """cos, sin [stop - start + text, D] in float32: of tokens start..stop of the (t, h, w) raster, w fastest, then of text.

    Each axis turns its share of a head's dims. Channels 2i and 2i+1 turn by the same angle, sin is negative at 2i.
    Text is not turned.
    """
    index = torch.arange(start, stop, device=device)
    positions = (index // (grid[1] * grid[2]), index // grid[2] % grid[1], index % grid[2])
    halves = [torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim for dim in config.rope_dims]
    angle = torch.cat([p.float()[:, None] * (1 / config.rope_theta**half) for p, half in zip(positions, halves)], 1)
    angle = torch.cat((angle, angle.new_zeros(text, angle.shape[1])))
    return angle.cos().repeat_interleave(2, 1), torch.stack((-angle.sin(), angle.sin()), -1).flatten(1)


def with_image(latents, image, kind):
    """Latents [B, C, T, h, w] as an image-to-video model is given them, with the image's own [B, C, 1, h, w].

    token_replace: frame 0 is the image. latent_concat: [B, 2C + 1, T, h, w], beside each place the image's latents in frame 0,
    zeros elsewhere, and a mask that is 1 in frame 0. kind: None for text-to-video.
    """
    if kind == "token_replace":
        return torch.cat((image, latents[:, :, 1:]), 2)
    if kind == "latent_concat":
        beside = torch.zeros_like(torch.cat((latents, latents[:, :1]), 1))
        beside[:, :-1, :1], beside[:, -1, 0] = image, 1
        return torch.cat((latents, beside), 1)
    return latents


def patchify(x, patch_size):
    """[B, C, T, h, w] -> [B, S, C*pt*ph*pw], tokens in (t, h, w) raster order."""
    pt, ph, pw = patch_size
    return rearrange(x, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)


def unpatchify(x, grid, patch_size):
    """[B, S, C*pt*ph*pw] -> [B, C, T, h, w], the inverse of patchify; grid counts patches."""
    (t, h, w), (pt, ph, pw) = grid, patch_size
    pattern = "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)"
    return rearrange(x, pattern, t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)


# --------------------------------------------------------------------------------------------------------------------
# attention: the only place where tokens, and therefore ranks, meet


def sdpa(q, k, v):
    """q, k, v [B, L, H, D] -> [B, L, H, D]. Never a mask: it costs 1.5x, and lengths are known instead."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backends(q.device), set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    if out.requires_grad:
        # torch caches cuDNN's plan of backward, keyed by the strides of q, k and v. The gradient's strides are in the plan
        # but not in the key: if they varied, a cached plan would read out of bounds
        out.register_hook(torch.Tensor.contiguous)
    return out


def backends(device):
    """SDPA's kernels, fastest first. At 32k tokens on an H200 cuDNN reaches 655 TFLOP/s, flash 350, efficient 180; on GPUs
    before Hopper flash is the fastest."""
    cudnn, flash = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    cudnn_first = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return [*((cudnn, flash) if cudnn_first else (flash, cudnn)), SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@torch.compiler.disable  # blocks are compiled on both sides of it
def joint_attention(qkv, video, text, group=None, attention=sdpa):
    """Attention over `video` tokens and the first text[b] text tokens of each sample.

    qkv [B, L/P, 3, H, D], stacked so that they travel in one collective -> [B, L/P, C].
    video: tokens over all ranks; text: B valid lengths; both were split as split_sizes does, text at max(text).
    Locally video comes before text, so after the exchange the order is video0 text0 video1 text1 ..: attention does not
    care, and position is in q and k already. Padding attends to nothing and gets zeros.
    """
    video_sizes, text_sizes = split_sizes(video, group), split_sizes(max(text), group)
    tokens, heads = [a + b for a, b in zip(video_sizes, text_sizes)], split_sizes(qkv.shape[3], group)
    q, k, v = all_to_all(qkv, group, 3, 1, heads, tokens).unbind(2)  # [B, L, H/P, D]
    with record_function("attention"):  # its name in profiles
        if min(text) == max(text):
            out = attention(q, k, v)
        else:
            starts = [sum(text_sizes[:rank]) for rank in range(len(text_sizes))]
            out = torch.stack([
                _attention_of_valid(
                    attention,
                    [x[b] for x in (q, k, v)],
                    [n + min(max(text[b] - start, 0), m) for n, m, start in zip(video_sizes, text_sizes, starts)],
                    tokens,
                )
                for b in range(len(text))
            ])  # fmt: skip
    return all_to_all(out, group, 1, 2, tokens, heads).flatten(2)


def _attention_of_valid(attention, qkv, valid, tokens):
    """One sample, q, k, v [L, H, D] -> [L, H, D]: of each rank's tokens[i], the first valid[i] are real."""
    sizes = [size for n, total in zip(valid, tokens) for size in (n, total - n)]
    q, k, v = (torch.cat(x.split(sizes)[::2])[None] for x in qkv)
    real = attention(q, k, v)[0].split(valid)
    return torch.cat([x for part, pad in zip(real, sizes[1::2]) for x in (part, part.new_zeros(pad, *part.shape[1:]))])


# --------------------------------------------------------------------------------------------------------------------
# what happens to each token alone: bf16 in and out, float32 inside where the model is defined so


def layer_norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def gelu(x):
    return F.gelu(x, approximate="tanh")


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def widen(x):
    """float32 at least: bf16 is widened, float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def rotate(x, rope):
    """x [B, L, H, D] by rope = cos, sin [L, D] of its tokens."""
    cos, sin = (table[:, None] for table in rope)
    wide = widen(x)
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (wide * cos + swapped * sin).to(x.dtype)


# --------------------------------------------------------------------------------------------------------------------
# modules: only where there are parameters


class RMSNorm(nn.Module):
    """Over a head's dims. It rounds before the weight, as the release does; F.rms_norm rounds once."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = widen(x)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.weight


class MLP(nn.Module):
    def __init__(self, dim, hidden, activation):
        super().__init__()
        self.fc1, self.fc2, self.activation = nn.Linear(dim, hidden), nn.Linear(hidden, dim), activation

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class TimeEmbedder(nn.Module):
    """t [B] in 0..1000 -> [B, C]."""

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


class Modulation(nn.Module):
    """vec [B, C] -> `count` tensors [B, 1, C]: shift, scale and gate, once or twice.

    still: for token_replace, another vec [B, C] for the image's tokens, and which these are, [L, 1] -> tensors [B, L, C].
    """

    def __init__(self, dim, count):
        super().__init__()
        self.linear, self.count = nn.Linear(dim, count * dim), count

    def forward(self, vec, still=None):
        moving = self.linear(F.silu(vec))[:, None].chunk(self.count, 2)
        if still is None:
            return moving
        return [torch.where(still[1], a, b) for a, b in zip(self(still[0]), moving)]


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
        qkv = rearrange(self.self_attn_qkv(self.norm1(txt)), "b l (n h d) -> b l n h d", n=3, h=self.num_heads)
        txt = txt + gate1 * self.self_attn_proj(attend(qkv))
        return txt + gate2 * self.mlp(self.norm2(txt))


class TokenRefiner(nn.Module):
    """text [B, L, 4096], t [B] -> [B, L, C]. Small, so it runs whole on every rank of an sp group."""

    def __init__(self, config):
        super().__init__()
        dim = config.hidden_size
        self.input_embedder = nn.Linear(config.text_dim, dim)
        self.t_embedder = TimeEmbedder(dim)
        self.c_embedder = TextEmbedder(config.text_dim, dim)
        self.individual_token_refiner = nn.Module()
        blocks = [RefinerBlock(config) for _ in range(config.refiner_depth)]
        self.individual_token_refiner.blocks = nn.ModuleList(blocks)

    def forward(self, text, t, lengths):
        mean = torch.stack([widen(row[:length]).mean(0) for row, length in zip(text, lengths)])
        condition = self.t_embedder(t) + self.c_embedder(mean.to(text.dtype))
        txt = self.input_embedder(text)
        attend = partial(joint_attention, video=0, text=lengths)
        for block in self.individual_token_refiner.blocks:
            txt = block(txt, condition, attend)
        return txt


class DoubleBlock(nn.Module):
    """Dual-stream: two streams of weights, one attention. img [B, S/P, C], txt [B, L/P, C] -> the same."""

    def __init__(self, config):
        super().__init__()
        dim, hidden, self.num_heads = config.hidden_size, int(config.hidden_size * config.mlp_ratio), config.num_heads
        self.img_mod, self.txt_mod = Modulation(dim, 6), Modulation(dim, 6)
        self.img_attn_qkv, self.txt_attn_qkv = nn.Linear(dim, 3 * dim), nn.Linear(dim, 3 * dim)
        self.img_attn_q_norm, self.img_attn_k_norm = RMSNorm(config.head_dim), RMSNorm(config.head_dim)
        self.txt_attn_q_norm, self.txt_attn_k_norm = RMSNorm(config.head_dim), RMSNorm(config.head_dim)
        self.img_attn_proj, self.txt_attn_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.img_mlp, self.txt_mlp = MLP(dim, hidden, gelu), MLP(dim, hidden, gelu)

    def forward(self, img, txt, vec, rope, attend, still=None):
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec, still)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        # each stream its own q, k, v [B, S/P or L/P, H, D]
        img_qkv = self.img_attn_qkv(modulate(layer_norm(img), img_shift1, img_scale1))
        txt_qkv = self.txt_attn_qkv(modulate(layer_norm(txt), txt_shift1, txt_scale1))
        img_q, img_k, img_v = img_qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)
        txt_q, txt_k, txt_v = txt_qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)

        # joined for attention alone
        q = torch.cat((self.img_attn_q_norm(img_q), self.txt_attn_q_norm(txt_q)), 1)
        k = torch.cat((self.img_attn_k_norm(img_k), self.txt_attn_k_norm(txt_k)), 1)
        v = torch.cat((img_v, txt_v), 1)
        out = attend(torch.stack((rotate(q, rope), rotate(k, rope), v), 2))
        img_out, txt_out = out.split((img.shape[1], txt.shape[1]), 1)

        # each stream its own projection and MLP
        img = img + img_gate1 * self.img_attn_proj(img_out)
        txt = txt + txt_gate1 * self.txt_attn_proj(txt_out)
        img = img + img_gate2 * self.img_mlp(modulate(layer_norm(img), img_shift2, img_scale2))
        txt = txt + txt_gate2 * self.txt_mlp(modulate(layer_norm(txt), txt_shift2, txt_scale2))
        return img, txt


class SingleBlock(nn.Module):
    """Single-stream: attention and MLP side by side on x [B, (S+L)/P, C], this rank's video tokens, then its text."""

    def __init__(self, config):
        super().__init__()
        dim, hidden, self.num_heads = config.hidden_size, int(config.hidden_size * config.mlp_ratio), config.num_heads
        self.modulation = Modulation(dim, 3)
        self.linear1, self.linear2 = nn.Linear(dim, 3 * dim + hidden), nn.Linear(dim + hidden, dim)
        self.q_norm, self.k_norm = RMSNorm(config.head_dim), RMSNorm(config.head_dim)

    def forward(self, x, vec, rope, attend, still=None):
        shift, scale, gate = self.modulation(vec, still)
        widths = 3 * x.shape[2], self.linear1.out_features - 3 * x.shape[2]
        qkv, mlp = self.linear1(modulate(layer_norm(x), shift, scale)).split(widths, 2)
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)
        out = attend(torch.stack((rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope), v), 2))
        return x + gate * self.linear2(torch.cat((out, gelu(mlp)), 2))


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
        return self.linear(modulate(layer_norm(img), shift, scale))


# --------------------------------------------------------------------------------------------------------------------
# the model


class HunyuanVideo(nn.Module):
    """attention: "sdpa", or "fa4" for the optional FlashAttention-4 (ValueError where it can't run). Another kernel:
    `model.attention = f`, with f(q, k, v) -> out, all [B, L, H, D].
    """

    def __init__(self, config, attention="sdpa"):
        super().__init__()
        self.config, self.attention, dim = config, attention_kernel(attention), config.hidden_size
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
        self,
        latents,
        timestep,
        text,
        text_mask,
        pooled,
        guidance=None,
        group=None,
        gather=True,
        checkpointing="none",
        offload=False,
    ):
        """The velocity [B, out_channels, T, h, w]; with gather=False this rank's patches of it [B, S/P, out*pt*ph*pw].

        latents [B, in_channels, T, h, w], h and w even; timestep [B] float in 0..1000 (1000 = noise); text [B, L, text_dim];
        text_mask [B, L], 1 = real, right-padded, or a list of the B lengths (reading a mask makes the CPU wait for the GPU);
        pooled [B, pooled_dim]; guidance [B], scale * 1000 (the release computes 6.0 in bf16: 6016), for models that embed it.
        group: the sp process group. Its ranks must all pass equal inputs, none of them split, and hold equal weights.
        checkpointing: none, full or attention. offload: what it keeps of a block's inputs lies in the host's memory.
        Padding influences nothing, and each sample is exactly as if alone.
        ValueError for inputs that do not fit, before anything is exchanged.
        """
        lengths = self._check(latents, timestep, text, text_mask, pooled, guidance, group)
        dtype = self.img_in.proj.weight.dtype
        grid = [n // p for n, p in zip(latents.shape[2:], self.config.patch_size)]
        video, run_one = math.prod(grid), partial(run_block, checkpointing, offload)
        latents, text, pooled = latents.to(dtype), text[:, : max(lengths)].to(dtype), pooled.to(dtype)
        if min(lengths) < max(lengths):  # zero times what padding holds may be NaN, in backward
            real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            text = torch.where(real.to(text.device)[..., None], text, 0)

        # what modulates every token, [B, C] and equal on every rank
        vec = self.time_in(timestep) + self.vector_in(pooled)
        if self.config.guidance_embed:
            vec = vec + self.guidance_in(guidance)

        # from here on every token lives on one rank
        img = self.img_in(split_sequence(patchify(latents, self.config.patch_size), group))  # [B, S/P, C]
        txt = split_sequence(self.txt_in(text, timestep, lengths), group)  # [B, L/P, C]
        # a slice's strides would be a compiled graph of their own
        txt = txt.clone(memory_format=torch.contiguous_format)
        start = sum(split_sizes(video, group)[: group_rank(group)])
        rope = rope_table(self.config, grid, start, start + img.shape[1], txt.shape[1], img.device)
        attend = partial(joint_attention, video=video, text=lengths, group=group, attention=self.attention)
        still_img, still = self._still(timestep, pooled, grid, start, img.shape[1], txt.shape[1])

        for n, block in enumerate(self.double_blocks):
            img, txt = run_one(f"double_block {n}", block, img, txt, vec, rope, attend, still_img)
        x = torch.cat((img, txt), 1)
        for n, block in enumerate(self.single_blocks):
            x = run_one(f"single_block {n}", block, x, vec, rope, attend, still)
        out = self.final_layer(x[:, : img.shape[1]], vec)

        if not gather:
            return out.clone()  # FSDP2 wants no view from its modules
        # 64 numbers a token are cheaper to gather than 3072
        return unpatchify(gather_sequence(out, group, video), grid, self.config.patch_size)

    def _still(self, timestep, pooled, grid, start, video, text):
        """token_replace: what Modulation takes as `still`, for this rank's video tokens, and for them and its text.

        The image is latent frame 0, the raster's first tokens. Its vec is of t = 0 and knows no guidance.
        """
        if self.config.image_condition_type != "token_replace":
            return None, None
        vec = self.time_in(torch.zeros_like(timestep)) + self.vector_in(pooled)
        first = torch.arange(start, start + video, device=pooled.device)[:, None] < grid[1] * grid[2]
        return (vec, first), (vec, torch.cat((first, first.new_zeros(text, 1))))

    @property
    def blocks(self):
        return [*self.double_blocks, *self.single_blocks]

    def compile_blocks(self):
        """torch.compile on both sides of each block's attention: nothing of ranks is in it, and all blocks of a kind share it.

        The second size compiles one graph for all sizes above 1. After eight graphs, whatever comes runs uncompiled. What
        is outside the blocks (embedders, refiner, final layer) stays as it is: it is too small to count.
        """
        # with this fusion the gradients of modulation's chunks, views of one buffer, are never written: pytorch issue 193061;
        # whether rows are padded is decided by timing: of two graphs for the same rows one may keep what the other can't recompute
        options = {"triton.mix_order_reduction": False, "shape_padding": False}
        for block in self.blocks:
            block.compile(options=options)

    def _check(self, latents, timestep, text, text_mask, pooled, guidance, group):
        config = self.config
        if group_size(group) > config.num_heads:
            raise ValueError(f"{group_size(group)} sequence-parallel ranks are more than the {config.num_heads} heads")
        if latents.dim() != 5 or latents.shape[1] != config.in_channels:
            raise ValueError(f"latents {list(latents.shape)} are not [B, {config.in_channels}, T, h, w]")
        for n, patch, axis in zip(latents.shape[2:], config.patch_size, ("frames", "height", "width")):
            if n < patch or n % patch:
                raise ValueError(f"latent {axis} {n} is not a multiple of the patch size {patch}")
        batch, length = len(latents), text.shape[1] if text.dim() == 3 else -1
        wanted = dict(timestep=[batch], text=[batch, length, config.text_dim], pooled=[batch, config.pooled_dim])
        given = dict(timestep=timestep, text=text, pooled=pooled)
        if isinstance(text_mask, torch.Tensor):
            wanted, given = wanted | dict(text_mask=[batch, length]), given | dict(text_mask=text_mask)
        if config.guidance_embed != (guidance is not None):
            raise ValueError(
                f"this model has {'a' if config.guidance_embed else 'no'} guidance embedding, "
                f"guidance was {'missing' if guidance is None else 'given'}"
            )
        if guidance is not None:
            wanted, given = wanted | dict(guidance=[batch]), given | dict(guidance=guidance)
        for name, shape in wanted.items():
            if list(given[name].shape) != shape:
                raise ValueError(f"{name} is {list(given[name].shape)}, expected {shape} beside {batch} latents")
        if isinstance(text_mask, torch.Tensor):
            return text_lengths(text_mask)
        if len(text_mask) != batch or not all(1 <= n <= length for n in text_mask):
            raise ValueError(f"text lengths {list(text_mask)} are not {batch} of 1 .. {length}")
        return list(text_mask)


def text_lengths(mask):
    """mask [B, L] -> B lengths. ValueError for a row that is not some ones (at least one), then zeros."""
    mask = mask.bool().cpu()
    lengths = mask.sum(1).tolist()
    for row, length in enumerate(lengths):
        if length == 0:
            raise ValueError(f"text mask row {row} is all zero: a sample needs at least one text token")
        if not mask[row, :length].all():
            raise ValueError(f"text mask row {row} has {length} ones that are not its first {length}: pad on the right")
    return lengths


# --------------------------------------------------------------------------------------------------------------------
# what makes it practical: activation checkpointing, another kernel, a count of the work


def run_block(checkpointing, offload, name, block, *args):
    """A block under its name in profiles, in backward's recomputation too."""
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"checkpointing {checkpointing!r} is none of {', '.join(CHECKPOINTING)}")
    if offload and checkpointing == "none":
        raise ValueError("offload moves what checkpointing keeps, and checkpointing is none: take attention or full")

    def named(*args):
        with record_function(name):
            return block(*args)

    if checkpointing == "none" or not torch.is_grad_enabled():
        return named(*args)
    rules = dict(use_reentrant=False, preserve_rng_state=False, context_fn=CHECKPOINTING[checkpointing])
    with torch.autograd.graph.saved_tensors_hooks(to_host, from_host) if offload else nullcontext():
        return checkpoint(named, *args, **rules)  # of its own tensors it saves the inputs alone


SIDE, LARGE = {}, 1 << 20  # of each GPU, a stream for copies beside the computation; values that are worth a copy


def to_host(x):
    """A block's input, copied to pinned memory while the GPU goes on; small ones stay."""
    if x.device.type != "cuda" or x.numel() < LARGE:
        return x
    if x.device not in SIDE:
        SIDE[x.device] = torch.cuda.Stream(x.device)
    side = SIDE[x.device]
    side.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(side):
        kept = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
        x.record_stream(side)
    return kept, x.device


def from_host(kept):
    if isinstance(kept, torch.Tensor):
        return kept
    kept, device = kept
    torch.cuda.current_stream(device).wait_stream(SIDE[device])
    return kept.to(device, non_blocking=True)


FA4_DTYPES = (torch.bfloat16, torch.float16)


def fa4(q, k, v):
    """The same by FlashAttention-4: on Hopper a forward at 119k tokens is 1.15 times as fast as with cuDNN. On Blackwell,
    where it runs too, cuDNN is the faster one."""
    if q.dtype not in FA4_DTYPES:
        raise ValueError(f"attention fa4 computes in bfloat16 or float16, the model is in {str(q.dtype)[6:]}")
    return _fa4(q, k, v)[0]


# An operator of its own, so that checkpointing can keep its output: (out [B, L, H, D], log-sum-exp [B, H, L]). It calls the
# package's kernels: torch's switch, activate_flash_attention_impl("FA4"), expects two results where 4.0.0b36 returns five
@torch.library.custom_op("hunyuan_sp::fa4", mutates_args=())
def _fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    return _flash_attn_fwd(q, k, v, return_lse=True)[:2]


def _fa4_backward(ctx, grad, _):
    from flash_attn.cute.interface import _flash_attn_bwd

    q, k, v, out, lse = ctx.saved_tensors
    return _flash_attn_bwd(q, k, v, out, grad.contiguous(), lse)[:3]


_fa4.register_autograd(_fa4_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output))


def attention_kernel(name):
    """ "sdpa" or "fa4" as a function; ValueError, one sentence, where it can't run. The only place that decides."""
    if name == "sdpa":
        return sdpa
    if name != "fa4":
        raise ValueError(f"attention {name!r} is none of sdpa, fa4")
    try:
        import flash_attn.cute.interface  # noqa: F401
    except ImportError as error:
        raise ValueError(f"attention fa4 needs FlashAttention-4, pip install --pre flash-attn-4 ({error})") from None
    gpu = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    if gpu[0] not in (9, 10):
        found = f"this one has {gpu[0]}.{gpu[1]}" if gpu[0] else "there is none here"
        raise ValueError(f"attention fa4 needs a GPU of compute capability 9 or 10, {found}")
    return fa4


# What `checkpointing="attention"` keeps: outputs and log-sum-exps. At 118,800 tokens recomputing them is 87 % of recomputing a
# block. The exchanges are recomputed, and so is attention by a kernel that is not listed
KEPT = [
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.hunyuan_sp.fa4.default,
]
CHECKPOINTING = {
    "none": None,
    "full": noop_context_fn,
    "attention": partial(create_selective_checkpoint_contexts, KEPT),
}


def forward_flops(config, video, text, linears=1, attention=1):
    """Of one sample's forward: linears and attention of the blocks, 2 a multiply-add. text is trimmed to its length.

    Training takes three times as much; where weights are frozen, twice for the linears.
    """
    dim, blocks, n = config.hidden_size, config.double_depth + config.single_depth, video + text
    of_linears = (8 + 4 * config.mlp_ratio) * dim * dim * n * blocks
    return linears * of_linears + attention * 4 * dim * n * n * blocks


# --------------------------------------------------------------------------------------------------------------------
# weights: initialised or loaded parameter by parameter, so that a sharded model never exists whole anywhere


@torch.no_grad()
def assign(param, full):
    """Put a full tensor, equal on all ranks, into a parameter; of a sharded one each rank keeps its part."""
    param.copy_(part_of(full, param))


def part_of(full, param):
    """A full tensor, equal on all ranks, as the parameter is: of a sharded one this rank's part."""
    if not isinstance(param, DTensor):
        return full
    return distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)


def whole(param):
    """A parameter, gathered if it is sharded."""
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach()


def init_weights(model, seed=0, only="", device=None):
    """Initialise for training from scratch; a parameter's values depend on (seed, its name, kind of device), not the layout.

    Modulations and the last layer start at zero, so that every block starts as the identity; so does a LoRA, whose B is zero.
    only: parameters with this in their name. device: where numbers are drawn, by default where the parameter is.
    """
    shapes = {name: param.shape for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        if only not in name:
            continue
        module, _, kind = name.rpartition(".")
        generator = torch.Generator(device or param.device).manual_seed(zlib.crc32(name.encode()) + seed)
        full = torch.empty(param.shape, device=generator.device)
        if re.search(r"mod\.linear|modulation|final_layer\.linear|lora_B", name) or name == "img_in.proj.bias":
            full.zero_()
        elif re.search(r"norm\d?$", module):
            full.fill_(1.0 if kind == "weight" else 0.0)
        elif re.search(r"(time_in|guidance_in|t_embedder)\.mlp", name) and kind == "weight":
            full.normal_(0, 0.02, generator=generator)
        else:
            fan_in = math.prod(shapes[module + ".weight"][1:])
            fan_out = shapes[module + ".weight"][0]
            bound = math.sqrt(6 / (fan_in + fan_out)) if name == "img_in.proj.weight" else 1 / math.sqrt(fan_in)
            full.uniform_(-bound, bound, generator=generator)
        assign(param, full)


# Each line is a layer: its name in the original, in diffusers (with +: its rows are split over several), and in
# ComfyUI where it is another. The line above says what comes before the three names; * is the block's number
# fmt: off
NAMES = [
    (("", "", ""), [
        ("img_in.proj", "x_embedder.proj", ""),
        ("time_in.mlp.0", "time_text_embed.timestep_embedder.linear_1", "time_in.in_layer"),
        ("time_in.mlp.2", "time_text_embed.timestep_embedder.linear_2", "time_in.out_layer"),
        ("guidance_in.mlp.0", "time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
        ("guidance_in.mlp.2", "time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
        ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1", ""),
        ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2", ""),
        ("final_layer.adaLN_modulation.1", "norm_out.linear", ""),
        ("final_layer.linear", "proj_out", ""),
    ]),
    (("txt_in.", "context_embedder.", "txt_in."), [
        ("input_embedder", "proj_in", ""),
        ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1", "t_embedder.in_layer"),
        ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2", "t_embedder.out_layer"),
        ("c_embedder.linear_1", "time_text_embed.text_embedder.linear_1", "c_embedder.in_layer"),
        ("c_embedder.linear_2", "time_text_embed.text_embedder.linear_2", "c_embedder.out_layer"),
    ]),
    ((
        "txt_in.individual_token_refiner.blocks.*.",
        "context_embedder.token_refiner.refiner_blocks.*.",
        "txt_in.individual_token_refiner.blocks.*.",
    ), [
        ("norm1", "norm1", ""),
        ("norm2", "norm2", ""),
        ("self_attn_qkv", "attn.to_q+attn.to_k+attn.to_v", "self_attn.qkv"),
        ("self_attn_proj", "attn.to_out.0", "self_attn.proj"),
        ("mlp.fc1", "ff.net.0.proj", "mlp.0"),
        ("mlp.fc2", "ff.net.2", "mlp.2"),
        ("adaLN_modulation.1", "norm_out.linear", ""),
    ]),
    (("double_blocks.*.", "transformer_blocks.*.", "double_blocks.*."), [
        ("img_mod.linear", "norm1.linear", "img_mod.lin"),
        ("txt_mod.linear", "norm1_context.linear", "txt_mod.lin"),
        ("img_attn_qkv", "attn.to_q+attn.to_k+attn.to_v", "img_attn.qkv"),
        ("txt_attn_qkv", "attn.add_q_proj+attn.add_k_proj+attn.add_v_proj", "txt_attn.qkv"),
        ("img_attn_q_norm", "attn.norm_q", "img_attn.norm.query_norm"),
        ("img_attn_k_norm", "attn.norm_k", "img_attn.norm.key_norm"),
        ("txt_attn_q_norm", "attn.norm_added_q", "txt_attn.norm.query_norm"),
        ("txt_attn_k_norm", "attn.norm_added_k", "txt_attn.norm.key_norm"),
        ("img_attn_proj", "attn.to_out.0", "img_attn.proj"),
        ("txt_attn_proj", "attn.to_add_out", "txt_attn.proj"),
        ("img_mlp.fc1", "ff.net.0.proj", "img_mlp.0"),
        ("img_mlp.fc2", "ff.net.2", "img_mlp.2"),
        ("txt_mlp.fc1", "ff_context.net.0.proj", "txt_mlp.0"),
        ("txt_mlp.fc2", "ff_context.net.2", "txt_mlp.2"),
    ]),
    (("single_blocks.*.", "single_transformer_blocks.*.", "single_blocks.*."), [
        ("modulation.linear", "norm.linear", "modulation.lin"),
        ("linear1", "attn.to_q+attn.to_k+attn.to_v+proj_mlp", ""),
        ("linear2", "proj_out", ""),
        ("q_norm", "attn.norm_q", "norm.query_norm"),
        ("k_norm", "attn.norm_k", "norm.key_norm"),
    ]),
]
# fmt: on
TABLE = {
    original + name: ([diffusers + n for n in theirs.split("+")], [comfyui + (other or name)])
    for (original, diffusers, comfyui), layers in NAMES
    for name, theirs, other in layers
}
NAMINGS = ("original", "diffusers", "comfyui")
PREFIXES = "model.diffusion_model. model.model. diffusion_model. transformer. module. model. _orig_mod.".split()


def names_in(naming, name):
    """The names under which another release keeps the rows of our parameter `name`."""
    if naming not in NAMINGS:
        raise ValueError(f"no naming {naming!r}: there are {', '.join(NAMINGS)}")
    if naming == "original":
        return [name]
    module, _, kind = name.rpartition(".")
    number = re.search(r"blocks\.(\d+)\.", module)
    pattern = re.sub(r"blocks\.\d+\.", "blocks.*.", module)
    return [f"{n.replace('*', number[1] if number else '*')}.{kind}" for n in TABLE[pattern][naming == "comfyui"]]


def naming_of(names):
    """original, diffusers or comfyui, by what only one of them has."""
    if any(n.startswith(("x_embedder.", "single_transformer_blocks.", "transformer_blocks.")) for n in names):
        return "diffusers"
    return "comfyui" if any(re.search(r"_attn\.qkv|_mod\.lin\.|^time_in\.in_layer", n) for n in names) else "original"


def swap_halves(naming, name, tensor):
    """diffusers keeps the final layer's modulation as (scale, shift), the release as (shift, scale)."""
    swap = naming == "diffusers" and name.startswith("final_layer.adaLN_modulation")
    return torch.cat(tensor.chunk(2)[::-1]) if swap else tensor


def export_weight(config, name, tensor, naming):
    """One parameter of ours as {name: tensor} of another naming; ("original" gives it back)."""
    names = names_in(naming, name)
    return dict(zip(names, swap_halves(naming, name, tensor).split(row_sizes(config, names, len(tensor)))))


def row_sizes(config, names, rows):
    """How a parameter's rows are shared out over its names in another release: as many as the hidden size, the rest to the last."""
    return [config.hidden_size] * (len(names) - 1) + [rows - config.hidden_size * (len(names) - 1)]


def load_weights(model, source):
    """Load a file, a folder or a dict of tensors in any of the three namings, strictly; sharded models too.

    source: .safetensors file, folder of them (with an index or without), the original .pt, or {name: tensor}. Everything is
    checked first, names, shapes, types and values, so that nothing is loaded unless everything fits; then it streams tensor
    by tensor, each rank keeping its part. fp8 is loaded as the numbers that it holds; where they are to be multiplied by
    scales kept elsewhere, it is refused. ValueError says which names are missing, unknown or of another shape, and how many.
    """
    tensors = _unprefixed(_readers(source))
    naming = naming_of(tensors)
    params = {name: param for name, param in model.named_parameters() if "lora_" not in name}
    sources, wrong = {name: names_in(naming, name) for name in params}, []
    wanted = {n for names in sources.values() for n in names}
    for name, names in sources.items():
        shapes = [tensors[n][0] for n in names if n in tensors]
        if len(shapes) == len(names):
            whole = [sum(s[0] for s in shapes), *shapes[0][1:]] if all(shapes) else []
            if whole != list(params[name].shape) or any(s[1:] != shapes[0][1:] for s in shapes):
                wrong.append(f"{' + '.join(names)} is {whole}, the model has {list(params[name].shape)}")
    problems = dict(missing=sorted(wanted - set(tensors)), unknown=sorted(set(tensors) - wanted))
    problems |= {"of another shape": wrong}
    if any(problems.values()):
        told = [f"{len(v)} {k} ({', '.join(v[:3])}{', ..' * (len(v) > 3)})" for k, v in problems.items() if v]
        raise ValueError(f"weights in {naming} naming do not fit the model: {'; '.join(told)}")
    device = next(iter(params.values())).device  # a GPU looks at 26 GB in seconds
    for name in sorted(wanted):
        _check_values(name, tensors[name][1]().to(device))
    for name, names in sources.items():
        parts = [tensors[n][1]().to(params[name].dtype) for n in names]  # parts may be of different types
        assign(params[name], swap_halves(naming, name, torch.cat(parts) if len(parts) > 1 else parts[0]))


def _check_values(name, tensor):
    """ValueError for values that are not finite, or that want a scale which is not in the tensor."""
    wide = tensor.float() if tensor.itemsize == 1 else tensor
    if not wide.isfinite().all():
        raise ValueError(f"{name} has values that are not finite")
    if tensor.itemsize == 1 and wide.numel() and wide.abs().max() > torch.finfo(tensor.dtype).max / 2:
        raise ValueError(
            f"{name} is {str(tensor.dtype)[6:]} with values up to {wide.abs().max():.0f}: they are to be multiplied by a scale "
            "that is kept elsewhere; convert the weights to bfloat16 first"
        )


def _unprefixed(tensors):
    """Without the prefixes that trainers put before all names; ValueError where two names become one."""
    names = {name: name for name in tensors}
    for prefix in (p for p in PREFIXES for _ in range(2)):
        if tensors and all(name.startswith(prefix) for name in names.values()):
            names = {key: name.removeprefix(prefix) for key, name in names.items()}
    names = {key: re.sub(r"(query|key)_norm\.scale$", r"\1_norm.weight", name) for key, name in names.items()}
    keys = {}
    for key, name in names.items():
        if name in keys:
            raise ValueError(f"{keys[name]} and {key} are the same weight, {name}")
        keys[name] = key
    return {name: tensors[key] for name, key in keys.items()}


def weight_files(source):
    """The files of weights at a path: itself, those that a folder's index names, or all .safetensors of a folder."""
    path = Path(source)
    indices = _visible(path, "*.safetensors.index.json") if path.is_dir() else []
    files = _visible(path, "*.safetensors") if path.is_dir() else [path]
    if len(indices) > 1:
        raise ValueError(f"{path} holds the indices of {len(indices)} models: {indices[0].name} and {indices[1].name}")
    if indices:
        names = sorted(set(_weight_map(indices[0]).values()))
        if outside := [name for name in names if name in (".", "..") or "/" in name or "\\" in name]:
            raise ValueError(f"{indices[0]} names a file outside its folder: {outside[0]}")
        files = [path / name for name in names]
        if absent := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{path} is not whole: {absent[0]} is missing, which {indices[0].name} names")
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(f"no weights at {path}: expected a .safetensors or .pt file, or a folder with some")
    for file in files:
        if part := re.search(r"-(\d+)-of-(\d+)\.safetensors$", file.name):
            there = len([f for f in files if f.name.endswith(f"-of-{part[2]}.safetensors")])
            if there != int(part[2]):
                raise ValueError(f"{path} is not whole: it has {there} of {int(part[2])} files like {file.name}")
    return files


def _visible(folder, pattern):
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("."))


def _weight_map(index):
    try:
        names = json.loads(index.read_text())["weight_map"]
        assert all(isinstance(name, str) for name in [*names.keys(), *names.values()])
        return names
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
        raise ValueError(f"{index} is not an index of weights: it has no weight_map of names") from None


def _readers(source):
    """{name: (shape, function that reads the tensor)}; nothing is unpickled but tensors."""
    path = "the weights"
    if not isinstance(source, dict):
        path, readers = Path(source), {}
        files = weight_files(path)
        if files[0].suffix == ".safetensors":
            for file in files:
                for name, reader in _open(file).items():
                    if name in readers:
                        raise ValueError(f"{name} is in {file} and in another file of {path}")
                    readers[name] = reader
            for index in _visible(path, "*.safetensors.index.json") if path.is_dir() else []:
                if lost := sorted(set(_weight_map(index)) - set(readers)):
                    raise ValueError(f"{index} names {lost[0]}, which no file has")
            return readers
        if path.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
            raise ValueError(f"{path} is none of .safetensors, .pt, .pth, .bin, .ckpt: other formats are not read")
        scales = path.with_name(f"{path.stem}_map{path.suffix}")
        if scales.exists():
            raise ValueError(f"{path} is to be multiplied by the scales in {scales.name}: convert it to bfloat16 first")
        try:
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it is compressed")
            source = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            told = str(error) if str(error) == "it is compressed" else type(error).__name__
            raise ValueError(f"{path} is not a file of plain tensors as torch.save writes them ({told})") from None
        for key in ("module", "ema", "model", "state_dict"):
            source = source[key] if isinstance(source, dict) and isinstance(source.get(key), dict) else source
    if not isinstance(source, dict):
        raise ValueError(f"{path} should be floating-point tensors by name, it is of type {type(source).__name__}")
    for name, tensor in source.items():
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and isinstance(name, str)
        if not plain or not tensor.is_floating_point():
            kind = f"{tensor.dtype} tensor" if plain else type(tensor).__name__
            raise ValueError(f"{path} should be floating-point tensors by name, {name!r} is of type {kind}")
    return {name: (list(t.shape), partial(lambda t: t.detach(), t)) for name, t in source.items()}


def open_safetensors(file):
    """A safetensors file opened for reading; ValueError, one sentence, if it is none."""
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        told = "".join(c for c in str(error) if c.isprintable())[:200]
        raise ValueError(f"{file} is not a readable safetensors file: {told}") from None


def shapes_in(handle):
    """{name: shape} of an open safetensors file."""
    return {name: handle.get_slice(name).get_shape() for name in handle.keys()}


def text_fits(shapes, config):
    """Whether {name: shape} has text [L, text_dim], L > 0, and pooled [pooled_dim]."""
    text = shapes.get("text", [])
    return text[1:] == [config.text_dim] and text[0] > 0 and shapes.get("pooled") == [config.pooled_dim]


def read_text(file, config):
    """text [L, text_dim] and pooled [pooled_dim] of a safetensors file; ValueError where it has others, or what is not finite."""
    with open_safetensors(file) as handle:
        shapes = shapes_in(handle)
        if not text_fits(shapes, config):
            raise ValueError(
                f"{file} holds {shapes}, expected text [L, {config.text_dim}] and pooled [{config.pooled_dim}]"
            )
        if more := sorted(set(shapes) - {"latents", "text", "pooled"}):
            raise ValueError(f"{file} holds {', '.join(more)} beside text and pooled, which would be ignored")
        text, pooled = handle.get_tensor("text").float(), handle.get_tensor("pooled").float()
        if not (text.isfinite().all() and pooled.isfinite().all()):
            raise ValueError(f"{file} has values that are not finite")
        return text, pooled


def _open(file):
    handle = open_safetensors(file)
    slices = {name: handle.get_slice(name) for name in handle.keys()}
    if wrong := [f"{name} is {x.get_dtype()}" for name, x in slices.items() if "F" not in x.get_dtype()]:
        raise ValueError(f"{file} has {len(wrong)} tensors that are not floating-point ({wrong[0]})")
    return {name: (x.get_shape(), partial(handle.get_tensor, name)) for name, x in slices.items()}


def save_weights(model, folder, naming="original", dtype=torch.bfloat16, shard_bytes=5 * 10**9):
    """Export for others: sharded safetensors with an index, as diffusers' from_pretrained reads them, and config.json.

    Collective: all ranks call it, rank 0 writes. A sharded model is gathered one parameter at a time.
    """
    folder, stem, writes = Path(folder), "diffusion_pytorch_model", not dist.is_initialized() or dist.get_rank() == 0
    shards, index, held = [{}], {}, 0
    for name, param in model.named_parameters():
        full = whole(param).to("cpu", dtype)
        _check_values(name, full)
        for key, tensor in export_weight(model.config, name, full, naming).items():
            if held and held + tensor.nbytes > shard_bytes:
                _write_shard(writes, folder, shards)
                shards, held = [*shards, {}], 0
            shards[-1][key], index[key], held = tensor.contiguous(), len(shards), held + tensor.nbytes
    _write_shard(writes, folder, shards)
    if writes:
        # the old export goes when the new one is on the disk; the index comes last, so that half an export is none
        for old in [*folder.glob(f"{stem}*.safetensors"), *folder.glob(f"{stem}*.index.json")]:
            old.unlink()
        names = {i: f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)}
        for i, final in names.items():
            (folder / f".part-{i:05d}.safetensors").replace(folder / final)
        config = diffusers_config(model.config) if naming == "diffusers" else asdict(model.config)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        document = dict(metadata=dict(total_size=sum(Path(folder / n).stat().st_size for n in names.values())))
        document |= dict(weight_map={key: names[i] for key, i in index.items()})
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(document, indent=1))


def write_safetensors(tensors, file):
    """OSError where it can't be written."""
    try:
        save_file(tensors, file, metadata=dict(format="pt"))
        os.umask(umask := os.umask(0))
        os.chmod(file, 0o666 & ~umask)  # the library lets nobody else read it
    except SafetensorError as error:  # a full disk
        raise OSError(f"{file} could not be written: {error}") from None


def _write_shard(writes, folder, shards):
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(shards[-1], folder / f".part-{len(shards):05d}.safetensors")
    shards[-1] = {}


# --------------------------------------------------------------------------------------------------------------------
# LoRA, arXiv:2106.09685: y = W x + b + alpha / rank * B A x. W is frozen; A and B are trained, saved, and given to others


class LoRALinear(nn.Linear):
    """A linear layer and its update by lora_A [rank, in] and lora_B [out, rank], in float32 beside weights of any dtype."""

    def __init__(self, linear, rank, scale):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias, self.scale, bound = linear.weight, linear.bias, scale, linear.in_features**-0.5
        like = dict(device=linear.weight.device, dtype=torch.promote_types(linear.weight.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, **like).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, **like))

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_lora(model, rank, alpha=None):
    """Freeze the model, and give each linear of its blocks, modulations aside, a LoRA. Before `shard`. alpha: default rank."""
    for param in model.parameters():
        param.requires_grad = False
    for block in model.blocks:
        for name, linear in [*block.named_modules()]:
            if isinstance(linear, nn.Linear) and "mod" not in name:
                module, _, last = name.rpartition(".")
                setattr(block.get_submodule(module), last, LoRALinear(linear, rank, (alpha or rank) / rank))


def save_lora(model, file, naming="original"):
    """Write the LoRA as diffusers and ComfyUI read it, alpha / rank multiplied into B. Collective; rank 0 writes.

    naming: "original", or "diffusers", where q, k and v are apart and share A.
    """
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            a, b = whole(module.lora_A).cpu(), whole(module.lora_B).cpu() * module.scale
            for theirs, rows in export_weight(model.config, f"{name}.weight", b, naming).items():
                stem = "transformer." + theirs.removesuffix("weight")
                tensors |= {f"{stem}lora_A.weight": a.clone(), f"{stem}lora_B.weight": rows.clone()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_safetensors(tensors, f"{file}.part")
        Path(f"{file}.part").replace(file)


# a field of ours: the same in the config.json of diffusers' HunyuanVideoTransformer3DModel
DIFFUSERS_FIELDS = dict(
    num_heads="num_attention_heads",
    rope_dims="rope_axes_dim",
    rope_theta="rope_theta",
    double_depth="num_layers",
    single_depth="num_single_layers",
    refiner_depth="num_refiner_layers",
    mlp_ratio="mlp_ratio",
    in_channels="in_channels",
    out_channels="out_channels",
    text_dim="text_embed_dim",
    pooled_dim="pooled_projection_dim",
    guidance_embed="guidance_embeds",
    image_condition_type="image_condition_type",
)


def diffusers_config(config):
    """HunyuanConfig -> what diffusers' config.json holds."""
    time, side, _ = config.patch_size
    theirs = {name: getattr(config, ours) for ours, name in DIFFUSERS_FIELDS.items()}
    theirs |= dict(rope_axes_dim=list(config.rope_dims), attention_head_dim=config.head_dim, qk_norm="rms_norm")
    return dict(_class_name="HunyuanVideoTransformer3DModel") | theirs | dict(patch_size=side, patch_size_t=time)


def config_from_diffusers(file):
    """config.json of diffusers -> HunyuanConfig. ValueError for a model that is not HunyuanVideo's."""
    try:
        theirs = dict(image_condition_type=None) | json.loads(Path(file).read_text())
        ours = {name: theirs[key] for name, key in DIFFUSERS_FIELDS.items()}
        config = HunyuanConfig.from_dict(ours | dict(patch_size=[theirs["patch_size_t"], *[theirs["patch_size"]] * 2]))
        wrong = {key: value for key, value in diffusers_config(config).items() if theirs.get(key) != value}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is not the config of a HunyuanVideoTransformer3DModel ({error!r})") from None
    kind = config.image_condition_type
    channels = {
        None: [config.in_channels],
        "token_replace": [config.out_channels],
        "latent_concat": [2 * config.out_channels + 1],
    }
    if config.in_channels not in channels.get(kind, []):
        raise ValueError(
            f"{file} has image_condition_type {kind} and {config.in_channels} channels: it is neither kind that is known"
        )
    if wrong:
        told = ", ".join(f"{key} is {theirs.get(key)}, not {value}" for key, value in wrong.items())
        raise ValueError(f"{file} is of another model: {told}")
    return config


# --------------------------------------------------------------------------------------------------------------------
# the lesson


def lesson(token=30):
    """One token's journey through a tiny model of 45 video and 7 text tokens: what each rank holds at every stage."""
    torch.manual_seed(0)
    manager, stages = ParallelManager(1, None, "cpu"), []
    group = manager.sp_group
    model = HunyuanVideo(HunyuanConfig.preset("tiny", double_depth=1, single_depth=1))
    sizes = split_sizes(45, group)
    home = next(r for r in range(manager.world_size) if token < sum(sizes[: r + 1]))

    def see(name, *tensors):
        stages.append((name, " and ".join(str(list(x.shape)) for x in tensors)))

    def watch(module, name):
        module.register_forward_hook(lambda _, args, out: see(name, *(out if isinstance(out, tuple) else (out,))))

    def attention(q, k, v):
        see("  after the all-to-all, q, k and v each: all tokens, some heads", q)
        return sdpa(q, k, v)

    double, single, model.attention = model.double_blocks[0], model.single_blocks[0], attention
    watch(model.img_in, "video: patches, split, then embedded")
    watch(model.txt_in, "text: refined whole on every rank, then split as well")
    watch(double.img_attn_qkv, "dual-stream block: video's q k v")
    watch(double.txt_attn_qkv, "  text's q k v")
    watch(double.img_attn_proj, "  after the way back: video's tokens, all heads")
    watch(double, "  video and text")
    watch(single.linear1, "single-stream block, video and text joined: q k v and MLP")
    watch(single, "  the block's output")
    watch(model.final_layer, "final layer, video alone")
    with torch.no_grad():
        inputs = torch.randn(1, 3, 3, 6, 10), torch.tensor([500.0]), torch.randn(1, 7, 32), [7], torch.randn(1, 32)
        see("gathered, for sampling only", model(*inputs, group=group))
    everyone = manager.together(lambda: [shapes for _, shapes in stages])
    if manager.is_main:
        print(
            f"video token {token} of 45 lives on rank {home}, as row {token - sum(sizes[:home])} of its {sizes[home]}"
        )
        for n, (name, _) in enumerate(stages):
            print(f"{name:64}" + "   ".join(f"rank {r}: {shapes[n]}" for r, shapes in enumerate(everyone)))
    return manager


if __name__ == "__main__":
    run(lesson, ".")
