"""Write weights for other programs, in bfloat16: those that training saved, or a snapshot's with LoRA files merged.

    $ python -m full.export --checkpoint out --naming diffusers --output released/
    $ python -m full.export --model SNAPSHOT --lora cat/lora.safetensors --naming diffusers --output merged/
    $ torchrun --nproc_per_node=2 -m full.export --model SNAPSHOT --checkpoint out --shard --output tuned/

With --shard the ranks share the weights. Rank 0 writes. Needs huggingface_hub, of the extra [pipeline].
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from full import faults
from full.claim import claim
from full.flags import add_machine_flags, add_model_flags, check_range, check_together, parse_flags, parser_of
from full.hub import find_model
from full.lora import lora_files
from full.model import Source, resolve
from full.names import NAMINGS
from full.screen import say
from full.weights import save_weights


def parse(argv=None):
    parser, own = parser_of(__doc__, model=add_model_flags, machine=add_machine_flags)
    flag = own.add_argument
    flag("--checkpoint", help="the --out folder of training (default: out, without --model, --weights and --config)")
    flag("--lora", action="append", help="FILE[:STRENGTH] to add to the weights; may be given several times")
    flag("--naming", choices=NAMINGS, default="original", help="naming of the tensors in the files")
    flag("--output", required=True, help="folder to write")
    flag("--overwrite", action="store_true", help="replace an export that is in --output")
    flag("--shard", action="store_true", help="FSDP2, for weights that do not fit one GPU")
    return parse_flags(parser, argv)


def check_output(args):
    """Raise ValueError if writing to --output would replace what is read, or, without --overwrite, an earlier export."""
    out = Path(args.output).resolve()
    for name in ("model", "weights", "checkpoint"):
        source = getattr(args, name)
        inside = source and Path(source).exists() and {out, *out.parents} & {Path(source).resolve()}
        if inside or (source and out in Path(source).resolve().parents):
            raise ValueError(
                f"--output {args.output} is --{name}, or lies in it or around it: export to another folder"
            )
    files = [*out.glob("diffusion_pytorch_model*"), *out.glob("config.json")] if out.is_dir() else []
    if files and not args.overwrite:
        raise ValueError(f"--output {args.output} has {files[0].name} already: --overwrite replaces it")


def export(args):
    """Build the model and write its weights. Return the ParallelManager."""
    check_range(args, "timeout", 1e-9, 1e7)
    check_together(args)
    find_model(args, ["transformer"])
    config = resolve(args)
    check_output(args)
    if not (args.weights or args.checkpoint):
        raise ValueError("nothing to export: give --checkpoint, --model or --weights")
    lora_files(args.lora)
    pm = faults.init(None, 1, args.device, args.timeout)
    pm.check_equal(vars(args), pm.world_group)
    source = Source(pm, args, config)
    pm.check_equal(dict(config=asdict(source.config), files=source.facts()), pm.world_group)
    claim(args.output)
    model = source.build_model(args.shard)
    save_weights(model, args.output, args.naming, getattr(torch, args.dtype or "bfloat16"))
    if pm.is_main:
        say(f"wrote {args.output} in {args.naming} naming")
    return pm


if __name__ == "__main__":
    args = parse()
    faults.exit_after(partial(export, args), args.output, args.debug)
