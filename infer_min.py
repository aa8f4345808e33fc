"""Sample from what train_min.py saved, or from released weights, under sequence parallelism.

    $ torchrun --nproc_per_node=2 infer_min.py --prompt "a blue circle moves up"
    $ torchrun --nproc_per_node=2 infer_min.py --score 20       # of 20 prompts: is the colour, is the direction right?
    $ torchrun --nproc_per_node=4 infer_min.py --config 13b --weights transformer/ --embeds prompt.safetensors \\
          --height 720 --width 1280 --frames 129 --steps 50 --shift 7 --guidance 6
    $ python infer_min.py --export released/ --naming diffusers

All ranks share each clip unless --sp says otherwise. The same seed gives the same clip on any number of ranks.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from comm import ParallelManager
from hunyuan_sp import NAMINGS, HunyuanConfig, HunyuanVideo, forward_flops, init_weights, load_weights, save_weights
from train_min import (
    CAPTIONS,
    CLIP_SHAPE,
    COLOURS,
    DIRECTIONS,
    Profile,
    RandomLatents,
    add_common_flags,
    check_flags,
    compute_dtype,
    embed_text,
    get_config,
    guidance_input,
    rates,
    read_tensors,
    run,
    seeded,
    shapes_in,
    shift_sigma,
    text_fits,
)


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompt", action="append", help="what to show; may be given several times")
    p.add_argument("--negative_prompt", default="", help="what to steer away from, where --cfg is over 1")
    p.add_argument("--embeds", help=".safetensors with text [L, 4096] and pooled [768], in place of --prompt")
    p.add_argument("--negative_embeds", help="the same for the negative prompt")
    p.add_argument("--score", type=int, help="sample so many prompts and measure colour and direction in the pixels")
    p.add_argument("--checkpoint", default="out", help="the --out folder of train_min.py")
    p.add_argument("--config", help="model preset, for --weights or for random weights (benchmarks)")
    p.add_argument("--dp", type=int, help="groups that each sample other prompts (default: world size / sp)")
    p.add_argument("--sp", type=int, help="ranks that share a clip (default: all)")
    p.add_argument("--shard", action="store_true", help="FSDP2, for weights that do not fit one GPU")
    p.add_argument("--steps", type=int, default=20, help="Euler steps")
    p.add_argument("--shift", type=float, help="flow shift (default 4; 13b: 7)")
    p.add_argument("--guidance", type=float, default=6.0, help="embedded guidance scale, for models that have it")
    p.add_argument(
        "--cfg", type=float, default=1.0, help="true classifier-free guidance scale, two passes in one batch"
    )
    p.add_argument("--seed", type=int, default=0, help="of the noise")
    p.add_argument(
        "--output", default="clip", help="name of the files written: NAME.safetensors, and NAME.gif with Pillow"
    )
    p.add_argument("--export", help="write the weights to this folder instead of sampling")
    p.add_argument("--naming", choices=NAMINGS, default="original", help="of --export")
    add_common_flags(p)
    return p.parse_args(argv)


# --------------------------------------------------------------------------------------------------------------------
# the Euler flow sampler


def sigma_schedule(steps, shift):
    """steps + 1 noise levels in float32, from 1 (noise) to 0 (clip); the model's timestep is 1000 sigma."""
    return shift_sigma(1 - torch.arange(steps + 1) / steps, shift)


@torch.no_grad()
def sample(model, latents, text, pooled, steps, shift, guidance=None, group=None, negative=None, cfg=1.0, on_step=None):
    """Noise [B, C, T, h, w] -> clip. The state stays in the latents' dtype, whatever the model computes in.

    text: B tensors [L_b, text_dim]; pooled [B, pooled_dim]; guidance: embedded scale. negative: (text, pooled) of the same
    form, used where cfg > 1: velocity = negative + cfg (positive - negative), both in one ragged batch.
    """
    batch, true_cfg = len(latents), negative is not None and cfg > 1
    if true_cfg:
        text, pooled = [*negative[0], *text], torch.cat((negative[1], pooled))
    lengths, padded = [len(t) for t in text], torch.nn.utils.rnn.pad_sequence(text, batch_first=True)
    scale = guidance_input(guidance, len(text), latents.device) if model.config.guidance_embed else None
    sigmas = sigma_schedule(steps, shift)
    for now, then in zip(sigmas.tolist(), sigmas[1:].tolist()):
        t = torch.full((len(text),), 1000 * now, device=latents.device)
        both = torch.cat((latents, latents)) if true_cfg else latents
        velocity = model(both, t, padded, lengths, pooled, scale, group=group).to(latents.dtype)
        if true_cfg:
            away, towards = velocity.split(batch)
            velocity = away + cfg * (towards - away)
        latents = latents + (then - now) * velocity
        if on_step:
            on_step()
    return latents


