"""Prompts in, videos out, under sequence parallelism: from a released snapshot, or from what train_min.py saved.

    $ torchrun --nproc_per_node=2 infer_min.py --prompt "a blue circle moves up"      # the toy that train_min.py trained
    $ torchrun --nproc_per_node=2 infer_min.py --score 20       # of 20 prompts: is the colour, is the direction right?
    $ torchrun --nproc_per_node=2 infer_min.py --model SNAPSHOT --prompt "a cat walks on the grass"
    $ torchrun --nproc_per_node=8 infer_min.py --model SNAPSHOT --prompts prompts.txt --sp 2 --output clips/
    $ torchrun --nproc_per_node=2 infer_min.py --model I2V_SNAPSHOT --image first.png --prompt "the cat jumps"
    $ torchrun --nproc_per_node=2 infer_min.py --model SNAPSHOT --lora cat/lora.safetensors:0.8 --prompt "a cat"
    $ torchrun --nproc_per_node=2 infer_min.py --model SNAPSHOT --encode videos/ --output latents/    # for train_min.py
    $ torchrun --nproc_per_node=4 infer_min.py --config 13b --weights transformer/ --embeds prompt.safetensors \\
          --height 720 --width 1280 --frames 129
    $ python infer_min.py --export released/ --naming diffusers

All ranks share each clip unless --sp says otherwise. The same seed gives the same clip on any number of ranks. A clip that is
there already, made by the same flags, is not made again.
In this order: flags, the Euler loop, the story, what it builds, looking at clips; last what needs diffusers, transformers
and av, the extra [pipeline]: text encoders, VAE, a folder of videos, .mp4.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import re
import sys
import time
from functools import partial
from pathlib import Path

import safetensors.torch
import torch

from comm import Checkpoints, ParallelManager, all_to_all, checksum, fingerprint, group_rank, group_size, run
from hunyuan_sp import (
    NAMINGS,
    HunyuanConfig,
    HunyuanVideo,
    forward_flops,
    guidance_input,
    init_weights,
    latent_shape,
    load_weights,
    names_in,
    open_safetensors,
    part_of,
    read_text,
    row_sizes,
    save_weights,
    shift_sigma,
    swap_halves,
    weight_files,
    with_image,
)
from sampler import seeded
from train_min import (
    Clock,
    Folder,
    Shapes,
    add_common_flags,
    check_flags,
    compute_dtype,
    get_config,
    printed_time,
    replace_file,
    scheduler_shift,
)


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = p.add_argument
    flag("--prompt", action="append", help="what to show; may be given several times")
    flag("--prompts", help="a text file with one prompt a line")
    flag("--negative_prompt", default="", help="what to steer away from, where --cfg is over 1")
    flag("--image", help="the first frame, for image-to-video snapshots")
    flag("--embeds", action="append", help=".safetensors with text [L, 4096] and pooled [768], in place of a --prompt")
    flag("--negative_embeds", help="the same for the negative prompt")
    flag("--score", type=int, help="sample so many prompts and measure colour and direction in the pixels")
    flag("--checkpoint", default="out", help="the --out folder of train_min.py")
    flag("--config", help="model preset, for --weights or for random weights (benchmarks)")
    flag("--sp", "--sequence_parallel_size", type=int, help="ranks that share a clip (default: all)")
    flag("--dp", "--data_parallel_size", type=int, help="groups that sample other prompts (default: world size / sp)")
    flag("--shard", action="store_true", help="FSDP2, for weights that do not fit one GPU")
    flag("--steps", type=int, default=20, help="Euler steps (default 20; --model: 50)")
    flag("--shift", type=float, help="flow shift (default 4; 13b: 7; --model: its scheduler's)")
    flag("--guidance", type=float, default=6.0, help="embedded guidance scale, for models that have it")
    flag("--cfg", type=float, default=1.0, help="true classifier-free guidance scale, two passes in one batch")
    flag("--seed", type=int, default=0, help="of the noise")
    flag("--output", default="clip", help="name of the files written, without ending; with a / at its end a folder")
    flag("--encode", help="a folder of videos and images with captions: each becomes a sample to train on, in --output")
    flag("--no_buckets", action="store_true", help="all of --height and --width, not of the shape nearest to their own")
    flag("--lora", action="append", help="FILE[:STRENGTH] to add to the weights; may be given several times")
    flag("--export", help="write the weights, in bfloat16, to this folder instead of sampling")
    flag("--naming", choices=NAMINGS, default="original", help="of --export")
    add_common_flags(p)
    args = p.parse_args(argv)
    if args.model:  # the release's own
        p.set_defaults(steps=50, height=720, width=1280, frames=129)
        args = p.parse_args(argv)
    return args


# --------------------------------------------------------------------------------------------------------------------
# the Euler flow sampler


@torch.no_grad()
def sample(
    model,
    latents,
    text,
    pooled,
    steps,
    shift,
    guidance=None,
    group=None,
    negative=None,
    cfg=1.0,
    clock=None,
    image=None,
):
    """Noise [B, C, T, h, w] -> clip. The state stays in the latents' dtype, whatever the model computes in.

    text: B tensors [L_b, text_dim]; pooled [B, pooled_dim]; guidance: embedded scale. negative: (text, pooled) of the same
    form, used where cfg > 1: velocity = negative + cfg (positive - negative), both in one ragged batch.
    image: latents [B, C, 1, h, w] of the first frame, for image-to-video models.
    """
    batch, true_cfg, kind = len(latents), negative is not None and cfg > 1, model.config.image_condition_type
    if (image is None) != (kind is None):
        told = "not given" if image is None else "given"
        raise ValueError(f"the model's image_condition_type is {kind}, and an image was {told}")
    if true_cfg:
        text, pooled = [*negative[0], *text], torch.cat((negative[1], pooled))
    lengths, padded = [len(t) for t in text], torch.nn.utils.rnn.pad_sequence(text, batch_first=True)
    scale = guidance_input(guidance, len(text), latents.device) if model.config.guidance_embed else None
    if kind:
        noise = torch.tensor(0.999).to(latents)  # in float32 the image's share is 0.00100005
        latents = noise * latents + (1 - noise) * image
    sigmas = sigma_schedule(steps, shift)
    for now, then in zip(sigmas.tolist(), sigmas[1:].tolist()):
        if clock:
            clock.start()
        t = torch.full((len(text),), 1000 * now, device=latents.device)
        told = with_image(latents, image, kind)
        velocity = model(told.repeat(1 + true_cfg, 1, 1, 1, 1), t, padded, lengths, pooled, scale, group=group)
        velocity = velocity.to(latents.dtype)
        if true_cfg:
            away, towards = velocity.split(batch)
            velocity = away + cfg * (towards - away)
        latents = latents + (then - now) * velocity
        if clock:
            video = latents[0, 0].numel() // math.prod(model.config.patch_size)
            clock.stop(batch * video, sum(forward_flops(model.config, video, length) for length in lengths))
    return with_image(latents, image, kind) if kind == "token_replace" else latents


def sigma_schedule(steps, shift):
    """steps + 1 noise levels in float32, from 1 (noise) to 0 (clip); the model's timestep is 1000 sigma."""
    return shift_sigma(1 - torch.arange(steps + 1) / steps, shift)


