"""Train HunyuanVideo's DiT under data × sequence parallelism, the whole story top to bottom.

    $ torchrun --nproc_per_node=2 train_min.py                  # a tiny model learns moving shapes, minutes on a CPU
    $ torchrun --nproc_per_node=6 train_min.py --sp 3           # 2 data-parallel groups of 3 sequence-parallel ranks
    $ torchrun --nproc_per_node=4 train_min.py --config 13b --sp 4 --height 720 --width 1280 --frames 49 --steps 5
    $ torchrun --nproc_per_node=8 train_min.py --config 13b --sp 4 --data latents/ --weights transformer/ --resume

Plain `python train_min.py` runs the same lines as a world of one. The loss curve is the same for every (dp, sp).
"""

import argparse
import hashlib
import json
import math
import os
import re
import resource
import signal
import sys
import time
import traceback
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from comm import ParallelManager, failed_ranks, silent_ranks, split_sequence
from hunyuan_sp import (
    CHECKPOINTING,
    HunyuanConfig,
    HunyuanVideo,
    forward_flops,
    init_weights,
    load_weights,
    open_safetensors,
    patchify,
    text_lengths,
)
from sampler import DPSPBatchSampler


def add_common_flags(p):
    """What training and sampling have in common."""
    p.add_argument("--blocks", help="cut the depth of --config to D,S double and single blocks, e.g. 4,8")
    p.add_argument("--weights", help="file or folder of released weights (original, diffusers or ComfyUI naming)")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    p.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="compute (default: bfloat16 on GPUs, float32 on CPUs)"
    )
    p.add_argument("--attention", default="sdpa", help="sdpa (default), or fa4: FlashAttention-4, the extra [fast]")
    p.add_argument("--compile", action="store_true", help="torch.compile both sides of each block's attention")
    p.add_argument("--height", type=int, default=256, help="of the video, for models over VAE latents")
    p.add_argument("--width", type=int, default=256, help="of the video")
    p.add_argument("--frames", type=int, default=17, help="of the video, 4k+1")
    p.add_argument(
        "--profile", action="store_true", help="Chrome traces of the last step, trace-RANK.json.gz, by the output"
    )
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", default="tiny", help="model preset: tiny (default) or 13b")
    p.add_argument("--dp", "--data_parallel_size", type=int, help="data-parallel groups (default: world size / sp)")
    p.add_argument(
        "--sp", "--sequence_parallel_size", type=int, default=1, help="ranks that share a sample (default 1)"
    )
    p.add_argument(
        "--shard_size", type=int, help="HSDP: shard weights over so many ranks, replicate beyond (default: all)"
    )
    p.add_argument("--data", help="folder with one .safetensors a sample (default: generated data)")
    p.add_argument("--text_tokens", type=int, default=60, help="text tokens of random latents")
    p.add_argument("--steps", type=int, default=900, help="optimizer steps in all, those before a resume included")
    p.add_argument("--batch", type=int, help="global batch: samples a step over all ranks (default 16; 13b: dp)")
    p.add_argument("--accumulation", type=int, default=1, help="micro-batches a step")
    p.add_argument("--lr", type=float, help="peak learning rate, then a cosine to a tenth (default 2e-3; 13b: 1e-5)")
    p.add_argument("--warmup", type=int, default=50, help="steps of linear warm-up")
    p.add_argument("--weight_decay", type=float, default=0.01, help="AdamW's")
    p.add_argument("--clip", type=float, default=1.0, help="global gradient norm")
    p.add_argument("--shift", type=float, default=4.0, help="flow shift of the noise levels; 7 for 720p x 129 frames")
    p.add_argument("--guidance", type=float, default=1.0, help="guidance scale fed to models that embed it")
    p.add_argument("--caption_drop", type=float, default=0.1, help="chance of training a sample without its text")
    p.add_argument(
        "--checkpointing", choices=CHECKPOINTING, help="activations (default: none for tiny, attention else)"
    )
    p.add_argument("--no_reshard", action="store_true", help="keep weights whole from forward to backward (as ZeRO-2)")
    p.add_argument("--seed", type=int, default=0, help="of weights, order, noise and caption drop")
    p.add_argument("--out", default="out", help="folder of checkpoints and log.jsonl")
    p.add_argument("--save_every", type=int, default=0, help="steps between checkpoints (default: only at the end)")
    p.add_argument("--keep", type=int, default=3, help="checkpoints of this run that stay (0: all)")
    p.add_argument("--no_save", action="store_true", help="no checkpoints at all, for benchmarks")
    p.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out, on any layout")
    p.add_argument("--timeout", type=float, default=600, help="seconds until a rank that does not answer ends the job")
    p.add_argument(
        "--max_skipped", type=int, default=10, help="stop after so many steps in a row without finite gradients"
    )
    p.add_argument(
        "--check_every", type=int, default=100, help="steps between checks that sp ranks share their samples"
    )
    p.add_argument("--deterministic", action="store_true", help="the same again bit for bit, on GPUs too")
    p.add_argument(
        "--workers", type=int, help="processes that load data, for each rank (default: none for tiny, one else)"
    )
    add_common_flags(p)
    args = p.parse_args(argv)
    big = args.config != "tiny"
    args.lr = (1e-5 if big else 2e-3) if args.lr is None else args.lr
    args.checkpointing = args.checkpointing or ("attention" if big else "none")
    args.workers = int(big) if args.workers is None else args.workers
    return args


