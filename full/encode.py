"""Encode a folder of videos and images with captions: each becomes a sample to train on. Or encode prompts alone.

    $ torchrun --nproc_per_node=2 -m full.encode --model SNAPSHOT --videos videos/ --output latents/
    $ python -m full.encode --model SNAPSHOT --prompts prompts.txt --output embeds/    # what --embeds takes

The files are divided among the ranks. A sample is written completely or not at all, and skipped if the same flags have made
it of the same file before. Files that can't be read or are not used are named and counted, and so is what a person should
know of the others. Needs the extra [pipeline].
"""

import json
import time
from functools import partial
from pathlib import Path

from full import faults
from full.after import next_command
from full.captions import videos_and_captions
from full.claim import claim
from full.clips import lines_of
from full.files import checksum, fingerprint, open_safetensors, save_tensors, visible, was_made_by
from full.flags import add_machine_flags, check_range, check_together, parse_flags, parser_of
from full.folder import Folder
from full.hub import find_model
from full.screen import printed_time, say
from full.snapshot import BESIDE_DIT, Snapshot, TextEncoders, of_library, template_of
from full.vae import encode_frames
from full.video import read_frames, read_image


def parse(argv=None):
    parser, own = parser_of(__doc__, machine=add_machine_flags)
    flag = own.add_argument
    flag("--model", required=True, help="released snapshot, a folder or OWNER/NAME of the hub")
    flag("--videos", help="folder of videos and images, with NAME.txt or captions.jsonl beside them")
    flag("--prompts", help="a text file with one prompt a line, in place of --videos")
    flag("--image", help="with --prompts, for image-to-video snapshots: the first frame, which their text encoder sees")
    flag("--output", required=True, help="folder to write")
    flag(
        "--no_buckets",
        action="store_true",
        help="crop every sample to --height x --width, not to the nearest shape of that area",
    )
    flag("--height", type=int, default=720, help="height of the samples (default 720)")
    flag("--width", type=int, default=1280, help="width of the samples (default 1280)")
    flag("--frames", type=int, default=129, help="frames of a sample at most, 4k + 1 (default 129)")
    return parse_flags(parser, argv)


# --------------------------------------------------------------------------------------------------------------------
# the story


def encode(args):
    """Encode everything in the folder, or the prompts. Return the ParallelManager."""
    check_range(args, "height width", 16)
    check_range(args, "frames", 1)
    check_range(args, "timeout", 1e-9, 1e7)
    check_together(args, "prompts-height prompts-width prompts-frames videos-image")
    if args.no_buckets and (args.height % 16 or args.width % 16):
        near = f"--height {max(16, args.height // 16 * 16)} --width {max(16, args.width // 16 * 16)}"
        raise ValueError(f"--no_buckets takes a height and width in steps of 16: {near} would do")
    if not (args.videos or args.prompts):
        raise ValueError("give --videos FOLDER or --prompts FILE")
    find_model(args, [*BESIDE_DIT, "transformer/config.json"])
    snapshot = Snapshot(args.model)
    pm = faults.init(None, 1, args.device, args.timeout)
    facts = snapshot.facts()
    pm.check_equal(vars(args) | dict(encoders=facts), pm.world_group)
    claim(args.output)
    return encode_prompts(pm, snapshot, facts, args) if args.prompts else encode_videos(pm, snapshot, facts, args)


def encode_videos(pm, snapshot, facts, args):
    """Encode videos and images with captions -> one .safetensors each, as full.train reads them; and the empty prompt.

    facts: fingerprints of the snapshot's files.
    """
    out = Path(args.output)
    began = time.perf_counter()
    entries, unused = faults.on_main(lambda: videos_and_captions(Path(args.videos)))
    sizes = faults.on_main(lambda: [size_of(entry.file) for entry in entries])
    found = list(zip(entries, sizes))
    tools = []
    if pm.is_main:
        say(f"loading the encoders of {args.model}")
    for rank in range(pm.world_size):  # one rank after another, so that a host reads one rank's encoders at a time
        faults.together(partial(load_tools, tools, snapshot, pm) if pm.rank == rank else lambda: None)
    made_by = dict(size=[args.height, args.width, args.frames, args.no_buckets])
    made_by |= dict(kind=snapshot.kind, encoders=facts, template=template_of(snapshot.kind))
    encoders, vae = tools
    if not snapshot.kind:
        empty = dict(zip(("text", "pooled"), encoders(""))) if pm.is_main else {}
        faults.on_main(lambda: save_tensors(out / Folder.EMPTY, empty))

    results = []  # [(outcome, notes)] of the entries
    for n in range(0, len(found), pm.world_size):
        work = partial(encode_nth, found, n + pm.rank, encoders, vae, made_by, args)
        results += [result for result in faults.together(work) if result]
        if pm.is_main:
            each = (time.perf_counter() - began) / len(results)
            left = each * (len(found) - len(results))
            for outcome, _ in results[n:]:
                if outcome not in ("made", "replaced", "there"):
                    say(outcome)
            say(f"sample {len(results)} of {len(found)} · {printed_time(left)} left")
    if pm.is_main:
        report(entries, unused, results, args)
    if all(outcome not in ("made", "replaced", "there") for outcome, _ in results):
        raise ValueError(f"{args.videos} holds nothing that could be encoded")
    if pm.is_main:
        say(f"next: {next_command(pm, 'train', '--model', args.named, '--data', out, '--lora', 32)}")
    return pm


