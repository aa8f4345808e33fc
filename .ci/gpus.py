"""Print full/README.md's table of GPUs: what `full.plan` finds for cards of several sizes, the measured figures beside it.

$ python .ci/gpus.py
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from full.flags import get_config, parse_train  # noqa: E402
from full.plan import add_flags, flags_of, plan, search, seconds  # noqa: E402

CASES = [  # GPUs, GiB, height, width, frames, flags
    (1, 8, 544, 960, 49, "--lora 32 --mlp_slices 1"),
    (1, 12, 720, 1280, 49, "--lora 32 --mlp_slices 1"),
    (1, 24, 720, 1280, 129, "--lora 32 --mlp_slices 8 --checkpointing full"),
    (1, 40, 720, 1280, 49, "--lora 32 --mlp_slices 1 --checkpointing full --offload activations"),
    (1, 80, 720, 1280, 49, "--lora 32 --mlp_slices 1"),
    (1, 80, 544, 960, 129, "--lora 32 --mlp_slices 1"),
    (2, 80, 544, 960, 129, "--lora 32 --mlp_slices 1 --sp 2"),
    (2, 80, 720, 1280, 49, "--mlp_slices 1 --sp 2 --offload weights"),
]


def measured(gpus, height, width, frames, flags):
    """Return "GiB, s" of assets/measured.md for the same flags, or ""."""
    text = (HERE / "assets/measured.md").read_text()
    rows = re.findall(r"^\| `(--[^`]*)` \| ([\d.]+) \| ([\d.]*) ?\|$", text, re.M)
    wanted = key(f"--height {height} --width {width} --frames {frames} {flags}")
    for row, gib, step in rows:
        if key(f"--height 720 --width 1280 {row}") == wanted:
            return f"{gib}, {step} s" if step else gib
    return ""


def key(flags):
    """Return what flags come to."""
    args = parse_train(None, f"--config 13b {flags}".split())
    names = "height width frames lora checkpointing offload sp dp mlp_slices blocks"
    return {name: sorted(x) if isinstance(x := getattr(args, name), list) else x for name in names.split()}


print("| GPUs | video | flags | GiB, planned | s a step, planned | measured |\n|---|---|---|---|---|---|")
for gpus, gib, height, width, frames, flags in CASES:
    line = f"--config 13b --gpus {gpus} --memory {gib} --height {height} --width {width} --frames {frames} {flags}"
    args = parse_train(None, line.split(), more=add_flags)
    config = get_config(args)
    best = search(config, args)[0]
    lora = f"--lora {best.lora} " * bool(best.lora)
    found = lora + flags_of(best)
    was = measured(gpus, height, width, frames, found)
    shown = found.replace("--sp 1 ", "")
    figures = f"{plan(config, best)['all']} | {seconds(config, best)[0]:.1f}"
    print(f"| {gpus} x {gib} GB | {height} x {width} x {frames} | `{shown}` | {figures} | {was} |")
