"""Draw the README's pictures into assets/, from data.

    $ python .ci/pictures.py                    # layout.svg, all_to_all.svg, scaling.svg and block.svg, of assets/*.json
    $ python .ci/pictures.py --trace clip-trace --work WORDS    # first block.json, from clip-trace-0.json.gz and -1.json.gz
    $ python .ci/pictures.py --train            # also training.png: trains the toy, samples from five of its checkpoints
    $ python .ci/pictures.py --clips clips/     # also training.png, of clips that are there: step-N-n.safetensors

The SVGs need the standard library alone. training.png needs Pillow and what the toy needs; --train takes some minutes on a
CPU. With --train, --clips says where the clips are kept. WORDS stand under block.svg's title. Its traces are those of

    $ torchrun --nproc_per_node=2 -m full.infer --config 13b --blocks 1,1 --height 720 --width 1280 --frames 129 --steps 4 \\
        --compile --profile --prompt "$(yes word | head -60 | xargs)"
"""

import argparse
import gzip
import json
import math
import re
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
# one block in time, assets/block.json: measured in the traces of --profile

KINDS = dict(  # kind of a segment: its name and its colour
    attention=("attention", "#b5d4ef"),
    linear=("linears", GREEN[0]),
    pointwise=("norms, rope, GELU", "#8fcf9b"),
    packing=("packing", "#6b7782"),
    exchange=("exchange", ORANGE[0]),
    waiting=("waiting", "url(#hatched)"),
)
STAGES = (  # the forward of a dual-stream block; what takes less than a two-thousandth of it has no name
    *(("pointwise", "modulate"), ("linear", "q, k, v"), ("pointwise", "norms, rope"), ("packing", "pack")),
    *(("exchange", "exchange of q, k, v"), ("attention", "attention")),
    *(("exchange", "exchange of the output"), ("packing", "unpack"), ("linear", "projection")),
    *(("pointwise", "norm"), ("linear", "MLP"), ("pointwise", "GELU"), ("linear", "MLP"), ("pointwise", "gate")),
)
HATCHED = (
    f'<defs><pattern id="hatched" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    f'<rect width="6" height="6" fill="#fff6ea"/><rect width="2" height="6" fill="{ORANGE[1]}"/></pattern></defs>'
)
DARK = ("linear", "exchange", "packing")  # their names stand in white
GROUND = "#f1f4f7"  # of the enlarged parts
LEFT, WIDE = 92, 784  # where time 0 is, and the pixels of all of it
NUMBERS = "no one two three four five six seven eight".split()
TOGETHER = 0.3  # ms: an exchange ends on all ranks within that


def kind_of(kernel, inside):
    """Return a kernel's kind. inside: the names of the annotations around it."""
    if "nccl" in kernel["name"]:
        return "exchange"
    if "attention" in inside:
        return "attention"
    if "all_to_all" in inside:
        return "packing"
    return "linear" if re.search("nvjet|gemm|cublas|cutlass", kernel["name"]) else "pointwise"


def kernels_of_block(events):
    """Return the first dual-stream block of a trace as [kind, start, end] in ms: the block itself, then its kernels."""
    spans = [event for event in events if event.get("cat") == "gpu_user_annotation"]
    blocks = [span for span in spans if span["name"].startswith("double_block")]
    if not blocks:
        raise ValueError("the trace has no double_block on a GPU: it is not one of --profile on GPUs")
    block = min(blocks, key=lambda span: span["ts"])

    def within(event, span):
        return event["tid"] == span["tid"] and 0 <= event["ts"] + event["dur"] / 2 - span["ts"] <= span["dur"]

    rows = [["block", block["ts"] / 1e3, (block["ts"] + block["dur"]) / 1e3]]
    kernels = [event for event in events if event.get("cat") == "kernel" and within(event, block)]
    for kernel in sorted(kernels, key=lambda event: event["ts"]):
        kind = kind_of(kernel, [span["name"] for span in spans if within(kernel, span)])
        rows.append([kind, kernel["ts"] / 1e3, (kernel["ts"] + kernel["dur"]) / 1e3])
    return rows