# --------------------------------------------------------------------------------------------------------------------
# looking at a clip [3, T, h, w] of pixels in -1..1


def colour_blocks(clip):
    """The frames side by side, two pixels a character, in terminal colours."""
    pixels = ((clip.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 3, 0).tolist()  # [T, h, w, 3]
    lines = []
    for y in range(0, len(pixels[0]), 2):
        rows = []
        for frame in pixels:
            below = frame[min(y + 1, len(frame) - 1)]
            pairs = zip(frame[y], below)
            rows.append("".join("\033[38;2;{};{};{}m\033[48;2;{};{};{}m▀".format(*a, *b) for a, b in pairs) + "\033[0m")
        lines.append("  ".join(rows))
    return "\n".join(lines)


def write_gif(clip, path, zoom=16):
    """Needs Pillow (the extra [video]); False without it."""
    try:
        from PIL import Image
    except ImportError:
        return False
    pixels = ((clip.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 3, 0).contiguous()
    size = (pixels.shape[2] * zoom, pixels.shape[1] * zoom)
    frames = [Image.frombytes("RGB", (size[0] // zoom, size[1] // zoom), f.numpy().tobytes()) for f in pixels]
    frames = [f.resize(size, Image.Resampling.NEAREST) for f in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=300, loop=0)
    return True


def measure(clip):
    """(colour, direction) of what moves in the pixels: the nearest colour, and where its centre goes."""
    light = (clip.float().clamp(-1, 1) + 1) / 2
    solid = (light.amax(0) > 0.5).float()  # [T, h, w]
    rgb = (light * solid).sum((1, 2, 3)) / solid.sum().clamp(min=1)
    colour = min(COLOURS, key=lambda name: (rgb - torch.tensor(COLOURS[name])).square().sum())
    mass = solid.sum((1, 2)).clamp(min=1)
    y = (solid.sum(2) * torch.arange(clip.shape[2])).sum(1) / mass
    x = (solid.sum(1) * torch.arange(clip.shape[3])).sum(1) / mass
    moved = (y[-1] - y[0], x[-1] - x[0])
    return colour, max(DIRECTIONS, key=lambda name: sum(a * b for a, b in zip(DIRECTIONS[name], moved)))


# --------------------------------------------------------------------------------------------------------------------
# the story


def build_model(pm, args):
    """Trained, released or random weights; plain tensors on every rank, or sharded."""
    trained = not (args.weights or args.config)
    if trained:
        path, state = pm.find(args.checkpoint)
        config = HunyuanConfig.from_dict(state["config"])
    else:
        args.config = args.config or "13b"
        config = get_config(args)
    dtype = compute_dtype(args, pm.device)
    with torch.device("meta"):
        model = HunyuanVideo(config, args.attention).requires_grad_(False)
    if args.shard:
        pm.shard(model, model.blocks, None if dtype == torch.float32 else dtype)
    else:
        pm.model = (model if trained else model.to(dtype)).to_empty(device=pm.device)
    if trained:
        pm.load(path)
    elif args.weights:
        load_weights(model, args.weights)
    else:
        init_weights(model)
    model = model if args.shard else model.to(dtype)
    if args.compile:
        model.compile_blocks()
    return model


def read_prompts(args, config):
    """[(title, (text, pooled))], and the negative one."""

    def read(file):
        shapes = shapes_in(file)
        if not text_fits(shapes, config):
            raise ValueError(
                f"{file} holds {shapes}, expected text [L, {config.text_dim}] and pooled [{config.pooled_dim}]"
            )
        return read_tensors(file, "text", "pooled")

    def embed(prompt):
        return embed_text(prompt, config.text_dim, config.pooled_dim)

    negative = read(args.negative_embeds) if args.negative_embeds else embed(args.negative_prompt)
    if args.embeds:
        return [(args.embeds, read(args.embeds))], negative
    prompts = args.prompt or ["a blue circle moves up"]
    if args.score:
        order = torch.randperm(len(CAPTIONS), generator=seeded("score", args.seed)).tolist()
        prompts = [CAPTIONS[order[n % len(order)]] for n in range(args.score)]
    return [(prompt, embed(prompt)) for prompt in prompts], negative


def infer(args):
    check_flags(args, "steps score", 1)
    check_flags(args, "shift", 1e-9)
    check_flags(args, "cfg", 0.0)
    pm = ParallelManager(args.dp, args.sp, args.device)
    model = build_model(pm, args)
    config, big = model.config, model.config.out_channels != 3
    if args.export:
        pm.on_main(lambda: Path(args.export).mkdir(parents=True, exist_ok=True))
        save_weights(model, args.export, args.naming)
        if pm.is_main:
            print(f"wrote {args.export} in {args.naming} naming")
        return pm

    prompts, negative = read_prompts(args, config)
    shape = RandomLatents(config, args.height, args.width, args.frames, 1).shape if big else CLIP_SHAPE
    shift, right = args.shift or (7.0 if big else 4.0), [0, 0, 0]
    looked = Profile(pm, args.profile and f"{args.output}-trace") if args.profile or big else None
    clock = Clock(pm, looked, args.steps)
    for first in range(0, len(prompts), pm.dp_size):
        n = min(
            first + pm.dp_rank, len(prompts) - 1
        )  # every rank takes the same number of steps, also with nothing to do
        extra, (title, (text, pooled)) = first + pm.dp_rank > n, prompts[n]
        noise = torch.randn((1, *shape), generator=seeded("sample", args.seed, n)).to(pm.device)
        text, pooled = text.to(pm.device), pooled.to(pm.device)
        away = ([negative[0].to(pm.device)], negative[1].to(pm.device)[None])
        clock.start()
        clip = sample(
            model,
            noise,
            [text],
            pooled[None],
            args.steps,
            shift,
            args.guidance,
            pm.sp_group,
            away,
            args.cfg,
            clock.tick,
        )[0].cpu()
        if extra:
            continue
        if args.score:
            colour, direction = measure(clip)
            right = [right[0] + 1, right[1] + (colour in title), right[2] + title.endswith(direction)]
        if pm.sp_rank == 0:
            show(clip, title, args.output + (f"-{n}" if len(prompts) > 1 else ""), quiet=bool(args.score))
    if args.score:
        total, colours, directions = (pm.sum(float(count)).item() / pm.sp_size for count in right)
        if pm.is_main:
            print(f"of {total:.0f} prompts, the colour is right in {colours:.0f} and the direction in {directions:.0f}")
    elif pm.is_main and big:
        video = shape[1] * shape[2] * shape[3] // 4
        forward = forward_flops(config, video, len(text)) * (1 + (args.cfg > 1))
        # of the first clip's steps: two of warm-up, and the last was looked into
        timed = clock.seconds[2 : args.steps - 1] or clock.seconds[: args.steps - 1] or clock.seconds
        speed = rates(pm, sorted(timed)[len(timed) // 2], video, forward)
        print(json.dumps(speed | looked.shares | dict(fastest=round(min(timed), 4))), flush=True)
    return pm


class Clock:
    """Seconds of each step, as the wall sees them; the last step of the first clip may be looked into."""

    def __init__(self, pm, looked, steps):
        self.pm, self.looked, self.steps, self.seconds = pm, looked, steps, []

    def start(self):
        if self.looked and len(self.seconds) == self.steps - 1:
            self.looked.start()
        self.last = self.now()

    def now(self):
        if self.pm.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def tick(self):
        self.seconds.append(self.now() - self.last)
        if self.looked and len(self.seconds) == self.steps:
            self.looked.stop()
        self.start()


def show(clip, title, name, quiet):
    """Write the clip's files, and draw it where it is pixels."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(latents=clip.contiguous()), f"{name}.safetensors")
    written = f"{name}.safetensors"
    if len(clip) == 3:
        written += f", {name}.gif" if write_gif(clip, f"{name}.gif") else " (a GIF too with Pillow: the extra [video])"
        if not quiet:
            print(f"{title}\n{colour_blocks(clip)}")
    print(f"{title}: wrote {written}", flush=True)


if __name__ == "__main__":
    run(infer, parse())
