"""LoRA files as they are found: a file is read whole, at the strength that its maker meant, or refused with the reason.

Names: the original release's, diffusers', ComfyUI's; as peft, kohya's scripts, OneTrainer and older diffusers write them.
Strength: alpha in a tensor, in the header, or in a JSON file beside it, under the names that trainers give it.
"""

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

from full.files import open_safetensors
from full.names import NAMINGS, names_in, row_sizes, swap_halves

PREFIX = r"(?:base_model\.model\.|model\.|diffusion_model\.|transformer\.|lora_unet_|lora_transformer_|Hunyuan_video_I2V_lora_)*"
NAME = re.compile(
    PREFIX + r"(?P<layer>.+?)\.(?:(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.\w+)??(?:\.weight)?"
    r"|(?P<other>alpha|diff|diff_b))"
)
PARTS = {"lora_A": "A", "lora_down": "A", "lora.down": "A", "lora_B": "B", "lora_up": "B", "lora.up": "B"}
KINDS = {  # a pattern of its names: what it is
    r"^(lora_te\d?_|text_encoder|text_model|te\d?\.)": "a LoRA of a text encoder",
    r"dora_scale|lora_magnitude_vector": "a DoRA",
    r"lokr_": "a LoKr",
    r"hada_": "a LoHa",
    r"oft_": "an OFT",
    r"lora_mid": "a LoRA with a middle part",
    r"lora_[AB](\.\w+)?\.bias|\.(w|b)_norm$": "a LoRA with biases",
}
ALPHA = ("lora_alpha", "network_alpha", "ss_network_alpha", "linear_alpha", "alpha")
RANK = ("r", "lora_rank", "network_dim", "ss_network_dim", "rank")
BASE = (
    "modelspec.architecture",
    "ss_base_model_version",
    "base_model",
    "base_model_version",
    "base_model_name_or_path",
)
OURS = r"hunyuan.?video(?!.?1.?5)"
OTHERS = r"(?<![a-z])(flux|wan|ltx|qwen|sdxl|sd3|stable.?diffusion|cogvideo|mochi|chroma|pixart|lumina|hidream|framepack\w*|hunyuan)(?![a-z])"


class Part(NamedTuple):
    """What a file adds to some rows of a parameter: scale * b @ a, or b itself if there is no a."""

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
        tensors, header = {name: handle.get_tensor(name).float() for name in handle.keys()}, handle.metadata() or {}
    facts = stated_facts(file, header)
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
        layers[place][part] = tensor
    check_depth(model, file, [name for name, *_ in layers])
    alpha, ranks, updates = facts.alpha, set(), defaultdict(list)
    for place, parts in layers.items():
        for part in parts_of(model, file, place, parts, facts):
            updates[part.name].append(part)
        if "A" in parts:
            ranks.add(len(parts["A"]))
    if not any(part.b.any() for parts in updates.values() for part in parts):
        raise ValueError(f"{file} changes nothing: it has {len(tensors)} tensors, and all updates are zero")
    if facts.rank and ranks and ranks != {facts.rank}:
        raise ValueError(f"{file} says that its rank is {facts.rank}, and its layers have {sorted(ranks)}")
    own = {parts["alpha"].item() for parts in layers.values() if "alpha" in parts}
    if len(own) == 1 and alpha not in (None, *own):
        raise ValueError(f"{file} states two alphas: {alpha:g} in its {facts.where}, {own.pop():g} in its tensors")
    stated = f"alpha {alpha:g}" if alpha else f"alpha {', '.join(f'{x:g}' for x in sorted(own))}" if own else "no alpha"
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


# --------------------------------------------------------------------------------------------------------------------
# what is stated outside the tensors


class Facts(NamedTuple):
    alpha: float | None = None
    rank: int | None = None
    root: bool = False  # alpha is divided by the rank's root
    where: str = ""
    base: tuple = ()


