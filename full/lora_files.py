"""LoRA files as they are found: a file is read whole, at the strength that its maker meant, or refused with the reason.

Names: the original release's, diffusers', ComfyUI's; as peft, kohya's scripts, OneTrainer and older diffusers write them.
Strength: alpha in a tensor, in the header, or in a JSON file beside it, under the names that trainers give it.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

import torch

from full.files import open_safetensors
from full.lora_facts import check_base, says_ours, stated_facts
from full.names import NAMINGS, names_in, row_sizes, swap_halves

PREFIXES = (
    r"base_model\.model\. model\. module\. _orig_mod\. unet\. diffusion_model\. transformer\. "
    "lora_unet_ lora_transformer_ Hunyuan_video_I2V_lora_"
)
NAME = re.compile(
    f"(?:{'|'.join(PREFIXES.split())})*"
    + r"(?P<layer>.+?)\.(?:(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.\w+)??(?:\.weight)?"
    r"|(?P<other>alpha|diff|diff_b))"
)
PARTS = {"lora_A": "A", "lora_down": "A", "lora.down": "A", "lora_B": "B", "lora_up": "B", "lora.up": "B"}
KINDS = {  # a pattern of its names: what it is
    r"^(lora_te\d?_|text_encoder|text_model|te\d?\.)": "a LoRA of a text encoder",
    r"dora_scale|lora_magnitude_vector": "a DoRA",
    r"lokr_": "a LoKr",
    r"hada_": "a LoHa",
    r"oft_": "an OFT",
    r"vera_lambda": "a VeRA",
    r"ia3_l": "an IA3",
    r"scale_weight$|scaled_fp8$": "quantised",
    r"lora_mid": "a LoRA with a middle part",
    r"lora_[AB](\.\w+)?\.bias": "a LoRA with biases",
    r"\.(w|b)_norm$": "differences of norms",
}
FLUX = dict(double=19, single=38)  # blocks, of this model's names and shapes


class Part(NamedTuple):
    """Hold what a file adds to some rows of a parameter: scale * b @ a, or b itself if there is no a."""

    name: str
    naming: str
    start: int
    scale: float
    a: torch.Tensor | None
    b: torch.Tensor

    def add_to(self, full, strength):
        """Add it to the full parameter, in float32."""
        b = self.b.to(full.device)
        update = self.scale * b if self.a is None else self.scale * b @ self.a.to(full.device)
        full[self.start : self.start + len(b)] += strength * swap_halves(self.naming, self.name, update)


class LoRA(NamedTuple):
    """updates: {parameter: [Part]}. summary: what it is, for people."""

    updates: dict
    summary: str


def read_lora(model, file):
    """Read a LoRA file for this model.

    ValueError if it is of another model, of a kind that is not read, has layers that the model lacks, of another shape, twice
    or not finite, if its strength is stated twice and differs, or if it would change nothing.
    """
    with open_safetensors(file) as handle:
        tensors, header = {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}
    facts = stated_facts(file, header, any(".lora_down" in name for name in tensors))
    check_base(file, facts)
    places, layers = places_of(model), defaultdict(dict)
    for name, tensor in tensors.items():
        for pattern, kind in KINDS.items():
            if re.search(pattern, name):
                raise ValueError(f"{file} is {kind} ({name}): only plain LoRA of the transformer is read")
        found = NAME.fullmatch(name)
        place = places.get(found["layer"].replace(".", "_")) if found else None
        if not place:
            raise ValueError(f"{file} is not a LoRA of this model: {name} belongs to none of its layers")
        part = PARTS[found["part"]] if found["part"] else found["other"]
        same = [p for p in layers if p[0] == place[0] and p[2] < place[2] + place[3] and place[2] < p[2] + p[3]]
        if part in layers[place] or same not in ([], [place]):
            raise ValueError(f"{file} has {part} of {place[0]} twice, the second time as {name}")
        if not tensor.is_floating_point() and (part != "alpha" or tensor.is_complex()):
            raise ValueError(
                f"{file} has {name} in {str(tensor.dtype).removeprefix('torch.')}: only floating point is read"
            )
        layers[place][part] = tensor.float()
    if not says_ours(facts):
        check_depth(model, file, [name for name, *_ in layers])
    ranks, updates = set(), defaultdict(list)
    for place, parts in layers.items():
        for part in parts_of(model, file, place, parts, facts):
            updates[part.name].append(part)
        if "A" in parts:
            ranks.add(len(parts["A"]))
    if not any(part.b.any() and (part.a is None or part.a.any()) for parts in updates.values() for part in parts):
        raise ValueError(f"{file} changes nothing: it has {len(tensors)} tensors, and all updates are zero")
    if facts.rank and ranks and ranks != {facts.rank}:
        raise ValueError(f"{file} says that its rank is {facts.rank}, and its layers have {sorted(ranks)}")
    own = sorted({parts["alpha"].item() for parts in layers.values() if "alpha" in parts})
    alphas = ", ".join(f"{x:g}" for x in own)
    if own and facts.alpha not in (None, *own):
        raise ValueError(f"{file} states two alphas: {facts.alpha:g} in its {facts.where}, {alphas} in its tensors")
    if facts.root and own:
        raise ValueError(f"{file} has alphas, and says that they are divided by the rank's root, in its {facts.root}")
    stated = f"alpha {alphas}" if own else f"alpha {facts.alpha:g} ({facts.where})" if facts.alpha else facts.no_alpha
    rank = f"rank {', '.join(map(str, sorted(ranks)))}, {stated}" if ranks else "differences of weights"
    more = "".join(f", {name} {header[name]}" for name in ("base", "steps", "size", "shift", "date") if name in header)
    return LoRA(dict(updates), f"{len(layers)} layers, {rank}{more}")


def places_of(model):
    """Return {layer's name in any naming, dots as underscores: (weight's name, naming, first row, rows)}."""
    places = {}
    for name, param in model.named_parameters():
        if name.endswith(".weight") and param.dim() == 2:
            for naming in NAMINGS:
                names = names_in(naming, name)
                heights = row_sizes(model.config, names, len(param))
                for n, theirs in enumerate(names):
                    place = name, "diffusers" if naming == "diffusers" else "original", sum(heights[:n]), heights[n]
                    places[theirs.removesuffix(".weight").replace(".", "_")] = place
    return places


def parts_of(model, file, place, parts, facts):
    """Yield the updates of one layer."""
    name, naming, start, height = place
    size, shapes = [height, model.get_parameter(name).shape[1]], {part: list(x.shape) for part, x in parts.items()}
    if not all(tensor.isfinite().all() for tensor in parts.values()):
        raise ValueError(f"{file} has values for {name} that are not finite")
    if "A" in parts or "B" in parts or set(parts) == {"alpha"}:
        rank = shapes.get("A", [0])[0]
        if shapes.get("A") != [rank, size[1]] or shapes.get("B") != [height, rank] or rank == 0:
            raise ValueError(f"{file} has {shapes} for {name}, which is {size} in the model")
        alpha = facts.alpha
        if "alpha" in parts:
            if parts["alpha"].numel() != 1:
                raise ValueError(f"{file} has an alpha of shape {shapes['alpha']} for {name}")
            alpha = parts["alpha"].item()
        if alpha is not None and not 0 < alpha < math.inf:
            raise ValueError(f"{file} has alpha {alpha} for {name}, which is no strength")
        scale = 1.0 if alpha is None else alpha / (rank**0.5 if facts.root else rank)
        yield Part(name, naming, start, scale, parts["A"], parts["B"])
    for part, target, wanted in (("diff", name, size), ("diff_b", name[:-6] + "bias", [height])):
        if part in parts:
            if shapes[part] != wanted:
                raise ValueError(f"{file} has {part} {shapes[part]} for {name}, which is {wanted} in the model")
            yield Part(target, naming, start, 1.0, None, parts[part])


def check_depth(model, file, names):
    """Raise ValueError if the blocks that are covered are FLUX.1's, or the first ones of both kinds, and none to the last."""
    covered, depths = {}, dict(double=model.config.double_depth, single=model.config.single_depth)
    for kind, depth in depths.items():
        numbers = {int(found[1]) for name in names if (found := re.match(rf"{kind}_blocks\.(\d+)\.", name))}
        covered[kind] = len(numbers) if 1 < len(numbers) < depth and numbers == set(range(len(numbers))) else 0
    flux = any(count == FLUX[kind] and depths[kind] in (20, 40) for kind, count in covered.items())
    if flux or all(covered.values()):
        found = " and ".join(f"the first {n} of {depths[kind]} {kind} blocks" for kind, n in covered.items() if n)
        raise ValueError(f"{file} is a LoRA of another model: it covers {found} (FLUX.1 has 19 and 38)")
