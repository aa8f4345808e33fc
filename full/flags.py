"""Define the flags of the programs, and check their values."""

import argparse
import difflib
import importlib.util
import math
import os
import sys
import time
from pathlib import Path

import torch

import train_min
from full.fa4 import attention_kernel
from full.faults import to_launcher
from full.files import printable, read_json
from full.names import config_from_diffusers
from hunyuan_sp import CHECKPOINTING, HunyuanConfig


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Show the default of each flag, unless its help says so already or it is off by default."""

    def _get_help_string(self, action):
        said = action.default in (None, False, "", argparse.SUPPRESS) or "default" in action.help
        return action.help if said else f"{action.help} (default {action.default})"


class Parser(argparse.ArgumentParser):
    """Print one line about a wrong flag, once for all ranks of a host, and give it to torchrun as the cause."""

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, 1)
            ways = f"did you mean {near[0]}?" if near else "--help shows what there is"
            self.error(f"there is no flag {name}: {ways}")
        return parsed

    def error(self, message):
        to_launcher(message)
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(1.0)  # torchrun ends all ranks when the first one is gone
            sys.exit(2)
        self.exit(2, f"error: {printable(message)}\n")


def parser_of(doc, **groups):
    """Return the parser of a program, and the group for its own flags. doc: the program's docstring, for --help.

    groups: {title: function that adds flags}. A flag that is added twice keeps its second meaning.
    """
    parser = Parser(description=doc, formatter_class=Formatter, allow_abbrev=False, conflict_handler="resolve")
    own = parser.add_argument_group("this program")
    for title, add_flags in groups.items():
        add_flags(parser.add_argument_group(title))
    return parser, own


def add_machine_flags(parser):
    """Add the flags that every program has."""
    flag = parser.add_argument
    flag("--device", choices=("cpu", "cuda"), help="default: cuda if there is a GPU")
    flag("--timeout", type=float, default=600, help="seconds after which a rank that does not answer ends the job")
    flag("--debug", action="store_true", help="show the traceback of an error")


def add_model_flags(parser):
    """Add the flags that training, sampling and export share."""
    flag = parser.add_argument
    flag("--config", help="model preset: tiny or 13b")
    flag("--blocks", help="cut the depth of --config to D,S double and single blocks, e.g. 4,8")
    flag("--model", help="released snapshot, a folder in diffusers' layout or OWNER/NAME[@REVISION] of the hub")
    flag("--weights", help="file or folder of released weights (original, diffusers or ComfyUI naming)")
    flag("--dtype", choices=("float32", "bfloat16"), help="compute (default: bfloat16 on GPUs, float32 on CPUs)")


def add_speed_flags(parser):
    """Add the flags that training and sampling share."""
    flag = parser.add_argument
    flag("--attention", default="sdpa", help="sdpa (default), or fa4: FlashAttention-4, the extra [fast]")
    flag(
        "--memory",
        type=float,
        help="use no more than a GPU of this many GiB has, e.g. 24 on a larger one; 1 GiB is left to CUDA and NCCL",
    )
    flag("--mlp_slices", type=int, default=1, help="compute each block's MLP in this many slices of the tokens")
    flag(
        "--profile",
        action="store_true",
        help="write Chrome traces of the last step, trace-RANK.json.gz, next to the output",
    )


# FLAG-OTHER: with FLAG, the other must be given too
NEEDS = "lora_alpha-lora init_lora-lora validate-validate_every sample_prompt-validate_every image-model"
NEEDS += " negative_embeds-embeds negative_embeds-cfg negative_prompt-cfg no_buckets-videos"
# flags of which only one is used
APART = "embeds-prompt embeds-prompts embeds-score prompt-score prompts-score negative_embeds-negative_prompt videos-prompts"
APART += " data-height data-width data-frames checkpoint-config clips-score overwrite-score resume-overwrite"


def parse_flags(parser, argv=None):
    """Parse the flags. `args.given`: those that were typed. `args.changed`: those that differ from their default."""
    args = parser.parse_args(argv)
    typed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args))))
    args.given = sorted(name for name, value in vars(typed).items() if value is not None)
    args.changed = [name for name in args.given if getattr(args, name) != parser.get_default(name)]
    return args


def check_together(args, apart=""):
    """Raise ValueError for flags that are given and would not be used. apart: more pairs that exclude each other."""
    for pair in NEEDS.split():
        name, needed = pair.split("-")
        if name in args.given and needed not in args.changed:
            raise ValueError(f"--{name} goes with --{needed}")
    for pair in (APART + " " + apart).split():
        one, other = pair.split("-")
        if {one, other} <= set(args.given):
            raise ValueError(f"--{one} and --{other} can't be used together: give one of them")


def check_used(args, config, sized):
    """Raise ValueError for flags that this model does not use. sized: whether it uses a video's size."""
    unused = [] if sized else ["height", "width", "frames"]
    unused += [] if config.guidance_embed else ["guidance"]
    for name in unused:
        if name in args.given:
            kind = "embeds no guidance scale" if name == "guidance" else "makes clips of one size"
            raise ValueError(f"--{name} has no effect: this model {kind}")