# --------------------------------------------------------------------------------------------------------------------
# the story


def infer(args):
    """Encode the prompts, build the model, sample every clip, decode and write it. Gives back the ParallelManager."""
    check_args(args)
    snapshot = Snapshot(args) if args.model is not None else None
    if snapshot:
        args.weights, args.shift = args.weights or str(snapshot.folder / "transformer"), args.shift or snapshot.shift
    args.config = args.config or ("13b" if args.weights else None)
    config = snapshot.config if snapshot else get_config(args) if args.config else None  # else the checkpoint's
    if config and config.out_channels != 3:
        latent_shape(config, args.height, args.width, args.frames)  # a size that can't be is told before the ranks meet
    shared = made_of(args, snapshot)

    pm = ParallelManager(args.dp, args.sp, args.device, args.timeout)
    facts = dict(torch=torch.__version__, device_type=pm.device.type, shared=shared)
    pm.check_equal(vars(args) | facts | dict(files=_fingerprint(*(args.embeds or ()), args.prompts)))
    args.dtype = str(compute_dtype(args, pm.device)).removeprefix("torch.")
    checkpoints, path, state, stages = Checkpoints(pm, args.checkpoint), None, {}, Stages(pm)
    if config is None:
        path, state = checkpoints.find()
        if state["args"].get("lora"):
            raise ValueError(f"{path} is a LoRA: give its base model, and --lora {args.checkpoint}/lora.safetensors")
        config, shared = HunyuanConfig.from_dict(state["config"]), [*shared, state["files"]]
    if args.encode:
        return encode(pm, snapshot, args)
    if args.export:
        return export(pm, build_model(config, pm, args, checkpoints, path, state), args)
    toy = config.out_channels == 3
    prompts = read_prompts(args, config)
    clips = [Clip(args, n, prompt, len(prompts), shared) for n, prompt in enumerate(prompts)]
    pm.on_main(lambda: clips[0].file("").parent.mkdir(parents=True, exist_ok=True))
    real = bool(args.weights or path) and not toy  # a toy or a benchmark is made each time
    todo = pm.on_main(lambda: [clip for clip in clips if not (real and clip.is_made())])
    if pm.is_main and len(todo) < len(clips):
        print(f"{len(clips) - len(todo)} of {len(clips)} clips are there already, made by these flags", flush=True)
    if not todo:
        return pm
    mine, rounds = todo[pm.dp_rank :: pm.dp_size], -(-len(todo) // pm.dp_size)
    mine += todo[-1:] * (rounds - len(mine))  # every rank takes the same number of steps, also with nothing to do

    my_prompts = {clip.prompt for clip in mine}
    if snapshot:
        with stages("encode"):
            texts, negative, image = snapshot.encode(pm, args, [clip.prompt for clip in todo], my_prompts)
    else:
        texts, negative, image = embed_prompts(pm, args, config, my_prompts)
    with stages("load"):
        model = build_model(config, pm, args, checkpoints, path, state)
        vae = snapshot.vae(pm.device) if snapshot else None
    shape = Shapes.CLIP_SHAPE if toy else latent_shape(config, args.height, args.width, args.frames)
    shift, right = args.shift or (4.0 if toy else 7.0), [0, 0, 0]
    traces = f"{args.output}-trace" if args.profile else None
    clock = Clock(pm, args.steps, traces, profiled=args.profile or not (toy or real), wait=True)
    bar = Bar(pm, clock, rounds * args.steps, len(todo)) if real else clock
    away = [negative[0].to(pm.device)], negative[1].to(pm.device)[None]
    for turn, clip in enumerate(mine):
        text, pooled = (x.to(pm.device) for x in texts[clip.prompt])
        noise = torch.randn((1, *shape), generator=seeded("sample", args.seed, clip.n)).to(pm.device)
        rules = dict(steps=args.steps, shift=shift, guidance=args.guidance, negative=away, cfg=args.cfg, image=image)
        watch = bar if real or turn == 0 else None  # a benchmark times its first turn
        with stages("denoise"):
            latents = sample(model, noise, [text], pooled[None], **rules, group=pm.sp_group, clock=watch)[0]
        pm.together(partial(check_clip, latents, clip.prompt))
        with stages("decode"):
            pixels = decode(vae, latents, pm.sp_group) if vae else None
            if pixels is not None and config.image_condition_type == "latent_concat":
                pixels = pixels[:, 4:]  # the image itself
        pm.together(partial(check_clip, pixels, clip.prompt) if pixels is not None else lambda: None)
        latents, surplus = latents.cpu(), turn * pm.dp_size + pm.dp_rank >= len(todo)
        if args.score and not surplus:
            colour, direction = Shapes.measure(latents)
            right = [right[0] + 1, right[1] + (colour in clip.prompt), right[2] + clip.prompt.endswith(direction)]
        with stages("write"):
            writes = pm.sp_rank == 0 and not surplus
            pm.together(partial(clip.write, latents, pixels, toy and not args.score) if writes else lambda: None)
        del pixels  # 2 GB at 720p
    if args.score:
        total, colours, directions = (pm.sum(float(count)).item() / pm.sp_size for count in right)
        if pm.is_main:
            print(f"of {total:.0f} prompts, the colour is right in {colours:.0f} and the direction in {directions:.0f}")
    elif pm.is_main and not toy:
        print(json.dumps(clock.report() | stages.report()), flush=True)
    return pm


def _fingerprint(*files):
    return fingerprint(file for file in files if file and Path(file).is_file())


def check_clip(latents, title):
    if not latents.isfinite().all():
        raise ValueError(f"the clip of {title!r} has values that are not finite: nothing is written")


# --------------------------------------------------------------------------------------------------------------------
# what it builds


def check_args(args):
    """ValueError for flags that are out of range, or do not go together."""
    check_flags(args, "steps score", 1)
    check_flags(args, "shift", 1e-9)
    check_flags(args, "cfg guidance", 0.0)
    check_flags(args, "seed", 0, 2**62)
    check_flags(args, "timeout", 1e-9, 1e7)
    if args.encode and not (args.model and args.output.endswith("/")):
        raise ValueError("--encode needs --model, a snapshot, and --output FOLDER/ with a / at its end")
    if args.image and not args.model:
        raise ValueError("--image needs --model, an image-to-video snapshot")
    if args.negative_embeds and (args.negative_prompt or not args.embeds):
        raise ValueError("--negative_embeds goes with --embeds, in place of --negative_prompt")
    if not args.output.endswith("/") and not Path(args.output).name:
        raise ValueError(f"--output {args.output!r} is no name: end a folder's with /")


def made_of(args, snapshot):
    """The fingerprints of the files that all clips are made of; an image is read whole."""
    files = [*weight_files(args.weights)] if args.weights else []
    files += [file for file, _ in loras(args)]
    files += snapshot.files() if snapshot else []
    return [_fingerprint(file) for file in (*files, args.negative_embeds)] + [args.image and checksum(args.image)]


def build_model(config, pm, args, checkpoints, path, state):
    """Trained (path, state: its checkpoint), released or random weights; plain tensors on every rank, or sharded."""
    dtype = compute_dtype(args, pm.device)
    with torch.device("meta"):
        model = HunyuanVideo(config, args.attention)
    if args.shard:
        pm.shard(model, model.blocks, None if dtype == torch.float32 else dtype)
    else:
        model = (model if path else model.to(dtype)).to_empty(device=pm.device)
    if path:
        average = {name: param.detach() for name, param in model.named_parameters()} if state.get("ema") else None
        checkpoints.load(path, None if average else model, more=average)
    elif args.weights:
        load_weights(model, args.weights)
    else:
        init_weights(model)
    for file, strength in loras(args):
        merge_lora(model, file, strength)
    model = (model if args.shard else model.to(dtype)).requires_grad_(False)
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
    """The prompts, or the files of embeds in their place. ValueError where words alone will not do.

    Only a snapshot's encoders understand words; the toy and random weights (a benchmark) take hashed ones.
    """
    toy, random = config.out_channels == 3, bool(args.config and not args.weights)
    words = [*(args.prompt or ()), *_lines(args.prompts)]
    if args.score and not toy:
        raise ValueError(f"--score reads pixels, this model gives {config.out_channels} latent channels")
    if args.embeds and (words or args.score):
        raise ValueError("--embeds takes the place of --prompt, --prompts and --score: give one of them")
    if not args.embeds and not toy and not random and not args.model:
        raise ValueError(
            "a --prompt is only hashed here, which these weights do not understand: give --embeds, or --model SNAPSHOT"
        )
    if args.embeds and args.cfg > 1 and not args.negative_embeds:
        raise ValueError(f"--cfg {args.cfg} with --embeds needs --negative_embeds")
    if args.model and not args.embeds and not words:
        raise ValueError("--model needs a --prompt, --prompts or --embeds")
    if args.score:
        captions = Shapes.captions()
        order = torch.randperm(len(captions), generator=seeded("score", args.seed)).tolist()
        return [captions[order[n % len(order)]] for n in range(args.score)]
    return args.embeds or words or ["a blue circle moves up"]


def _lines(file):
    """The lines of a text file that hold something."""
    if not file:
        return []
    lines = [line.strip() for line in read_utf8(Path(file)).split("\n")]
    if not any(lines):
        raise ValueError(f"--prompts {file} is empty")
    return [line for line in lines if line]


def embed_prompts(pm, args, config, prompts):
    """{prompt: (text, pooled)}, the negative (text, pooled), no image: without a snapshot's encoders."""
    read, texts = partial(read_text if args.embeds else Shapes.embed, config=config), {}
    pm.together(lambda: texts.update((prompt, read(prompt)) for prompt in prompts))  # each group reads its own
    negative = read_text(args.negative_embeds, config) if args.negative_embeds else None
    return texts, negative or Shapes.embed(args.negative_prompt, config), None


# --------------------------------------------------------------------------------------------------------------------
# LoRA files, ours and those of others


def loras(args):
    """[(file, strength)] of --lora FILE[:STRENGTH]."""
    given = []
    for told in args.lora or ():
        file, colon, strength = told.rpartition(":")
        try:
            file, strength = (file, float(strength)) if colon else (told, 1.0)
        except ValueError:  # a colon of the name
            file, strength = told, 1.0
        if not Path(file).is_file():
            raise ValueError(f"--lora {told} is not FILE or FILE:STRENGTH: there is no file {file}")
        if not math.isfinite(strength):
            raise ValueError(f"--lora {told} is not FILE or FILE:STRENGTH: {strength} is no strength")
        given.append((file, strength))
    return given


@torch.no_grad()
def merge_lora(model, file, strength=1.0):
    """Add a LoRA to the weights: W += strength * alpha / rank * B A, rounded once to the weights' dtype.

    file: .safetensors in the original, diffusers or kohya naming; its alpha in a tensor, in diffusers' header, or in B already.
    ValueError, before anything is changed, for layers that the model has not, of another shape, or not finite.
    """
    with open_safetensors(file) as handle:
        tensors, header = {name: handle.get_tensor(name).float() for name in handle.keys()}, handle.metadata() or {}
    params, places, layers = dict(model.named_parameters()), {}, {}
    for name in (name for name, param in params.items() if name.endswith(".weight") and param.dim() == 2):
        for naming in NAMINGS:
            names = names_in(naming, name)
            heights = row_sizes(model.config, names, len(params[name]))
            for n, theirs in enumerate(names):
                places[theirs.removesuffix(".weight").replace(".", "_")] = name, naming, sum(heights[:n]), heights[n]
    for name, tensor in tensors.items():
        found = LORA_NAME.fullmatch(name)
        if not found or found[1].replace(".", "_") not in places:
            raise ValueError(f"{file} is not a LoRA of this model: {name} belongs to none of its layers")
        layers.setdefault(found[1].replace(".", "_"), {})[LORA_PARTS[found[2]]] = tensor
    alpha, root = header_alpha(header, file)
    updates = []
    for layer, parts in layers.items():
        name, naming, start, height = places[layer]
        shapes = {part: list(tensor.shape) for part, tensor in parts.items()}
        rank = shapes.get("A", [0])[0]
        if dict(alpha=[]) | shapes != dict(alpha=[], A=[rank, params[name].shape[1]], B=[height, rank]):
            raise ValueError(
                f"{file} has {shapes} for {layer}, which is [{height}, {params[name].shape[1]}] in the model"
            )
        if not all(tensor.isfinite().all() for tensor in parts.values()):
            raise ValueError(f"{file} has values for {layer} that are not finite")
        own = parts["alpha"].item() if "alpha" in parts else alpha
        scale = strength if own is None else strength * own / (rank**0.5 if root else rank)
        updates.append((name, naming, start, scale, parts["A"], parts["B"]))
    for name, naming, start, scale, a, b in updates:
        param = params[name]
        full = torch.zeros(param.shape, device=param.device)
        full[start : start + len(b)] = scale * b.to(param.device) @ a.to(param.device)
        param.copy_(param + part_of(swap_halves(naming, name, full), param))


LORA_PARTS = dict(lora_A="A", lora_B="B", lora_down="A", lora_up="B", alpha="alpha")
LORA_NAME = re.compile(
    r"(?:transformer\.|diffusion_model\.|lora_unet_|Hunyuan_video_I2V_lora_)?"
    r"(.+?)\.(lora_A|lora_B|lora_down|lora_up|alpha)(?:\.weight)?"
)


def header_alpha(header, file):
    """(alpha or None, whether it is divided by the rank's root) of the header that diffusers writes."""
    try:
        config = json.loads(header.get("lora_adapter_metadata", "{}"))
        config = {key.removeprefix("transformer."): value for key, value in config.items()}
        if config.get("alpha_pattern"):
            raise ValueError("it has an alpha_pattern")
        return config and float(config["lora_alpha"]) or None, bool(config.get("use_rslora"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: its header's lora_adapter_metadata is not understood ({error!r})") from None


# --------------------------------------------------------------------------------------------------------------------
# what the user sees


class Preview:
    """What a model in training makes of one prompt, in 20 steps from the same noise every time; from train_min.py.

    shape: of the latents, [C, T, h, w]. model: the text-to-video snapshot whose encoders and VAE are used; None for the toy.
    """

    def __init__(self, pm, config, shape, prompt, model):
        flags = [f"--prompt={prompt}", "--steps=20", *(["--model", model] if model else [])]
        self.pm, self.shape, self.args = pm, shape, parse(flags)
        self.snapshot = Snapshot(self.args) if model else None
        if self.snapshot:
            texts, _, _ = self.snapshot.encode(pm, self.args, [prompt], {prompt})
        else:
            texts, _, _ = embed_prompts(pm, self.args, config, {prompt})
        self.text, self.pooled = (x.to(pm.device) for x in texts[prompt])

    def write(self, model, name):
        """NAME.mp4 or .gif, as `infer` writes them. Every rank calls it."""
        if self.pm.is_main and sys.stdout.isatty():
            print()  # training's line stays
        try:
            self._write(model, name)
        except (OSError, ValueError) as error:  # on all ranks alike; training goes on
            if self.pm.is_main:
                print(f"{name} is not written: {error}", flush=True)

    def _write(self, model, name):
        shift, group = self.snapshot.shift if self.snapshot else 4.0, self.pm.sp_group
        noise = torch.randn((1, *self.shape), generator=seeded("sample", 0, 0)).to(self.pm.device)
        rules = dict(steps=self.args.steps, shift=shift, guidance=self.args.guidance, group=group)
        latents = sample(model, noise, [self.text], self.pooled[None], **rules)[0]
        self.pm.together(partial(check_clip, latents, self.args.prompt[0]))
        pixels, vae = None, []
        if self.snapshot:
            self.pm.together(lambda: vae.append(self.snapshot.vae(self.pm.device)))
            pixels = decode(vae[0], latents, group)
        clip = Clip(argparse.Namespace(**vars(self.args) | dict(output=name)), 0, self.args.prompt[0], 1, None)
        self.pm.together(lambda: clip.write(latents.cpu(), pixels, draw=False) if self.pm.is_main else None)


class Clip:
    """One clip to be: its prompt, its number, the flags that decide what is in it, its files."""

    OUTSIDE = (
        "output embeds prompt prompts dp sp shard device compile attention timeout profile debug export naming score"
    )

    def __init__(self, args, n, prompt, count, shared):
        self.prompt, self.n = prompt, n
        self.name = f"{args.output}{n:04d}" if args.output.endswith("/") else args.output + f"-{n}" * (count > 1)
        self.endings = (".mp4", ".safetensors") if args.model else (".safetensors",)
        made_by = {k: v for k, v in vars(args).items() if k not in self.OUTSIDE.split()}
        made_by |= dict(prompt=prompt, n=n, shared=shared)
        made_by |= dict(embeds=_fingerprint(prompt)) if args.embeds else {}
        self.made_by = json.dumps(made_by, sort_keys=True)

    def file(self, ending):
        return Path(self.name + ending)

    def is_made(self):
        """Whether it is there, whole, and made by the same flags."""
        there = all(self.file(ending).is_file() for ending in self.endings)
        return there and was_made_by(self.file(".safetensors"), self.made_by)

    def write(self, latents, pixels, draw):
        """Write the clip's files, each whole or not at all, and draw it. pixels: [3, F, H, W] of a VAE, if there was one."""
        data = safetensors.torch.save(dict(latents=latents.contiguous()), dict(format="pt", made_by=self.made_by))
        files = {".safetensors": data}
        if pixels is not None:
            frames = to_bytes(pixels)
            files |= {".png": strip(frames), ".mp4": mp4(frames)}  # .mp4 last: it says that all is there
        elif len(latents) == 3:
            files |= {".gif": gif(latents)}
        for ending in files:  # an older clip's: what is there after a kill must be of one clip
            self.file(ending).unlink(missing_ok=True)
        for ending, data in files.items():
            if data:
                replace_file(self.file(ending), data)
        if draw:
            print(f"{self.prompt}\n{colour_blocks(latents)}")
        told = "" if files.get(".gif", True) else " (a GIF too with Pillow: the extra [video])"
        print(f"{self.prompt}: wrote {', '.join(str(self.file(e)) for e, d in files.items() if d)}{told}", flush=True)


def was_made_by(file, told):
    """Whether a .safetensors is there and says so in its header."""
    try:
        with open_safetensors(file) as handle:
            return (handle.metadata() or {}).get("made_by") == told
    except ValueError:
        return False


class Stages:
    """Seconds and peak memory of what is done under `with stages(name)`, on this rank."""

    def __init__(self, pm):
        self.pm, self.told = pm, {}

    @contextlib.contextmanager
    def __call__(self, name):
        cuda, began = self.pm.device.type == "cuda", time.perf_counter()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        yield
        gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0  # synchronises
        seconds, most = self.told.get(name, (0.0, 0.0))
        self.told[name] = seconds + time.perf_counter() - began, max(most, gib)

    def report(self):
        return {name: dict(s=round(seconds, 2), gib=round(gib, 2)) for name, (seconds, gib) in self.told.items()}


class Bar:
    """One line over all rounds and steps that updates in place; the first round is timed by `clock`. Only rank 0 speaks."""

    def __init__(self, pm, clock, steps, clips):
        self.pm, self.clock, self.steps, self.clips, self.done, self.spent = pm, clock, steps, clips, 0, 0.0

    def start(self):
        self.began = time.perf_counter()
        if self.done < self.clock.steps:
            self.clock.start()

    def stop(self, tokens, flops):
        if self.done < self.clock.steps:
            self.clock.stop(tokens, flops)
        self.done += 1
        self.spent += time.perf_counter() - self.began
        per_step, per_clip = self.spent / self.done, self.clock.steps
        round_now, step = divmod(self.done - 1, per_clip)
        line = (
            f"clip {min(round_now * self.pm.dp_size + 1, self.clips)} of {self.clips} · step {step + 1}/{per_clip} · "
            f"{per_step:.2f} s/step · {printed_time(per_step * (self.steps - self.done))} left"
        )
        if not self.pm.is_main:
            return
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="\n" if step + 1 == per_clip else "", flush=True)
        elif step % max(1, per_clip // 4) == 0 or step + 1 == per_clip:
            print(line, flush=True)


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


def gif(clip, zoom=16):
    """The bytes of a .gif. Needs Pillow (the extra [video]); None without it."""
    try:
        from PIL import Image
    except ImportError:
        return None
    pixels, data = to_bytes(clip), io.BytesIO()
    size = (pixels.shape[2] * zoom, pixels.shape[1] * zoom)
    frames = [Image.fromarray(frame.numpy()).resize(size, Image.Resampling.NEAREST) for frame in pixels]
    frames[0].save(data, format="gif", save_all=True, append_images=frames[1:], duration=300, loop=0)
    return data.getvalue()


def to_bytes(clip):
    """[3, F, H, W] in -1..1 -> [F, H, W, 3] in 0..255, rounded, on the CPU."""
    frames = [(frame / 2 + 0.5).clamp(0, 1).cpu().float().mul(255).round().byte() for frame in clip.unbind(1)]
    return torch.stack(frames).permute(0, 2, 3, 1).contiguous()


# --------------------------------------------------------------------------------------------------------------------
# the VAE's tiles, shared out over the ranks of an sp group


@torch.no_grad()
def decode(vae, latents, group=None):
    """latents [16, T, h, w], equal on all ranks of the group -> pixels [3, F, H, W] on its first rank, None on the others.

    Tiles, blending and result are those of diffusers' AutoencoderKLHunyuanVideo after enable_tiling(). One rank decodes a
    tile, by itself, so that the frames are the same from any number of ranks.
    """
    rank, z = group_rank(group), (latents.to(vae.dtype) / vae.config.scaling_factor)[None]
    times, rows, columns = plan = decode_plan(vae, latents.shape[1:])
    tiles = [(t, y, x) for t in times for y in rows for x in columns]
    shapes = [(3, *(n * (b - a - first) + first for n, first, (a, b) in zip((4, 8, 8), (1, 0, 0), t))) for t in tiles]
    sizes = [math.prod(shape) for shape in shapes]
    owners, counts = share_out(sizes, group_size(group))
    mine, place = z.new_empty(1, counts[rank]), 0
    for tile, size, owner in zip(tiles, sizes, owners):
        if owner == rank:
            (t0, t1), (y0, y1), (x0, x1) = tile
            part = z[:, :, t0:t1, y0:y1, x0:x1]
            mine[0, place : place + size] = vae.decoder(vae.post_quant_conv(part)).flatten()
            place += size
    everything = all_to_all(mine, group, 0, 1, [1] + [0] * (len(counts) - 1), counts)  # all of it to the first rank
    if rank > 0:
        return None
    order = sorted(range(len(tiles)), key=lambda n: owners[n])  # as they arrive: rank by rank
    parts = dict(zip(order, everything[0].split([sizes[n] for n in order])))
    decoded = {tile: parts[n].view(shape) for n, (tile, shape) in enumerate(zip(tiles, shapes))}
    frames, height, width = 4 * latents.shape[1] - 3, 8 * latents.shape[2], 8 * latents.shape[3]
    return blend_tiles(vae, plan, decoded)[:, :frames, :height, :width]


def decode_plan(vae, shape):
    """The spans (start, stop) that cut latents (T, h, w): in time, in height, in width."""

    def spans(length, tile, stride, several):
        return [(a, min(a + tile, length)) for a in range(0, length, stride)] if several else [(0, length)]

    T, h, w = shape
    frames, every = vae.tile_sample_min_num_frames // 4, vae.tile_sample_stride_num_frames // 4
    tiles = vae.tile_sample_min_height // 8, vae.tile_sample_min_width // 8
    strides = vae.tile_sample_stride_height // 8, vae.tile_sample_stride_width // 8
    several = h > tiles[0] or w > tiles[1]
    times = spans(T, frames + 1, every, T > frames)
    # all but the first time span drop their first pixel frame: a span of one latent frame would leave nothing
    times = [(a, b) for a, b in times if a == 0 or b - a > 1]
    return times, spans(h, tiles[0], strides[0], several), spans(w, tiles[1], strides[1], several)


def share_out(sizes, ranks):
    """Largest first, each to the rank with the least so far: (the owner of each, what each rank has)."""
    owners, counts = [0] * len(sizes), [0] * ranks
    for n in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        owners[n] = counts.index(min(counts))
        counts[owners[n]] += sizes[n]
    return owners, counts


def blend_tiles(vae, plan, decoded):
    """{(time, row, column): pixels [3, f, y, x]} -> [3, F, H, W]: each with its neighbours as they are after their own
    blending, above first, then left; time after space."""
    clips, (times, rows, columns) = [], plan
    axes = ("num_frames", "height", "width")
    stride_t, stride_h, stride_w = strides = [getattr(vae, f"tile_sample_stride_{axis}") for axis in axes]
    sizes = [getattr(vae, f"tile_sample_min_{axis}") for axis in axes]
    overlap_t, overlap_h, overlap_w = (size - stride for size, stride in zip(sizes, strides))
    for time_span in times:
        grid = [[decoded[time_span, row, column] for column in columns] for row in rows]
        for i, line in enumerate(grid):
            for j, tile in enumerate(line):
                if i > 0:
                    blend(grid[i - 1][j], tile, 2, overlap_h)
                if j > 0:
                    blend(line[j - 1], tile, 3, overlap_w)
        if len(rows) * len(columns) > 1:
            grid = [[tile[:, :, :stride_h, :stride_w] for tile in line] for line in grid]
        clip = torch.cat([torch.cat(line, 3) for line in grid], 2)
        if clips:
            clip = clip[:, 1:]
            blend(clips[-1], clip, 1, overlap_t)
        clips.append(clip)
    return torch.cat([clip[:, : stride_t + (n == 0)] for n, clip in enumerate(clips)], 1)


def blend(before, tile, dim, length):
    """Fade from the end of `before` into the start of `tile`, in place."""
    length = min(length, before.shape[dim], tile.shape[dim])
    k = (torch.arange(length, dtype=torch.float64) / length).view(-1, *[1] * (tile.dim() - 1 - dim)).to(tile.device)
    end, start = before.narrow(dim, before.shape[dim] - length, length), tile.narrow(dim, 0, length)
    start.copy_(end * (1 - k).to(tile.dtype) + start * k.to(tile.dtype))


# --------------------------------------------------------------------------------------------------------------------
# from here on what needs the extra [pipeline]: a snapshot's text encoders and its VAE


class Snapshot:
    """A released snapshot in the diffusers layout: what its parts say, and what comes out of its encoders.

    ValueError where a part is missing, or the extra, or where the flags do not go with the kind of model.
    """

    PARTS = "transformer vae scheduler".split()
    ENCODERS = "text_encoder text_encoder_2 tokenizer tokenizer_2".split()  # and image_processor, where there is one

    def __init__(self, args):
        self.folder = Path(args.model)
        missing = [name for name in ("diffusers", "transformers", "av") if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"--model needs {', '.join(missing)}: pip install -e '.[pipeline]'")
        check_encoder()
        parts = self.PARTS + self.ENCODERS * (not args.embeds)
        if lost := [part for part in parts if not (self.folder / part).is_dir()]:
            raise ValueError(f"{self.folder} is not a snapshot in the diffusers layout: it has no {lost[0]}/")
        self.config = get_config(args)
        self.shift = scheduler_shift(self.folder)
        kind = self.config.image_condition_type
        if bool(args.image) != bool(kind) and not (args.export or args.encode):
            told = "its first frame: give --image" if kind else "no --image"
            raise ValueError(f"{self.folder} is a {kind or 'text-to-video'} model, which takes {told}")
        if kind == "latent_concat" and args.frames < 5:
            raise ValueError(f"--frames {args.frames}: a latent_concat model gives 4 frames fewer, so 5 at least")
        self.image = self._image(args.image) if args.image else None

    def files(self):
        """All files but the DiT's weights."""
        parts = [self.folder / part for part in (*self.PARTS[1:], *self.ENCODERS, "image_processor")]
        return [file for part in parts for file in sorted(part.rglob("*")) if file.is_file()]

    @staticmethod
    def _image(file):
        from PIL import Image, ImageOps

        try:
            image = ImageOps.exif_transpose(Image.open(file))  # a phone's picture lies on its side
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"{file} is not an image: {error}") from None
        if image.mode[0] in "IF":
            raise ValueError(f"{file} has 16 or 32 bits a channel (mode {image.mode}): save it with 8")
        return image.convert("RGB")

    def encode(self, pm, args, prompts, mine):
        """{prompt: (text, pooled)} of my prompts, the negative (text, pooled), the image's latents [1, 16, 1, h, w] or None.

        Rank 0 encodes, each prompt once, and frees the encoders; a host never holds them twice.
        """
        from PIL import Image

        def on_main(function):
            return pm.on_main(lambda: _of_library(self.folder, function))

        encoders, image = [], None  # of rank 0 alone
        if args.embeds:
            texts, negative, _ = embed_prompts(pm, args, self.config, mine)
        else:
            on_main(lambda: encoders.append(TextEncoders(self, pm.device)))
            texts = {}
            for prompt in dict.fromkeys(prompts):
                encoded = on_main(lambda prompt=prompt: encoders[0](prompt, self.image))
                texts |= {prompt: encoded} if prompt in mine else {}
            black = Image.new("RGB", (args.width, args.height)) if self.image else None  # as diffusers does
            negative = on_main(lambda: encoders[0](args.negative_prompt, black, every=2))
        encoders.clear()
        if self.image:
            first = self.image.resize((args.width, args.height), Image.Resampling.LANCZOS)
            image = on_main(lambda: encode_frames(self.vae(pm.device), [first]).cpu())
            image = image.to(pm.device)
        if pm.device.type == "cuda":
            torch.cuda.empty_cache()
        return texts, negative, image

    def vae(self, device):
        """The snapshot's VAE in its released dtype, with tiles."""
        from diffusers import AutoencoderKLHunyuanVideo

        with open_safetensors(weight_files(self.folder / "vae")[0]) as handle:
            dtype = handle.get_tensor(next(iter(handle.keys()))).dtype
        rules = dict(dtype=dtype, low_cpu_mem_usage=False)  # which would need accelerate
        load = partial(_whole, AutoencoderKLHunyuanVideo, self.folder / "vae", **rules)
        vae = _of_library(self.folder / "vae", load).to(device).requires_grad_(False)
        vae.enable_tiling()
        return vae


def _whole(kind, folder, **more):
    """A model by its library. ValueError for weights that are missing, which libraries fill with random numbers."""
    model, told = kind.from_pretrained(folder, output_loading_info=True, **more)
    if lost := sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]])):
        raise ValueError(f"{folder} lacks {len(lost)} weights, {lost[0]} among them")
    return model


