"""Print what to type next: each program ends with the command that continues from what it made."""

import os
import shlex


def next_command(pm, program, *flags):
    """Return the command of a program in full/, for the number of ranks that this host runs now. Flags of None are left
    out."""
    flags = [shlex.quote(str(flag)) for flag in flags if flag is not None]
    here = os.environ.get("LOCAL_WORLD_SIZE", pm.world_size)
    start = f"torchrun --nproc_per_node={here}" if pm.world_size > 1 else "python"
    return " ".join((start, "-m", f"full.{program}", *flags))


def after_training(pm, args, config, shape):
    """Return the command that samples what a run has saved. shape: [C, T, h, w] of its largest sample's latents."""
    prompt = ["--prompt", args.sample_prompt or "a cat walks on the grass"]
    if config.out_channels == 3:
        prompt[1] = args.sample_prompt or "a blue circle moves up"
        return next_command(pm, "infer", *([] if args.out == "out" else ["--checkpoint", args.out]), *prompt)
    base = ["--model", args.named] if args.model else ["--weights", args.weights] if args.lora else []
    what = ["--lora", f"{args.out}/lora.safetensors"] if args.lora else ["--checkpoint", args.out]
    image = ["--image", "FIRST.png"] if config.image_condition_type else []
    size = ["--height", shape[2] * 8, "--width", shape[3] * 8, "--frames", shape[1] * 4 - 3]
    return next_command(pm, "infer", *base, *what, *size, *image, *(prompt if args.model else ["--embeds", "FILE"]))
