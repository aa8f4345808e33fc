"""Encode a folder of videos and images with captions: each becomes a sample to train on. Or encode prompts alone.

    $ torchrun --nproc_per_node=2 -m full.encode --model SNAPSHOT --videos videos/ --output latents/
    $ python -m full.encode --model SNAPSHOT --prompts prompts.txt --output embeds/    # what --embeds takes

The ranks take turns at the files. A sample is written whole or not at all; one that exists, made by the same flags of the same
file, is not made again. What can't be read is named, skipped and counted. Needs the extra [pipeline].
"""

import json
import time
from functools import partial
from pathlib import Path

from full import faults
from full.after import next_command
from full.claim import claim
from full.clips import lines_of
from full.files import checksum, fingerprint, read_utf8, save_tensors, was_made_by
from full.flags import add_machine_flags, check_range, check_together, parse_flags, parser_of
from full.folder import Folder
from full.hub import find_model
from full.screen import printed_time, say
from full.snapshot import ENCODERS, PARTS, Snapshot, TextEncoders, of_library, template_of
from full.vae import encode_frames
from full.video import IMAGES, VIDEOS, read_frames, read_image


def parse(argv=None):
    parser, own = parser_of(__doc__, machine=add_machine_flags)
    flag = own.add_argument
    flag("--model", required=True, help="released snapshot, a folder or OWNER/NAME of the hub")
    flag("--videos", help="folder of videos and images, with NAME.txt or captions.jsonl beside them")
    flag("--prompts", help="a text file with one prompt a line, in place of --videos")
    flag("--image", help="with --prompts, for image-to-video snapshots: the first frame, which their text encoder sees")
    flag("--output", required=True, help="folder to write")
    flag("--no_buckets", action="store_true", help="all of --height and --width, not of the shape nearest to their own")
    flag("--height", type=int, default=720, help="of the samples (default 720)")
    flag("--width", type=int, default=1280, help="of the samples (default 1280)")
    flag("--frames", type=int, default=129, help="of the samples, 4k + 1 at most (default 129)")
    return parse_flags(parser, argv)


# --------------------------------------------------------------------------------------------------------------------
# the story


def encode(args):
    """Encode everything in the folder, or the prompts. Return the ParallelManager."""
    check_range(args, "height width", 16)
    check_range(args, "frames", 1)
    check_range(args, "timeout", 1e-9, 1e7)
    check_together(args, "prompts-height prompts-width prompts-frames videos-image")
    if not (args.videos or args.prompts):
        raise ValueError("give --videos FOLDER or --prompts FILE")
    find_model(args, [*PARTS[1:], *ENCODERS, "image_processor", "transformer/config.json"])
    snapshot = Snapshot(args.model)
    pm = faults.init(None, 1, args.device, args.timeout)
    facts = snapshot.facts()
    pm.check_equal(vars(args) | dict(encoders=facts), pm.world_group)
    claim(args.output)
    return encode_prompts(pm, snapshot, args) if args.prompts else encode_videos(pm, snapshot, facts, args)


def encode_videos(pm, snapshot, facts, args):
    """Encode videos and images with captions -> one .safetensors each, as full.train reads them; and the empty prompt.

    facts: the snapshot's.
    """
    out, began = Path(args.output), time.perf_counter()
    found = faults.on_main(lambda: [(*pair, size_of(pair[0])) for pair in videos_and_captions(Path(args.videos))])
    tools = []
    if pm.is_main:
        say(f"loading the encoders of {args.model}")
    for rank in range(pm.world_size):  # one after another: a host reads one rank's encoders at a time
        faults.together(partial(load_tools, tools, snapshot, pm) if pm.rank == rank else lambda: None)
    made_by = dict(size=[args.height, args.width, args.frames, args.no_buckets])
    made_by |= dict(kind=snapshot.kind, encoders=facts, template=template_of(snapshot.kind))
    encoders, vae = tools
    if not snapshot.kind:
        empty = dict(zip(("text", "pooled"), encoders(""))) if pm.is_main else {}
        faults.on_main(lambda: save_tensors(out / Folder.EMPTY, empty))

    results = []
    for n in range(0, len(found), pm.world_size):
        mine = found[n : n + pm.world_size][pm.rank :][:1]
        work = partial(encode_one, *mine[0], encoders, vae, made_by, args) if mine else lambda: None
        results += [result for result in faults.together(work) if result]
        if pm.is_main:
            left = (time.perf_counter() - began) / len(results) * (len(found) - len(results))
            for result in results[n:]:
                if result not in ("made", "replaced", "there"):
                    say(result)
            say(f"sample {len(results)} of {len(found)} · {printed_time(left)} left")
    made, replaced, there = (results.count(kind) for kind in ("made", "replaced", "there"))
    if pm.is_main:
        older = f", {replaced} in place of older ones" * (replaced > 0)
        skipped = len(results) - made - replaced - there
        say(f"wrote {made + replaced} samples to {out}{older}, {there} were there, {skipped} skipped")
    if pm.is_main and made + replaced + there:
        say(f"next: {next_command(pm, 'train', '--model', args.named, '--data', out, '--lora', 32)}")
    if not made + replaced + there:
        raise ValueError(f"{args.videos} holds nothing that could be encoded")
    return pm