def _of_library(told, function):
    """Call it. Whatever goes wrong in a library is a ValueError of one sentence."""
    try:
        return function()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{told}: {(str(error).splitlines() or [type(error).__name__])[0]}") from None


@torch.no_grad()
def encode_frames(vae, frames):
    """RGB images of one size -> their latents [1, 16, T, h, w], float32: the posterior's mean, scaled."""
    width, height = frames[0].size
    pixels = [torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8).view(height, width, 3) for x in frames]
    video = (torch.stack(pixels).permute(3, 0, 1, 2)[None].float() / 127.5 - 1).to(vae.device, vae.dtype)
    return vae.encode(video).latent_dist.mode().float() * vae.config.scaling_factor


class TextEncoders:
    """A snapshot's LLaMA (LLaVA for image-to-video) and CLIP, in their released dtype, and without the two layers of the first
    that are not used: prompt -> text [L, text_dim] of valid tokens, pooled [pooled_dim].

    256 tokens may follow the template's head: the prompt's and the template's end, which is one mark, or for image-to-video
    five, of which the last one is kept. Source: diffusers 0.42, whose pipelines' text is the same.
    """

    def __init__(self, snapshot, device):
        import transformers

        transformers.logging.set_verbosity_error()  # it would report the layers that are left out
        transformers.logging.disable_progress_bar()
        from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video, pipeline_hunyuan_video_image2video

        folder, for_image = snapshot.folder, snapshot.config.image_condition_type is not None
        module = pipeline_hunyuan_video_image2video if for_image else pipeline_hunyuan_video
        self.template, self.head = module.DEFAULT_PROMPT_TEMPLATE["template"], 103 if for_image else 95
        # AutoTokenizer, or the class that the release names, may split by other rules: what counts is checked
        self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        head = len(self.tokenizer(self.template.partition("{}")[0]).input_ids)
        if head != self.head:
            told = f"the template's head is {head} tokens, not {self.head}"
            raise ValueError(f"{folder / 'tokenizer'} is another one: {told}")

        config = transformers.AutoConfig.from_pretrained(folder / "text_encoder")
        text_config = config.text_config if for_image else config
        text_config.num_hidden_layers -= 2
        kind = transformers.LlavaForConditionalGeneration if for_image else transformers.LlamaModel
        llama = _whole(kind, folder / "text_encoder", config=config, dtype="auto").to(device).eval()
        self.llama, self.device = llama.model if for_image else llama, device
        (self.llama.language_model if for_image else self.llama).norm = torch.nn.Identity()
        self.clip_tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
        self.clip = _whole(transformers.CLIPTextModel, folder / "text_encoder_2", dtype="auto").to(device).eval()
        if for_image:
            self.image_token = config.image_token_index
            self.processor = transformers.CLIPImageProcessor.from_pretrained(folder / "image_processor")
            self.every = 4 if snapshot.config.image_condition_type == "token_replace" else 2

    @torch.no_grad()
    def __call__(self, prompt, image=None, every=None):
        """every: 4 keeps every fourth of the image's 576 tokens; by default what the kind of model was trained with."""
        ids = self.tokenizer(self.template.format(prompt)).input_ids
        end = 1 if image is None else 5
        count, most = len(ids) - self.head - end, 257 - end
        if count > most:
            print(f"{prompt[:40]!r}.. has {count} tokens: what follows the first {most} is cut off", flush=True)
        ids = ids[: self.head + 256]
        if image is None:
            text = self._states(ids)[self.head :]
        else:
            place = ids.index(self.image_token)
            pixels = self.processor(image, return_tensors="pt").pixel_values.to(self.device, self.llama.dtype)
            states = self._states([*ids[:place], *[self.image_token] * 576, *ids[place + 1 :]], pixel_values=pixels)
            seen, words = states[place : place + 576 : every or self.every], states[self.head + 575 :]
            text = torch.cat((seen, words[: min(count, most)], words[-1:] if count < most else words[:0]))
        clip_ids = self.clip_tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
        pooled = self.clip(torch.tensor([clip_ids], device=self.device)).pooler_output[0]
        return text.float().cpu(), pooled.float().cpu()

    def _states(self, ids, **more):
        return self.llama(input_ids=torch.tensor([ids], device=self.device), **more).last_hidden_state[0]


