"""Sample from what train_min.py saved, or from released weights, under sequence parallelism.

    $ torchrun --nproc_per_node=2 infer_min.py --prompt "a blue circle moves up"
    $ torchrun --nproc_per_node=2 infer_min.py --score 20       # of 20 prompts: is the colour, is the direction right?
    $ torchrun --nproc_per_node=4 infer_min.py --config 13b --weights transformer/ --embeds prompt.safetensors \\
          --height 720 --width 1280 --frames 129 --steps 50 --shift 7 --guidance 6
    $ python infer_min.py --export released/ --naming diffusers

All ranks share each clip unless --sp says otherwise. The same seed gives the same clip on any number of ranks.
In this order: flags, the Euler loop, the story, what it builds, looking at clips.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path

import torch

from comm import Checkpoints, ParallelManager, fingerprint, run
from hunyuan_sp import (
    NAMINGS,
    HunyuanConfig,
    HunyuanVideo,
    forward_flops,
    guidance_input,
    init_weights,
    latent_shape,
    load_weights,
    read_text,
    save_weights,
    shift_sigma,
    weight_files,
    write_safetensors,
)
from sampler import seeded
from train_min import Clock, Shapes, add_common_flags, check_flags, compute_dtype, get_config


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = p.add_argument
    flag("--prompt", action="append", help="what to show; may be given several times")
    flag("--negative_prompt", default="", help="what to steer away from, where --cfg is over 1")
    flag("--embeds", help=".safetensors with text [L, 4096] and pooled [768], in place of --prompt")
    flag("--negative_embeds", help="the same for the negative prompt")
    flag("--score", type=int, help="sample so many prompts and measure colour and direction in the pixels")
    flag("--checkpoint", default="out", help="the --out folder of train_min.py")
    flag("--config", help="model preset, for --weights or for random weights (benchmarks)")
    flag("--sp", "--sequence_parallel_size", type=int, help="ranks that share a clip (default: all)")
    flag("--dp", "--data_parallel_size", type=int, help="groups that sample other prompts (default: world size / sp)")
    flag("--shard", action="store_true", help="FSDP2, for weights that do not fit one GPU")
    flag("--steps", type=int, default=20, help="Euler steps")
    flag("--shift", type=float, help="flow shift (default 4; 13b: 7)")
    flag("--guidance", type=float, default=6.0, help="embedded guidance scale, for models that have it")
    flag("--cfg", type=float, default=1.0, help="true classifier-free guidance scale, two passes in one batch")
    flag("--seed", type=int, default=0, help="of the noise")
    flag("--output", default="clip", help="name of the files written: NAME.safetensors, and NAME.gif with Pillow")
    flag("--export", help="write the weights to this folder instead of sampling")
    flag("--naming", choices=NAMINGS, default="original", help="of --export")
    add_common_flags(p)
    return p.parse_args(argv)


# --------------------------------------------------------------------------------------------------------------------
# the Euler flow sampler


@torch.no_grad()
def sample(model, latents, text, pooled, steps, shift, guidance=None, group=None, negative=None, cfg=1.0, clock=None):
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
        if clock:
            clock.start()
        t = torch.full((len(text),), 1000 * now, device=latents.device)
        both = torch.cat((latents, latents)) if true_cfg else latents
        velocity = model(both, t, padded, lengths, pooled, scale, group=group).to(latents.dtype)
        if true_cfg:
            away, towards = velocity.split(batch)
            velocity = away + cfg * (towards - away)
        latents = latents + (then - now) * velocity
        if clock:
            video = latents[0, 0].numel() // math.prod(model.config.patch_size)
            clock.stop(batch * video, sum(forward_flops(model.config, video, length) for length in lengths))
    return latents


def sigma_schedule(steps, shift):
    """steps + 1 noise levels in float32, from 1 (noise) to 0 (clip); the model's timestep is 1000 sigma."""
    return shift_sigma(1 - torch.arange(steps + 1) / steps, shift)


# --------------------------------------------------------------------------------------------------------------------
# the story


def infer(args):
    """Build the model, sample every prompt, write the clips. Gives back the ParallelManager."""
    check_flags(args, "steps score", 1)
    check_flags(args, "shift", 1e-9)
    check_flags(args, "cfg guidance", 0.0)
    check_flags(args, "seed", 0, 2**62)
    args.config = args.config or ("13b" if args.weights else None)
    config = get_config(args) if args.config else None  # else the checkpoint's
    if config and config.out_channels != 3:
        latent_shape(config, args.height, args.width, args.frames)  # a size that can't be is told before the ranks meet
    files = [*weight_files(args.weights)] if args.weights else []
    files += [file for file in (args.embeds, args.negative_embeds) if file and Path(file).is_file()]
    pm = ParallelManager(args.dp, args.sp, args.device)
    pm.check_equal(vars(args) | dict(torch=torch.__version__, files=fingerprint(files)))
    model = build_model(config, pm, args)
    config, toy = model.config, model.config.out_channels == 3
    if args.export:
        return export(pm, model, args)

    prompts, negative = read_prompts(args, config)
    shape = Shapes.CLIP_SHAPE if toy else latent_shape(config, args.height, args.width, args.frames)
    shift, right = args.shift or (4.0 if toy else 7.0), [0, 0, 0]
    traces = f"{args.output}-trace" if args.profile else None
    clock = Clock(pm, args.steps, traces, profiled=args.profile or not toy, wait=True)
    for first in range(0, len(prompts), pm.dp_size):
        # every rank takes the same number of steps, also with nothing to do
        n = min(first + pm.dp_rank, len(prompts) - 1)
        (title, text, pooled), surplus = prompts[n], first + pm.dp_rank > n
        noise = torch.randn((1, *shape), generator=seeded("sample", args.seed, n))
        inputs = [noise.to(pm.device), [text.to(pm.device)], pooled.to(pm.device)[None]]
        away = [negative[0].to(pm.device)], negative[1].to(pm.device)[None]
        rules = (args.steps, shift, args.guidance, pm.sp_group, away, args.cfg)
        clip = sample(model, *inputs, *rules, clock=clock if first == 0 else None)[0].cpu()
        pm.together(partial(check_clip, clip, title))
        if surplus:
            continue
        if args.score:
            colour, direction = Shapes.measure(clip)
            right = [right[0] + 1, right[1] + (colour in title), right[2] + title.endswith(direction)]
        if pm.sp_rank == 0:
            show(clip, title, args.output + (f"-{n}" if len(prompts) > 1 else ""), draw=toy and not args.score)
    if args.score:
        total, colours, directions = (pm.sum(float(count)).item() / pm.sp_size for count in right)
        if pm.is_main:
            print(f"of {total:.0f} prompts, the colour is right in {colours:.0f} and the direction in {directions:.0f}")
    elif pm.is_main and not toy:
        print(json.dumps(clock.report()), flush=True)
    return pm