def report(entries, unused, results, args):
    """Print what was made, and what a person should know before training on it."""
    out = Path(args.output)
    outcomes = [outcome for outcome, _ in results]
    made, replaced, there = (outcomes.count(kind) for kind in ("made", "replaced", "there"))
    older = f", {replaced} in place of older ones" * (replaced > 0)
    skipped = len(results) - made - replaced - there
    say(f"wrote {made + replaced} samples to {out}{older}, {there} existed already, {skipped} skipped")
    sources = {Folder.EMPTY, *(f"{entry.name}.safetensors" for entry in entries)}
    stale = [file for file in visible(out, "*.safetensors") if file.name not in sources]
    said = {f"not in {args.videos} any more, but training uses them until you delete them": stale, "not used": unused}
    for entry, (_, notes) in zip(entries, results):
        for note in notes:
            said.setdefault(note, []).append(entry.file)
    for note, files in said.items():
        if files:
            more = f" and {len(files) - 20} more" * (len(files) > 20)
            say(f"{note} ({len(files)}): {', '.join(map(str, files[:20]))}{more}")


def load_tools(tools, snapshot, pm):
    def load():
        return TextEncoders(snapshot, pm.device), snapshot.vae(pm.device)

    tools.extend(of_library(snapshot.folder, load))


def size_of(file):
    """Return [bytes, a fingerprint of the beginning], by which ranks compare a file; None if it can't be read."""
    try:
        return [file.stat().st_size, fingerprint([file], limit=0)] if file.is_file() else None
    except (OSError, ValueError):  # encode_one reports why, e.g. a name that is not UTF-8
        return None


def encode_nth(found, n, *tools_and_rules):
    """Encode file n of `found`, as encode_one does. Do nothing if there are fewer files."""
    return encode_one(*found[n], *tools_and_rules) if n < len(found) else None


def encode_one(entry, size, encoders, vae, made_by, args):
    """Write a file's sample. Return its outcome ("made", "replaced", "there", or why it is skipped) and its notes.

    size: its size_of on rank 0. notes: what a person should know, from read_frames.
    """
    target = Path(args.output) / f"{entry.name}.safetensors"
    older, kind, notes = target.exists(), made_by["kind"], set()
    try:
        if size_of(entry.file) != size:
            raise ValueError("it is another file here than on rank 0, which read its caption")
        if entry.problem:
            raise ValueError(entry.problem)
        made_by = made_by | dict(file=checksum(entry.file), caption=entry.caption)
        if was_made_by(target, made_by):
            with open_safetensors(target) as handle:
                return "there", json.loads(handle.metadata().get("notes", "[]"))
        frames = read_frames(entry.file, args, notes)
        if kind == "token_replace" and len(frames) == 1:
            raise ValueError("it is one frame, which a token_replace model is given, and learns those after it")
        notes |= set() if entry.caption.strip() else {"with an empty caption"}
        first = frames[0] if kind else None
        sample = dict(latents=encode_frames(vae, frames)[0])
        sample |= dict(zip(("text", "pooled"), encoders(entry.caption, first)))
        if kind:
            sample |= dict(image=encode_frames(vae, [first])[0])
            sample |= dict(zip(("empty_text", "empty_pooled"), encoders("", first)))
        if not all(x.isfinite().all() for x in sample.values()):
            raise ValueError("its latents or text are not finite")
    except (ValueError, OSError) as error:
        return f"skipping {entry.file}: {error}{f' ({target}, made before, is kept)' * older}", []
    header = dict(made_by=json.dumps(made_by, sort_keys=True))
    header |= dict(notes=json.dumps(sorted(notes)))
    save_tensors(target, sample, **header)
    return ("replaced" if older else "made"), sorted(notes)


def check_older(folder, prompts):
    """Raise ValueError if a folder has embeds of other prompts, which would be replaced, or stay under a number of these."""
    for file in visible(folder, "*.safetensors"):
        with open_safetensors(file) as handle:
            prompt = (handle.metadata() or {}).get("prompt")
        if not file.stem.isdigit() or prompt not in prompts[int(file.stem) :][:1]:
            raise ValueError(f"{file} is of another prompt, {str(prompt)[:60]!r}: give another --output")


def encode_prompts(pm, snapshot, facts, args):
    """Encode each prompt -> OUTPUT/0000.safetensors, .. with text and pooled, by rank 0. facts: the snapshot's."""
    if bool(args.image) != bool(snapshot.kind):
        wanted = "a prompt's text depends on the first frame: give --image" if snapshot.kind else "--image is not used"
        raise ValueError(f"{args.model} is a {snapshot.kind or 'text-to-video'} model: {wanted}")
    image = read_image(args.image) if args.image else None
    prompts = faults.on_main(lambda: lines_of(args.prompts))
    faults.on_main(lambda: check_older(Path(args.output), prompts))
    made_by = dict(kind=snapshot.kind, encoders=facts, image=args.image and checksum(args.image))
    size = args.width, args.height
    texts, _ = snapshot.encode(pm, prompts, image=image, size=size)

    def write():
        for n, prompt in enumerate(prompts):
            file = Path(args.output) / f"{n:04d}.safetensors"
            tensors = dict(zip(("text", "pooled"), texts[prompt]))
            save_tensors(file, tensors, prompt=prompt, made_by=json.dumps(made_by))
            say(f"{prompt}: wrote {file}")

    faults.on_main(write)
    return pm


if __name__ == "__main__":
    args = parse()
    faults.exit_after(partial(encode, args), args.output, args.debug)
