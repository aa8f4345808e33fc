"""Estimate what a training needs, without a GPU: memory to within 10 % of what was measured, seconds a step to within 15 %.

    $ python -m full.plan --config 13b --sp 2 --lora 32 --height 720 --width 1280 --frames 49    # the flags of full.train
    $ python -m full.plan --config 13b --gpus 1 --memory 24 --height 720 --width 1280 --frames 49 --lora 32    # find the rest

The first prints one line of JSON for these flags. The second searches for --sp, --checkpointing, --offload and --mlp_slices where
they are not given, and prints a line for each setting that fits, the fastest first; a slower one only if it needs less memory.
Seconds are of H100s and H200s, which were measured within 1 % of each other, with --compile and cuDNN's attention.
"""

import functools
import json
import math
import sys
from argparse import Namespace
from itertools import product

import torch

from full.flags import check_range, check_train, default_batch, get_config, is_benchmark, parse_train
from full.folder import build_data, largest_shape
from full.hub import find_model
from full.lora import add_lora
from full.memory import check_host, pinned
from hunyuan_sp import HunyuanVideo

TEXT = 60  # text tokens of a sample
SHAPES = {}  # the largest sample's shape, by the flags that decide it
MARGIN = 0.95  # of a GPU's memory, without the GiB that CUDA takes: what an estimate may fill


def add_flags(own):
    """Add what full.train does not have."""
    own.add_argument("--gpus", type=int, help="how many there are: search for the fastest setting that fits")
    own.add_argument("--clips", type=int, default=1000, help="encoded samples whose disk space is printed")


# --------------------------------------------------------------------------------------------------------------------
# memory