def segments_of(traces):
    """Return, for each rank's list of events, the block's [kind, start, duration] in ms, and how far clocks were moved.

    Time 0 is where the first rank's block begins. An exchange ends on all ranks at once, and it begins when the last rank
    is ready: until then the others wait. Where clocks differ, the ends of the exchanges set them. ValueError if they cannot.
    """
    ranks = [kernels_of_block(events) for events in traces]
    exchanges = [[row for row in rows if row[0] == "exchange"] for rows in ranks]
    counts = [len(rows) for rows in exchanges]
    if min(counts) == 0 or min(counts) < max(counts) or len(ranks) < 2:
        raise ValueError(f"two ranks or more with equally many exchanges are needed; these have {counts}")

    late = [[mine[2] - first[2] for mine, first in zip(rows, exchanges[0])] for rows in exchanges]
    moved = [0.0] * len(ranks)
    if max(abs(ms) for row in late for ms in row) > TOGETHER:
        moved = [-sum(row) / len(row) for row in late]
    apart = max(abs(ms + by) for row, by in zip(late, moved) for ms in row)
    if apart > TOGETHER:
        raise ValueError(
            f"an exchange's ends lie {apart:.2f} ms apart, more than {TOGETHER}: are these traces of one run?"
        )
    ranks = [[[kind, start + by, end + by] for kind, start, end in rows] for rows, by in zip(ranks, moved)]
    zero = min(rows[0][1] for rows in ranks)
    exchanges = [[row for row in rows if row[0] == "exchange"] for rows in ranks]
    ready = [max(row[1] for row in same) for same in zip(*exchanges)]

    result = []
    for block, *rows in ranks:
        merged, begins = [], iter(ready)
        for kind, start, end in rows:
            if kind == "exchange":
                start, waited = next(begins), start
                merged.append(["waiting", waited, start])
            if merged and merged[-1][0] == kind and start - merged[-1][2] < 0.02:
                merged[-1][2] = end
            else:
                merged.append([kind, start, end])
        rows = [[kind, round(start - zero, 3), round(end - start, 3)] for kind, start, end in [block, *merged]]
        result.append([row for row in rows if row[2] > 0])
    return result, [round(by, 3) + 0.0 for by in moved]


def measure_block(prefix, work):
    """Write assets/block.json from PREFIX-0.json.gz, PREFIX-1.json.gz and so on. work: a line on what was computed."""
    traces = []
    while (path := Path(f"{prefix}-{len(traces)}.json.gz")).exists():
        with gzip.open(path) as file:
            traces.append(json.load(file))
    if not traces:
        raise FileNotFoundError(f"there is no {path}")
    ranks, moved = segments_of([trace["traceEvents"] for trace in traces])
    gpu = traces[0]["deviceProperties"][0]["name"].removeprefix("NVIDIA ")
    about = "What block.svg shows. Each rank: the block, then its segments: kind, start and duration in ms. See measured.md."
    head = json.dumps(dict(about=about, gpu=gpu, work=work, clocks_moved_ms=moved), indent=2, ensure_ascii=False)
    rows = ["    [\n" + ",\n".join(f"      {json.dumps(row)}" for row in rows) + "\n    ]" for rows in ranks]
    whole = head.removesuffix("\n}") + ',\n  "ranks": [\n' + ",\n".join(rows) + "\n  ]\n}\n"
    (ASSETS / "block.json").write_text(whole, encoding="utf-8")
    print(f"wrote assets/block.json; clocks were moved by {moved} ms")


def named(rows, rank, ranks):
    """Return the segments that are long enough for a name, as (name, kind, start, duration)."""
    long = [row for row in rows[1:] if row[2] >= rows[0][2] / 2000]
    kinds = [kind for kind, *_ in long if kind != "waiting"]
    known = kinds == [kind for kind, _ in STAGES]
    names = iter([name for _, name in STAGES] if known else [KINDS[kind][0] for kind in kinds])
    waits = f"waits for rank {1 - rank}:" if ranks == 2 else "waits"
    return [(waits if row[0] == "waiting" else next(names), *row) for row in long]


def beside(labels, gap=8):
    """Move labels apart. labels: (middle wanted, width), from left to right -> middles at which none touches the next."""
    groups = []  # [left edge, width, number of labels]
    for middle, width in labels:
        groups.append([middle - width / 2, width, 1])
        while len(groups) > 1 and groups[-2][0] + groups[-2][1] + gap > groups[-1][0]:
            (left, wide, many), (right, width, more) = groups[-2], groups[-1]
            moved = (left * many + (right - wide - gap) * more) / (many + more)
            groups[-2:] = [[moved, wide + gap + width, many + more]]
    middles, labels = [], iter(labels)
    for left, _, many in groups:
        for _ in range(many):
            _, width = next(labels)
            middles.append(left + width / 2)
            left += width + gap
    return middles