def check_range(args, names, low, high=math.inf):
    """Raise ValueError for the first of these flags whose value is outside low .. high."""
    for name in names.split():
        value = getattr(args, name)
        if value is not None and not (low <= value <= high and value != math.inf):
            least = f"at least {low}{' and finite' * (value == math.inf)}"
            raise ValueError(f"--{name} {value} is not {least if high == math.inf else f'in {low} .. {high}'}")


def get_config(args):
    """Return the config of --config and --blocks, or of --model. ValueError for a config that can't be."""
    changes = {}
    if args.model and (args.config or args.blocks):
        raise ValueError("--model brings its own config: leave out --config and --blocks")
    if args.blocks:
        try:
            changes = dict(zip(("double_depth", "single_depth"), map(int, args.blocks.split(",")), strict=True))
            if min(changes.values()) < 0 or not any(changes.values()):
                raise ValueError
        except ValueError:
            raise ValueError(f"--blocks {args.blocks} is not two numbers D,S of at least one block, e.g. 4,8") from None
    if args.model:
        config = config_from_diffusers(Path(args.model) / "transformer" / "config.json")
    else:
        config = HunyuanConfig.preset(args.config, **changes)
    sp = getattr(args, "sp", None) or 1
    if sp > config.num_heads:
        raise ValueError(f"sequence_parallel_size {sp} is more than the {config.num_heads} heads")
    return config


def scheduler_shift(snapshot):
    """Return the flow shift of a snapshot's scheduler. ValueError for any schedule but `shift_sigma` over even steps."""
    file = Path(snapshot) / "scheduler/scheduler_config.json"
    switches = ("use_", "invert_sigmas", "shift_terminal", "stochastic_sampling")  # fields that mean another schedule
    try:
        config = read_json(file)
        kind, shift = config["_class_name"], float(config["shift"])
        on = [name for name, value in config.items() if name.startswith(switches) and value]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not say which schedule it is, and its shift ({error!r})") from None
    if kind != "FlowMatchEulerDiscreteScheduler" or on or not 0 < shift < math.inf:
        found = f"{kind} with a shift of {shift}{' and ' * bool(on)}{', '.join(on)}"
        raise ValueError(f"{file} is {found}: only the release's schedule is known, FlowMatchEulerDiscreteScheduler")
    return shift


def compute_dtype(args, device):
    """Return the dtype to compute in."""
    return getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))


# --------------------------------------------------------------------------------------------------------------------
# training