# --------------------------------------------------------------------------------------------------------------------
# a folder of videos with captions -> samples to train on


def encode(pm, snapshot, args):
    """Videos and images with captions -> one .safetensors each in --output, as train_min.py reads them; and the empty prompt.

    The ranks take turns at the files. A sample is written whole or not at all; one that is there, made by the same flags
    of the same file, is not made again. What can't be read is named, skipped and counted.
    """
    out, tools, began = Path(args.output), [], time.perf_counter()
    found = pm.on_main(lambda: videos_and_captions(Path(args.encode)))

    def load():
        tools.extend(_of_library(snapshot.folder, lambda: (TextEncoders(snapshot, pm.device), snapshot.vae(pm.device))))

    for rank in range(pm.world_size):  # one after another: a host reads one rank's encoders at a time
        pm.together(load if pm.rank == rank else lambda: None)
    encoders, vae = tools
    kind = snapshot.config.image_condition_type
    made_by = dict(size=[args.height, args.width, args.frames, args.no_buckets])
    made_by |= dict(kind=kind, encoders=[_fingerprint(file) for file in snapshot.files()])
    pm.on_main(lambda: out.mkdir(parents=True, exist_ok=True))
    text = ("text", "pooled")
    if not kind:
        empty = safetensors.torch.save(dict(zip(text, encoders("")))) if pm.is_main else b""
        pm.on_main(lambda: replace_file(out / Folder.EMPTY, empty))

    def one(file, caption):
        """ "made", "replaced", "there", or why it is skipped."""
        target = out / f"{file.name}.safetensors"
        older = target.exists()
        try:
            told = json.dumps(made_by | dict(file=checksum(file), caption=caption), sort_keys=True)
            if was_made_by(target, told):
                return "there"
            if caption is None:
                raise ValueError(f"there is no {file.stem}.txt, and no line for it in captions.jsonl")
            frames = read_frames(file, args)
            first = frames[0] if kind else None
            sample = dict(latents=encode_frames(vae, frames)[0]) | dict(zip(text, encoders(caption, first)))
            if kind:
                sample |= dict(image=encode_frames(vae, [first])[0])
                sample |= dict(zip(("empty_text", "empty_pooled"), encoders("", first)))
            if not all(x.isfinite().all() for x in sample.values()):
                raise ValueError("its latents or text are not finite")
        except (ValueError, OSError) as error:
            return f"skipping {file}: {error}{f' ({target}, made before, stays)' * older}"
        sample = {name: x.cpu().contiguous() for name, x in sample.items()}
        replace_file(target, safetensors.torch.save(sample, dict(format="pt", made_by=told)))
        return "replaced" if older else "made"

    results = []
    for n in range(0, len(found), pm.world_size):
        mine = found[n : n + pm.world_size][pm.rank :][:1]
        results += [told for told in pm.together(lambda mine=mine: one(*mine[0]) if mine else None) if told]
        if pm.is_main:
            left = (time.perf_counter() - began) / len(results) * (len(found) - len(results))
            for told in results[n:]:
                if told not in ("made", "replaced", "there"):
                    print(told, flush=True)
            print(f"sample {len(results)} of {len(found)} · {printed_time(left)} left", flush=True)
    made, replaced, there = (results.count(told) for told in ("made", "replaced", "there"))
    if pm.is_main:
        older = f", {replaced} in place of older ones" * (replaced > 0)
        skipped = len(results) - made - replaced - there
        print(f"wrote {made + replaced} samples to {out}{older}, {there} were there, {skipped} skipped")
    if not made + replaced + there:
        raise ValueError(f"{args.encode} holds nothing that could be encoded")
    return pm


