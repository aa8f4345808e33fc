"""Find a model by its name on the hub, OWNER/NAME or OWNER/NAME@REVISION, and fetch it once into the standard cache.

Needs huggingface_hub (the extra [pipeline]).
"""

import importlib.util
import os
import re
from pathlib import Path

from full.files import read_json


def find_model(args, parts):
    """Replace args.model by its folder, and keep what was typed in args.named. A path that exists is used as it is.

    parts: the folders and files of the snapshot that will be used; only these are fetched. ValueError if there is no such
    model, or if its copy in the cache is incomplete.
    """
    args.named = args.model
    if args.model is None or Path(args.model).exists():
        return
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", args.model)
    if not found:
        raise ValueError(
            f"--model {args.model}: there is no such folder, and a model of the hub is OWNER/NAME[@REVISION]"
        )
    if not importlib.util.find_spec("huggingface_hub"):
        raise ValueError(f"--model {args.model}: no such folder; for the hub: pip install -e '.[pipeline]'")
    import huggingface_hub

    name, revision = found.groups()
    if os.environ.get("LOCAL_RANK", "0") != "0":  # every rank asks, but only one of them fetches
        huggingface_hub.utils.disable_progress_bars()
    patterns = [part if "." in part else f"{part}/*" for part in parts]
    try:
        rules = dict(revision=revision, allow_patterns=patterns, ignore_patterns=["*.bin", "*.pt", "*.msgpack"])
        args.model = huggingface_hub.snapshot_download(name, **rules)
    except Exception as error:  # the library has many, of the network, the hub and the disk
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        both = "there is no such folder, and no such model in the cache or on the hub"
        raise ValueError(f"--model {args.named}: {both} ({reason})") from None
    if missing := missing_files(Path(args.model), parts):
        cure = f"go online, or: hf download {name}{f' --revision {revision}' if revision else ''}"
        raise ValueError(f"--model {args.named}: its copy in the cache is incomplete, {missing[0]} is missing: {cure}")


def missing_files(folder, parts):
    """Return the files that a snapshot lacks. Offline, the library also returns a download that never finished."""
    wanted = []
    for part in parts:
        if "." in part:
            wanted += [part]
        elif part != "image_processor":
            wanted += [f"{part}/{name}" for name in NEEDED.get(part.removesuffix("_2"), [])]
            for index in sorted((folder / part).glob("*.safetensors.index.json")):
                wanted += [f"{part}/{name}" for name in sorted({*read_json(index)["weight_map"].values()})]
    kind = (
        read_json(config).get("image_condition_type")
        if (config := folder / "transformer/config.json").exists()
        else None
    )
    wanted += ["image_processor/preprocessor_config.json"] * (kind is not None and "image_processor" in parts)
    lost = [name for name in wanted if not (folder / name).exists()]
    vocabularies = [part for part in parts if part.startswith("tokenizer")]
    for part in vocabularies:
        if not any((folder / part / name).exists() for name in ("tokenizer.json", "vocab.json")):
            lost.append(f"{part}/tokenizer.json")
    weights = [part for part in parts if part.startswith(("transformer", "vae", "text_encoder")) and "." not in part]
    return lost + [f"{part}/*.safetensors" for part in weights if not whole_files(folder / part)]


def whole_files(folder):
    """Return the .safetensors of a folder; none if it has fewer than their names' -of-N, or links that lead nowhere."""
    files = [file for file in folder.glob("*.safetensors") if file.exists()]
    counts = {int(found[1]) for file in files if (found := re.search(r"-of-(\d+)\.safetensors$", file.name))}
    return files if all(len(files) >= count for count in counts) else []


NEEDED = dict(
    transformer=["config.json"],
    vae=["config.json"],
    text_encoder=["config.json"],
    tokenizer=["tokenizer_config.json"],
    scheduler=["scheduler_config.json"],
)
