"""Train HunyuanVideo's DiT under data × sequence parallelism: the whole training loop.

    $ torchrun --nproc_per_node=2 train_min.py                  # a tiny model learns moving shapes, minutes on a CPU
    $ torchrun --nproc_per_node=6 train_min.py --sp 3 --steps 4000 --resume    # longer, as 2 data-parallel groups of 3
    $ torchrun --nproc_per_node=4 train_min.py --config 13b --sp 4 --height 720 --width 1280 --frames 49 --batch 1 --steps 5
    $ torchrun --nproc_per_node=8 train_min.py --config 13b --sp 4 --data LATENTS --batch 2 --save_every 100 --out DIR

Plain `python train_min.py` runs the same lines as a world of one. The loss curve is the same for every (dp, sp).
Released weights, your own videos, LoRA: `torchrun -m full.train`, which takes its steps with this file's `train_step`.
"""

import argparse
import json
import math
import shutil
import sys
import time
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.utils.data import DataLoader

from comm import ParallelManager, split_sequence
from hunyuan_sp import (
    CHECKPOINTING,
    HunyuanConfig,
    HunyuanVideo,
    guidance_input,
    init_weights,
    latent_shape,
    patchify,
    shift_sigma,
    with_image,
)
from sampler import DPSPBatchSampler, seeded


