"""Train, save and merge LoRA, arXiv:2106.09685: y = W x + b + alpha / rank * B A x. W is frozen; A and B are trained.

Call `add_lora(model)` before `shard`. `save_lora` writes a file that diffusers and ComfyUI read. `merge_loras` adds files to
the weights: ours, and those of other trainers, which full/lora_files.py reads.
"""

import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from full.files import fingerprint, save_tensors
from full.lora_facts import files_of
from full.lora_files import read_lora
from full.names import export_weight
from full.weights import gathered
from hunyuan_sp import assign


class LoRALinear(nn.Linear):
    """A linear layer with its update, lora_A [rank, in] and lora_B [out, rank]: in float32, whatever the weights' dtype."""

    def __init__(self, linear, rank, scale):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        like = dict(device=linear.weight.device, dtype=dtype)
        bound = linear.in_features**-0.5
        a = torch.empty(rank, linear.in_features, **like)
        self.lora_A = nn.Parameter(a.uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, **like))

    def forward(self, x):
        # FSDP2 casts them to the dtype of the computation; without FSDP2 they are cast here
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        update = F.linear(F.linear(x, a), b)
        return super().forward(x) + self.scale * update


def add_lora(model, rank, alpha=None):
    """Freeze the model, and give each linear layer of its blocks but the modulations a LoRA. Call it before `shard`.

    alpha: by default the rank."""
    for param in model.parameters():
        param.requires_grad = False
    for block in model.blocks:
        for name, linear in [*block.named_modules()]:
            if isinstance(linear, nn.Linear) and "mod" not in name:
                parent, _, last = name.rpartition(".")
                layer = LoRALinear(linear, rank, (alpha or rank) / rank)
                setattr(block.get_submodule(parent), last, layer)


def layers_of(model):
    """Yield (name, layer) of each layer with a LoRA."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def save_lora(model, file, naming="original", **facts):
    """Write the LoRA as diffusers and ComfyUI read it, alpha / rank multiplied into B. Collective; rank 0 writes.

    naming: "original", or "diffusers", where q, k and v are separate layers that share A. facts: more for its header.
    """
    tensors, rank = {}, 0
    for name, layer in layers_of(model):
        a = gathered(layer.lora_A).cpu()
        b = gathered(layer.lora_B).cpu() * layer.scale
        rank, alpha = len(a), layer.scale * len(a)
        for theirs, rows in export_weight(model.config, f"{name}.weight", b, naming).items():
            stem = "transformer." + theirs.removesuffix("weight")
            tensors |= {f"{stem}lora_A.weight": a.clone(), f"{stem}lora_B.weight": rows.clone()}
    # in the file alpha equals rank, since B holds the rest
    date = time.strftime("%Y-%m-%dT%H:%M:%S")
    header = dict(rank=rank, alpha=rank, trained_alpha=alpha, date=date, **facts)
    header |= {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "hunyuan-video/lora",
        "modelspec.implementation": "https://github.com/Tencent/HunyuanVideo",
        "modelspec.title": "LoRA",
        "modelspec.date": header["date"],
    }
    if not dist.is_initialized() or dist.get_rank() == 0:
        strings = {name: str(value) for name, value in header.items()}
        save_tensors(file, tensors, **strings)


@torch.no_grad()
def init_lora(model, file):
    """Start the model's LoRA from a file. ValueError if the file has other layers or another rank."""
    updates, layers = read_lora(model, file).updates, dict(layers_of(model))
    for name in updates:
        if name.removesuffix(".weight") not in layers:
            raise ValueError(f"{file} changes {name}, which --lora does not train")
    for name, layer in layers.items():
        parts = sorted(updates.get(f"{name}.weight", ()), key=lambda part: part.start)
        if not parts:
            assign(layer.lora_B, torch.zeros(layer.lora_B.shape))
            continue
        a, rows = parts[0].a, sum(len(part.b) for part in parts)
        if a is None or len(a) != len(layer.lora_A) or rows != len(layer.lora_B):
            raise ValueError(
                f"{file} has {name} of rank {len(parts[0].b.T)}, not a whole layer of rank {len(layer.lora_A)}"
            )
        same = [part.a is not None and torch.equal(part.a, a) for part in parts]
        if not all(same):
            raise ValueError(f"{file} has an A of its own for parts of {name}, which is one layer here")
        assign(layer.lora_A, a)
        b = torch.cat([part.scale * part.b for part in parts])
        assign(layer.lora_B, b / layer.scale)


