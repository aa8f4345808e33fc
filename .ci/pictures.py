"""Draw the README's pictures into assets/, from data.

    $ python .ci/pictures.py                    # layout.svg, all_to_all.svg, and scaling.svg from assets/measured.json
    $ python .ci/pictures.py --train            # also training.png: trains the toy, samples from five of its checkpoints
    $ python .ci/pictures.py --clips clips/     # also training.png, of clips that are there: step-N-n.safetensors

The SVGs need the standard library alone. training.png needs Pillow and what the toy needs; --train takes some minutes on a
CPU. With --train, --clips says where the clips are kept.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from html import escape
from itertools import groupby
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
ASSETS = HERE / "assets"

INK, PALE, LINE = "#1f2328", "#59636e", "#c8ced5"
BLUE, ORANGE, GREEN = ("#1f6fb4", "#cfe3f5"), ("#c2600a", "#fde0c2"), ("#2b7a3d", "#cdebd2")  # (strong, light)
GREY, RED = ("#59636e", "#d5dade"), "#b3261e"
RANKS = (BLUE, ORANGE)


# --------------------------------------------------------------------------------------------------------------------
# SVG: a picture is a list of strings


def text(x, y, words, size=14, anchor="start", fill=INK, bold=False):
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{weight}>{escape(words)}</text>'
    )


def box(x, y, width, height, fill="none", stroke="none", radius=3):
    at = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {at} rx="{radius}" fill="{fill}" stroke="{stroke}"/>'


def line(x1, y1, x2, y2, stroke=INK, width=1.5, dashed=False, head=False):
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    parts = [f'<path d="M {x1:g} {y1:g} L {x2:g} {y2:g}" stroke="{stroke}" stroke-width="{width}"{dash}/>']
    if head:
        turn = math.degrees(math.atan2(y2 - y1, x2 - x1))
        at = f'transform="translate({x2:g} {y2:g}) rotate({turn:.1f})"'
        parts.append(f'<path d="M -2 -6 L 10 0 L -2 6 z" fill="{stroke}" {at}/>')
    return "".join(parts)


def write_svg(name, width, height, title, parts):
    """On a white card, so that it reads on a dark page too."""
    page = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="Helvetica, Arial, sans-serif" role="img">',
        f"<title>{escape(title)}</title>",
        box(0.5, 0.5, width - 1, height - 1, "#ffffff", LINE, 12),
        *parts,
        "</svg>\n",
    ]
    (ASSETS / name).write_text("\n".join(page), encoding="utf-8")
    print(f"wrote assets/{name}")


# --------------------------------------------------------------------------------------------------------------------
# who holds what: dp × sp = 2 × 3


def strip(x, y, words, parts, mine, colours):
    """`parts` equal parts in a row, of which this rank holds number `mine`."""
    (strong, light), width = colours, 96 / parts
    cells = [box(x + 62 + n * width, y - 11, width, 14, light, "#ffffff", 0) for n in range(parts)]
    cells[mine] = box(x + 62 + mine * width, y - 11, width, 14, strong, "#ffffff", 0)
    return [text(x, y, words, 12.5, fill=PALE), *cells]


def draw_layout():
    dp, sp, left, top, across, down = 2, 3, 142, 106, 190, 130
    parts = [text(24, 34, "dp × sp = 2 × 3: six ranks, two samples at a time", 18, bold=True)]
    parts.append(text(24, 58, "Each strip is a whole, its dark part is on that rank.", 13, fill=PALE))
    for column in range(sp):
        parts.append(text(left + column * across + 88, top - 18, f"sp rank {column}", 14, "middle", PALE))
    for row in range(dp):
        y, colour = top + row * down, RANKS[row]
        parts.append(text(24, y + 46, f"dp rank {row}", 14, fill=PALE))
        parts.append(text(24, y + 68, f"sample {'ab'[row]}", 16, fill=colour[0], bold=True))
        parts.append(box(left - 12, y - 8, sp * across + 8, down - 14, colour[1], colour[0], 10))
        for column in range(sp):
            x = left + column * across
            parts.append(box(x, y, 174, down - 30, "#ffffff", colour[0], 6))
            parts.append(text(x + 8, y + 22, f"rank {row * sp + column}", 15, bold=True))
            parts += strip(x + 8, y + 46, "video", sp, column, colour)
            parts += strip(x + 8, y + 66, "text", sp, column, colour)
            parts += strip(x + 8, y + 86, "weights", dp * sp, row * sp + column, GREEN)
    notes = (
        ("Ranks of a row share", "a sample: a third of its", "tokens each. They", "exchange in attention."),
        ("Another row has another", "sample. Rows meet only", "in weights and gradients."),
    )
    for row, lines in enumerate(notes):
        for n, words in enumerate(lines):
            parts.append(text(left + sp * across + 8, top + row * down + 22 + n * 19, words, 13))
    y = top + dp * down + 2
    parts.append(box(left - 12, y, sp * across + 8, 34, GREEN[1], GREEN[0], 10))
    words = "weights, gradients and optimizer: a sixth on each of the six ranks (FSDP2)"
    parts.append(text(left - 8 + sp * across / 2, y + 22, words, 14, "middle"))
    write_svg(
        "layout.svg", 900, y + 54, "Six ranks as two data-parallel groups of three sequence-parallel ranks", parts
    )


# --------------------------------------------------------------------------------------------------------------------
# the Ulysses exchange: 2 ranks, 4 tokens, 4 heads


def grid(x, y, tokens, heads, cell):
    """One rank's cells token·head, in the colour of the rank where they began."""
    parts = [text(x + (i + 0.5) * cell, y - 7, f"head {h}", 11, "middle", PALE) for i, h in enumerate(heads)]
    for i, token in enumerate(tokens):
        parts.append(text(x - 8, y + i * cell + 26, f"token {token}", 12, "end", PALE))
        for j, head in enumerate(heads):
            strong, light = RANKS[token // 2]
            parts.append(box(x + j * cell, y + i * cell, cell, cell, light, strong, 0))
            parts.append(text(x + (j + 0.5) * cell, y + i * cell + 26, f"{token}·{head}", 14, "middle", strong, True))
    return parts


def draw_all_to_all():
    cell, before, after, lanes = 46, 168, 742, (136, 378)  # lanes: the top of each rank's four rows
    middle = (before + 4 * cell + after - 62) / 2
    parts = [text(24, 34, "The exchange around attention: 2 ranks, 4 tokens, 4 heads", 18, bold=True)]
    parts.append(text(before + 2 * cell, 76, "half the tokens, all heads", 14, "middle", PALE))
    parts.append(text(after + cell, 76, "all tokens, half the heads", 14, "middle", PALE))
    parts.append(text(middle, 70, "scatter heads, gather tokens", 14, "middle", bold=True))
    parts.append(line(middle - 112, 84, middle + 104, 84, INK, 2, head=True))
    for rank, y in enumerate(lanes):
        parts.append(box(14, y - 34, 872, 4 * cell + 48, "none", LINE, 10))
        parts.append(text(26, y + 2 * cell + 6, f"rank {rank}", 16, fill=RANKS[rank][0], bold=True))
        parts += grid(before, y + cell, (2 * rank, 2 * rank + 1), range(4), cell)
        parts += grid(after, y, range(4), (2 * rank, 2 * rank + 1), cell)
    for source, y in enumerate(lanes):  # what each rank sends, and what it keeps
        for target, lane in enumerate(lanes):
            start, end = y + 2 * cell + (target - 0.5) * 26, lane + 2 * cell * source + cell
            stroke, stays = RANKS[source][0], source == target
            parts.append(line(before + 4 * cell + 10, start, after - 68, end, stroke, 2.2, stays, head=True))
    y = lanes[1] + 4 * cell
    parts.append(line(middle + 112, y + 32, middle - 104, y + 32, INK, 2, head=True))
    parts.append(text(middle, y + 54, "scatter tokens, gather heads = the backward", 14, "middle", bold=True))
    foot = (
        "A cell is token·head, in the colour of the rank where it began: solid arrows travel, dashed ones stay.",
        "To the right go q, k and v, to the left what attention returns. Each way is the backward of the other.",
    )
    for n, words in enumerate(foot):
        parts.append(text(450, y + 86 + 20 * n, words, 13, "middle"))
    write_svg("all_to_all.svg", 900, y + 124, "The all-to-all of two ranks, before and after", parts)


# --------------------------------------------------------------------------------------------------------------------
# what was measured, assets/measured.json


def bars(panel, x, y, label, scale):
    """A panel's bars, grouped by machine, and the y below them. What does less work is hollow."""
    parts = [text(x, y, panel["title"], 16, bold=True), text(x, y + 20, panel["work"], 12.5, fill=PALE)]
    linear = next((p["value"] for p in panel["points"] if p.get("linear")), None)
    y += 22
    for machine, group in groupby(panel["points"], key=lambda point: point["machine"]):
        parts.append(text(x, y + 32, machine, 14, bold=True))
        y += 40
        top = y
        for point in group:
            ours = point["who"] == "this project"
            strong, light = BLUE if ours else GREY
            fill = "#ffffff" if point.get("less_work") else strong if ours else light
            value = f"{point['value']:.{panel['decimals']}f}" + " †" * point.get("older", False)
            parts.append(text(x, y + 14, f"{point['who']}, {point['how']}".rstrip(", "), 13, fill=strong))
            parts.append(text(x + label - 46, y + 14, value, 13, fill=strong, bold=ours))
            parts.append(box(x + label, y + 1, point["value"] * scale, 17, fill, strong, 2))
            y += 22
        if linear and "H200" in machine:
            at = x + label + linear / point["gpus"] * scale
            parts.append(line(at, top - 5, at, y + 3, RED, 1.8, dashed=True))
    return parts, y


def draw_scaling():
    panels = json.loads((ASSETS / "measured.json").read_text(encoding="utf-8"))
    left, low = bars(panels["forward"], 24, 36, 222, 43)
    right, y = bars(panels["memory"], 556, 36, 200, 2.4)
    notes = [
        line(562, y + 32, 562, y + 52, RED, 1.8, dashed=True),
        text(576, y + 46, "linear scaling from this project's one H200", 12.5),
        box(556, y + 63, 12, 12, "#ffffff", GREY[0], 2),
        text(576, y + 73, "less work: forward and backward alone,", 12.5),
        text(576, y + 90, "no optimizer", 12.5),
        text(558, y + 117, "†", 12.5),
        text(576, y + 117, "a version that was 1 to 5 % slower", 12.5),
        text(576, y + 144, "fa4 is FlashAttention-4", 12.5),
    ]
    foot = (
        "bf16, random weights, torch 2.11. This project is compiled; its memory is that of the whole training step.",
        "This project: a run's median. The others on H200s: the fastest of three runs. Sources: assets/measured.json.",
    )
    notes += [text(24, low + 36 + 19 * n, words, 12.5, fill=PALE) for n, words in enumerate(foot)]
    title = "Seconds of a forward and memory of a training step"
    write_svg("scaling.svg", 900, low + 74, title, [*left, *right, *notes])


# --------------------------------------------------------------------------------------------------------------------
# the toy's clips over training

STEPS = (50, 150, 300, 600, 900)
PROMPTS = (
    "a blue circle moves up",
    "a red square moves left",
    "a yellow cross moves down",
    "a small cyan circle moves right",
)


def train_toy(clips):
    """clips/step-N-n.safetensors: prompt n sampled from the checkpoint of step N."""

    def run(*command):
        print("+", *command, flush=True)
        subprocess.run([sys.executable, *command, "--device", "cpu"], cwd=HERE, check=True)

    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out"
        run("train_min.py", "--steps", str(STEPS[-1]), "--out", out, "--save_every", str(STEPS[0]))
        for step in STEPS:  # the newest checkpoint of a folder is sampled from: so each gets a folder of its own
            shutil.copytree(f"{out}/step-{step}", f"{folder}/{step}/step-{step}")
            run("-m", "full.infer", "--checkpoint", f"{folder}/{step}", *prompts, "--output", f"{clips}/step-{step}")


def frames_of(path, size):
    """A clip [3, T, h, w] in -1..1 -> T enlarged images."""
    from PIL import Image
    from safetensors.numpy import load_file

    pixels = ((load_file(path)["latents"].clip(-1, 1) + 1) * 127.5).astype("uint8").transpose(1, 2, 3, 0)
    return [Image.fromarray(frame).resize((size, size), Image.Resampling.NEAREST) for frame in pixels]


def draw_training(clips, path):
    """A row a prompt, a column a training step, four frames in each. Drawn at twice the size at which it is shown."""
    from PIL import Image, ImageDraw, ImageFont

    size, gap, left, top, margin = 72, 4, 300, 72, 24  # size: of a frame
    across, down = 4 * (size + gap) + 24, size + 28
    width, height = left + len(STEPS) * across, top + len(PROMPTS) * down
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(26)
    for row, prompt in enumerate(PROMPTS):
        y, words = top + row * down, prompt.split()
        for n, part in enumerate((" ".join(words[:-2]), " ".join(words[-2:]))):
            draw.text((margin, y + size / 2 + (n - 0.5) * 32), part, INK, font, "lm")
        for column, step in enumerate(STEPS):
            for n, frame in enumerate(frames_of(f"{clips}/step-{step}-{row}.safetensors", size)):
                image.paste(frame, (left + column * across + n * (size + gap), y))
    for column, step in enumerate(STEPS):
        draw.text((left + column * across + 2 * (size + gap), top / 2), f"step {step}", INK, font, "mm")
    image.save(path, optimize=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train the toy and sample the clips of training.png")
    parser.add_argument("--clips", help="folder of step-N-n.safetensors (with --train: where they go)")
    args = parser.parse_args()
    draw_layout()
    draw_all_to_all()
    draw_scaling()
    if args.train or args.clips:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(args.clips or temporary).resolve()
            if args.train:
                train_toy(folder)
            draw_training(folder, ASSETS / "training.png")
