"""Read weights in the naming of the release, diffusers or ComfyUI, strictly, and write them as diffusers reads them.

Writing needs huggingface_hub (the extra [pipeline]).
"""

import json
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from full.files import open_safetensors, read_json, replace_file, save_tensors, visible
from full.names import diffusers_config, export_weight, names_in, naming_of, swap_halves, unprefixed
from hunyuan_sp import assign


def gathered(param):
    """Return a parameter's values, gathered if it is sharded."""
    return (param.full_tensor() if isinstance(param, DTensor) else param).detach()


def load_weights(model, source):
    """Load a file, a folder or a dict of tensors in any of the three namings, strictly; sharded models too.

    source: a .safetensors file, a folder of them (with an index or without), the original .pt, or {name: tensor}. Names,
    shapes and types are checked first; then tensors are read one by one, their values checked, and each rank keeps its part.
    fp8 is loaded as the numbers in the file, and refused if these need scales that are kept elsewhere.
    ValueError if names are missing, unknown or of another shape; it says which and how many.
    """
    tensors = unprefixed(readers(source))
    naming = naming_of(tensors)
    params = {name: param for name, param in model.named_parameters() if "lora_" not in name}
    sources, wrong = {name: names_in(naming, name) for name in params}, []
    wanted = {n for names in sources.values() for n in names}
    for name, names in sources.items():
        shapes = [tensors[n][0] for n in names if n in tensors]
        if len(shapes) == len(names):
            joined = [sum(shape[0] for shape in shapes), *shapes[0][1:]] if all(shapes) else []
            even = all(shape[1:] == shapes[0][1:] for shape in shapes)
            if not even or joined != list(params[name].shape):
                wrong.append(f"{' + '.join(names)} is {joined}, the model has {list(params[name].shape)}")
    problems = dict(missing=sorted(wanted - set(tensors)))
    problems |= dict(unknown=sorted(set(tensors) - wanted))
    problems |= {"of another shape": wrong}
    if any(problems.values()):
        counts = [f"{len(v)} {k} ({', '.join(v[:3])}{', ..' * (len(v) > 3)})" for k, v in problems.items() if v]
        raise ValueError(f"weights in {naming} naming do not fit the model: {'; '.join(counts)}")
    for name, names in sources.items():
        parts = []
        for n in names:
            part = tensors[n][1]().to(params[name].device)  # a GPU checks 26 GB in seconds
            check_values(n, part)
            parts.append(part.to(params[name].dtype))  # parts may have different dtypes
        full = torch.cat(parts) if len(parts) > 1 else parts[0]
        assign(params[name], swap_halves(naming, name, full))


def check_values(name, tensor):
    """Raise ValueError if values are not finite, or need a scale that is not in the tensor."""
    wide = tensor.float() if tensor.itemsize == 1 else tensor
    if not wide.isfinite().all():
        raise ValueError(f"{name} has values that are not finite")
    fp8 = tensor.itemsize == 1 and wide.numel() > 0
    if fp8 and wide.abs().max() > torch.finfo(tensor.dtype).max / 2:
        raise ValueError(
            f"{name} is {str(tensor.dtype)[6:]} with values up to {wide.abs().max():.0f}: they are to be multiplied by a "
            "scale that is kept elsewhere; convert the weights to bfloat16 first"
        )


# --------------------------------------------------------------------------------------------------------------------
# files


def weight_files(source):
    """Return the weight files at a path: the file itself, those in a folder's index, or all .safetensors of a folder."""
    path = Path(source)
    indices = visible(path, "*.safetensors.index.json") if path.is_dir() else []
    files = visible(path, "*.safetensors") if path.is_dir() else [path]
    if len(indices) > 1:
        raise ValueError(f"{path} holds the indices of {len(indices)} models: {indices[0].name} and {indices[1].name}")
    if indices:
        names = sorted(set(weight_map(indices[0]).values()))
        if outside := [name for name in names if name in (".", "..") or "/" in name or "\\" in name]:
            raise ValueError(f"{indices[0]} names a file outside its folder: {outside[0]}")
        files = [path / name for name in names]
        if absent := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{path} is incomplete: {absent[0]} is missing, which {indices[0].name} names")
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(f"no weights at {path}: expected a .safetensors or .pt file, or a folder with some")
    for file in files:
        if part := re.search(r"-(\d+)-of-(\d+)\.safetensors$", file.name):
            there = len([f for f in files if f.name.endswith(f"-of-{part[2]}.safetensors")])
            if there != int(part[2]):
                raise ValueError(f"{path} is incomplete: it has {there} of {int(part[2])} files like {file.name}")
    return files


