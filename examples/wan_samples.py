"""Samples of Wan to train on: a folder of latents and texts, noise in its place, and `encode`, which makes such a folder.

A sample is a .safetensors: latents [C, T, h, w], normalised as the pipeline does; text [L, text_dim], its tokens alone.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, UMT5EncoderModel

from full.files import save_tensors
from full.video import IMAGES, VIDEOS, read_frames
from hunyuan_sp import shift_sigma
from sampler import seeded

WORDS = 512  # tokens of text, padded with zeros, as the pipeline feeds them


class Samples:
    """A folder of .safetensors with latents and text, as --encode makes them. ValueError if they are of another model."""

    def __init__(self, folder, config):
        self.files = sorted(Path(folder).glob("*.safetensors"))
        if not self.files:
            raise ValueError(f"--data {folder} holds no .safetensors: --encode makes them")
        self.names = [file.name for file in self.files]
        self.shapes = []
        for file in self.files:
            with safe_open(file, "pt") as handle:
                latents, text = (handle.get_slice(name).get_shape() for name in ("latents", "text"))
            if (latents[0], text[1]) != (config["in_channels"], config["text_dim"]):
                theirs = f"the model {config['in_channels']} and {config['text_dim']}"
                raise ValueError(f"{file} has {latents[0]} channels and {text[1]} numbers a text token, {theirs}")
            self.shapes.append(tuple(latents))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        sample = load_file(self.files[i])
        return i, sample["latents"].float(), sample["text"].float()


class Noise:
    """Noise in the shape of a small clip, and texts of 7 tokens."""

    shapes = names = None

    def __init__(self, config):
        self.parts = (config["in_channels"], 5, 6, 6), (7, config["text_dim"])

    def __len__(self):
        return 64

    def __getitem__(self, i):
        generator = seeded("noise", int(i))
        return i, *(torch.randn(part, generator=generator) for part in self.parts)


def collate(items, args):
    """Make a batch by rectified flow; its noise is a function of (seed, epoch, sample): every sp rank draws the same."""
    rows = []
    for index, clip, text in items:
        generator = seeded("flow", args.seed, index.epoch, int(index))
        noise = torch.randn(clip.shape, generator=generator)
        low, high = args.sigmas
        level = low + (high - low) * shift_sigma(torch.randn((), generator=generator).sigmoid(), args.shift)
        row = dict(latents=(1 - level) * clip + level * noise, target=noise - clip, timestep=1000 * level)
        text = F.pad(text[:WORDS], (0, 0, 0, WORDS - min(len(text), WORDS)))
        rows.append(row | dict(text=text, weight=torch.tensor(index.weight)))
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


# --------------------------------------------------------------------------------------------------------------------
# from videos


def encode(pm, args):
    """Make a sample of each video and image in a folder; the ranks take turns. What can't be made is named and skipped."""
    if not (args.model and args.data):
        raise ValueError("--encode needs --model, whose VAE and text encoder it uses, and --data, the folder to write")
    files = sorted(file for file in Path(args.encode).glob("*") if file.suffix.lower() in VIDEOS + IMAGES)
    vae = AutoencoderKLWan.from_pretrained(args.model, subfolder="vae").to(pm.device)
    patches = 2 * vae.config.scale_factor_spatial  # pixels of a token's side
    if args.height % patches or args.width % patches:
        raise ValueError(f"--height {args.height} and --width {args.width} must be multiples of {patches}")
    tokenizer = AutoTokenizer.from_pretrained(args.model, subfolder="tokenizer")
    dtype = torch.bfloat16 if pm.device.type == "cuda" else torch.float32
    text_encoder = UMT5EncoderModel.from_pretrained(args.model, subfolder="text_encoder", dtype=dtype)
    text_encoder = text_encoder.to(pm.device)
    Path(args.data).mkdir(parents=True, exist_ok=True)
    made = 0
    for file in files[pm.rank :: pm.world_size]:
        try:
            caption = file.with_suffix(".txt").read_text(encoding="utf-8")
            frames = read_at_rate(file, args)
        except (OSError, ValueError) as error:
            print(f"skipping {file}: {error}", flush=True)
            continue
        sample = dict(latents=encode_frames(vae, frames), text=encode_text(tokenizer, text_encoder, caption))
        save_tensors(Path(args.data, f"{file.name}.safetensors"), sample)
        made += 1
        print(f"{file}: {len(frames)} frames, {len(sample['text'])} tokens of text", flush=True)
    if not pm.sum(made, pm.world_group):
        raise ValueError(f"{args.encode} holds no video or image with a caption that could be encoded")
    return pm


def read_at_rate(file, args):
    """Read 4k + 1 frames at --rate of a video, --frames at most: `read_frames` gives those of each 1/24 s."""
    pace = 24 / args.rate
    size = dict(height=args.height, width=args.width, no_buckets=True)
    frames = read_frames(file, argparse.Namespace(**size, frames=math.ceil((args.frames - 1) * pace) + 4))
    count = min(args.frames, int((len(frames) - 1) / pace) + 1)
    return [frames[round(n * pace)] for n in range((count - 1) // 4 * 4 + 1)]


@torch.no_grad()
def encode_frames(vae, frames):
    """Encode RGB images -> latents [C, T, h, w]: the posterior's mode, each channel by its mean and deviation."""
    pixels = torch.stack([torch.from_numpy(np.array(frame)) for frame in frames]).permute(3, 0, 1, 2)[None]
    pixels = pixels.to(vae.device, vae.dtype) / 127.5 - 1
    latents = vae.encode(pixels).latent_dist.mode()[0].float().cpu()
    mean, std = (torch.tensor(x).view(-1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    return ((latents - mean) / std).contiguous()


@torch.no_grad()
def encode_text(tokenizer, text_encoder, caption):
    """Encode a caption -> [L, text_dim], its tokens alone, at most 512."""
    words = tokenizer(" ".join(caption.split()), max_length=WORDS, truncation=True, return_tensors="pt")
    words = words.to(text_encoder.device)
    return text_encoder(words.input_ids, words.attention_mask).last_hidden_state[0].float().cpu().contiguous()