def load_tools(tools, snapshot, pm):
    tools.extend(of_library(snapshot.folder, lambda: (TextEncoders(snapshot, pm.device), snapshot.vae(pm.device))))


def size_of(file):
    """Return what tells two files of one name apart: bytes, and a fingerprint of their beginnings; None if there is none."""
    return [file.stat().st_size, fingerprint([file], whole=0)] if file.is_file() else None


def encode_one(file, caption, size, encoders, vae, made_by, args):
    """Write a file's sample; return "made", "replaced", "there", or why it is skipped. size: what rank 0 sees of it."""
    target = Path(args.output) / f"{file.name}.safetensors"
    older, kind = target.exists(), made_by["kind"]
    try:
        if size_of(file) != size:
            raise ValueError("it is another file here than on rank 0, which read its caption")
        made_by = made_by | dict(file=checksum(file), caption=caption)
        if was_made_by(target, made_by):
            return "there"
        if caption is None:
            raise ValueError(f"there is no {file.stem}.txt, and no line for it in captions.jsonl")
        frames = read_frames(file, args)
        first = frames[0] if kind else None
        sample = dict(latents=encode_frames(vae, frames)[0]) | dict(zip(("text", "pooled"), encoders(caption, first)))
        if kind:
            sample |= dict(image=encode_frames(vae, [first])[0])
            sample |= dict(zip(("empty_text", "empty_pooled"), encoders("", first)))
        if not all(x.isfinite().all() for x in sample.values()):
            raise ValueError("its latents or text are not finite")
    except (ValueError, OSError) as error:
        return f"skipping {file}: {error}{f' ({target}, made before, stays)' * older}"
    save_tensors(target, sample, made_by=json.dumps(made_by, sort_keys=True))
    return "replaced" if older else "made"


def encode_prompts(pm, snapshot, args):
    """Encode each prompt -> OUTPUT/0000.safetensors, .. with text and pooled, by rank 0."""
    if bool(args.image) != bool(snapshot.kind):
        wanted = "a prompt's text depends on the first frame: give --image" if snapshot.kind else "--image is not used"
        raise ValueError(f"{args.model} is a {snapshot.kind or 'text-to-video'} model: {wanted}")
    image = read_image(args.image) if args.image else None
    prompts = faults.on_main(lambda: lines_of(args.prompts))
    texts, _ = snapshot.encode(pm, prompts, image=image, size=(args.width, args.height))

    def write():
        for n, prompt in enumerate(prompts):
            file = Path(args.output) / f"{n:04d}.safetensors"
            save_tensors(file, dict(zip(("text", "pooled"), texts[prompt])), prompt=prompt)
            say(f"{prompt}: wrote {file}")

    faults.on_main(write)
    return pm


# --------------------------------------------------------------------------------------------------------------------
# what is in the folder


def videos_and_captions(folder):
    """Return [(file, caption or None)] of a folder, by name: the caption is NAME.txt's, or that of a line
    {"file": .., "caption": ..} of captions.jsonl."""
    if not folder.is_dir():
        raise ValueError(f"--videos {folder} is not a folder")
    files = {file for file in folder.glob("*") if file.suffix.lower() in VIDEOS + IMAGES and file.name[0] != "."}
    if not files:
        raise ValueError(f"--videos {folder} holds no {', '.join(VIDEOS + IMAGES)}")
    captions, table = {}, folder / "captions.jsonl"
    for n, line in enumerate(read_utf8(table).splitlines() if table.exists() else [], 1):
        try:
            row = json.loads(line) if line.strip() else None
            captions |= {folder / row["file"]: str(row["caption"])} if row else {}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f'{table}, line {n}, is not {{"file": .., "caption": ..}}') from None
    for file in files:
        if file.with_suffix(".txt").exists():
            captions[file] = read_utf8(file.with_suffix(".txt")).strip()
    return [(file, captions.get(file)) for file in sorted({*files, *captions})]  # what does not exist is skipped


if __name__ == "__main__":
    args = parse()
    faults.run(partial(encode, args), args.output, args.debug)