def plan(config, args, shape=None):
    """Return {part: GiB} that a GPU needs for these flags in bf16 with --compile, and of the host's memory each rank: to
    within 10 % of what was measured. shape: the largest sample's latents, if the caller knows it.

    In multiples of one activation, 2 bytes x hidden size for each of a rank's tokens: what a block keeps until its backward,
    and what the backward of one block works with, plain and with its MLP in slices (not measured but with full offloaded).
    The keys are --checkpointing's.
    """
    sizes = dict(none=((18, 24), (14, 15)), attention=((2, 22), (2, 13)), full=((1, 30), (1, 17)))
    plain, sliced = sizes[args.checkpointing]
    on_host = 0
    if "activations" in args.offload:  # what works holds what comes back, too
        on_host, plain, sliced = plain[0], (0, 32), (0, 18)
    kept, working = sliced if args.mlp_slices > 1 else plain
    dp, shard = args.dp or 1, args.shard_size or (args.dp or 1) * args.sp
    params, largest, count = sizes_of(config, args.lora)
    trained, frozen = (sum(n for n, trains in params if trains == kind) for kind in (True, False))
    gathered = sum(2 * 2 * n + 4 * n * trains for n, trains in largest)  # the next block too

    tokens = rows_of(args, dp) * -(-(tokens_of(config, shape or shape_of(config, args)) + TEXT) // args.sp)
    activation = 2 * config.hidden_size * tokens
    averaged = 4 * trained / shard * (args.ema > 0)
    parts = dict(weights=(4 * trained + 2 * frozen) / shard + averaged, optimizer=8 * trained / shard)
    parts |= dict(gradients=4 * trained / (shard if args.accumulation == 1 else 1))
    parts |= dict(kept=count * (kept * activation + 4 * config.num_heads * tokens))
    parts |= dict(working=working * activation + gathered)
    # a save copies what is trained to the host, and writes beside training
    parts["host"] = 0 if is_benchmark(args) else 12 * trained / shard + averaged
    if "weights" in args.offload:  # a trained one with its gradient, and two averages that are not pinned
        parts |= dict(weights=0, optimizer=0, gradients=0, host=averaged)  # a save makes no copy
        for n, trains in params:
            parts["host"] += 2 * pinned(4 * n / shard) + 8 * n / shard if trains else pinned(2 * n / shard)
    parts["host"] += on_host * count * pinned(activation)
    # the kept activations go as the gradients come
    parts["all"] = parts["weights"] + parts["optimizer"] + max(parts["kept"], parts["gradients"]) + parts["working"]
    return {name: round(value / 2**30, 1) for name, value in parts.items()}


def check_offload(config, args, shape, pm):
    """Raise ValueError if the host lacks the memory for what --offload keeps there in training. Call it before loading.

    shape: [C, T, h, w] of the largest sample's latents.
    """
    if args.offload and pm.device.type == "cuda":
        here = Namespace(**vars(args) | dict(dp=pm.dp_size, sp=pm.sp_size))
        check_host(args.offload, 2**30 * plan(config, here, shape)["host"], pm.world_size)


@functools.cache
def sizes_of(config, lora):
    """Return the parameters of a model as [(elements, trained)], those of its largest block, and the number of blocks."""
    with torch.device("meta"):
        model = HunyuanVideo(config)
        if lora:
            add_lora(model, lora)

    def sizes(module):
        return [(param.numel(), param.requires_grad) for param in module.parameters()]

    return sizes(model), max(map(sizes, model.blocks), key=lambda own: sum(n for n, _ in own)), len(model.blocks)


def rows_of(args, dp):
    """Return the samples of a micro-batch."""
    return -(-(args.batch or default_batch(args, dp)) // (dp * args.accumulation))


def shape_of(config, args):
    """Return [C, T, h, w] of the largest sample's latents. A search asks for each setting: the samples are read once."""
    key = config, args.data, args.model, args.config, args.height, args.width, args.frames
    if key not in SHAPES:
        SHAPES[key] = largest_shape(build_data(config, args))
    return SHAPES[key]


def tokens_of(config, shape):
    """Return the video tokens of latents [C, T, h, w]."""
    return math.prod(shape[1:]) // math.prod(config.patch_size)


# --------------------------------------------------------------------------------------------------------------------
# seconds: the cost model of assets/measured.md, whose constants these are; of LoRA, offloading and slices too

LINEARS, ATTENTION, BACKWARD = 725e12, 560e12, 500e12  # FLOP/s in bf16; cuDNN's attention forward and backward
POINTWISE = 3.5e-7  # s a token and block: norms, modulation, rope, GELU, copies
LINK, EXCHANGES = 215e9, 3  # bytes/s of a GPU to its sp group; exchanges of q, k, v and the output, all shown
FSDP_SHOWN, ADAMW, ONCE = 0.35, 22e-12, 0.03  # share of the weights' traffic; s a parameter of a rank; s a step
HOST_ADAMW = 1.4e-9  # s a trained parameter of a rank whose weights, gradients and AdamW are in the host's memory
HOST_COPY, HOST_SHOWN = 50e9, 0.7  # bytes/s to a GPU from pinned memory; the share of that time which nothing hides


def seconds(config, args):
    """Return the seconds of one step, and the GB that a GPU exchanges in it."""
    dp, width = args.dp or 1, config.hidden_size
    ranks, params = dp * args.sp, sizes_of(config, args.lora)[0]
    trained, frozen = (sum(n for n, trains in params if trains == kind) for kind in (True, False))
    samples, blocks = args.accumulation * rows_of(args, dp), config.double_depth + config.single_depth
    n = tokens_of(config, shape_of(config, args)) + TEXT
    local, busiest = n / args.sp, -(-config.num_heads // args.sp) / config.num_heads
    again = args.checkpointing != "none"
    linears = (8 + 4 * config.mlp_ratio) * width**2 * local / LINEARS
    mlp = 4 * config.mlp_ratio / (8 + 4 * config.mlp_ratio) * (args.mlp_slices > 1)  # recomputed once more
    attention = 4 * width * n * n * busiest / ATTENTION * (2 if args.checkpointing == "full" else 1)
    attention += 10 * width * n * n * busiest / BACKWARD
    sent = EXCHANGES * 4 * local * width * 2 * (args.sp - 1) / args.sp
    block = linears * ((2 if args.lora else 3) + again + mlp) + attention + POINTWISE * local + sent / LINK
    weights = (8 * trained + 4 * frozen) * (ranks - 1) / ranks
    total = samples * blocks * block + FSDP_SHOWN * weights / LINK + ONCE
    if "weights" in args.offload:
        copies = (2 + again) * 2 * (trained + frozen) / ranks / HOST_COPY
        total += HOST_SHOWN * copies + HOST_ADAMW * trained / ranks
    else:
        total += ADAMW * trained / ranks
    if "activations" in args.offload and args.checkpointing == "attention":
        total += HOST_SHOWN * samples * blocks * 2 * 2 * width * local / HOST_COPY  # its output leaves and comes back
    return total, (samples * blocks * sent + weights) / 1e9


# --------------------------------------------------------------------------------------------------------------------
# the setting


def search(config, args):
    """Return the settings that fit, as args, the fastest a sample first; a slower one only if it needs less memory.

    ValueError, with the one that needs least, if none fits.
    """
    free = dict(sp=[n for n in range(1, config.num_heads + 1) if args.gpus % n == 0], mlp_slices=[1, 8])
    free |= dict(checkpointing=["none", "attention", "full"])
    free |= dict(offload=[[], ["activations"], ["weights"], ["activations", "weights"]])
    free |= {name: [getattr(args, name)] for name in free if name in args.given}
    found, smallest = [], None
    for values in product(*free.values()):
        trial = Namespace(**vars(args) | dict(zip(free, values)))
        trial.dp = args.dp or args.gpus // trial.sp
        if trial.dp * trial.sp != args.gpus or args.gpus % (args.shard_size or 1):
            continue
        if "activations" in trial.offload and trial.checkpointing == "none":
            continue
        gib, step = plan(config, trial)["all"], seconds(config, trial)[0]
        samples = trial.batch or default_batch(trial, trial.dp)  # without those that only fill a batch
        setting = step / samples, gib, trial
        smallest = min(smallest or setting, setting, key=lambda one: one[1])
        if args.memory is None or gib <= MARGIN * (args.memory - 1):
            found.append(setting)
    if smallest is None:
        given = " ".join(f"--{name} {getattr(args, name)}" for name in ("dp", "sp", "shard_size") if name in args.given)
        raise ValueError(f"{given or 'what is asked'} does not go with {args.gpus} GPUs")
    if not found:
        why = f"the least, {flags_of(smallest[2])}, needs {smallest[1]:.1f} GiB of a GPU and leaves one to CUDA"
        raise ValueError(f"nothing fits {args.gpus} x {args.memory:g} GiB: {why}")
    best, least = [], math.inf
    for _, gib, trial in sorted(found, key=lambda one: (round(one[0], 3), one[1])):
        if gib < least:
            best, least = [*best, trial], gib
    return best


def flags_of(args):
    """Return the flags of a setting."""
    flags = [f"--sp {args.sp}", f"--checkpointing {args.checkpointing}", *(f"--offload {x}" for x in args.offload)]
    return " ".join([*flags, *[f"--mlp_slices {args.mlp_slices}"] * (args.mlp_slices > 1)])


def report(config, args):
    """Return what is printed of one setting."""
    parts, (step, exchanged), shape = plan(config, args), seconds(config, args), shape_of(config, args)
    _, frames, height, width = shape
    toy = config.out_channels == 3
    facts = dict(video="the toy's" if toy else f"{8 * height} x {8 * width} x {4 * frames - 3}", flags=flags_of(args))
    facts |= dict(gib_a_gpu=parts.pop("all"), host_gib_a_rank=parts.pop("host"), of_the_gpu=parts)
    facts |= dict(s_per_step=round(step, 2), gb_exchanged=round(exchanged, 1))
    sample = 4 * (math.prod(shape) + 100 * config.text_dim)  # float32, and a caption of 100 tokens
    return facts | {f"disk_gb_{args.clips}_clips": round(args.clips * sample / 1e9, 1)}


if __name__ == "__main__":
    try:
        args = parse_train(__doc__, more=add_flags)
        check_range(args, "gpus clips", 1)
        if args.memory and not args.gpus:
            raise ValueError("--memory goes with --gpus, to search for what fits")
        find_model(args, ["transformer/config.json", "scheduler"])
        config = get_config(args)
        check_train(args, config)
        for setting in search(config, args) if args.gpus else [args]:
            print(json.dumps(report(config, setting)))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
