"""Prompts in, clips out, under sequence parallelism: all ranks share each clip.

    $ torchrun --nproc_per_node=2 infer_min.py --prompt "a blue circle moves up"    # the toy that train_min.py trained
    $ torchrun --nproc_per_node=2 infer_min.py --score 20                           # how many of 20 prompts are right
    $ SIZE="--height 720 --width 1280 --frames 129 --shift 7"
    $ torchrun --nproc_per_node=8 infer_min.py --weights FILE --embeds FILE --steps 50 $SIZE    # the release: writes latents
    $ torchrun --nproc_per_node=4 infer_min.py --config 13b --steps 4 $SIZE                     # random: a benchmark

The same seed gives the same clip on any number of ranks. Released snapshots, image-to-video, LoRA files, .mp4:
`torchrun -m full.infer`, which takes its Euler steps with this file's `sample`.
"""

import time

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from comm import ParallelManager
from hunyuan_sp import (
    HunyuanConfig,
    HunyuanVideo,
    guidance_input,
    init_weights,
    latent_shape,
    load_release,
    shift_sigma,
    with_image,
)
from sampler import seeded
from train_min import Shapes, newest_checkpoint, parse, tensors_of


def add_flags(parser):
    flag = parser.add_argument
    flag("--prompt", action="append", help="a caption for the toy; may be given several times")
    flag("--embeds", action="append", help=".safetensors with text and pooled, instead of a prompt")
    flag("--score", type=int, help="sample this many prompts, and measure colour, shape and direction in the pixels")
    flag("--checkpoint", default="out", help="folder that train_min.py saved to; the newest step is used")
    flag("--weights", help="released weights in the original naming: a file, or a folder of .safetensors")
    flag("--config", help="model preset: tiny, or 13b (without --weights random weights, for benchmarks)")
    flag("--steps", type=int, default=20, help="Euler steps")
    flag("--shift", type=float, default=4.0, help="flow shift (the 13B: 7)")
    flag("--guidance", type=float, default=6.0, help="embedded guidance scale, for models that have it")
    flag("--seed", type=int, default=0, help="of the noise")
    flag("--output", default="clip", help="name of the .gif or .safetensors; those after the first get -1, -2, ..")
    flag("--height", type=int, default=256)
    flag("--width", type=int, default=256)
    flag("--frames", type=int, default=17, help="4k + 1")
    flag("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    flag("--compile", action="store_true", help="torch.compile both sides of each block's attention")


# --------------------------------------------------------------------------------------------------------------------
# the Euler solver


@torch.no_grad()
def sample(model, latents, text, pooled, steps, shift, guidance=None, group=None, negative=None, cfg=1.0, image=None):
    """Turn noise [B, c, T, h, w] into a clip. Latents keep their dtype from step to step, whatever the model computes in.

    text: B tensors [L_b, text_dim]; pooled [B, pooled_dim]; guidance: the scale, for models that embed it.
    negative: (text, pooled) of the same form, used if cfg > 1: velocity = negative + cfg * (positive - negative), both
    in one ragged batch. image: latents [B, c, 1, h, w] of the first frame, for image-to-video models.
    """
    kind = model.config.image_condition_type
    true_cfg = negative is not None and cfg > 1
    if true_cfg:
        text = [*negative[0], *text]
        pooled = torch.cat((negative[1], pooled))
    lengths = [len(row) for row in text]
    padded = torch.nn.utils.rnn.pad_sequence(text, batch_first=True)
    scale = guidance_input(guidance, len(text), latents.device) if model.config.guidance_embed else None
    if kind:
        noise = torch.tensor(0.999).to(latents)  # rounded to float32 as in the release: the image's share is 0.00100005
        latents = noise * latents + (1 - noise) * image

    sigmas = sigma_schedule(steps, shift).tolist()
    for now, then in zip(sigmas, sigmas[1:]):
        timestep = torch.full((len(text),), 1000 * now, device=latents.device)
        inputs = with_image(latents, image, kind).repeat(1 + true_cfg, 1, 1, 1, 1)
        velocity = model(inputs, timestep, padded, lengths, pooled, scale, group=group)
        velocity = velocity.to(latents.dtype)
        if true_cfg:
            away, towards = velocity.chunk(2)
            velocity = away + cfg * (towards - away)
        latents = latents + (then - now) * velocity
    return with_image(latents, image, kind) if kind == "token_replace" else latents


def sigma_schedule(steps, shift):
    """Return steps + 1 noise levels in float32, from 1 (noise) to 0 (clip); the model's timestep is 1000 sigma."""
    return shift_sigma(1 - torch.arange(steps + 1) / steps, shift)


# --------------------------------------------------------------------------------------------------------------------
# the story


def infer(args):
    """Build the model, sample a clip for every prompt, show or save it. Return the ParallelManager."""
    pm = ParallelManager(1, None, args.device)  # all ranks share each clip
    pm.check_equal(vars(args), pm.world_group)
    model = build_model(pm, args)
    config = model.config
    toy = config.out_channels == 3  # its clips are pixels, not latents
    shape = Shapes.CLIP_SHAPE if toy else latent_shape(config, args.height, args.width, args.frames)
    rules = dict(steps=args.steps, shift=args.shift, guidance=args.guidance, group=pm.sp_group)

    scores = []
    prompts = choose_prompts(args)
    for n, prompt in enumerate(prompts):
        began = time.perf_counter()
        text, pooled = embed(prompt, config, args, pm.device)
        noise = torch.randn((1, *shape), generator=seeded("sample", args.seed, n)).to(pm.device)
        clip = sample(model, noise, [text], pooled[None], **rules)[0].cpu()
        if pm.is_main:
            print(f"{prompt}: {args.steps} steps in {time.perf_counter() - began:.2f} s", flush=True)
            if args.score:
                scores.append(score(clip, prompt))
            else:
                show(clip, f"{args.output}-{n}" if n else args.output, toy)
    if scores:
        print(score_line(scores))
    return pm


def score(clip, prompt):
    """Return whether colour, shape and direction in a clip's pixels are those of its prompt: three booleans."""
    return [word in prompt.split() for word in Shapes.measure(clip)]


def score_line(scores):
    """Return what is printed of the scores of several clips."""
    return "of {} prompts right: colour {}, shape {}, direction {}".format(len(scores), *map(sum, zip(*scores)))


def build_model(pm, args):
    """Build the model, all of it on every rank, with the weights of a checkpoint, the release's, or random ones."""
    from_checkpoint = not (args.weights or args.config)
    if from_checkpoint:
        folder, manifest = newest_checkpoint(args.checkpoint)
        config = HunyuanConfig.from_dict(manifest["config"])
    else:
        config = HunyuanConfig.preset(args.config or "13b")
    with torch.device("meta"):
        model = HunyuanVideo(config).to(torch.bfloat16 if pm.device.type == "cuda" else torch.float32)
    model = model.to_empty(device=pm.device).requires_grad_(False)
    if from_checkpoint:
        dcp.load(tensors_of(model), storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    elif args.weights:
        load_release(model, args.weights)
    else:
        init_weights(model)
    if args.compile:
        model.compile_blocks()
    return model


# --------------------------------------------------------------------------------------------------------------------
# prompts and their embeddings


def choose_prompts(args):
    """Return the prompts to sample. A file of --embeds takes the place of a prompt."""
    if args.score:
        captions = Shapes.captions()
        order = torch.randperm(len(captions), generator=seeded("score", args.seed)).tolist()
        return [captions[order[n % len(order)]] for n in range(args.score)]
    return args.embeds or args.prompt or ["a blue circle moves up"]


def embed(prompt, config, args, device):
    """Return text [L, text_dim] and pooled [pooled_dim] of a prompt of the toy, or of a file of --embeds."""
    if args.embeds:
        stored = load_file(prompt)
        return stored["text"].float().to(device), stored["pooled"].float().to(device)
    benchmark = args.config and not args.weights  # random weights understand nothing anyway
    if config.out_channels != 3 and not benchmark:
        raise ValueError("only the toy understands the words of a prompt: give --embeds instead")
    text, pooled = Shapes.embed(prompt, config)
    return text.to(device), pooled.to(device)


# --------------------------------------------------------------------------------------------------------------------
# looking at a clip


def show(clip, name, toy):
    """Write latents to NAME.safetensors; a clip of the toy is pixels: print it, and write NAME.gif."""
    if toy:
        print(colour_blocks(clip))
        gif(clip, name)
    else:
        save_file({"latents": clip}, f"{name}.safetensors")


def to_bytes(clip):
    """Convert [3, F, H, W] in -1..1 -> [F, H, W, 3] in 0..255, rounded."""
    return (clip / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(1, 2, 3, 0).contiguous()


def colour_blocks(clip):
    """Return the frames side by side in terminal colours, two pixels a character."""
    lines = []
    pixels = to_bytes(clip).tolist()
    for y in range(0, len(pixels[0]), 2):
        rows = []
        for frame in pixels:
            pairs = zip(frame[y], frame[y + 1])
            cells = ["\033[38;2;{};{};{}m\033[48;2;{};{};{}m▀".format(*upper, *lower) for upper, lower in pairs]
            rows.append("".join(cells) + "\033[0m")
        lines.append("  ".join(rows))
    return "\n".join(lines)


def gif(clip, name, zoom=16):
    """Write NAME.gif, if Pillow is installed (the extra [video])."""
    try:
        from PIL import Image
    except ImportError:
        return
    size = (clip.shape[3] * zoom, clip.shape[2] * zoom)
    images = [Image.fromarray(frame.numpy()) for frame in to_bytes(clip)]
    frames = [image.resize(size, Image.Resampling.NEAREST) for image in images]
    frames[0].save(f"{name}.gif", save_all=True, append_images=frames[1:], duration=300, loop=0)


if __name__ == "__main__":
    usage = "infer_min.py [flags] (snapshots, images, LoRA, .mp4: torchrun -m full.infer, full.encode, full.export)"
    infer(parse(add_flags, usage, __doc__)).close()