def weight_map(index):
    """Return {tensor name: file name} of an index."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index} is not an index of weights: it has no weight_map of names")
    return names


def readers(source):
    """Return {name: (shape, function that reads the tensor)}. Only tensors are unpickled."""
    if isinstance(source, dict):
        return from_dict("the weights", source)
    path, found = Path(source), {}
    files = weight_files(path)
    if files[0].suffix != ".safetensors":
        return from_dict(path, read_pt(path))
    for file in files:
        handle = open_safetensors(file)
        slices = {name: handle.get_slice(name) for name in handle.keys()}
        if wrong := [f"{name} is {x.get_dtype()}" for name, x in slices.items() if "F" not in x.get_dtype()]:
            raise ValueError(f"{file} has {len(wrong)} tensors that are not floating-point ({wrong[0]})")
        if twice := sorted(set(slices) & set(found)):
            raise ValueError(f"{twice[0]} is in {file} and in another file of {path}")
        for name, x in slices.items():
            found[name] = x.get_shape(), partial(handle.get_tensor, name)
    for index in visible(path, "*.safetensors.index.json") if path.is_dir() else []:
        if lost := sorted(set(weight_map(index)) - set(found)):
            raise ValueError(f"{index} names {lost[0]}, which no file has")
    return found


def read_pt(path):
    """Return {name: tensor} of the release's .pt."""
    if path.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(f"{path} is none of .safetensors, .pt, .pth, .bin, .ckpt: other formats are not read")
    scales = path.with_name(f"{path.stem}_map{path.suffix}")
    if scales.exists():
        raise ValueError(f"{path} is to be multiplied by the scales in {scales.name}: convert it to bfloat16 first")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(f"{path} is not a file of plain tensors as torch.save writes them ({kind})") from None
    for key in ("module", "ema", "model", "state_dict"):
        inner = stored.get(key) if isinstance(stored, dict) else None
        stored = inner if isinstance(inner, dict) else stored
    return stored


def from_dict(origin, tensors):
    if not isinstance(tensors, dict):
        raise ValueError(f"{origin} should be floating-point tensors by name, it is of type {type(tensors).__name__}")
    for name, tensor in tensors.items():
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and isinstance(name, str)
        if not plain or not tensor.is_floating_point():
            kind = f"{tensor.dtype} tensor" if plain else type(tensor).__name__
            raise ValueError(f"{origin} should be floating-point tensors by name, {name!r} is of type {kind}")
    return {name: (list(tensor.shape), tensor.detach) for name, tensor in tensors.items()}


# --------------------------------------------------------------------------------------------------------------------
# export


def save_weights(model, folder, naming="original", dtype=torch.bfloat16, shard_bytes=5 * 10**9):
    """Write weights for others: .safetensors with an index, as diffusers' from_pretrained reads them, and config.json.

    Collective: all ranks call it, rank 0 writes. A sharded model is gathered one parameter at a time.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder, writes = Path(folder), not dist.is_initialized() or dist.get_rank() == 0
    origin, planned = {}, {}  # for each exported tensor: the parameter it is cut from, and its size
    for name, param in model.named_parameters():
        empty = torch.empty(param.shape, dtype=dtype, device="meta")
        for key, tensor in export_weight(model.config, name, empty, naming).items():
            origin[key], planned[key] = (name, param), tensor
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    plan = split_torch_state_dict_into_shards(planned, filename_pattern=pattern, max_shard_size=shard_bytes)
    parts = []
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    for n, (file, keys) in enumerate(plan.filename_to_tensors.items()):
        shard, exported = {}, {}
        for key in keys:
            name, param = origin[key]
            if key not in exported:
                full = gathered(param).to("cpu", dtype)
                check_values(name, full)
                exported = export_weight(model.config, name, full, naming)
            shard[key] = exported[key]
        parts.append((folder / f".part-{n}.safetensors", folder / file))
        if writes:
            save_tensors(parts[-1][0], shard)
    if writes:
        # the old export is deleted when the new one is on the disk; the index comes last, so half an export can't be read
        earlier = pattern.format(suffix="*")
        for old in [*folder.glob(earlier), *folder.glob(f"{earlier}.index.json")]:
            old.unlink()
        for written, final in parts:
            written.replace(final)
        config = diffusers_config(model.config) if naming == "diffusers" else asdict(model.config)
        replace_file(folder / "config.json", json.dumps(config, indent=1))
        index = dict(metadata=plan.metadata, weight_map=plan.tensor_to_filename)
        replace_file(folder / f"{pattern.format(suffix='')}.index.json", json.dumps(index, indent=1))