def parse_train(doc, argv=None, more=None):
    """Parse the flags of full.train and full.plan: those of train_min.py and more. more: a function that adds others."""
    groups = dict(training=train_min.add_flags, model=add_model_flags, speed=add_speed_flags, machine=add_machine_flags)
    parser, own = parser_of(doc, **groups)
    flag = own.add_argument
    flag("--batch", type=int, help="global batch: samples a step over all ranks (default 16; 13b: dp x accumulation)")
    flag("--lr", type=float, help="peak, then a cosine to a tenth (default 4e-3; 13b, --model: 1e-5; --lora: 1e-4)")
    flag("--shift", type=float, help="flow shift of the noise levels (default 4; 13b: 7; --model: its scheduler's)")
    flag(
        "--checkpointing",
        choices=CHECKPOINTING,
        help="checkpointing of activations (default: none for tiny, else attention)",
    )
    flag("--lora", type=int, help="train a LoRA of this rank, the weights frozen; written to --out/lora.safetensors")
    flag("--init_lora", help="a LoRA file of the same rank to start from, e.g. to continue with new data")
    flag("--lora_alpha", type=float, help="its update is alpha / rank times B A (default: the rank)")
    flag("--ema", type=float, default=0.0, help="use an average over about 1 / (1 - EMA) steps (default 0: none)")
    flag(
        "--validate_every", type=int, default=0, help="steps between validations on held-out samples (default 0: none)"
    )
    flag("--validate", type=float, help="share of the samples to hold out, at least one sample (default 0.05)")
    flag(
        "--sample_prompt",
        help="sample this prompt at each validation, from the same noise: --out/sample-STEP.mp4 or .gif",
    )
    flag(
        "--offload",
        action="append",
        choices=("weights", "activations"),
        help="keep them in the host's memory; may be given twice",
    )
    flag("--keep", type=int, default=3, help="checkpoints of this run to keep (0: all)")
    resume = dict(nargs="?", const="yes", choices=("yes", "auto"))
    flag(
        "--resume",
        **resume,
        help="continue from the newest checkpoint in --out, on any layout; auto: start anew if there is none",
    )
    flag(
        "--overwrite",
        action="store_true",
        help="start anew in an --out that has an earlier run, whose files are put aside",
    )
    flag("--tensorboard", action="store_true", help="write the figures of log.jsonl for TensorBoard too")
    flag("--deterministic", action="store_true", help="make runs repeat bit for bit, on GPUs too")
    if more:
        more(own)
    flag("--workers", type=int, help="processes per rank that load data (default: none for tiny, else one)")
    args = parse_flags(parser, argv)
    args.offload = args.offload or []
    args.config = args.config or (None if args.model else "tiny")
    big = args.config != "tiny"
    args.lr = (1e-4 if args.lora else 1e-5 if big else 4e-3) if args.lr is None else args.lr
    if args.shift is None and not args.model:
        args.shift = 7.0 if big else 4.0
    args.checkpointing = args.checkpointing or ("attention" if big else "none")
    args.workers = int(big) if args.workers is None else args.workers
    return args


def check_train(args, config):
    """Raise ValueError for flags that are out of range or do not go together."""
    check_range(args, "steps batch accumulation shard_size lora sp dp mlp_slices", 1)
    check_range(args, "memory", 2)
    check_range(args, "warmup save_every keep workers validate_every", 0)
    check_range(args, "lr clip shift lora_alpha", 1e-9)
    check_range(args, "timeout", 1e-9, 1e7)
    check_range(args, "caption_drop validate", 0.0, 1.0)
    check_range(args, "seed", 0, 2**62)
    check_range(args, "guidance", 0.0)
    check_range(args, "ema", 0.0, 0.999999)
    check_together(args)
    check_used(args, config, sized=config.out_channels != 3)
    attention_kernel(args.attention)
    if args.lora and not (args.weights or args.model or is_benchmark(args)):
        raise ValueError("--lora changes weights that are there: give --model or --weights")
    if "activations" in args.offload and args.checkpointing == "none":
        raise ValueError("--offload activations moves what --checkpointing attention or full keeps, and it is none")
    understood = config.out_channels == 3 or (args.model and not config.image_condition_type)
    if args.sample_prompt is not None and not understood:
        raise ValueError("--sample_prompt is for the toy, or for --model with a text-to-video snapshot")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise ValueError("--tensorboard needs tensorboard: pip install tensorboard")
    if args.model and not args.shift:
        scheduler_shift(args.model)


def take_from_model(args):
    """Fill in --weights and --shift from --model, where they are not given."""
    if args.model:
        args.weights = args.weights or f"{args.model}/transformer"
        args.shift = args.shift or scheduler_shift(args.model)


def default_batch(args, dp):
    return 16 if args.config == "tiny" else dp * args.accumulation


def save_is_due(step, stop, args):
    """Return whether to save after this step: every --save_every steps, at the end and at a stop. A benchmark saves only if
    --save_every is given."""
    every = args.save_every or (0 if is_benchmark(args) else args.steps)
    return bool(every) and (stop or step % every == 0 or step == args.steps)


def is_benchmark(args):
    """Return whether this run trains on noise, so that nothing of it is worth saving."""
    return not args.data and args.config != "tiny"
