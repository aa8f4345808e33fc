"""Estimate the memory that --dp x --sp GPUs would need for a training, to within 10 %, without needing one.

    $ python -m full.plan --config 13b --sp 2 --lora 32 --height 720 --width 1280 --frames 49    # the flags of full.train

It prints GiB a GPU, GiB of the host's memory a rank, and what they are made of.
"""

import json
import math
import sys

import torch

from full.flags import check_train, default_batch, get_config, is_benchmark, parse_train
from full.folder import build_data, largest_shape
from full.hub import find_model
from full.lora import add_lora
from full.memory import pinned
from hunyuan_sp import HunyuanVideo


def plan(config, args):
    """Return {part: GiB} that a GPU needs for these flags in bf16 with --compile, and of the host's memory each rank: to
    within 10 % of what was measured.

    In multiples of one activation, 2 bytes x hidden size for each of a rank's tokens: what a block keeps until its backward,
    and what the backward of one block works with. The keys of the first dict are --checkpointing's.
    """
    blocks, working = dict(none=(18, 24), attention=(2, 22), full=(1, 30))[args.checkpointing]
    kept = blocks - ("activations" in args.offload)
    with torch.device("meta"):
        model = HunyuanVideo(config)
        if args.lora:
            add_lora(model, args.lora, args.lora_alpha)
    dp, shard = args.dp or 1, args.shard_size or (args.dp or 1) * args.sp
    params = [(param.numel(), param.requires_grad) for param in model.parameters()]
    trained, frozen = (sum(n for n, trains in params if trains == kind) for kind in (True, False))
    largest = max(([*block.parameters()] for block in model.blocks), key=lambda own: sum(p.numel() for p in own))
    gathered = sum(2 * 2 * p.numel() + 4 * p.numel() * p.requires_grad for p in largest)  # the next block too

    data = build_data(config, args)
    video, batch = (
        math.prod(largest_shape(data)[1:]) // math.prod(config.patch_size),
        args.batch or default_batch(args, dp),
    )
    tokens = -(-batch // (dp * args.accumulation)) * -(-(video + 60) // args.sp)
    activation = 2 * config.hidden_size * tokens
    averaged = 4 * trained / shard * (args.ema > 0)
    parts = dict(weights=(4 * trained + 2 * frozen) / shard + averaged, optimizer=8 * trained / shard)
    parts |= dict(gradients=4 * trained / (shard if args.accumulation == 1 else 1))
    parts |= dict(kept=len(model.blocks) * (kept * activation + 4 * config.num_heads * tokens))
    parts |= dict(working=working * activation + gathered)
    # a save copies what is trained to the host, and writes beside training
    parts["host"] = 0 if is_benchmark(args) else 12 * trained / shard + averaged
    if "weights" in args.offload:  # a trained one with its gradient, and two averages that are not pinned
        parts |= dict(weights=0, optimizer=0, gradients=0, host=averaged)  # a save makes no copy
        for n, trains in params:
            parts["host"] += 2 * pinned(4 * n / shard) + 8 * n / shard if trains else pinned(2 * n / shard)
    if "activations" in args.offload:
        parts["host"] += len(model.blocks) * pinned(activation)
    # the kept activations go as the gradients come
    parts["all"] = parts["weights"] + parts["optimizer"] + max(parts["kept"], parts["gradients"]) + parts["working"]
    return {name: round(value / 2**30, 1) for name, value in parts.items()}


if __name__ == "__main__":
    try:
        args = parse_train(__doc__)
        find_model(args, ["transformer/config.json", "scheduler"])
        config = get_config(args)
        check_train(args, config)
        parts, (_, frames, height, width) = plan(config, args), largest_shape(build_data(config, args))
        video = f"{8 * height} x {8 * width} x {4 * frames - 3}" if config.out_channels != 3 else "the toy's"
        print(
            json.dumps(
                dict(video=video, gib_a_gpu=parts.pop("all"), host_gib_a_rank=parts.pop("host"), of_the_gpu=parts)
            )
        )
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
