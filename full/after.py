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
        checkpoint = [] if args.out == "out" else ["--checkpoint", args.out]
        return next_command(pm, "infer", *checkpoint, *prompt)
    base = ["--weights", args.weights] if args.lora else []
    if args.model:
        base = ["--model", args.named]
    trained = ["--lora", f"{args.out}/lora.safetensors"] if args.lora else ["--checkpoint", args.out]
    _, frames, height, width = shape
    size = ["--height", 8 * height, "--width", 8 * width, "--frames", 4 * frames - 3]
    image = ["--image", "FIRST.png"] if config.image_condition_type else []
    words = prompt if args.model else ["--embeds", "FILE"]
    return next_command(pm, "infer", *base, *trained, *size, *image, *words)