def parse(add_flags, usage, description, argv=None):
    """Parse the flags. usage: one line, printed with errors too, which names the programs that have more flags."""
    rules = dict(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser(usage=usage, description=description, **rules)
    add_flags(parser)
    return parser.parse_args(argv)


def add_flags(parser):
    """Add the flags that full/train.py has too."""
    flag = parser.add_argument
    flag("--config", default="tiny", help="model preset: tiny or 13b (without --data it trains on noise: a benchmark)")
    flag("--data", help="folder with one .safetensors a sample: latents, text, pooled (default: moving shapes)")
    flag("--sp", "--sequence_parallel_size", type=int, default=1, help="ranks that share a sample")
    flag("--dp", "--data_parallel_size", type=int, help="data-parallel groups (default: world size / sp)")
    flag("--shard_size", type=int, help="HSDP: shard weights over this many ranks, replicate beyond (default: all)")
    flag("--steps", type=int, default=2500, help="optimizer steps in all, those before a resume included")
    flag("--batch", type=int, default=16, help="global batch: samples a step, over all ranks and micro-batches")
    flag("--accumulation", type=int, default=1, help="micro-batches a step")
    flag("--lr", type=float, default=4e-3, help="peak, then a cosine to a tenth (fine-tuning the 13B: 1e-5)")
    flag("--warmup", type=int, default=50, help="steps of linear warm-up")
    flag("--clip", type=float, default=1.0, help="largest global gradient norm")
    flag("--shift", type=float, default=4.0, help="flow shift of the noise levels (the 13B: 7)")
    flag("--guidance", type=float, default=1.0, help="guidance scale fed to models that embed it")
    flag("--caption_drop", type=float, default=0.1, help="chance of training a sample without its text")
    flag("--checkpointing", choices=CHECKPOINTING, help="of activations (default: attention; tiny: none)")
    flag("--seed", type=int, default=0, help="of weights, order, noise and caption drop")
    flag("--out", default="out", help="folder of checkpoints and log.jsonl")
    flag("--save_every", type=int, help="steps between checkpoints (default: one at the end; benchmarks: none)")
    flag("--resume", action="store_true", help="continue from the newest checkpoint in --out, on any layout")
    flag("--height", type=int, default=256)
    flag("--width", type=int, default=256)
    flag("--frames", type=int, default=17, help="4k + 1")
    flag("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    flag("--compile", action="store_true", help="torch.compile both sides of each block's attention")


# --------------------------------------------------------------------------------------------------------------------
# the story


def train(args):
    """Build everything, take the steps, save checkpoints. Return the ParallelManager."""
    config = HunyuanConfig.preset(args.config)
    data = build_data(config, args)
    args.checkpointing = args.checkpointing or ("none" if args.config == "tiny" else "attention")

    # who am I; which samples are mine; where did we stop
    pm = ParallelManager(args.dp, args.sp, args.device)
    layout = pm.dp_rank, pm.dp_size, args.accumulation
    sampler = DPSPBatchSampler(len(data), args.batch, *layout, args.seed, shapes=data.shapes, names=data.names)
    pm.check_equal(vars(args) | sampler.state_dict(), pm.world_group)
    model, optimizer = build_model(config, pm, args)
    start = load_checkpoint(args.out, model, optimizer, sampler) if args.resume else 0
    if pm.is_main:
        print(f"dp {pm.dp_size} x sp {pm.sp_size} on {pm.device.type}, from step {start} of {args.steps}", flush=True)

    stream = batches(data, sampler, args)
    rules = dict(clip=args.clip, guidance=args.guidance, checkpointing=args.checkpointing)
    for step in range(start + 1, args.steps + 1):
        began = time.perf_counter()
        micro_batches = [next(stream) for _ in range(sampler.micro_batches)]
        loss, norm = train_step(pm, model, optimizer, micro_batches, learning_rate(step, args), **rules)
        sampler.advance()
        if pm.is_main:
            report(step, loss, norm, time.perf_counter() - began, args)
        if save_is_due(step, args):
            save_checkpoint(pm, args.out, step, model, optimizer, sampler)
    return pm


def train_step(pm, model, optimizer, micro_batches, lr, clip=1.0, guidance=1.0, checkpointing="none"):
    """Take one optimizer step under the gradient rule. Return the loss and the gradient norm, equal on all ranks."""
    # the loss is a mean over the tokens of all dp ranks and micro-batches, not a mean of means
    count = sum(count_tokens(batch, model.config) for batch in micro_batches)
    count = pm.sum(count, pm.dp_group).item()
    loss = 0.0
    for n, batch in enumerate(micro_batches, 1):
        batch = to_device(batch, pm.device)
        local = flow_loss(model, batch, guidance, pm.sp_group, checkpointing) / count
        # the gradient rule: the sum over ranks of these is the mean over all tokens of the step
        pm.backward(model, local, last=n == len(micro_batches))
        loss += local.detach()
    loss = pm.sum(loss, pm.world_group).item()
    norm = pm.clip_grad_norm(model, clip)

    for param_group in optimizer.param_groups:
        param_group["lr"] = lr
    # all ranks see the same two numbers: all of them skip the step, or none
    pm.step(optimizer, skip=not math.isfinite(loss + norm))
    return loss, norm


def build_model(config, pm, args):
    """Build the model, on the meta device first so that no rank ever holds all weights, and its optimizer."""
    with torch.device("meta"):
        model = HunyuanVideo(config)
    dtype = torch.bfloat16 if pm.device.type == "cuda" else None
    pm.shard(model, model.blocks, dtype, args.shard_size)
    init_weights(model, args.seed, device=pm.device)
    if args.compile:
        model.compile_blocks()
    return model, torch.optim.AdamW(model.parameters(), args.lr, (0.9, 0.99), weight_decay=0.01, fused=True)


def learning_rate(step, args):
    """Return the rate of step 1, 2, ..: linear warm-up, then a cosine to a tenth at --steps; more steps stretch it."""
    warm = min(1.0, step / max(1, args.warmup))
    done = max(0, step - 1 - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr * warm * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))


def report(step, loss, norm, seconds, args):
    """Append the step to OUT/log.jsonl, in full precision, and update the progress line."""
    finite = math.isfinite(loss + norm)
    entry = dict(step=step, loss=loss if finite else None, grad_norm=norm if finite else None)  # NaN is no JSON
    Path(args.out).mkdir(parents=True, exist_ok=True)
    with open(Path(args.out, "log.jsonl"), "a") as log:
        log.write(json.dumps(entry) + "\n")
    line = f"step {step}/{args.steps} · loss {loss:.4f} · grad norm {norm:.2f} · {seconds:.2f} s/step"
    line += "" if finite else " · skipped: not finite"
    if sys.stdout.isatty():
        print(f"\r\033[K{line}", end="\n" if step == args.steps else "", flush=True)
    elif step % max(1, args.steps // 20) == 0 or step in (1, args.steps):
        print(line, flush=True)


# --------------------------------------------------------------------------------------------------------------------
# checkpoints: OUT/step-N appears, by a rename, when all of it is written

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save_is_due(step, args):
    """Return whether to save after this step: every --save_every steps and at the end; a benchmark only if asked."""
    every = args.save_every or (args.steps if args.config == "tiny" or args.data else 0)
    return every > 0 and (step % every == 0 or step == args.steps)


def save_checkpoint(pm, out, step, model, optimizer, sampler):
    """Save weights, optimizer, sampler and step as out/step-N. Call it on every rank: each writes what it holds."""
    temporary, final = Path(out, f"tmp-step-{step}"), Path(out, f"step-{step}")
    manifest = dict(step=step, serial=time.time_ns(), sampler=sampler.state_dict(), config=asdict(model.config))
    if pm.is_main:
        shutil.rmtree(temporary, ignore_errors=True)  # a run that was killed may have left one
    dist.barrier()
    writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)  # .safetensors: nothing is pickled
    dcp.save(tensors_of(model, optimizer), storage_writer=writer)
    if pm.is_main:
        Path(temporary, "manifest.json").write_text(json.dumps(manifest))
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        print(f"saved {final}", flush=True)
    dist.barrier()


def load_checkpoint(out, model, optimizer, sampler):
    """Load the newest checkpoint in `out`, saved on any layout. Return its step."""
    folder, manifest = newest_checkpoint(out)
    if HunyuanConfig.from_dict(manifest["config"]) != model.config:
        raise ValueError(f"{folder} is of another model: {manifest['config']}")
    sampler.load_state_dict(manifest["sampler"])
    # the tensors are the model's own, and the optimizer's, made by a step at rate 0: they are filled in place
    dcp.load(tensors_of(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    return manifest["step"]


def tensors_of(model, optimizer=None):
    """Return all tensors that a step changes, by name. Learning rate and the like belong to the command line."""
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state = get_optimizer_state_dict(model, optimizer, options=FLAT) if optimizer else {}
    return weights | {f"optimizer.{name}": value for name, value in state.items() if torch.is_tensor(value)}


def newest_checkpoint(out):
    """Return (folder, manifest) of the checkpoint in `out` that was saved last."""
    found = [(file.parent, json.loads(file.read_text())) for file in Path(out).glob("step-*/manifest.json")]
    if not found:
        raise FileNotFoundError(f"no checkpoint in {out}: there is no step-N folder in it")
    return max(found, key=lambda pair: pair[1]["serial"])


# --------------------------------------------------------------------------------------------------------------------
# rectified flow: x = (1 - sigma) clip + sigma noise, and the model learns the velocity noise - clip


def flow_loss(model, batch, guidance, group, checkpointing="none"):
    """Return the sum over this rank's tokens of their mean squared error; divide it by the global token count."""
    config = model.config
    inputs = {name: batch[name] for name in ("timestep", "text", "lengths", "pooled")}
    inputs["latents"] = with_image(batch["latents"], batch.get("image"), config.image_condition_type)
    if config.guidance_embed:
        inputs["guidance"] = guidance_input(guidance, len(batch["latents"]), batch["latents"].device)
    velocity = model(**inputs, group=group, gather=False, checkpointing=checkpointing)
    target = patchify(batch["target"], config.patch_size)
    mine = split_sequence(target, group)
    error = (velocity.to(mine.dtype) - mine).square().mean(2)
    if config.image_condition_type == "token_replace":  # the image is given, not learned: its tokens are the first
        place = split_sequence(torch.arange(target.shape[1], device=error.device), group, 0)
        error = error * (place >= target.shape[1] // batch["target"].shape[2])
    return (error * batch["weight"][:, None]).sum()


def count_tokens(batch, config):
    """Return the number of video tokens that carry weight: the mean is taken over these."""
    frames, height, width = batch["target"].shape[2:]
    frames -= config.image_condition_type == "token_replace"
    tokens = frames * height * width / math.prod(config.patch_size)
    return tokens * batch["weight"].sum().item()


def collate(items, seed, shift, caption_drop, sigma=None):
    """Make a batch of items as the data below gives them. sigma: one noise level for all samples, else each draws its own.

    Noise is a function of (seed, epoch, sample), so every sp rank draws the same.
    """
    rows = []
    for index, clip, text, pooled, *more in items:
        generator = seeded("flow", seed, index.epoch, int(index))
        noise = torch.randn(clip.shape, generator=generator)
        level = shift_sigma(torch.randn((), generator=generator).sigmoid(), shift)
        level = level if sigma is None else torch.tensor(sigma)
        more = dict(*more)
        empty = more.pop("empty", (torch.zeros_like(text[:1]), torch.zeros_like(pooled)))
        if torch.rand((), generator=generator) < caption_drop:
            text, pooled = empty
        flow = dict(latents=(1 - level) * clip + level * noise, target=noise - clip, timestep=1000 * level)
        rows.append(flow | more | dict(text=text, pooled=pooled, weight=torch.tensor(index.weight)))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    texts = columns.pop("text")
    batch = {name: torch.stack(column) for name, column in columns.items()}
    batch["text"] = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    return batch | dict(lengths=[len(text) for text in texts], samples=[int(item[0]) for item in items])


def to_device(batch, device):
    return {name: x.to(device) if torch.is_tensor(x) else x for name, x in batch.items()}


def batches(data, sampler, args):
    """Yield batches without end; every pass over the loader is the rest of the sampler's epoch."""
    rules = dict(seed=args.seed, shift=args.shift, caption_drop=args.caption_drop)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=partial(collate, **rules))
    while True:
        yield from loader


# --------------------------------------------------------------------------------------------------------------------
# data: item i is (i, latents [c, T, h, w], text [L, text_dim], pooled [pooled_dim]); for image-to-video models also a dict
# with image [c, 1, h, w]; its key `empty` is the (text, pooled) that a dropped caption becomes, by default zeros


def build_data(config, args):
    if args.data:
        return LatentFolder(args.data)
    if args.config == "tiny":
        return Shapes(config)
    return RandomLatents(config, latent_shape(config, args.height, args.width, args.frames))


class LatentFolder:
    """Read one .safetensors a sample: latents, already multiplied by the VAE's 0.476986; text, valid tokens only; pooled."""

    def __init__(self, folder):
        self.files = sorted(set(Path(folder).glob("*.safetensors")) - {Path(folder, "empty_prompt.safetensors")})
        self.names = [file.name for file in self.files]
        self.shapes = [tuple(safe_open(file, "pt").get_slice("latents").get_shape()) for file in self.files]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        with safe_open(self.files[i], "pt") as handle:
            return i, *(handle.get_tensor(name).float() for name in ("latents", "text", "pooled"))


class RandomLatents:
    """Give noise of the right shape and texts of 60 tokens, for benchmarks."""

    shapes = names = None

    def __init__(self, config, latents, length=4096):
        self.length = length
        self.parts = latents, (60, config.text_dim), (config.pooled_dim,)

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        generator = seeded("random", int(i))
        return i, *(torch.randn(part, generator=generator) for part in self.parts)


class Shapes:
    """Draw clips of coloured shapes that move, with captions of five or six words: a tiny model learns them in minutes.

    `draw` makes the clip of a caption; `measure` reads colour, shape and direction back from a clip's pixels.
    """

    CLIP_SHAPE = (3, 4, 16, 16)
    COLOURS = dict(red=(1, 0, 0), green=(0, 1, 0), blue=(0, 0, 1), yellow=(1, 1, 0), purple=(1, 0, 1), cyan=(0, 1, 1))
    SHAPES = ("square", "circle", "cross")
    RADIUS, SMALL = 4, 2  # pixels from the centre to the edge
    DIRECTIONS = dict(left=(0, -1), right=(0, 1), up=(-1, 0), down=(1, 0))
    shapes = names = None

    def __init__(self, config, length=4096):
        self.config, self.length = config, length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        generator, captions = seeded("clip", int(i)), self.captions()
        caption = captions[i % len(captions)]
        if torch.rand((), generator=generator) < 0.3:
            caption = caption.replace("a ", "a small ", 1)
        return i, self.draw(caption, generator), *self.embed(caption, self.config)

    @classmethod
    def captions(cls):
        return [f"a {c} {s} moves {d}" for c in cls.COLOURS for s in cls.SHAPES for d in cls.DIRECTIONS]

    @staticmethod
    def embed(prompt, config):
        """Embed a prompt -> text [words, text_dim], pooled [pooled_dim]: a word's letters fix its random vector."""
        words, dims = prompt.lower().split(), (config.text_dim, config.pooled_dim)
        if not words:  # one token of zeros, as a dropped caption has
            return torch.zeros(1, config.text_dim), torch.zeros(config.pooled_dim)
        vectors = [torch.randn(sum(dims), generator=seeded("word", word)) for word in words]
        text, pooled = torch.stack(vectors).split(dims, 1)
        return text, pooled.sum(0) / math.sqrt(len(words))

    @classmethod
    def draw(cls, caption, generator):
        """Return the clip that a caption describes, [3, 4, 16, 16] in -1..1, from a random place: 2 pixels a frame."""
        _, frames, size, _ = cls.CLIP_SHAPE
        words = caption.split()
        colour = torch.tensor(next(cls.COLOURS[word] for word in words if word in cls.COLOURS))
        shape = next(word for word in words if word in cls.SHAPES)
        direction = next(cls.DIRECTIONS[word] for word in words if word in cls.DIRECTIONS)
        radius, way = (cls.SMALL if "small" in words else cls.RADIUS), 2 * (frames - 1)
        # the shape stays inside to the last frame
        spans = [(radius + way * (d < 0), size - radius - way * (d > 0)) for d in direction]
        start = [torch.randint(*span, (), generator=generator) for span in spans]
        clip = torch.full(cls.CLIP_SHAPE, -1.0)
        for t in range(frames):
            centre = [s + 2 * t * d for s, d in zip(start, direction)]
            clip[:, t, cls.stencil(shape, radius, *centre)] = colour[:, None] * 2.0 - 1
        return clip

    @classmethod
    def stencil(cls, shape, radius, y, x):
        """Return a mask [16, 16] of the pixels of a shape around (y, x)."""
        axis = torch.arange(cls.CLIP_SHAPE[-1])
        dy = (axis - y).abs()[:, None]
        dx = (axis - x).abs()
        if shape == "circle":
            return dy**2 + dx**2 <= radius * (radius + 1)
        inside = torch.maximum(dy, dx) <= radius
        return inside & (torch.minimum(dy, dx) <= radius // 4) if shape == "cross" else inside

    @classmethod
    def measure(cls, clip):
        """Return the words for what moves in the pixels: the nearest colour and shape, and where its centre goes."""
        light = (clip.float().clamp(-1, 1) + 1) / 2
        solid = light.amax(0) > 0.5  # [T, h, w]
        colours = torch.tensor([*cls.COLOURS.values()])
        mean = light[:, solid].mean(1)
        colour = (colours - mean).square().sum(1).argmin()

        overlap = {}  # of each shape, small or not, at its best place in each frame
        for kind in product(cls.SHAPES, (cls.RADIUS, cls.SMALL)):
            overlap[kind] = torch.zeros(len(solid))
            for place in product(range(solid.shape[1]), repeat=2):
                mask = cls.stencil(*kind, *place)
                both = (solid & mask).sum((1, 2))
                either = (solid | mask).sum((1, 2))
                overlap[kind] = torch.maximum(overlap[kind], both / either)
        shape, _ = max(overlap, key=lambda kind: overlap[kind].sum())

        centres = [frame.nonzero().float().mean(0) for frame in solid]
        directions = torch.tensor([*cls.DIRECTIONS.values()]).float()
        direction = (directions @ (centres[-1] - centres[0])).argmax()
        return [*cls.COLOURS][colour], shape, [*cls.DIRECTIONS][direction]


if __name__ == "__main__":
    usage = "train_min.py [flags] (released weights, LoRA, your own videos: torchrun -m full.train)"
    train(parse(add_flags, usage, __doc__)).close()