VIDEOS, IMAGES = (".mp4", ".mov", ".webm", ".mkv"), (".png", ".jpg", ".jpeg", ".webp")


def videos_and_captions(folder):
    """[(file, caption or None)] of a folder, by name: of NAME.txt, or of lines {"file": .., "caption": ..} of captions.jsonl."""
    if not folder.is_dir():
        raise ValueError(f"--encode {folder} is not a folder")
    files = {file for file in folder.glob("*") if file.suffix.lower() in VIDEOS + IMAGES and file.name[0] != "."}
    if not files:
        raise ValueError(f"--encode {folder} holds no {', '.join(VIDEOS + IMAGES)}")
    captions, table = {}, folder / "captions.jsonl"
    for n, line in enumerate(read_utf8(table).splitlines() if table.exists() else [], 1):
        try:
            row = json.loads(line) if line.strip() else None
            captions |= {folder / row["file"]: str(row["caption"])} if row else {}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f'{table}, line {n}, is not {{"file": .., "caption": ..}}') from None
    for file in files:
        if file.with_suffix(".txt").exists():
            captions[file] = read_utf8(file.with_suffix(".txt")).strip()
    return [(file, captions.get(file)) for file in sorted({*files, *captions})]  # what is not there is skipped


def read_utf8(file):
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a text file: {error}") from None