def stated_facts(file, header):
    """Return what the header and the JSON files beside a LoRA say of it. ValueError if they contradict each other."""
    sources = {"header": header}
    for name in ("adapter_config.json", "lora_config.json"):
        side = Path(file).with_name(name)
        if side.is_file():
            sources[name] = parse_json(file, name, side.read_text(errors="replace"))
    found, base = defaultdict(dict), ()
    for where, source in sources.items():
        for key, value in flatten(file, where, source):
            if key in ("alpha_pattern", "rank_pattern") and value:
                raise ValueError(f"{file}: its {where} has an {key}, which is not read")
            if key == "use_dora" and str(value).lower() in ("true", "1"):
                raise ValueError(f"{file} is a DoRA, as its {where} says: only plain LoRA is read")
            if key in ("use_rslora", "rslora"):
                found["root"][f"{where}'s {key}"] = float(str(value).lower() in ("true", "1"))
            base += ((key, str(value)),) if key in BASE and isinstance(value, str) else ()
            for fact, names in (("alpha", ALPHA), ("rank", RANK)):
                # "Dynamic": each layer has its own
                if key in names and value not in (None, "None", "", "Dynamic") and not isinstance(value, bool):
                    place = f"{where}'s {key}" + " again" * (f"{where}'s {key}" in found[fact])
                    found[fact][place] = number(file, where, key, value)
    for fact, values in found.items():
        if len(set(values.values())) > 1:
            both = " and ".join(f"{value:g} in its {where}" for where, value in values.items())
            raise ValueError(f"{file} states two values of {fact}: {both}")
    where, alpha = next(iter(found["alpha"].items()), ("", None))
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"{file} has alpha {alpha} in its {where}, which is no strength")
    rank = next(iter(found["rank"].values()), None)
    if rank is not None and not (rank > 0 and rank.is_integer()):
        raise ValueError(f"{file} has rank {rank}, which is no number of rows")
    return Facts(alpha, rank and int(rank), 1.0 in found["root"].values(), where, base)


def number(file, where, key, value):
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{file}: {key} in its {where} is {str(value)[:40]!r}, which is no number") from None


def parse_json(file, where, text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{file}: its {where} can't be read as JSON") from None


def flatten(file, where, source, depth=0):
    """Yield (key, value) of nested objects, and of JSON kept in strings; keys without the prefix of a component."""
    if not isinstance(source, dict):
        raise ValueError(f"{file}: its {where} holds no JSON object")
    for key, value in source.items():
        key = key.removeprefix("transformer.")
        if isinstance(value, str) and value.lstrip()[:1] == "{":
            try:
                value = parse_json(file, f"{where}'s {key}", value)
            except ValueError:
                if key == "lora_adapter_metadata":  # others may be words: {trigger} dances
                    raise
        if isinstance(value, dict) and depth < 4 and key not in ("alpha_pattern", "rank_pattern"):
            yield from flatten(file, where, value, depth + 1)
        else:
            yield key, value


def check_base(file, facts):
    """Raise ValueError if the file says that it is for another model."""
    for key, value in facts.base:
        names_a_kind = "." in key or key.startswith("ss_")  # base_model_name_or_path may be any path
        if not re.search(OURS, value, re.I) and (names_a_kind or re.search(OTHERS, value, re.I)):
            raise ValueError(f"{file} is a LoRA of another model: its {key} is {value[:60]!r}")


def check_depth(model, file, names):
    """Raise ValueError if both kinds of blocks are covered from the first one on, and none to the model's last.

    FLUX.1 has 19 and 38 blocks of this model's names and shapes, where the 13B has 20 and 40.
    """
    covered = {}
    for kind, depth in (("double", model.config.double_depth), ("single", model.config.single_depth)):
        numbers = {int(found[1]) for name in names if (found := re.match(rf"{kind}_blocks\.(\d+)\.", name))}
        covered[kind] = 1 < len(numbers) < depth and numbers == set(range(len(numbers))) and (len(numbers), depth)
    if all(covered.values()):
        (double, of_double), (single, of_single) = covered.values()
        raise ValueError(
            f"{file} is a LoRA of another model: it covers the first {double} of {of_double} double and the first {single} of "
            f"{of_single} single blocks (FLUX.1 has 19 and 38)"
        )