def ticks(start, end, y, scale):
    """Return an axis in ms under the rows, with a tick every 1, 2 or 5 times a power of ten: at most a dozen."""
    step = next(s for n in range(-2, 6) for s in (10**n, 2 * 10**n, 5 * 10**n) if (end - start) / s <= 12)
    parts = [line(LEFT, y, LEFT + (end - start) * scale, y, PALE, 1), text(LEFT - 20, y + 16, "ms", 11, "end", PALE)]
    for n in range(math.ceil(start / step), math.floor(end / step) + 1):
        at = LEFT + (n * step - start) * scale
        parts += [line(at, y, at, y + 4, PALE, 1), text(f"{at:.1f}", y + 16, f"{n * step:g}", 11, "middle", PALE)]
    return parts


def draw_rows(ranks, window, y, height, lane, ready):
    """Draw a row a rank, of what lies in the window (start, end, pixels per ms), with a dashed line where exchanges begin.

    lane: the room above each row, for names that do not fit inside; without it they are left out.
    Return the parts and the y of the axis.
    """
    begin, end, scale = window
    bars, labels, top = [], [], y + lane

    def at(ms):
        return LEFT + (min(max(ms, begin), end) - begin) * scale

    for rank, rows in enumerate(ranks):
        y += lane or 6
        labels.append(text(LEFT - 12, y + height / 2 + 5, f"rank {rank}", 13, "end", bold=True))
        for kind, start, ms in rows[1:]:
            if at(start) < at(start + ms):
                bars.append(box(at(start), y, at(start + ms) - at(start), height, KINDS[kind][1], radius=0))
        above = []  # (the bar's middle, the name's width, the name)
        for name, kind, start, ms in named(rows, rank, len(ranks)):
            x, width, words = (at(start) + at(start + ms)) / 2, at(start + ms) - at(start), f"{name} {ms:.1f}"
            if kind == "attention" and lane:  # enlarged, it is cut off
                continue
            if width > 6.3 * len(words) + 4:
                fill = "#ffffff" if kind in DARK else INK
                labels.append(text(f"{x:.1f}", y + height / 2 + 4.5, words, 13, "middle", fill))
            elif width and lane:
                above.append((x, 5.9 * len(words), words))
        wanted = [(min(max(x, LEFT + wide / 2), at(end) - wide / 2), wide) for x, wide, _ in above]
        for (x, wide, words), middle in zip(above, beside(wanted)):
            labels.append(line(middle, y - 9, x, y - 1, PALE, 0.8))
            labels.append(box(middle - wide / 2, y - 25, wide, 15, GROUND, radius=0))  # over a dashed line
            labels.append(text(f"{middle:.1f}", y - 13, words, 12, "middle"))
        late = rows[0][1] - begin
        if lane and late * scale > 140:
            words = f"begins {late:.1f} ms later"
            labels.append(text(f"{at(rows[0][1]) - 8:.1f}", y + height / 2 + 4.5, words, 13, "end", PALE))
        y += height
    y += 4

    dashes = [line(at(ms), top - 2, at(ms), y, INK, 1.3, dashed=True) for ms in ready if lane and begin < ms < end]
    return [*bars, *dashes, *labels, *ticks(begin, end, y, scale)], y


def table(ranks, y):
    """Write what each kind takes on each rank, and its share, under the legend. Return the parts and the y below."""
    blocks = sum(rows[0][2] for rows in ranks)
    columns = []
    for kind, (name, fill) in KINDS.items():
        columns.append((name, fill, [sum(ms for k, _, ms in rows[1:] if k == kind) for rows in ranks]))
    busy = [sum(ms for _, _, ms in rows[1:]) for rows in ranks]
    columns.append(("idle", "#ffffff", [rows[0][2] - ms for rows, ms in zip(ranks, busy)]))
    columns.append(("sum", None, [rows[0][2] for rows in ranks]))
    parts, x = [], LEFT
    for rank in range(len(ranks)):
        parts.append(text(LEFT - 12, y + 22 + 20 * rank, f"rank {rank}, ms", 12.5, "end", PALE))
    parts.append(text(LEFT - 12, y + 22 + 20 * len(ranks), "share", 12.5, "end", PALE))
    for name, fill, values in columns:
        if fill:
            parts.append(box(x, y - 11, 13, 13, fill, LINE, 0))
        parts.append(text(x + 19 * bool(fill), y, name, 12.5))
        for n, words in enumerate([*(f"{ms:.1f}" for ms in values), f"{100 * sum(values) / blocks:.1f} %"]):
            parts.append(text(x + 19 * bool(fill), y + 22 + 20 * n, words, 13, bold=n == len(values)))
        x += 6.2 * max(len(name), 6) + 48
    return parts, y + 22 + 20 * len(ranks)