def read_frames(file, args):
    """RGB images of one size from a video, at each 1/24 s the frame shown then, or from an image; 4k + 1, --frames at most.

    Resized and cropped at the centre to --height x --width, or to the size of that area whose shape is nearest.
    ValueError for what can't be read.
    """
    from PIL import Image, ImageOps

    def fit(image):
        size = (args.width, args.height) if args.no_buckets else bucket(*image.size, args.height * args.width)
        return ImageOps.fit(image.convert("RGB"), size, Image.Resampling.LANCZOS)

    if file.suffix.lower() in IMAGES:
        return [fit(Snapshot._image(file))]
    import av

    frames, shown = [], None
    try:
        with av.open(str(file)) as video:
            stream = video.streams.video[0]
            start, end = None, 0.0
            for frame in video.decode(stream):
                start = frame.time if start is None else start
                while shown and len(frames) / 24 < frame.time - start - 1e-3 and len(frames) < args.frames:
                    frames.append(shown)
                if len(frames) == args.frames:
                    break
                shown = fit(frame.to_image().rotate(getattr(frame, "rotation", 0), expand=True))
                end = frame.time - start + 1 / (stream.average_rate or 24)
            while shown and len(frames) / 24 < end - 1e-3 and len(frames) < args.frames:
                frames.append(shown)
    except (av.error.FFmpegError, IndexError, TypeError, OSError, ValueError) as error:
        raise ValueError(f"it is not a video that can be read ({error})") from None
    if not frames:
        raise ValueError("it has no frames")
    return frames[: (len(frames) - 1) // 4 * 4 + 1]


def bucket(width, height, area):
    """The (width, height) in steps of 16, of at most this area, whose shape is nearest to width x height."""

    def distance(size):  # of equal shapes the larger
        return round(abs(math.log(size[0] / size[1] * height / width)), 6), -size[0] * size[1]

    return min([(max(16, area // h // 16 * 16), h) for h in range(16, area // 16 + 1, 16)], key=distance)


# --------------------------------------------------------------------------------------------------------------------
# files that one can watch


def strip(frames, count=6, height=240):
    """frames [F, H, W, 3] -> the bytes of a .png with some of them side by side, for a look without a player."""
    from PIL import Image

    picked = frames[torch.linspace(0, len(frames) - 1, min(count, len(frames))).round().long()]
    row = Image.fromarray(torch.cat([*picked], 1).numpy())
    data, scale = io.BytesIO(), min(1.0, height / row.height)
    row.resize((round(row.width * scale), round(row.height * scale))).save(data, format="png")
    return data.getvalue()


def check_encoder():
    import av

    try:
        av.codec.Codec("libx264", "w")
    except ValueError as error:
        raise ValueError(
            f"PyAV {av.__version__} has no H.264 encoder, libx264, to write an .mp4 with ({error})"
        ) from None


def mp4(frames, rate=24):
    """frames [F, H, W, 3] in 0..255 -> the bytes of an .mp4: H.264, yuv420p, the model's own 24 frames a second."""
    import av

    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=rate, options=dict(crf="18"))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames.numpy():
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return data.getvalue()


if __name__ == "__main__":
    args = parse()
    run(partial(infer, args), args.output, args.debug)