# --------------------------------------------------------------------------------------------------------------------
# data: item i is (i, latents [C, T, h, w], text [L, text_dim], pooled [pooled_dim])

COLOURS = dict(red=(1, 0, 0), green=(0, 1, 0), blue=(0, 0, 1), yellow=(1, 1, 0), purple=(1, 0, 1), cyan=(0, 1, 1))
SHAPES = ("square", "circle", "cross")
DIRECTIONS = dict(left=(0, -1), right=(0, 1), up=(-1, 0), down=(1, 0))
CLIP_SHAPE = (3, 4, 12, 12)
CAPTIONS = [f"a {c} {s} moves {d}" for c in COLOURS for s in SHAPES for d in DIRECTIONS]


def draw_clip(caption, generator):
    """The clip that a caption describes, [3, 4, 12, 12] in -1..1, at a random place: 2 pixels a frame."""
    _, frames, size, _ = CLIP_SHAPE
    words = caption.split()
    colour = next(COLOURS[w] for w in words if w in COLOURS)
    direction = next(DIRECTIONS[w] for w in words if w in DIRECTIONS)
    radius, way = (1 if "small" in words else 2), 2 * (frames - 1)
    spans = [(radius + way * (d < 0), size - 1 - radius - way * (d > 0)) for d in direction]
    start = [int(torch.randint(low, high + 1, (), generator=generator)) for low, high in spans]
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    clip = torch.full((3, frames, size, size), -1.0)
    for t in range(frames):
        dy, dx = [(axis - s - 2 * t * d).abs() for axis, s, d in zip((y, x), start, direction)]
        inside = torch.maximum(dy, dx) <= radius
        if "circle" in words:
            inside = dy**2 + dx**2 <= radius**2 + 1
        if "cross" in words:
            inside &= torch.minimum(dy, dx) <= radius // 3
        clip[:, t] = torch.where(inside, torch.tensor(colour)[:, None, None] * 2.0 - 1, clip[:, t])
    return clip


def embed_text(prompt, text_dim, pooled_dim):
    """A fixed text embedder: a word is a random vector that only depends on its letters. Stands in for the two encoders.

    prompt -> text [words, text_dim], pooled [pooled_dim]. No words give one token of zeros, as a dropped caption does.
    """
    words = prompt.lower().split()
    if not words:
        return torch.zeros(1, text_dim), torch.zeros(pooled_dim)
    vectors = [torch.randn(text_dim + pooled_dim, generator=seeded("word", word)) for word in words]
    text, pooled = torch.stack(vectors).split((text_dim, pooled_dim), 1)
    return text, pooled.sum(0) / math.sqrt(len(words))


