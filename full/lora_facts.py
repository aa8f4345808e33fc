"""Read what a LoRA's header and the JSON files beside it say of it: alpha, rank, kind and base model, under the names that
trainers give them. Contradictions, other kinds and other base models are refused.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

# the names of facts; the short ones count at the top of a header or file, and in an object that is about a LoRA
ALPHA = "lora_alpha network_alpha ss_network_alpha linear_alpha adapter_alpha".split()
RANK = "lora_rank network_dim ss_network_dim".split()
SHORT = dict(alpha=ALPHA, r=RANK, rank=RANK, linear=RANK)
ABOUT = r"lora|network|adapter|peft"
STARTS = r"pissa|olora|corda|loftq|lora_ga"  # peft's ways to start that change the base's weights too
# what the base model is called, by kind and as a path that may be anything
BASE_KIND = ("modelspec.architecture", "ss_base_model_version")
BASE_PATH = (
    *"base base_model baseModel base_model_version base_model_name_or_path base_model_class".split(),
    *"architecture modelspec.implementation ss_sd_model_name ss_network_module".split(),
)
OURS = r"hunyuan.?video(?!.?v?1.?5|.?foley)|skyreels.?v1"
OTHERS = (
    r"(?<![a-z])(flux\w*|cogvideo\w*|(wan|ltx|qwen|sdxl|sd3|mochi|chroma|pixart|lumina|hidream)(?![a-z])|stable.?diffusion|"
    r"framepack|hunyuan.?(dit|image|3d|world|video.?(v?1.?5|foley)))"
)


class Facts(NamedTuple):
    alpha: float | None = None
    where: str = ""
    rank: int | None = None
    root: str = ""  # where it says that alpha is divided by the rank's root
    base: tuple = ()
    no_alpha: str = "no alpha"


def files_of(file):
    """Return a LoRA's file, and the JSON files beside it that say what it is."""
    sides = (Path(file).with_name(name) for name in ("adapter_config.json", "lora_config.json"))
    return [Path(file), *(side for side in sides if side.is_file())]


def stated_facts(file, header, kohya):
    """Return what the header and the JSON files beside a LoRA say of it. ValueError if they contradict each other.

    kohya: whether its tensors have the names of kohya's scripts. In other names a ss_network_alpha is what a converter has
    left, which has multiplied it in.
    """
    sources = {"header": header}
    sources |= {side.name: parse_json(file, side.name, side.read_text(errors="replace")) for side in files_of(file)[1:]}
    found, base, no_alpha = dict(alpha={}, rank={}, root={}), [], "no alpha"
    for source, content in sources.items():
        for key, value, name in flatten(file, source, content):
            where, yes = f"{source}'s {key}", str(value).lower() in ("true", "1")
            check_kind(file, where, key, value, yes)
            if key in (*BASE_KIND, *BASE_PATH) and isinstance(value, str):
                base.append((key, value))
            if key in ("use_rslora", "rslora"):
                found["root"][where] = float(yes)
            if value in (None, "None", "", "Dynamic") or isinstance(value, bool):  # "Dynamic": each layer has its own
                continue
            if key == "ss_network_alpha" and not kohya:
                no_alpha = f"the alpha of {value} in its header multiplied in already"
            elif name in ALPHA + RANK:
                fact = "alpha" if name in ALPHA else "rank"
                found[fact][where + " again" * (where in found[fact])] = number(file, where, value)
    for fact, values in found.items():
        if len(set(values.values())) > 1:
            both = " and ".join(f"{value:g} in its {where}" for where, value in values.items())
            raise ValueError(f"{file} states two values of {fact}: {both}")
    where, alpha = next(iter(found["alpha"].items()), ("", None))
    root = "".join(where for where, yes in [*found["root"].items()][:1] if yes)
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"{file} has alpha {alpha} in its {where}, which is no strength")
    if root and alpha is None:
        raise ValueError(f"{file} divides alpha by the rank's root ({root}), and does not say what alpha is")
    rank = next(iter(found["rank"].values()), None)
    if rank is not None and not (rank > 0 and rank.is_integer()):
        raise ValueError(f"{file} has rank {rank}, which is no number of rows")
    return Facts(alpha, where, rank and int(rank), root, tuple(base), no_alpha)


def check_kind(file, where, key, value, yes):
    """Raise ValueError if a fact says that this is no plain LoRA."""
    if key in ("alpha_pattern", "rank_pattern") and value:
        raise ValueError(f"{file}: its {where} is not empty, and not read")
    if key == "use_dora" and yes:
        raise ValueError(f"{file} is a DoRA, as its {where} says: only plain LoRA is read")
    if key == "peft_type" and value != "LORA":
        raise ValueError(f"{file} is of another kind: its {where} is {str(value)[:40]!r}, and only LORA is read")
    if key == "init_lora_weights" and re.search(STARTS, str(value), re.I):
        changed = "which changes the base model too: convert it to a plain LoRA, as peft's save_pretrained can"
        raise ValueError(f"{file}: its {where} is {str(value)[:40]!r}, {changed}")


def number(file, where, value):
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{file}: its {where} is {str(value)[:40]!r}, which is no number") from None


def parse_json(file, where, text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{file}: its {where} can't be read as JSON") from None


def flatten(file, source, content, inside="", depth=0):
    """Yield (key, value, key's long name) of nested objects, and of JSON in strings; keys without a component's prefix.

    Short names count at the top and in an object that is about a LoRA; kohya's statistics of a training, ss_.., hold words
    of its captions.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{file}: its {source} holds no JSON object")
    for key, value in content.items():
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "[") and not key.startswith("ss_"):
            try:
                value = parse_json(file, f"{source}'s {key}", value)
            except ValueError:
                if key == "lora_adapter_metadata":  # others may be words: {trigger} dances
                    raise
        place, _, name = key.rpartition(".") if key not in BASE_KIND + BASE_PATH else ("", "", key)
        objects = [value] if isinstance(value, dict) else value if isinstance(value, list) else []
        objects = [x for x in objects if isinstance(x, dict)] if name not in ("alpha_pattern", "rank_pattern") else []
        about = f"{inside} {place}"
        for each in objects if depth < 9 else ():
            yield from flatten(file, source, each, name, depth + 1)
        if not objects:
            short = name.lower().replace("-", "_")
            short = "lora_alpha" if short.endswith("lora_alpha") else short
            counts = short in SHORT and (re.search(ABOUT, about) or not about.strip() and short != "linear")
            yield (
                name,
                value,
                SHORT[short][0] if counts else "" if short in SHORT else short if short in ALPHA + RANK else name,
            )


def says_ours(facts):
    """Return whether it says that it is for this model."""
    return any(re.search(OURS, value, re.I) for _, value in facts.base)


def check_base(file, facts):
    """Raise ValueError if the file says that it is for another model."""
    for key, value in facts.base:
        if not re.search(OURS, value, re.I) and (key in BASE_KIND or re.search(OTHERS, value, re.I)):
            raise ValueError(f"{file} is a LoRA of another model: its {key} is {value[:60]!r}")
