"""LoRA, arXiv:2106.09685: y = W x + b + alpha / rank * B A x. W is frozen; A and B are trained, saved, and given to others.

`add_lora(model)` goes before `shard`. `save_lora` writes what diffusers and ComfyUI read; `merge_lora` reads files of others.
"""

import json
import math
import re
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from full.files import open_safetensors, save_tensors
from full.names import NAMINGS, export_weight, names_in, row_sizes, swap_halves
from full.weights import whole


class LoRALinear(nn.Linear):
    """A linear layer and its update by lora_A [rank, in] and lora_B [out, rank], in float32 beside weights of any dtype."""

    def __init__(self, linear, rank, scale):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias, self.scale, bound = linear.weight, linear.bias, scale, linear.in_features**-0.5
        like = dict(device=linear.weight.device, dtype=torch.promote_types(linear.weight.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, **like).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, **like))

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_lora(model, rank, alpha=None):
    """Freeze the model and give each linear of its blocks, modulations aside, a LoRA. Before `shard`. alpha: default rank."""
    for param in model.parameters():
        param.requires_grad = False
    for block in model.blocks:
        for name, linear in [*block.named_modules()]:
            if isinstance(linear, nn.Linear) and "mod" not in name:
                module, _, last = name.rpartition(".")
                setattr(block.get_submodule(module), last, LoRALinear(linear, rank, (alpha or rank) / rank))


def save_lora(model, file, naming="original"):
    """Write the LoRA as diffusers and ComfyUI read it, alpha / rank multiplied into B. Collective; rank 0 writes.

    naming: "original", or "diffusers", where q, k and v are apart and share A.
    """
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            a, b = whole(module.lora_A).cpu(), whole(module.lora_B).cpu() * module.scale
            for theirs, rows in export_weight(model.config, f"{name}.weight", b, naming).items():
                stem = "transformer." + theirs.removesuffix("weight")
                tensors |= {f"{stem}lora_A.weight": a.clone(), f"{stem}lora_B.weight": rows.clone()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_tensors(file, tensors)


# --------------------------------------------------------------------------------------------------------------------
# files, ours and those of others


def lora_files(flags):
    """Return [(file, strength)] of --lora FILE[:STRENGTH], given several times or not at all."""
    given = []
    for flag in flags or ():
        file, colon, strength = flag.rpartition(":")
        try:
            file, strength = (file, float(strength)) if colon else (flag, 1.0)
        except ValueError:  # a colon of the name
            file, strength = flag, 1.0
        if not Path(file).is_file():
            raise ValueError(f"--lora {flag} is not FILE or FILE:STRENGTH: there is no file {file}")
        if not math.isfinite(strength):
            raise ValueError(f"--lora {flag} is not FILE or FILE:STRENGTH: {strength} is no strength")
        given.append((file, strength))
    return given


@torch.no_grad()
def merge_lora(model, file, strength=1.0):
    """Add a LoRA to the weights: W += strength * alpha / rank * B A, rounded once to the weights' dtype.

    file: .safetensors in the original, diffusers or kohya naming; its alpha in a tensor, in diffusers' header, or in B already.
    ValueError, before anything is changed, for layers that the model lacks, of another shape, or not finite.
    """
    with open_safetensors(file) as handle:
        tensors, header = {name: handle.get_tensor(name).float() for name in handle.keys()}, handle.metadata() or {}
    params, places, layers = dict(model.named_parameters()), {}, {}
    for name in (name for name, param in params.items() if name.endswith(".weight") and param.dim() == 2):
        for naming in NAMINGS:
            names = names_in(naming, name)
            heights = row_sizes(model.config, names, len(params[name]))
            for n, theirs in enumerate(names):
                places[theirs.removesuffix(".weight").replace(".", "_")] = name, naming, sum(heights[:n]), heights[n]
    for name, tensor in tensors.items():
        found = LORA_NAME.fullmatch(name)
        if not found or found[1].replace(".", "_") not in places:
            raise ValueError(f"{file} is not a LoRA of this model: {name} belongs to none of its layers")
        layers.setdefault(found[1].replace(".", "_"), {})[LORA_PARTS[found[2]]] = tensor
    alpha, root = header_alpha(header, file)
    updates = []
    for layer, parts in layers.items():
        name, naming, start, height = places[layer]
        shapes = {part: list(tensor.shape) for part, tensor in parts.items()}
        rank = shapes.get("A", [0])[0]
        if dict(alpha=[]) | shapes != dict(alpha=[], A=[rank, params[name].shape[1]], B=[height, rank]):
            size = [height, params[name].shape[1]]
            raise ValueError(f"{file} has {shapes} for {layer}, which is {size} in the model")
        if not all(tensor.isfinite().all() for tensor in parts.values()):
            raise ValueError(f"{file} has values for {layer} that are not finite")
        own = parts["alpha"].item() if "alpha" in parts else alpha
        scale = strength if own is None else strength * own / (rank**0.5 if root else rank)
        updates.append((name, naming, start, scale, parts["A"], parts["B"]))
    for name, naming, start, scale, a, b in updates:
        param = params[name]
        full = torch.zeros(param.shape, device=param.device)
        full[start : start + len(b)] = scale * b.to(param.device) @ a.to(param.device)
        add_update(param, swap_halves(naming, name, full))


@torch.no_grad()
def merge_checkpoint(model, path, manifest):
    """Add to the weights the LoRA, or its average, that a checkpoint of full.train holds."""
    reader, (rank, alpha, _) = dcp.HuggingFaceStorageReader(str(path)), manifest["lora"]
    kind = "more" if manifest.get("ema") else "model"
    sizes = {key: stored.size for key, stored in reader.read_metadata().state_dict_metadata.items()}
    tensors = {key: torch.empty(size) for key, size in sizes.items() if re.match(rf"{kind}\..*\.lora_[AB]$", key)}
    dcp.load(tensors, storage_reader=reader)
    for name, param in model.named_parameters():
        layer = f"{kind}.{name.removesuffix('weight')}"
        if f"{layer}lora_A" in tensors:
            add_update(param, alpha / rank * tensors[f"{layer}lora_B"] @ tensors[f"{layer}lora_A"])


def add_update(param, full):
    """Add a full tensor, equal on all ranks, to a parameter; if that is sharded, each rank adds its part."""
    full = full.to(param.device)
    if isinstance(param, DTensor):
        full = distribute_tensor(full, param.device_mesh, param.placements, src_data_rank=None)
    param.copy_(param + full)


LORA_PARTS = dict(lora_A="A", lora_B="B", lora_down="A", lora_up="B", alpha="alpha")
LORA_NAME = re.compile(
    r"(?:transformer\.|diffusion_model\.|lora_unet_|Hunyuan_video_I2V_lora_)?"
    r"(.+?)\.(lora_A|lora_B|lora_down|lora_up|alpha)(?:\.weight)?"
)


def header_alpha(header, file):
    """Return (alpha or None, whether it is divided by the rank's root) of the header that diffusers writes."""
    try:
        config = json.loads(header.get("lora_adapter_metadata", "{}"))
        config = {key.removeprefix("transformer."): value for key, value in config.items()}
        if config.get("alpha_pattern"):
            raise ValueError("it has an alpha_pattern")
        return config and float(config["lora_alpha"]) or None, bool(config.get("use_rslora"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: its header's lora_adapter_metadata is not understood ({error!r})") from None