def seeded(*key):
    """A random stream that is a function of the key alone: never of a rank, nor of what came before."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Shapes:
    """Clips of coloured shapes that move, with captions of five or six words."""

    def __init__(self, config, length=4096):
        self.config, self.length, self.shapes = config, length, None

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        generator, caption = seeded("clip", int(i)), CAPTIONS[i % len(CAPTIONS)]
        if torch.rand((), generator=generator) < 0.3:
            caption = caption.replace("a ", "a small ", 1)
        return i, draw_clip(caption, generator), *embed_text(caption, self.config.text_dim, self.config.pooled_dim)


class RandomLatents:
    """Noise of the right shape: what a benchmark needs."""

    def __init__(self, config, height, width, frames, text_tokens, length=64):
        if height % 16 or width % 16 or frames % 4 != 1 or min(height, width, frames) < 1:
            raise ValueError(
                f"height {height} and width {width} must be multiples of 16, frames {frames} must be 4k+1: "
                f"{max(16, height // 16 * 16)} x {max(16, width // 16 * 16)} x {max(1, (frames - 1) // 4 * 4 + 1)} would do"
            )
        self.config, self.length, self.text_tokens, self.shapes = config, length, text_tokens, None
        self.shape = (config.in_channels, (frames - 1) // 4 + 1, height // 8, width // 8)

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        generator, config = seeded("random", int(i)), self.config
        text = torch.randn(self.text_tokens, config.text_dim, generator=generator)
        return (
            i,
            torch.randn(self.shape, generator=generator),
            text,
            torch.randn(config.pooled_dim, generator=generator),
        )


def shapes_in(file):
    """{name: shape} of a safetensors file."""
    with open_safetensors(file) as handle:
        return {name: handle.get_slice(name).get_shape() for name in handle.keys()}


def text_fits(shapes, config):
    """Whether there are text [L, text_dim], L > 0, and pooled [pooled_dim]."""
    text = shapes.get("text", [])
    return text[1:] == [config.text_dim] and text[0] > 0 and shapes.get("pooled") == [config.pooled_dim]


def read_tensors(file, *names):
    with open_safetensors(file) as handle:
        return tuple(handle.get_tensor(name).float() for name in names)


class Folder:
    """One .safetensors a sample: latents [C, T, h, w] (already times the VAE's 0.476986), text [L, 4096], pooled [768]."""

    def __init__(self, config, folder):
        self.files = sorted(Path(folder).glob("*.safetensors"))
        if not self.files:
            raise FileNotFoundError(f"no data: there is no .safetensors file in {folder}")
        self.config, self.shapes = config, []
        for file in self.files:
            shapes = shapes_in(file)
            latents = shapes.get("latents", [])
            fits = len(latents) == 4 and latents[0] == config.out_channels and text_fits(shapes, config)
            if not fits or any(n < 1 or n % p for n, p in zip(latents[1:], config.patch_size)):
                raise ValueError(
                    f"{file} holds {shapes}, expected latents [{config.out_channels}, T, h, w] with h, w even, "
                    f"text [L, {config.text_dim}] and pooled [{config.pooled_dim}]"
                )
            self.shapes.append(tuple(latents))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return i, *read_tensors(self.files[i], "latents", "text", "pooled")


# --------------------------------------------------------------------------------------------------------------------
# rectified flow: x = (1 - sigma) clip + sigma noise, and the model learns the velocity noise - clip


def shift_sigma(u, shift):
    """Noise levels moved towards noise as resolution grows: arXiv:2403.03206, equation 23."""
    return shift * u / (1 + (shift - 1) * u)


def collate(items, seed, shift, caption_drop):
    """Items -> one batch, noise included: it is a function of (seed, epoch, sample), so resume is exact on any layout."""
    rows = []
    for index, clip, text, pooled in items:
        generator = seeded("flow", seed, getattr(index, "epoch", 0), int(index))
        noise = torch.randn(clip.shape, generator=generator)
        sigma = shift_sigma(torch.randn((), generator=generator).sigmoid(), shift)
        if torch.rand((), generator=generator) < caption_drop:
            text, pooled = torch.zeros_like(text[:1]), torch.zeros_like(pooled)
        rows.append(((1 - sigma) * clip + sigma * noise, noise - clip, 1000 * sigma, text, pooled))
    noisy, target, timestep, texts, pooled = zip(*rows)
    mask = torch.arange(max(map(len, texts))) < torch.tensor([len(t) for t in texts])[:, None]
    return dict(
        latents=torch.stack(noisy),
        target=torch.stack(target),
        timestep=torch.stack(timestep),
        text=torch.nn.utils.rnn.pad_sequence(texts, batch_first=True),
        text_mask=mask,
        pooled=torch.stack(pooled),
        weight=torch.tensor([getattr(item[0], "weight", 1.0) for item in items]),
        samples=torch.tensor([int(item[0]) for item in items]),
    )


def flow_loss(model, batch, guidance, group, checkpointing="none"):
    """The sum over this rank's tokens of their mean squared error, to be divided by the global token count."""
    config = model.config
    inputs = {name: batch[name] for name in ("latents", "timestep", "text", "pooled")}
    inputs["text_mask"] = text_lengths(batch["text_mask"])  # FSDP2 would take the mask to the GPU, to be fetched back
    scale = guidance_input(guidance, len(batch["latents"]), batch["latents"].device) if config.guidance_embed else None
    velocity = model(**inputs, guidance=scale, group=group, gather=False, checkpointing=checkpointing)
    target = split_sequence(patchify(batch["target"], config.patch_size), group)
    error = (velocity.to(target.dtype) - target).square().mean(2)
    return (error * batch["weight"][:, None]).sum()


def guidance_input(scale, batch, device):
    """What the model is fed for a guidance scale: the release multiplies by 1000 in bf16, so 6.0 is 6016."""
    return torch.full((batch,), scale, dtype=torch.bfloat16, device=device).mul(1000).float()


def count_tokens(batch, patch_size):
    """Video tokens that carry weight: what the mean is taken over."""
    return batch["weight"].sum().item() * math.prod(batch["target"].shape[2:]) / math.prod(patch_size)


# --------------------------------------------------------------------------------------------------------------------
# what the user sees

PEAK_TFLOPS = dict(A100=312, H100=989, H200=989, B200=2250)  # dense bf16, by the vendor's datasheets


def replace_text(path, text):
    """All or nothing, whenever the process is killed."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(text)
    except OSError as error:  # a full disk does not say where
        raise OSError(f"{path} could not be written: {error.strerror}") from None
    os.replace(temporary, path)


def rates(pm, seconds, tokens, flops):
    """Of one step over all ranks; tflops and the share of a known GPU's peak are per rank, memory is rank 0's."""
    tflops = flops / seconds / 1e12 / pm.world_size
    report = dict(s_per_step=round(seconds, 4), tokens_per_s=round(tokens / seconds), tflops_per_rank=round(tflops, 4))
    if pm.device.type != "cuda":
        return report | dict(peak_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2))
    name = torch.cuda.get_device_name(pm.device)
    peak = next((peak for gpu, peak in PEAK_TFLOPS.items() if gpu in name), None)
    mfu = dict(mfu=round(tflops / peak, 4)) if peak else {}
    memory = dict(peak_gib=torch.cuda.max_memory_allocated(), resident_gib=torch.cuda.memory_allocated())
    return report | mfu | {name: round(value / 2**30, 2) for name, value in memory.items()}


class Profile:
    """One step under torch's profiler: for `path` a Chrome trace; and how its time on the GPU was shared."""

    def __init__(self, pm, path=None):
        self.pm, self.path, self.shares = pm, path, {}
        gpu = [ProfilerActivity.CUDA] * (pm.device.type == "cuda")
        self.profiler = (
            profile(activities=gpu + [ProfilerActivity.CPU] * bool(path), acc_events=True) if gpu or path else None
        )

    def start(self):
        if self.profiler:
            self.profiler.start()

    def stop(self):
        if not self.profiler:
            return
        self.profiler.stop()
        kernels = [e for e in self.profiler.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        self.shares = shares([(e.time_range.start, e.time_range.end, "nccl" in e.name.lower()) for e in kernels])
        if self.path:
            self.profiler.export_chrome_trace(f"{self.path}-{self.pm.rank}.json.gz")


def shares(spans):
    """Kernels (start, end, is_collective) -> shares of the time from first to last: collectives, those with nothing
    beside them (exposed), nothing at all (idle)."""
    if not spans:
        return {}
    edges = sorted([(start, 1, kind) for start, _, kind in spans] + [(end, -1, kind) for _, end, kind in spans])
    running, totals, last = [0, 0], {}, edges[0][0]
    for now, change, kind in edges:
        state = (running[0] > 0, running[1] > 0)
        totals[state] = totals.get(state, 0) + now - last
        running[kind] += change
        last = now
    exposed, beside, idle = (totals.get(state, 0) for state in ((False, True), (True, True), (False, False)))
    named = dict(collectives=exposed + beside, exposed=exposed, idle=idle)
    return {name: round(part / sum(totals.values()), 4) for name, part in named.items()}


class Progress:
    """One line that updates in place, one JSON line a step in log.jsonl, and a curve at the end. Only rank 0 speaks."""

    def __init__(self, pm, out, steps, resumed):
        self.pm, self.steps, self.losses, self.seconds, self.skipped = pm, steps, [], [], 0
        if pm.is_main:  # steps after the one resumed from are taken again
            path = Path(out) / "log.jsonl"
            lines = path.read_text().splitlines(True) if resumed and path.exists() else []
            replace_text(path, "".join(x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= resumed))
            self.log = open(path, "a")
        self.started = self.last = time.perf_counter()

    def step(self, step, loss, norm, lr, tokens, flops, skipped):
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        self.losses.append(loss)
        self.seconds.append((seconds, tokens, flops))
        self.skipped += skipped
        if not self.pm.is_main:
            return
        speed = rates(self.pm, seconds, tokens, flops)
        self.log.write(json.dumps(dict(step=step, loss=loss, grad_norm=norm, lr=lr, skipped=skipped) | speed) + "\n")
        self.log.flush()
        recent = [loss for loss in self.losses if math.isfinite(loss)][-20:] or [math.nan]
        left = (self.steps - step) * (now - self.started) / len(self.losses)
        mfu = f" · MFU {100 * speed['mfu']:.1f} %" if "mfu" in speed else ""
        line = (
            f"step {step}/{self.steps}{' skipped' if skipped else ''} · loss {sum(recent) / len(recent):.4f} · grad norm {norm:.2f} · "
            f"{seconds:.2f} s/step · {speed['tokens_per_s']} tokens/s{mfu} · {speed['peak_gib']:.1f} GiB · "
            f"{left // 60:.0f}:{left % 60:02.0f} left"
        )
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="\n" if step == self.steps else "", flush=True)
        elif step % max(1, self.steps // 20) == 0 or step == self.steps or len(self.losses) == 1:
            print(line, flush=True)

    def end(self, looked):
        if not self.pm.is_main or not self.losses:
            return
        print(curve([loss for loss in self.losses if math.isfinite(loss)] or [0.0]))
        timed = self.seconds[:-1] or self.seconds if looked else self.seconds
        # the first steps compile and allocate; and their backward multiplies zeros, since blocks begin as the identity
        warm = timed[2:] or timed[-1:]
        speed = rates(self.pm, *sorted(warm)[len(warm) // 2])  # the median step
        speed["timed_steps"] = len(timed[2:])
        print(json.dumps(speed | (looked.shares if looked else {}) | dict(skipped=self.skipped)), flush=True)


def curve(values, columns=64, rows=8):
    """A small plot in the terminal: each column the mean of its share of the values."""
    columns = min(columns, len(values))
    edges = [len(values) * i // columns for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:])]
    low, high = min(means), max(means)
    heights = [(v - low) / ((high - low) or 1) * (8 * rows - 1) + 1 for v in means]
    lines = ["".join(" ▁▂▃▄▅▆▇█"[min(8, max(0, round(h - 8 * row)))] for h in heights) for row in reversed(range(rows))]
    labels = [f"{high:.4f}", *[""] * (rows - 2), f"{low:.4f}"]
    return "\n".join(f"{label:>10} │{line}" for label, line in zip(labels, lines)) + f"\n{'loss':>10} └{'─' * columns}"


# --------------------------------------------------------------------------------------------------------------------
# the story


def find_start(pm, args):
    """(path, manifest) of the checkpoint to go on from, (None, {"run": ..}) for a new run. Equal on all ranks.

    run.json names the run under way in --out, and its launch: a job that torchrun restarts goes on with its own newest
    checkpoint, never with one that an older run left in the same folder.
    """
    file = Path(args.out) / "run.json"
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    launch = f"process {os.getppid()}" if launch == "none" else launch

    def known():
        file.parent.mkdir(parents=True, exist_ok=True)
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and file.exists():
            last = json.loads(file.read_text())
            return last["run"] if last["launch"] == launch else None

    run = pm.on_main(known)
    try:
        start = pm.find(args.out, run) if run or args.resume else (None, dict(run=None))
    except FileNotFoundError:
        if not run:
            raise
        start = None, dict(run=run)
    run = start[1].get("run") or pm.on_main(lambda: f"{time.time():.6f}")
    pm.on_main(lambda: replace_text(file, json.dumps(dict(run=run, launch=launch))))
    return start[0], start[1] | dict(run=run)


def check_config(config, state, path):
    """ValueError with the fields that differ from what a checkpoint was trained with."""
    was, now = state["config"], json.loads(json.dumps(asdict(config)))
    if wrong := [
        f"{k}: {was.get(k)} there, {now.get(k)} here" for k in sorted({*was, *now}) if was.get(k) != now.get(k)
    ]:
        raise ValueError(f"{path} is of another model: {'; '.join(wrong)}")


def compute_dtype(args, device):
    return getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))


def build_model(config, pm, args, path=None):
    """On the meta device first: no rank ever holds all weights. path: the checkpoint that they come from."""
    with torch.device("meta"):
        model = HunyuanVideo(config, args.attention)
    dtype = compute_dtype(args, pm.device)
    param_dtype = None if dtype == torch.float32 else dtype
    pm.shard(model, model.blocks, param_dtype, args.shard_size, not args.no_reshard)
    if args.weights and not path:
        load_weights(model, args.weights)
    elif not path:
        init_weights(model, args.seed)
    if args.compile:
        model.compile_blocks()
    pm.optimizer = torch.optim.AdamW(
        model.parameters(), args.lr, (0.9, 0.99), weight_decay=args.weight_decay, fused=True
    )
    if path:
        pm.load(path)
    return model


def build_data(config, args):
    if args.data:
        return Folder(config, args.data)
    if args.config == "tiny":
        return Shapes(config)
    return RandomLatents(config, args.height, args.width, args.frames, args.text_tokens)


def learning_rate(step, args):
    """Linear warm-up, then a cosine to a tenth at the last step."""
    done = min(1.0, max(0, step - args.warmup) / max(1, args.steps - args.warmup))
    return args.lr * min(1.0, (step + 1) / max(1, args.warmup)) * (0.55 + 0.45 * math.cos(math.pi * done))


def check_flags(args, names, low, high=math.inf):
    """ValueError for the first of the flags whose value is outside low .. high."""
    for name in names.split():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            wanted = f"at least {low}" if high == math.inf else f"in {low} .. {high}"
            raise ValueError(f"--{name} {value} is not {wanted}")


def get_config(args):
    changes = {}
    if args.blocks:
        try:
            changes = dict(zip(("double_depth", "single_depth"), map(int, args.blocks.split(",")), strict=True))
            if min(changes.values()) < 0:
                raise ValueError
        except ValueError:
            raise ValueError(f"--blocks {args.blocks} is not two numbers D,S, e.g. 4,8") from None
    config = HunyuanConfig.preset(args.config, **changes)
    if (args.sp or 1) > config.num_heads:
        raise ValueError(f"sequence_parallel_size {args.sp} is more than the {config.num_heads} heads")
    return config


def train(args):
    check_flags(args, "steps batch accumulation max_skipped check_every text_tokens", 1)
    check_flags(args, "warmup save_every keep workers", 0)
    check_flags(args, "lr clip shift timeout", 1e-9)
    check_flags(args, "caption_drop", 0.0, 1.0)
    config = get_config(args)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product on a GPU
        torch.use_deterministic_algorithms(True)
    data = build_data(config, args)
    pm = ParallelManager(args.dp, args.sp, args.device, args.timeout)
    batch_size = args.batch or (16 if args.config == "tiny" else pm.dp_size)
    sampler = DPSPBatchSampler(
        len(data), batch_size, pm.dp_rank, pm.dp_size, args.accumulation, args.seed, shapes=data.shapes
    )
    rules = dict(seed=args.seed, shift=args.shift, caption_drop=args.caption_drop)
    pinned = pm.device.type == "cuda"
    loader = DataLoader(
        data,
        batch_sampler=sampler,
        collate_fn=partial(collate, **rules),
        num_workers=args.workers,
        pin_memory=pinned,
        worker_init_fn=forget_signals,
    )
    asked = catch_signals()

    path, state = find_start(pm, args)
    if path:
        check_config(config, state, path)
        sampler.load_state_dict(state["sampler"])
    model, step, skipped = build_model(config, pm, args, path), state.get("step", 0), 0
    if pm.is_main:
        print(
            f"{sum(p.numel() for p in model.parameters()):,} parameters on {pm.world_size} x {pm.device.type} = "
            f"dp {pm.dp_size} x sp {pm.sp_size}, {len(data)} samples, global batch {batch_size}, from step {step}"
            + (f" of {args.steps}: nothing to do" if step >= args.steps else ""),
            flush=True,
        )

    def batches():  # every pass over the loader is what is left of the sampler's epoch
        while True:
            yield from loader

    big = isinstance(data, RandomLatents)
    stream, progress, saved = batches(), Progress(pm, args.out, args.steps, step), step
    extra = dict(run=state["run"], config=asdict(config), args=vars(args), layout=[pm.dp_size, pm.sp_size])
    # a benchmark looks into its last step, which then does not count
    looked = Profile(pm, args.profile and f"{args.out}/trace") if args.profile or big else None
    while step < args.steps:
        if looked and step == args.steps - 1:
            looked.start()
        micro_batches = [next(stream) for _ in range(args.accumulation)]
        count = pm.sum(sum(count_tokens(b, config.patch_size) for b in micro_batches), pm.dp_group).item()
        flops = sum(b["weight"].sum().item() * _flops(config, b) for b in micro_batches)
        local = torch.zeros((), device=pm.device)
        for n, batch in enumerate(micro_batches):
            # the mask stays on the CPU: its lengths are then known without waiting for the GPU
            batch = {k: v if k == "text_mask" else v.to(pm.device, non_blocking=True) for k, v in batch.items()}
            loss = flow_loss(model, batch, args.guidance, pm.sp_group, args.checkpointing) / count
            # the gradient rule: the sum over ranks of these is the mean over all tokens of the step
            pm.backward(loss, last=n == args.accumulation - 1)
            local += loss.detach()
        norm = pm.clip_grad_norm(args.clip)
        flags = torch.tensor([asked["save"], asked["stop"], pm.save_ready()]).to(local)
        total, save, stop, ready = pm.sum(torch.cat((local[None], flags))).tolist()
        finite, lr = math.isfinite(total) and math.isfinite(norm), learning_rate(step, args)
        for group in pm.optimizer.param_groups:
            group["lr"] = lr
        pm.step(skip=not finite)  # norm and loss are sums over all ranks: all skip, or none
        skipped = 0 if finite else skipped + 1
        if step < 3 or step % args.check_every == 0:
            seen = [b["samples"].tolist() for b in micro_batches]
            shapes = [list(b["latents"].shape) for b in micro_batches]
            pm.check_equal(step=step, samples=seen, shapes=shapes, norm=str(norm))
        sampler.advance()
        step += 1
        asked["save"] &= not save
        total_flops = 3 * pm.sum(flops, pm.dp_group).item()
        if looked and step == args.steps:
            looked.stop()
        progress.step(step, total, norm, lr, tokens=count, flops=total_flops, skipped=not finite)
        if skipped >= args.max_skipped:
            raise ValueError(
                f"{skipped} steps in a row, the last one {step}, had no finite loss and gradient (loss {total}, norm {norm}): "
                f"the last checkpoint is {f'{args.out}/step-{saved}' if saved else 'none'}"
            )
        if ready == pm.world_size:
            pm.finish_save()
        due = step == args.steps or (args.save_every and step % args.save_every == 0)
        if not args.no_save and (due or save or stop):
            pm.save(args.out, step, extra | dict(sampler=sampler.state_dict()), args.keep)
            saved = step
        if stop:
            break
    pm.finish_save()
    if progress.skipped == len(progress.losses) > 0:
        raise ValueError(f"none of {progress.skipped} steps had a finite loss and gradient: nothing was learned")
    progress.end(looked)
    if pm.is_main:
        why = ", stopped by a signal" if step < args.steps else ""
        print(f"saved {args.out}/step-{saved}{why}" if saved else f"nothing saved{why}", flush=True)
        if saved and not args.data and args.config == "tiny":
            print('now: torchrun --nproc_per_node=2 infer_min.py --prompt "a blue circle moves up"')
    return pm


def forget_signals(_):
    """In a process that loads data: a signal is the training's, and so are the connections that its handler uses."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def catch_signals():
    """SIGUSR1: save at the end of the step. SIGTERM (Slurm, spot hosts, torchrun): save there and stop."""
    asked = dict(save=False, stop=False)

    def stop(*_):
        if failed_ranks():  # torchrun clears up after another rank: there will be no next step
            os._exit(1)
        asked["stop"] = True

    signal.signal(signal.SIGUSR1, lambda *_: asked.update(save=True))
    signal.signal(signal.SIGTERM, stop)
    return asked


def _flops(config, batch):
    video = math.prod(batch["target"].shape[2:]) // math.prod(config.patch_size)
    return forward_flops(config, video, batch["text_mask"].sum(1).float().mean().item())


def run(main, args):
    """What can go wrong for a user is one sentence and status 1, on every rank, and in the last lines of torchrun."""
    try:
        main(args).close()
    except (ValueError, OSError, RuntimeError) as error:
        told = str(error).strip() or type(error).__name__
        if isinstance(error, OSError) and error.errno and not error.filename:  # a full disk does not say where
            told = f"{args.out if main is train else args.output}: {told}"
        if isinstance(error, RuntimeError):
            if not re.search(r"timed? ?out|connection|peer|nccl|gloo", told, re.I) or not dist.is_initialized():
                raise
            silent = silent_ranks()
            told = f"rank {', '.join(map(str, silent)) or 'unknown'} does not answer ({told.splitlines()[0][:200]})"
        if args.debug:
            traceback.print_exc()
        print(f"error: {told}", file=sys.stderr, flush=True)
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # what torchrun shows as the cause
            extra = dict(py_callstack=told, timestamp=str(int(time.time())))
            Path(file).write_text(json.dumps(dict(message=dict(message=told, extraInfo=extra))))
        os._exit(1)  # waiting for other ranks here would hang


if __name__ == "__main__":
    run(train, parse())
