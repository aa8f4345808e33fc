"""LoRA, arXiv:2106.09685: y = W x + b + alpha / rank * B A x. W is frozen; A and B are trained, saved, and given to others.

`add_lora(model)` goes before `shard`. `save_lora` writes what diffusers and ComfyUI read; `merge_loras` adds files to the
weights, ours and those of others, which full/lora_files.py reads.
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
from full.lora_files import files_of, read_lora
from full.names import export_weight
from full.weights import whole
from hunyuan_sp import assign


class LoRALinear(nn.Linear):
    """A linear layer and its update by lora_A [rank, in] and lora_B [out, rank], in float32 beside weights of any dtype."""

    def __init__(self, linear, rank, scale):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias, self.scale, bound = linear.weight, linear.bias, scale, linear.in_features**-0.5
        like = dict(device=linear.weight.device, dtype=torch.promote_types(linear.weight.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, **like).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, **like))

    def forward(self, x):
        # FSDP2 casts them to the dtype that is computed in; a model that nobody shards is cast here
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return super().forward(x) + self.scale * F.linear(F.linear(x, a), b)


def add_lora(model, rank, alpha=None):
    """Freeze the model and give each linear of its blocks, modulations aside, a LoRA. Before `shard`. alpha: default rank."""
    for param in model.parameters():
        param.requires_grad = False
    for block in model.blocks:
        for name, linear in [*block.named_modules()]:
            if isinstance(linear, nn.Linear) and "mod" not in name:
                module, _, last = name.rpartition(".")
                setattr(block.get_submodule(module), last, LoRALinear(linear, rank, (alpha or rank) / rank))


def layers_of(model):
    """Yield (name, layer) of each layer with a LoRA."""
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def save_lora(model, file, naming="original", **facts):
    """Write the LoRA as diffusers and ComfyUI read it, alpha / rank multiplied into B. Collective; rank 0 writes.

    naming: "original", or "diffusers", where q, k and v are apart and share A. facts: what else its header says.
    """
    tensors, rank = {}, 0
    for name, layer in layers_of(model):
        a, b = whole(layer.lora_A).cpu(), whole(layer.lora_B).cpu() * layer.scale
        rank, alpha = len(a), layer.scale * len(a)
        for theirs, rows in export_weight(model.config, f"{name}.weight", b, naming).items():
            stem = "transformer." + theirs.removesuffix("weight")
            tensors |= {f"{stem}lora_A.weight": a.clone(), f"{stem}lora_B.weight": rows.clone()}
    # what is in the file has alpha = rank, since B holds the rest
    header = dict(rank=rank, alpha=rank, trained_alpha=alpha, date=time.strftime("%Y-%m-%dT%H:%M:%S"), **facts)
    header |= {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "hunyuan-video/lora",
        "modelspec.implementation": "https://github.com/Tencent/HunyuanVideo",
        "modelspec.title": "LoRA",
        "modelspec.date": header["date"],
    }
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_tensors(file, tensors, **{name: str(value) for name, value in header.items()})


@torch.no_grad()
def init_lora(model, file):
    """Start the model's LoRA from a file. ValueError if that has other layers, or more ranks than the model's."""
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
        if any(part.a is None or not torch.equal(part.a, a) for part in parts):
            raise ValueError(f"{file} has an A of its own for parts of {name}, which is one layer here")
        assign(layer.lora_A, a)
        assign(layer.lora_B, torch.cat([part.scale * part.b for part in parts]) / layer.scale)


# --------------------------------------------------------------------------------------------------------------------
# adding files to the weights


def lora_files(flags):
    """Return [(file, strength)] of --lora FILE[:STRENGTH], given several times or not at all."""
    given = []
    for flag in flags or ():
        file, colon, strength = flag.rpartition(":")
        try:
            file, strength = (file, float(strength)) if colon else (flag, 1.0)
        except ValueError:  # a colon of the name
            file, strength = flag, 1.0
        file = in_folder(file)
        if not Path(file).is_file():
            raise ValueError(f"--lora {flag} is not FILE or FILE:STRENGTH: there is no file {file}")
        if not math.isfinite(strength):
            raise ValueError(f"--lora {flag} is not FILE or FILE:STRENGTH: {strength} is no strength")
        given.append((file, strength))
    return given


def in_folder(file):
    """Return the LoRA in a folder of training, OUT or OUT/step-N; another name as it is."""
    inside = Path(file, "lora.safetensors")
    return str(inside) if inside.is_file() else file


def lora_facts(files):
    """Return the fingerprints of LoRA files, each with the JSON files beside it."""
    return [fingerprint(files_of(file)) for file in files]


def merge_lora(model, file, strength=1.0):
    """Add one LoRA file to the weights; see merge_loras."""
    return merge_loras(model, [(file, strength)])


@torch.no_grad()
def merge_loras(model, files):
    """Add LoRA files [(file, strength)] to the weights: W += strength * alpha / rank * B A, summed in float32, rounded once.

    Returns one sentence a file: what was applied. ValueError, before anything is changed, for a file that is not applied
    whole: see read_lora.
    """
    params, sums, sentences, totals = dict(model.named_parameters()), {}, [], {}
    loras = {file: read_lora(model, file) for file, _ in files}
    for file, strength in files:
        totals[file] = totals.get(file, 0.0) + strength  # +50 and -50 of one file are nothing
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
    """Add to the weights the LoRA, or its average, that a checkpoint of full.train holds; return a sentence on it."""
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
    """Add a full tensor, equal on all ranks, to a parameter; if that is sharded, each rank adds its part."""
    if isinstance(param, DTensor):  # which may be in the host's memory
        full = distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None).to_local()
        param = param.to_local()
    param.copy_(param + full.to(param.device))
