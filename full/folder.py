"""Read a folder of encoded samples, all of it checked before training, and hold some samples out for validation."""

import json
import math
import zlib
from pathlib import Path

import torch

from full.faults import together
from full.files import fingerprint, open_safetensors, read_text, shapes_in, text_fits, visible
from full.snapshot import encoder_files
from hunyuan_sp import latent_shape
from train_min import RandomLatents, Shapes


def build_data(config, args):
    """Return the dataset that the flags ask for: a folder, moving shapes for the toy, noise for a benchmark."""
    if args.data:
        return Folder(config, args.data)
    if args.model:
        raise ValueError("--model needs --data, a folder that full.encode has written")
    if args.config == "tiny":
        return Shapes(config)
    return RandomLatents(config, latent_shape(config, args.height, args.width, args.frames))


class Folder:
    """Read one .safetensors per sample: latents [C, T, h, w] (already times the VAE's 0.476986), text [L, 4096], pooled
    [768].

    Image-to-video samples also have image [C, 1, h, w], and empty_text and empty_pooled, which replace a dropped caption.
    For text-to-video those are in empty_prompt.safetensors; without that file they are zeros. Items are like train_min.py's.
    """

    EMPTY = "empty_prompt.safetensors"

    def __init__(self, config, folder):
        self.with_image, self.empty = config.image_condition_type is not None, None
        self.files = visible(folder, "*.safetensors")
        if not self.with_image and Path(folder, self.EMPTY) in self.files:
            self.files.remove(Path(folder, self.EMPTY))
            self.empty = read_text(Path(folder, self.EMPTY), config)
        if not self.files:
            raise FileNotFoundError(f"no data: there is no .safetensors file in {folder}")
        self.origins, self.unsaid = {}, 0  # {facts on encoders, as JSON: a file with them}; files without
        self.shapes = [self._shape(config, file) for file in self.files]
        self.names = [file.name for file in self.files]
        if len(self.origins) > 1:
            one, other = [*self.origins.values()][:2]
            raise ValueError(f"{one} and {other} were encoded by different snapshots: encode them again by one")

    def _shape(self, config, file):
        """Return (C, T, h, w) of a file's latents. ValueError if the file lacks a tensor, or has another one."""
        allowed = ["latents", "text", "pooled", *("image empty_text empty_pooled".split() if self.with_image else ())]
        if not file.is_file():
            raise ValueError(f"{file} is not a file")
        with open_safetensors(file) as handle:
            shapes, made_by = shapes_in(handle), (handle.metadata() or {}).get("made_by")
        if made_by:
            try:
                stored = json.loads(made_by).items()
                facts = {name: value for name, value in stored if name in ("kind", "encoders")}
                if any(type(x) is not str for x in facts.get("encoders") or ()):
                    raise ValueError
            except (ValueError, TypeError, AttributeError, RecursionError):
                raise ValueError(
                    f"{file} has a header that full.encode did not write: made_by {made_by[:40]!r}"
                ) from None
            self.origins.setdefault(json.dumps(facts, sort_keys=True), file)
            if facts.get("kind") != config.image_condition_type:
                kinds = [kind or "text-to-video" for kind in (facts.get("kind"), config.image_condition_type)]
                raise ValueError(f"{file} was encoded for a {kinds[0]} model, and this one is {kinds[1]}")
        else:
            self.unsaid += 1
        if more := sorted(set(shapes) - set(allowed)):
            problem = f"{file} holds {', '.join(more)} beside {', '.join(allowed)}, which would be ignored"
            raise ValueError(f"{problem}: text has valid tokens only, and needs no mask")
        channels, latents = config.out_channels, shapes.get("latents", [])
        fits = len(latents) == 4 and latents[0] == channels
        whole = all(n >= 1 and n % p == 0 for n, p in zip(latents[1:], config.patch_size))
        if not (fits and whole and text_fits(shapes, config)):
            patches = "whole patches of {} x {} x {}".format(*config.patch_size)
            texts = f"text [L, {config.text_dim}] and pooled [{config.pooled_dim}]"
            raise ValueError(f"{file} holds {shapes}, expected latents [{channels}, T, h, w] in {patches}, {texts}")
        if self.with_image:
            empty = {name: shapes.get(f"empty_{name}", []) for name in ("text", "pooled")}
            if shapes.get("image") != [channels, 1, *latents[2:]] or not text_fits(empty, config):
                wanted = f"an image-to-video model needs image [{channels}, 1, h, w], empty_text and empty_pooled too"
                raise ValueError(f"{file} holds {shapes}: {wanted}, as full.encode writes them")
        if config.image_condition_type == "token_replace" and latents[1] == 1:
            raise ValueError(f"{file} is one frame, which a token_replace model is given, and learns those after it")
        return tuple(latents)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        with open_safetensors(self.files[i]) as handle:
            sample = {name: handle.get_tensor(name).float() for name in handle.keys()}
        more = dict(image=sample["image"]) if self.with_image else {}
        empty = (sample["empty_text"], sample["empty_pooled"]) if self.with_image else self.empty
        more |= dict(empty=empty) if empty else {}
        return i, sample["latents"], sample["text"], sample["pooled"], more


