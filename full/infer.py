"""Sample videos from a released snapshot, or from what training saved: text or an image in, .mp4 out.

    $ torchrun --nproc_per_node=2 -m full.infer --model SNAPSHOT --prompt "a cat walks on the grass"
    $ torchrun --nproc_per_node=8 -m full.infer --model SNAPSHOT --prompts prompts.txt --sp 2 --output clips/
    $ torchrun --nproc_per_node=2 -m full.infer --model I2V_SNAPSHOT --image first.png --prompt "the cat jumps"
    $ torchrun --nproc_per_node=2 -m full.infer --model SNAPSHOT --lora cat/lora.safetensors:0.8 --prompt "a cat"
    $ torchrun --nproc_per_node=2 -m full.infer --model SNAPSHOT --checkpoint out --prompt "a cat"    # what full.train saved

By default all ranks work on one clip. With --sp N each group of N ranks makes its own, and the prompts are divided among the
groups. A prompt and a seed give the same clip on any number of ranks, whatever else is in the list. Clips that exist, made
by the same flags, are skipped; those of other flags are replaced with --overwrite alone. Its Euler steps are infer_min.py's
`sample`. --model needs the extra [pipeline].
"""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

import infer_min
from full import faults
from full.claim import claim
from full.clips import check_embeds, check_finite, embed_prompts, make_clips, read_prompts
from full.fa4 import attention_kernel, fastest_kernel
from full.files import checksum, fingerprint
from full.flags import (
    add_machine_flags,
    add_model_flags,
    add_speed_flags,
    check_range,
    check_together,
    check_used,
    compute_dtype,
    parse_flags,
    parser_of,
)
from full.hub import find_model
from full.lora import lora_files
from full.memory import cure, limit_memory
from full.model import Source, resolve
from full.screen import Bar, Stages, say
from full.snapshot import BESIDE_DIT, PARTS, Snapshot, template_of
from full.speed import Clock
from full.vae import decode
from full.video import read_image
from hunyuan_sp import latent_shape
from infer_min import sample, score, score_line
from sampler import seeded
from train_min import Shapes


def parse(argv=None):
    groups = dict(sampling=infer_min.add_flags, model=add_model_flags, speed=add_speed_flags, machine=add_machine_flags)
    parser, own = parser_of(__doc__, **groups)
    flag = own.add_argument
    flag("--prompt", action="append", help="a prompt; may be given several times")
    flag("--prompts", help="a text file with one prompt a line")
    flag("--negative_prompt", default="", help="what to steer away from, if --cfg is over 1")
    flag("--image", help="the first frame, for image-to-video snapshots")
    flag("--negative_embeds", help="the file of --embeds for the negative prompt")
    flag("--checkpoint", help="the --out folder of training (default: out, without --model, --weights and --config)")
    flag("--lora", action="append", help="FILE[:STRENGTH] to add to the weights; may be given several times")
    flag(
        "--offload",
        action="append",
        choices=("weights", "encoders"),
        help="keep them in the host's memory; may be given twice",
    )
    flag("--attention", default="auto", help="auto: fa4 on Hopper with the extra [fast], else sdpa; or one of the two")
    flag("--sp", "--sequence_parallel_size", type=int, help="ranks that share a clip (default: all)")
    flag("--dp", "--data_parallel_size", type=int, help="groups that share out the prompts (default: world size / sp)")
    flag("--shard", action="store_true", help="FSDP2, for weights that do not fit one GPU")
    flag("--steps", type=int, default=20, help="Euler steps (default 20; --model: 50)")
    flag("--shift", type=float, help="flow shift (default 4; 13b: 7; --model: its scheduler's)")
    flag("--cfg", type=float, default=1.0, help="true classifier-free guidance scale, two passes in one batch")
    flag("--clips", type=int, default=1, help="clips of each prompt, with the seeds --seed, --seed + 1, ..")
    flag("--output", default="clip", help="name of the files to write, without ending; a folder if it ends with /")
    flag("--overwrite", action="store_true", help="replace clips that other flags have made")
    args = parse_flags(parser, argv)
    if args.model:  # the release's own defaults
        parser.set_defaults(steps=50, height=720, width=1280, frames=129)
        args = parse_flags(parser, argv)
    args.offload = args.offload or []
    return args


# --------------------------------------------------------------------------------------------------------------------
# the story