def ground(window, whole, y, height, to):
    """Draw an enlarged part's ground, y to y + height, and what joins it to its place in the whole strip, at y = to."""
    (start, end, scale), edge = window, y + height if to > y else y
    corners = ((start, edge, scale, start), (end, edge, scale, start), (end, to, whole[2], 0), (start, to, whole[2], 0))
    path = " L ".join(f"{LEFT + (ms - zero) * by:.1f} {at:g}" for ms, at, by, zero in corners)
    return [box(LEFT, y, (end - start) * scale, height, GROUND, radius=0), f'<path d="M {path} z" fill="{GROUND}"/>']


def draw_block():
    """Draw the whole block to scale; enlarged above it, what comes before attention, and below it, what comes after."""
    facts = json.loads((ASSETS / "block.json").read_text(encoding="utf-8"))
    ranks = facts["ranks"]
    attention = [[(start, start + ms) for kind, start, ms in rows if kind == "attention"] for rows in ranks]
    begin = max(pieces[0][0] for pieces in attention)
    end = min(pieces[-1][1] for pieces in attention)
    last = max(rows[0][1] + rows[0][2] for rows in ranks)
    stub = 0.04 * max(begin, last - end)  # so much of attention is seen in the enlarged parts
    scale = WIDE / (stub + max(begin, last - end))
    before, whole, after = (0, begin + stub, scale), (0, last, WIDE / last), (end - stub, last, scale)
    exchanges = [[start for kind, start, _ in rows if kind == "exchange"] for rows in ranks]
    ready = [max(starts) for starts in zip(*exchanges)]

    first, y1 = draw_rows(ranks, before, 68, 34, 32, ready)
    middle, y2 = draw_rows(ranks, whole, y1 + 44, 24, 0, ready)
    third, y3 = draw_rows(ranks, after, y2 + 40, 34, 32, ready)
    legend, y4 = table(ranks, y3 + 54)

    count = NUMBERS[len(ranks)] if len(ranks) < len(NUMBERS) else len(ranks)
    longest = max(rows[0][2] for rows in ranks)
    title = f"One dual-stream block, forward, on {count} {facts['gpu']}s: {longest:.0f} ms"
    parts = [HATCHED, text(24, 34, title, 18, bold=True), text(24, 57, facts["work"], 13, fill=PALE)]
    parts += ground(before, whole, 68, y1 - 68, y1 + 50) + ground(after, whole, y2 + 40, y3 - y2 - 40, y2)
    parts += [*first, *middle, *third, *legend, line(LEFT + 6, y4 + 18, LEFT + 6, y4 + 36, INK, 1.3, dashed=True)]
    words = "Here the last GPU is ready and the exchange begins: the others have waited for it. It ends on all at once."
    parts.append(text(LEFT + 19, y4 + 32, words, 13))
    write_svg("block.svg", 900, y4 + 54, title, parts)


# --------------------------------------------------------------------------------------------------------------------
# the toy's clips over training

STEPS = (100, 300, 700, 1500, 2500)
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
    parser.add_argument(
        "--trace", metavar="PREFIX", help="traces PREFIX-0.json.gz, .. of --profile: measure block.json in them"
    )
    parser.add_argument("--work", default="", help="with --trace: a line on what was computed, for the picture")
    args = parser.parse_args()
    draw_layout()
    draw_all_to_all()
    draw_scaling()
    if args.trace:
        measure_block(args.trace, args.work)
    draw_block()
    if args.train or args.clips:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(args.clips or temporary).resolve()
            if args.train:
                train_toy(folder)
            draw_training(folder, ASSETS / "training.png")
