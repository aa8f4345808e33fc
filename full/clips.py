"""Decide which clips to sample, name their files and write them. Training's previews are clips too."""

import hashlib
import json
import os
import unicodedata
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from full.faults import together
from full.files import (
    checksum,
    fingerprint,
    open_safetensors,
    printable,
    read_text,
    read_utf8,
    replace_file,
    save_tensors,
    was_made_by,
)
from full.screen import say
from full.snapshot import Snapshot
from full.vae import decode
from full.video import mp4, strip, to_bytes
from infer_min import colour_blocks, gif, sample
from sampler import seeded
from train_min import Shapes

# flags, earlier versions' too, that do not change a clip's pixels; the checkpoint's files are in `shared`
OUTSIDE = (
    "output overwrite embeds prompts clips dp sp shard offload memory device compile attention timeout profile debug score checkpoint "
    "naming export given changed named model weights image mlp_slices"
)
LONGEST = 80  # bytes of a clip's file name, with its ending


class Clip:
    """One clip to sample: its prompt, its seed, the facts that decide its pixels, and its files.

    name: the name of its files, without ending; None: made of prompt and seed, in the folder --output. shared: fingerprints
    of the files that all clips are made of.
    """

    def __init__(self, args, prompt, seed, shared, name=None):
        embeds = dict(embeds=fingerprint([prompt])) if args.embeds else {}
        words, same = (Path(prompt).stem, embeds["embeds"]) if embeds else (prompt, None)
        self.prompt, self.seed, self.name = prompt, seed, name or f"{args.output}{file_name(words, seed, same)}"
        self.overwrite = getattr(args, "overwrite", False)
        self.endings = (".mp4", ".safetensors") if args.model else (".safetensors",)
        flags = vars(args).items()
        self.made_by = {name: value for name, value in flags if name not in OUTSIDE.split()}
        kernel = args.attention if args.attention != "sdpa" else None  # None: as when there was no other
        self.made_by |= dict(prompt=prompt, seed=seed, kernel=kernel, shared=shared) | embeds

    def is_made(self):
        """Return whether all its files exist and were made by the same flags."""
        there = all(Path(self.name + ending).is_file() for ending in self.endings)
        return there and self.is_ours()

    def is_ours(self):
        """Return whether its latents exist and were made by the same flags."""
        ignored = set(OUTSIDE.split()) - {"embeds"}
        return was_made_by(self.name + ".safetensors", self.made_by, ignored)

    def is_taken(self):
        """Return whether a file of that name exists which is not this clip's."""
        endings = ".safetensors", ".mp4", ".gif", ".png"
        exists = any(os.path.lexists(self.name + ending) for ending in endings)
        return exists and not self.is_ours()

    def write(self, latents, pixels, draw=False):
        """Write its files. ValueError if another program has written others of that name meanwhile."""
        if not self.overwrite and self.is_taken():
            raise ValueError(f"another program has written {self.name} meanwhile: {self.prompt!r} is not written")
        made_by = json.dumps(self.made_by, sort_keys=True)
        write_clip(self.name, self.prompt, latents, pixels, draw, made_by=made_by)


def make_clips(args, prompts, shared):
    """Return the clips to make: --clips of each prompt. A prompt that comes again takes the next seed."""
    times, clips, count = Counter(), [], len(prompts) * args.clips
    for n, prompt in enumerate(prompt for prompt in prompts for _ in range(args.clips)):
        name = None if args.output.endswith("/") else args.output + f"-{n}" * (count > 1)
        clips.append(Clip(args, prompt, args.seed + times[prompt], shared, name))
        times[prompt] += 1
    return clips


def file_name(words, seed, same=None):
    """Return a name for a clip's files, of at most LONGEST bytes with the ending: its words, in any script, and its seed.

    Different words give different names: six hex digits are added where the words alone would not show it. same: what these
    digits are made of, by default the words.
    """
    normal = unicodedata.normalize("NFC", words).lower()
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in normal).split()
    digits = hashlib.sha256((same or words).encode(errors="surrogatepass")).hexdigest()[:6]
    room = LONGEST - len(f"-{digits}-{seed}.safetensors")
    slug = "-".join(kept).encode()[:room].decode(errors="ignore").rstrip("-") or "clip"
    return f"{slug}-{seed}" if slug.replace("-", " ") == words and not same else f"{slug}-{digits}-{seed}"


def write_clip(name, prompt, latents, pixels=None, draw=False, **header):
    """Write a clip's files, each completely or not at all. pixels: [3, F, H, W] of a VAE; the toy's latents are pixels
    already."""
    endings = (".safetensors", ".png", ".mp4") if pixels is not None else (".safetensors", ".gif")
    for ending in endings:  # an older clip's files: after a kill, all files that exist must be of one clip
        Path(name + ending).unlink(missing_ok=True)
    save_tensors(name + ".safetensors", dict(latents=latents), **header)
    if pixels is not None:
        frames = to_bytes(pixels)
        replace_file(name + ".png", strip(frames))
        replace_file(name + ".mp4", mp4(frames))  # last, since it says that the clip is complete
    elif len(latents) == 3:
        gif(latents, name)
    if draw:
        say(f"{printable(prompt)}\n{colour_blocks(latents)}", raw=True)
    written = [name + ending for ending in endings if Path(name + ending).is_file()]
    hint = " (a GIF too with Pillow: the extra [video])" * (len(latents) == 3 and len(written) == 1)
    say(f"{prompt}: wrote {', '.join(written)}{hint}")