def infer(args):
    """Encode the prompts, build the model, sample every clip, decode and write it. Return the ParallelManager."""
    job = Job(args)
    pm = job.pm
    config = job.source.config
    if not job.todo:
        return pm
    stages = Stages(pm, quiet=not job.real)
    with stages("encode"):
        texts, negative, image = job.encode()
    with stages("load"):
        memory = dict(offload="weights" in args.offload, mlp_slices=args.mlp_slices)
        model = job.source.build_model(args.shard, args.attention, args.compile, **memory)
        vae = job.snapshot.vae(pm.device) if job.snapshot else None
    shape = Shapes.CLIP_SHAPE if job.toy else latent_shape(config, args.height, args.width, args.frames)
    clock = Clock(pm, args.steps, f"{args.output}-trace" if args.profile else None, wait=True)
    bar = Bar(pm, clock, len(job.mine), len(job.todo), quiet=not job.real)
    shift = args.shift or (4.0 if job.toy else 7.0)
    rules = dict(steps=args.steps, shift=shift, guidance=args.guidance, cfg=args.cfg)
    rules |= dict(negative=negative, image=image, group=pm.sp_group)
    scores = []
    for turn, clip in enumerate(job.mine):
        text, pooled = (x.to(pm.device) for x in texts[clip.prompt])
        noise = torch.randn((1, *shape), generator=seeded("sample", clip.seed, 0))
        with stages("denoise"), bar.watching(model):
            latents = sample(model, noise.to(pm.device), [text], pooled[None], **rules)[0]
        check_finite(latents, clip.prompt)
        with stages("decode"):
            pixels = decode(vae, latents, pm.sp_group) if vae else None
            if pixels is not None and config.image_condition_type == "latent_concat":
                pixels = pixels[:, 4:]  # without the given image
        check_finite(pixels, clip.prompt)
        writes = pm.sp_rank == 0 and not (job.surplus and turn == len(job.mine) - 1)
        if args.score and writes:
            scores.append(score(latents.cpu(), clip.prompt))
        with stages("write"):
            write = partial(clip.write, latents.cpu(), pixels, job.toy)
            faults.together(write if writes and not args.score else lambda: None)
        del pixels  # 2 GB at 720p
    report(pm, args, scores, clock, stages, job.toy)
    return pm