# --------------------------------------------------------------------------------------------------------------------
# adding files to the weights


def lora_files(flags):
    """Return [(file, strength)] for the values FILE[:STRENGTH] of --lora; an empty list if it was not given."""
    given = []
    for flag in flags or ():
        file, colon, strength = flag.rpartition(":")
        try:
            file, strength = (file, float(strength)) if colon else (flag, 1.0)
        except ValueError:  # the colon belongs to the name
            file, strength = flag, 1.0
        file = in_folder(file)
        if not Path(file).is_file():
            raise ValueError(f"--lora {flag} is not FILE or FILE:STRENGTH: there is no file {file}")
        if not math.isfinite(strength):
            raise ValueError(f"--lora {flag} is not FILE or FILE:STRENGTH: {strength} is not a strength")
        given.append((file, strength))
    return given


def in_folder(file):
    """Return the path of the LoRA in a folder of training (OUT or OUT/step-N); return any other path as it is."""
    inside = Path(file, "lora.safetensors")
    return str(inside) if inside.is_file() else file


def lora_facts(files):
    """Return a fingerprint for each LoRA file, with the JSON files next to it."""
    return [fingerprint(files_of(file)) for file in files]


def merge_lora(model, file, strength=1.0):
    """Add one LoRA file to the weights; see merge_loras."""
    return merge_loras(model, [(file, strength)])


@torch.no_grad()
def merge_loras(model, files):
    """Add LoRA files [(file, strength)] to the weights: W += strength * alpha / rank * B A, summed in float32, rounded once.

    Return one sentence per file on what was applied. ValueError, before anything is changed, for a file that can't be
    applied completely: see read_lora.
    """
    params, sums, sentences, totals = dict(model.named_parameters()), {}, [], {}
    loras = {file: read_lora(model, file) for file, _ in files}
    for file, strength in files:
        totals[file] = totals.get(file, 0.0) + strength  # +50 and -50 of one file cancel exactly
        sentences.append(f"{file}: {loras[file].summary}, strength {strength:g}")
    for file, strength in totals.items():
        for name, parts in loras[file].updates.items():
            sums.setdefault(name, []).extend((strength, part) for part in parts)
    for name, parts in sums.items():
        param = params[name]
        full = torch.zeros(param.shape, device=param.device)
        for strength, part in parts:
            part.add_to(full, strength)
        if not full.isfinite().all():
            raise ValueError(f"{', '.join(map(str, totals))}: at these strengths {name} is not finite")
        add_update(param, full)
    return sentences


@torch.no_grad()
def merge_checkpoint(model, path, manifest):
    """Add the LoRA of a checkpoint of full.train, or its average, to the weights. Return a sentence on it."""
    reader, (rank, alpha, _) = dcp.HuggingFaceStorageReader(str(path)), manifest["lora"]
    kind = "more." if manifest.get("ema") else "model."
    sizes = {key: stored.size for key, stored in reader.read_metadata().state_dict_metadata.items()}
    mine = [key for key in sizes if key.startswith(kind) and key.endswith(("lora_A", "lora_B"))]
    tensors = {key: torch.empty(sizes[key]) for key in mine}
    dcp.load(tensors, storage_reader=reader)
    for name, param in model.named_parameters():
        layer = kind + name.removesuffix("weight")
        if f"{layer}lora_A" in tensors:
            add_update(param, alpha / rank * tensors[f"{layer}lora_B"] @ tensors[f"{layer}lora_A"])
    return f"{path}: LoRA of rank {rank}, alpha {alpha:g}{', averaged' * bool(manifest.get('ema'))}"


def add_update(param, full):
    """Add a full tensor, equal on all ranks, to a parameter. If the parameter is sharded, each rank adds its part."""
    if isinstance(param, DTensor):  # it may be in the host's memory
        full = distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None).to_local()
        param = param.to_local()
    param.copy_(param + full.to(param.device))