def check_clip(clip, title):
    if not clip.isfinite().all():
        raise ValueError(f"the clip of {title!r} has values that are not finite: nothing is written")


# --------------------------------------------------------------------------------------------------------------------
# what it builds


def build_model(config, pm, args):
    """Trained (config is None), released or random weights; plain tensors on every rank, or sharded."""
    trained = config is None
    if trained:
        checkpoints = Checkpoints(pm, args.checkpoint)
        path, state = checkpoints.find()
        config = HunyuanConfig.from_dict(state["config"])
    dtype = compute_dtype(args, pm.device)
    with torch.device("meta"):
        model = HunyuanVideo(config, args.attention).requires_grad_(False)
    if args.shard:
        pm.shard(model, model.blocks, None if dtype == torch.float32 else dtype)
    else:
        model = (model if trained else model.to(dtype)).to_empty(device=pm.device)
    if trained:
        checkpoints.load(path, model)
    elif args.weights:
        load_weights(model, args.weights)
    else:
        init_weights(model)
    model = model if args.shard else model.to(dtype)
    if args.compile:
        model.compile_blocks()
    return model


def export(pm, model, args):
    pm.on_main(lambda: Path(args.export).mkdir(parents=True, exist_ok=True))
    save_weights(model, args.export, args.naming)
    if pm.is_main:
        print(f"wrote {args.export} in {args.naming} naming")
    return pm


def read_prompts(args, config):
    """[(title, text, pooled)], and the negative (text, pooled). ValueError where words alone will not do.

    Only the toy and random weights (a benchmark) take hashed words for an embedding.
    """
    toy, random = config.out_channels == 3, bool(args.config and not args.weights)
    if args.score and not toy:
        raise ValueError(f"--score reads pixels, this model gives {config.out_channels} latent channels")
    if args.embeds and (args.prompt or args.score):
        raise ValueError("--embeds takes the place of --prompt and --score: give one of them")
    if not args.embeds and not toy and not random:
        raise ValueError("a --prompt is only hashed here, which these weights do not understand: give --embeds")
    if args.embeds and args.cfg > 1 and not args.negative_embeds:
        raise ValueError(f"--cfg {args.cfg} with --embeds needs --negative_embeds")
    negative = Shapes.embed(args.negative_prompt, config)
    if args.negative_embeds:
        negative = read_text(args.negative_embeds, config)
    if args.embeds:
        return [(args.embeds, *read_text(args.embeds, config))], negative
    prompts = args.prompt or ["a blue circle moves up"]
    if args.score:
        captions = Shapes.captions()
        order = torch.randperm(len(captions), generator=seeded("score", args.seed)).tolist()
        prompts = [captions[order[n % len(order)]] for n in range(args.score)]
    return [(prompt, *Shapes.embed(prompt, config)) for prompt in prompts], negative


# --------------------------------------------------------------------------------------------------------------------
# looking at a clip [3, T, h, w] of pixels in -1..1


def show(clip, title, name, draw):
    """Write the clip's files, and draw it."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(dict(latents=clip.contiguous()), f"{name}.safetensors")
    written = f"{name}.safetensors"
    if len(clip) == 3:
        written += f", {name}.gif" if write_gif(clip, f"{name}.gif") else " (a GIF too with Pillow: the extra [video])"
    if draw:
        print(f"{title}\n{colour_blocks(clip)}")
    print(f"{title}: wrote {written}", flush=True)


def colour_blocks(clip):
    """The frames side by side, two pixels a character, in terminal colours."""
    pixels = to_bytes(clip).tolist()
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
    pixels = to_bytes(clip)
    size = (pixels.shape[2] * zoom, pixels.shape[1] * zoom)
    frames = [Image.fromarray(frame.numpy()).resize(size, Image.Resampling.NEAREST) for frame in pixels]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=300, loop=0)
    return True


def to_bytes(clip):
    """[3, T, h, w] in -1..1 -> [T, h, w, 3] in 0..255."""
    return ((clip.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).contiguous()


if __name__ == "__main__":
    args = parse()
    run(partial(infer, args), args.output, args.debug)