def check_finite(values, prompt):
    """Raise ValueError on every rank if a clip is not finite on one of them. values: latents, pixels or None."""

    def check():
        if values is not None and not values.isfinite().all():
            raise ValueError(f"the clip of {prompt!r} has values that are not finite: nothing is written")

    together(check)


# --------------------------------------------------------------------------------------------------------------------
# prompts


def read_prompts(args, config):
    """Return the prompts, or the files of --embeds instead. ValueError if the model can't use words alone.

    Real words need a snapshot's encoders. The toy and random weights (a benchmark) take hashed words.
    """
    toy, random = config.out_channels == 3, bool(args.config and not args.weights)
    words = [*(args.prompt or ()), *lines_of(args.prompts)]
    if args.score and not toy:
        raise ValueError(f"--score reads pixels, this model gives {config.out_channels} latent channels")
    if not args.embeds and not toy and not random and not args.model:
        raise ValueError(
            "a --prompt is only hashed here, which these weights do not understand: give --embeds, or --model SNAPSHOT"
        )
    if args.embeds and args.cfg > 1 and not args.negative_embeds:
        raise ValueError(f"--cfg {args.cfg} with --embeds needs --negative_embeds")
    if args.model and not args.embeds and not words:
        raise ValueError("--model needs a --prompt, --prompts or --embeds")
    if args.score:
        captions = Shapes.captions()
        order = torch.randperm(len(captions), generator=seeded("score", args.seed)).tolist()
        return [captions[order[n % len(order)]] for n in range(args.score)]
    return args.embeds or words or ["a blue circle moves up"]


def lines_of(file):
    """Return the lines of a text file that are not blank."""
    if not file:
        return []
    lines = [line.strip() for line in read_utf8(file).split("\n")]
    if not any(lines):
        raise ValueError(f"--prompts {file} is empty")
    return [line for line in lines if line]


def embed_prompts(args, config, prompts):
    """Return {prompt: (text, pooled)} and the negative prompt's (text, pooled), without a snapshot's encoders."""
    read, texts = (read_text if args.embeds else Shapes.embed), {}
    together(lambda: texts.update((prompt, read(prompt, config)) for prompt in prompts))  # each group reads its own
    negative = read_text(args.negative_embeds, config) if args.negative_embeds else None
    return texts, negative or Shapes.embed(args.negative_prompt, config)


def check_embeds(files, snapshot, image):
    """Raise ValueError for embeds that full.encode made with another snapshot, or for another first frame.

    image: the file of --image or None. Embeds that do not say what made them are taken.
    """
    if not files:
        return
    now = dict(kind=snapshot.kind, image=image and checksum(image))
    now |= dict(encoders=snapshot.facts()) if (snapshot.folder / "text_encoder").is_dir() else {}
    for file in files:
        with open_safetensors(file) as handle:
            stored = json.loads((handle.metadata() or {}).get("made_by", "{}"))
        if wrong := [name for name in now if name in stored and stored[name] != now[name]]:
            raise ValueError(
                f"{file} was made with another {', '.join(wrong)}: make it again with full.encode --prompts"
            )


# --------------------------------------------------------------------------------------------------------------------
# training's previews


class Preview:
    """Sample one prompt with a model in training, in 20 steps, from the same noise every time.

    shape: [C, T, h, w] of the latents. snapshot: the text-to-video snapshot whose encoders and VAE are used; None for the
    toy.
    """

    def __init__(self, pm, config, shape, prompt, snapshot=None):
        self.pm, self.shape, self.prompt = pm, shape, prompt
        self.snapshot = Snapshot(snapshot) if snapshot else None
        if self.snapshot:
            texts, _ = self.snapshot.encode(pm, [prompt])
        else:
            texts = {prompt: Shapes.embed(prompt, config)}
        self.text, self.pooled = (x.to(pm.device) for x in texts[prompt])

    def write(self, model, name):
        """Sample and write NAME.mp4 or .gif, as full.infer does. Every rank calls it."""
        try:
            self._write(model, name)
        except (OSError, ValueError) as error:  # raised on all ranks alike; training continues
            if self.pm.is_main:
                say(f"{name} is not written: {error}")

    def _write(self, model, name):
        shift, group = self.snapshot.shift if self.snapshot else 4.0, self.pm.sp_group
        noise = torch.randn((1, *self.shape), generator=seeded("sample", 0, 0))
        rules = dict(steps=20, shift=shift, guidance=6.0, group=group)
        latents = sample(model, noise.to(self.pm.device), [self.text], self.pooled[None], **rules)[0]
        check_finite(latents, self.prompt)
        pixels, vae = None, []
        if self.snapshot:
            together(lambda: vae.append(self.snapshot.vae(self.pm.device)))
            pixels = decode(vae[0], latents, group)
        write = partial(write_clip, name, self.prompt, latents.cpu(), pixels)
        together(write if self.pm.is_main else lambda: None)