class Job:
    """Decide what to sample: where the model comes from, which clips to make, and which of them this rank's group makes."""

    def __init__(self, args):
        check_args(args)
        self.args = args
        self.snapshot, config, self.image = resolve_inputs(args)
        limit_memory(args.memory, args.device)
        self.pm = faults.init(args.dp, args.sp, args.device, args.timeout)
        compare_ranks(self.pm, args)
        self.source = Source(self.pm, args, config)
        self.toy = self.source.config.out_channels == 3
        check_used(args, self.source.config, sized=not self.toy)
        self.real = bool(args.weights or self.source.path) and not self.toy  # else clips are always made anew
        prompts = read_prompts(args, self.source.config)
        if not args.score:
            path = Path(args.output)
            if args.output.endswith("/"):
                claim(path)
            else:
                claim(path.parent, path.name)
        shared = made_of(args, self.source, self.snapshot)
        self.pm.check_equal(dict(shared=shared), self.pm.world_group)
        self.todo = self.leave_out_made(make_clips(args, prompts, shared))
        # all ranks take the same number of steps, so a group with fewer clips repeats the last one of all
        self.mine = self.todo[self.pm.dp_rank :: self.pm.dp_size]
        rounds = -(-len(self.todo) // self.pm.dp_size)
        self.surplus = len(self.mine) < rounds
        self.mine += self.todo[-1:] * self.surplus

    def leave_out_made(self, clips):
        """Return the clips to make, equal on all ranks. ValueError if they would replace others."""
        if self.args.score:
            return clips
        todo = faults.on_main(lambda: [clip for clip in clips if not (self.real and clip.is_made())])
        kept = [] if self.args.overwrite else todo
        taken = faults.on_main(lambda: [clip.name for clip in kept if clip.is_taken()])
        if taken:
            names = ", ".join(taken[:3]) + ", .." * (len(taken) > 3)
            ways = "--overwrite replaces them, another --output keeps them"
            raise ValueError(f"{len(taken)} of {len(clips)} clips exist already, made by other flags ({names}): {ways}")
        if self.pm.is_main and len(todo) < len(clips):
            say(f"{len(clips) - len(todo)} of {len(clips)} clips exist already, made by these flags")
        return todo

    def encode(self):
        """Return {prompt: (text, pooled)}, the negative ([text], pooled [1, ..]), and the image's latents or None."""
        args = self.args
        size = args.width, args.height
        prompts = sorted({clip.prompt for clip in self.todo})
        if self.snapshot and not args.embeds:
            device = torch.device("cpu") if "encoders" in args.offload else self.pm.device
            given = prompts, args.negative_prompt, self.image, size
            texts, negative = self.snapshot.encode(self.pm, *given, device)
        else:
            texts, negative = embed_prompts(args, self.source.config, prompts)
        if self.image and self.pm.is_main and abs(self.image.width * size[1] / self.image.height / size[0] - 1) > 0.02:
            say(f"--image is {self.image.width} x {self.image.height}: it is squeezed to {size[0]} x {size[1]}")
        text, pooled = (x.to(self.pm.device) for x in negative)
        image = self.snapshot.encode_image(self.pm, self.image, size) if self.image else None
        return texts, ([text], pooled[None]), image


def check_args(args):
    """Raise ValueError for flags that are out of range, or do not go together."""
    check_range(args, "steps score clips sp dp mlp_slices", 1)
    check_range(args, "memory", 2)
    check_range(args, "shift", 1e-9)
    check_range(args, "cfg", 1.0)
    check_range(args, "guidance", 0.0)
    check_range(args, "seed", 0, 2**62)
    check_range(args, "timeout", 1e-9, 1e7)
    check_together(args)
    if args.attention != "auto":
        attention_kernel(args.attention)
    if not args.output.endswith("/") and not Path(args.output).name:
        raise ValueError(f"--output {args.output!r} is not a name: end a folder with /")
    if Path(args.output).suffix in (".mp4", ".png", ".gif", ".safetensors"):
        raise ValueError(f"--output {args.output} is a name without its ending: several files are written")
    lora_files(args.lora)


def resolve_inputs(args):
    """Return (the snapshot of --model or None, the config if the flags give it, the image or None), before the ranks meet.

    It fills in flags that follow from others. ValueError if they do not fit the model.
    """
    find_model(args, PARTS if args.embeds else ["transformer", *BESIDE_DIT])
    snapshot = Snapshot(args.model, encoders=not args.embeds) if args.model is not None else None
    config = resolve(args)
    if snapshot:
        snapshot.check_image(args.image, args.frames)
        check_embeds(args.embeds, snapshot, args.image)
        args.shift = args.shift or snapshot.shift
    image = read_image(args.image) if args.image else None
    if config and config.out_channels != 3:
        latent_shape(config, args.height, args.width, args.frames)
    return snapshot, config, image


def compare_ranks(pm, args):
    """Raise ValueError if ranks have other flags or files; fill in the flags that depend on the device."""
    files = [*(args.embeds or ()), args.prompts]
    if auto := args.attention == "auto":
        args.attention = fastest_kernel(pm.device)
    facts = dict(torch=torch.__version__, device_type=pm.device.type)
    existing = [file for file in files if file and Path(file).is_file()]
    facts["files"] = [fingerprint([file]) for file in existing]
    pm.check_equal(vars(args) | facts, pm.world_group)
    args.dtype = str(compute_dtype(args, pm.device)).removeprefix("torch.")
    if auto and pm.is_main and pm.device.type == "cuda":
        say(f"attention by {args.attention}")


def made_of(args, source, snapshot):
    """Return fingerprints of what all clips are made of: weights, config, encoders, template, image."""
    facts = [source.facts(), asdict(source.config)]
    facts += [snapshot.facts(), template_of(snapshot.kind)] if snapshot else []
    facts += [fingerprint([args.negative_embeds])] if args.negative_embeds else []
    return [*facts, args.image and checksum(args.image)]


def report(pm, args, scores, clock, stages, toy):
    """Print the score of the toy, or speed and memory."""
    everyone = [score for part in faults.together(lambda: scores) for score in part]
    if not pm.is_main:
        return
    if args.score:
        say(score_line(everyone))
    elif not toy:
        say(json.dumps(clock.report() | stages.report()))


if __name__ == "__main__":
    args = parse()
    faults.exit_after(partial(infer, args), args.output, args.debug, partial(cure, args))