def largest_shape(data):
    """Return [C, T, h, w] of the largest sample's latents."""
    return max(data.shapes or [data[0][1].shape], key=math.prod)


def name_of(data, i):
    """Return the name of sample i for a message: its file, if it has one."""
    return str(data.files[i]) if hasattr(data, "files") else f"sample {i}"


def contents_of(data):
    """Return a fingerprint of the samples, which must be equal on all ranks: of whole files, or, of more than 10 GB of them,
    of each file's header and of part of each tensor."""
    if not hasattr(data, "files"):
        return f"{len(data)} samples"
    empty = Path(data.files[0]).with_name(Folder.EMPTY)
    files = [*data.files, *([empty] if empty.is_file() else [])]
    total = sum(file.stat().st_size for file in files)
    limit = 100 << 20 if total < 10 << 30 else 1 << 20
    return f"{len(data)} files, {fingerprint(files, limit=limit)}, {zlib.crc32(repr(data.shapes).encode()):08x}"


def check_origin(data, model):
    """Raise ValueError if the samples were encoded by another snapshot than `model`."""
    files = encoder_files(model)
    for made_by, file in data.origins.items():
        stored = json.loads(made_by).get("encoders") or []
        ours = [fingerprint([part], like=like) for part, like in zip(files, stored)]
        if len(files) != len(stored) or ours != stored:
            raise ValueError(
                f"{file} was encoded by another snapshot than {model}: encode the videos again with --model"
            )


# --------------------------------------------------------------------------------------------------------------------
# the samples that validation uses


def hold_out(data, args):
    """Return (samples to train on, held-out samples or None): the same on any layout and after a resume."""
    if not args.validate_every:
        return data, None
    share = 0.05 if args.validate is None else args.validate
    count = max(1, round(share * len(data)))
    if count >= len(data):
        raise ValueError(f"--validate {share} of {len(data)} samples leaves none to train on")

    def place(i):  # depends on the sample's name alone
        return zlib.crc32(Path(name_of(data, i)).name.encode()), i

    order = sorted(range(len(data)), key=place)
    trained, held_out = order[count:], order[:count]
    return Part(data, sorted(trained)), Part(data, sorted(held_out))


class Part:
    """Select some samples of a dataset, by their indices."""

    def __init__(self, data, indices):
        self.data = data
        self.indices = indices
        self.shapes = [data.shapes[i] for i in indices] if data.shapes else None
        self.names = [data.names[i] for i in indices] if data.names else None
        if hasattr(data, "files"):
            self.files = [data.files[i] for i in indices]

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        return i, *self.data[self.indices[i]][1:]


# --------------------------------------------------------------------------------------------------------------------
# the samples of a step


def check_samples(pm, micro_batches, step):
    """Raise ValueError for the classic silent bug: sp ranks that work on different samples, or on one sample that each has
    augmented in its own way."""

    def shapes(batch):
        return [list(batch[name].shape) for name in ("latents", "text")]

    def checksums(batch):
        tensors = {name: x.contiguous() for name, x in batch.items() if torch.is_tensor(x)}
        return {name: zlib.crc32(x.view(torch.uint8).numpy()) for name, x in tensors.items()}

    facts = dict(step=step, samples=[batch["samples"] for batch in micro_batches])
    facts |= dict(shapes=[shapes(batch) for batch in micro_batches])
    facts |= dict(contents=[checksums(batch) for batch in micro_batches])
    pm.check_equal(facts, pm.sp_group)


def name_odd_samples(micro_batches, data):
    """Return the names of a step's samples, on all ranks, that have values which are not finite."""
    return sorted({name for names in together(lambda: odd_samples(micro_batches, data)) for name in names})


def odd_samples(micro_batches, data):
    """Return the names of this rank's samples that have values which are not finite."""
    parts = ("samples", "target", "text", "pooled", "image")
    rows = [row for b in micro_batches for row in zip(*(b[name] for name in parts if name in b))]
    finite = [all(part.isfinite().all() for part in parts) for _, *parts in rows]
    return [name_of(data, row[0]) for row, good in zip(rows, finite) if not good]
