"""Train HunyuanVideo's DiT under data × sequence parallelism, the whole story top to bottom.

    $ torchrun --nproc_per_node=2 train_min.py                  # a tiny model learns moving shapes, minutes on a CPU
    $ torchrun --nproc_per_node=6 train_min.py --sp 3           # 2 data-parallel groups of 3 sequence-parallel ranks
    $ torchrun --nproc_per_node=4 train_min.py --config 13b --sp 4 --height 720 --width 1280 --frames 49 --steps 5
    $ torchrun --nproc_per_node=8 train_min.py --config 13b --sp 4 --data latents/ --weights transformer/ --resume
    $ torchrun --nproc_per_node=1 train_min.py --model SNAPSHOT --data latents/ --lora 32 --validate_every 100 --out cat

Plain `python train_min.py` runs the same lines as a world of one. The loss curve is the same for every (dp, sp).
In this order: flags, the loop, what it builds, the loss, data, the screen, signals.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import resource
import signal
import sys
import time
import zlib
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from comm import Checkpoints, ParallelManager, failed_ranks, fingerprint, run, split_sequence
from hunyuan_sp import (
    CHECKPOINTING,
    HunyuanConfig,
    HunyuanVideo,
    add_lora,
    config_from_diffusers,
    forward_flops,
    guidance_input,
    init_weights,
    latent_shape,
    load_weights,
    open_safetensors,
    patchify,
    read_text,
    save_lora,
    shapes_in,
    shift_sigma,
    text_fits,
    text_lengths,
    weight_files,
    with_image,
)
from sampler import DPSPBatchSampler, seeded


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = p.add_argument
    flag("--config", help="model preset: tiny (default) or 13b")
    flag("--sp", "--sequence_parallel_size", type=int, default=1, help="ranks that share a sample (default 1)")
    flag("--dp", "--data_parallel_size", type=int, help="data-parallel groups (default: world size / sp)")
    flag("--shard_size", type=int, help="HSDP: shard weights over so many ranks, replicate beyond (default: all)")
    flag("--data", help="folder with one .safetensors a sample (default: moving shapes; 13b: noise, for benchmarks)")
    flag("--steps", type=int, default=900, help="optimizer steps in all, those before a resume included")
    flag("--batch", type=int, help="global batch: samples a step over all ranks (default 16; 13b: dp x accumulation)")
    flag("--accumulation", type=int, default=1, help="micro-batches a step")
    flag("--lr", type=float, help="peak, then a cosine to a tenth (default 2e-3; 13b, --model: 1e-5; --lora: 1e-4)")
    flag("--warmup", type=int, default=50, help="steps of linear warm-up")
    flag("--clip", type=float, default=1.0, help="global gradient norm")
    flag("--shift", type=float, help="flow shift of the noise levels (default 4; 13b: 7; --model: its scheduler's)")
    flag("--guidance", type=float, default=1.0, help="guidance scale fed to models that embed it")
    flag("--caption_drop", type=float, default=0.1, help="chance of training a sample without its text")
    flag("--lora", type=int, help="train a LoRA of this rank, the weights frozen; written to --out/lora.safetensors")
    flag("--lora_alpha", type=float, help="its update is alpha / rank times B A (default: the rank)")
    flag("--ema", type=float, default=0.0, help="use an average over some 1 / (1 - this) steps (default 0: none)")
    flag("--validate_every", type=int, default=0, help="steps between losses on samples held out (default 0: none)")
    flag("--validate", type=float, help="share of the samples that is held out then, at least one (default 0.05)")
    flag("--sample_prompt", help="a clip of it at each validation, from the same noise: --out/sample-STEP.mp4 or .gif")
    flag("--offload", action="append", choices=("weights", "activations"), help="to the host's memory; or twice, both")
    flag("--checkpointing", choices=CHECKPOINTING, help="activations (default: none for tiny, attention else)")
    flag("--seed", type=int, default=0, help="of weights, order, noise and caption drop")
    flag("--out", default="out", help="folder of checkpoints and log.jsonl")
    flag("--save_every", type=int, help="steps between checkpoints (default: only at the end; noise: none)")
    flag("--keep", type=int, default=3, help="checkpoints of this run that stay (0: all)")
    resume = dict(nargs="?", const="yes", choices=("yes", "auto"))
    flag("--resume", **resume, help="go on from the newest checkpoint in --out, on any layout; auto: or start anew")
    flag("--tensorboard", action="store_true", help="the figures of log.jsonl for TensorBoard too, if it is installed")
    flag("--plan", action="store_true", help="print the memory that --dp x --sp GPUs would need, and do nothing")
    flag("--deterministic", action="store_true", help="the same again bit for bit, on GPUs too")
    flag("--workers", type=int, help="processes that load data, for each rank (default: none for tiny, one else)")
    add_common_flags(p)
    args = p.parse_args(argv)
    args.offload = args.offload or []
    args.config = args.config or (None if args.model else "tiny")
    big = args.config != "tiny"
    args.lr = (1e-4 if args.lora else 1e-5 if big else 2e-3) if args.lr is None else args.lr
    if args.shift is None and not args.model:
        args.shift = 7.0 if big else 4.0
    args.checkpointing = args.checkpointing or ("attention" if big else "none")
    args.workers = int(big) if args.workers is None else args.workers
    return args


def add_common_flags(p):
    """What training and sampling have in common."""
    flag = p.add_argument
    flag("--blocks", help="cut the depth of --config to D,S double and single blocks, e.g. 4,8")
    flag("--model", help="folder of a released snapshot, diffusers layout: its config and weights; sampling: all of it")
    flag("--weights", help="file or folder of released weights (original, diffusers or ComfyUI naming)")
    flag("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    flag("--dtype", choices=("float32", "bfloat16"), help="compute (default: bfloat16 on GPUs, float32 on CPUs)")
    flag("--attention", default="sdpa", help="sdpa (default), or fa4: FlashAttention-4, the extra [fast]")
    flag("--compile", action="store_true", help="torch.compile both sides of each block's attention")
    flag(
        "--height", type=int, default=256, help="of the video, for models over VAE latents (sampling with --model: 720)"
    )
    flag("--width", type=int, default=256, help="of the video (sampling with --model: 1280)")
    flag("--frames", type=int, default=17, help="of the video, 4k+1 (sampling with --model: 129)")
    flag("--timeout", type=float, default=600, help="seconds until a rank that does not answer ends the job")
    flag("--profile", action="store_true", help="Chrome traces of the last step, trace-RANK.json.gz, by the output")
    flag("--debug", action="store_true", help="show the traceback of an error")


MAX_SKIPPED = 10  # steps in a row without finite gradients that end a run
CHECK_EVERY = 100  # steps between checks that sp ranks share their samples


# --------------------------------------------------------------------------------------------------------------------
# the story


def train(args):
    """Build everything, take the steps, save. Gives back the ParallelManager."""
    config = get_config(args)
    check_args(args, config)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product on a GPU
        torch.use_deterministic_algorithms(True)
    data, held = hold_out(build_data(config, args), args)
    weights = fingerprint(weight_files(args.weights)) if args.weights else ""

    # who am I; which samples are mine; where did we stop
    pm = ParallelManager(args.dp, args.sp, args.device, args.timeout)
    facts = dict(torch=torch.__version__, device_type=pm.device.type, data=data.fingerprint(), weight_files=weights)
    pm.check_equal(vars(args) | facts)
    signals = catch_signals()
    checkpoints = Checkpoints(pm, args.out)
    checkpoints.claim()
    path, state = find_start(
        checkpoints, args
    )  # state: the checkpoint's manifest, of which a new run has the tag alone
    args.batch = args.batch or state.get("batch") or default_batch(args, pm.dp_size)
    kinds = dict(shapes=data.shapes, names=data.names)  # a step takes samples of one shape
    sampler = DPSPBatchSampler(len(data), args.batch, pm.dp_rank, pm.dp_size, args.accumulation, args.seed, **kinds)
    trained = what_is_trained(args, weights, held)
    if path:
        check_same(config, trained, state, path)
        sampler.load_state_dict(state["sampler"])
        tell_changes(pm, args, state)
    preview = build_preview(config, pm, args, data)  # its text encoders are gone before the model comes
    model, optimizer, average = build_model(config, pm, args, checkpoints, path)
    stream = batches(data, sampler, pm, args)
    start = step = saved = state.get("step", 0)
    save_every, skipped = args.save_every or (0 if is_benchmark(args) else args.steps), 0  # steps skipped in a row
    traces = f"{args.out}/trace" if args.profile else None
    clock = Clock(pm, args.steps - start, traces, profiled=args.profile or is_benchmark(args))
    progress = Progress(pm, model, data, args, start)
    rules = dict(checkpointing=args.checkpointing, offload="activations" in args.offload)

    stop = pm.sum(float(signals["stop"])).item()  # while all that was built
    while step < args.steps and not stop:
        clock.start()
        micro_batches = [next(stream) for _ in range(sampler.micro_batches)]
        if step - start < 3 or step % CHECK_EVERY == 0:
            check_samples(pm, micro_batches, step)
        # the loss is a mean over the tokens of all dp ranks and micro-batches, not a mean of means
        count = pm.sum(sum(count_tokens(b, config) for b in micro_batches), pm.dp_group).item()
        loss = torch.zeros((), device=pm.device)
        for n, batch in enumerate(micro_batches):
            local = flow_loss(model, to_device(batch, pm.device), args.guidance, pm.sp_group, **rules) / count
            # the gradient rule: the sum over ranks of these is the mean over all tokens of the step
            pm.backward(model, local, last=n == len(micro_batches) - 1)
            loss += local.detach()
        norm = pm.clip_grad_norm(model, args.clip)

        # one sum says how all ranks fared, and what they were asked by signals
        flags = torch.tensor([signals["save"], signals["stop"], checkpoints.ready()]).to(loss)
        loss, save, stop, ready = pm.sum(torch.cat((loss[None], flags))).tolist()
        finite, lr = math.isfinite(loss) and math.isfinite(norm), learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        pm.step(optimizer, skip=not finite)  # norm and loss are sums over all ranks: all skip, or none
        average.update(skip=not finite)
        sampler.advance()
        step += 1
        flops = pm.sum(sum(batch_flops(config, b, frozen=args.lora) for b in micro_batches), pm.dp_group).item()
        clock.stop(count, flops)
        more = {} if finite else dict(not_finite=name_odd_samples(pm, micro_batches, data))
        if held and not stop and (step % args.validate_every == 0 or step == args.steps):
            with average.used():
                more |= dict(validation_loss=validate(model, held, pm, args))
                if preview:
                    preview.write(model, f"{args.out}/sample-{step}")
            stop = pm.sum(float(signals["stop"])).item()  # that took a while
        progress.step(step, loss, norm, lr, clock, skipped=not finite, more=more)

        skipped = 0 if finite else skipped + 1
        if skipped >= MAX_SKIPPED:
            checkpoints.finish()
            raise ValueError(
                f"{skipped} steps in a row, the last one {step}, had no finite loss and gradient (loss {loss}, norm {norm}): "
                f"the last checkpoint is {f'{args.out}/step-{saved}' if saved else 'none'}"
            )
        if ready == pm.world_size:
            checkpoints.finish()
        signals["save"] &= not save  # this save answers all that have asked by now
        if save or save_every and (stop or step % save_every == 0 or step == args.steps):
            extra = dict(config=asdict(config), args=vars(args), layout=[pm.dp_size, pm.sp_size], batch=args.batch)
            extra |= trained | dict(sampler=sampler.state_dict())
            rest = dict(more=average.values, copy="weights" not in args.offload)
            checkpoints.save(step, model, optimizer, extra, state["tag"], args.keep, **rest)
            if args.lora:
                with average.used():
                    pm.together(partial(save_lora, model, f"{args.out}/lora.safetensors"))
            saved = step
    checkpoints.finish()
    if step >= args.steps:  # the next run under the same rendezvous id is another one
        pm.on_main(lambda: replace_file(Path(args.out) / "run.json", json.dumps(dict(run=state["tag"], done=True))))
    progress.end(clock, step, saved)
    return pm


# --------------------------------------------------------------------------------------------------------------------
# what the loop builds


def check_args(args, config):
    """ValueError for flags that are out of range, or do not go together; --model's weights and shift where none are given."""
    check_flags(args, "steps batch accumulation shard_size lora", 1)
    check_flags(args, "warmup save_every keep workers validate_every", 0)
    check_flags(args, "lr clip shift lora_alpha", 1e-9)
    check_flags(args, "timeout", 1e-9, 1e7)
    check_flags(args, "caption_drop validate", 0.0, 1.0)
    check_flags(args, "seed", 0, 2**62)
    check_flags(args, "guidance", 0.0)
    check_flags(args, "ema", 0.0, 0.999999)
    if args.model and not (args.data or args.plan):
        raise ValueError("--model needs --data, a folder that infer_min.py --encode has written")
    if args.lora and not (args.weights or args.model or is_benchmark(args)):
        raise ValueError("--lora changes weights that are there: give --model or --weights")
    if args.lora_alpha and not args.lora:
        raise ValueError("--lora_alpha goes with --lora")
    if "activations" in args.offload and args.checkpointing == "none":
        raise ValueError("--offload activations moves what --checkpointing attention or full keeps, and it is none")
    for name in ("validate", "sample_prompt"):
        if getattr(args, name) is not None and not args.validate_every:
            raise ValueError(f"--{name} goes with --validate_every")
    understood = config.out_channels == 3 or (args.model and not config.image_condition_type)
    if args.sample_prompt is not None and not understood:
        raise ValueError("--sample_prompt is for the toy, or for --model with a text-to-video snapshot")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise ValueError("--tensorboard needs tensorboard: pip install tensorboard")
    if args.model:
        args.weights = args.weights or f"{args.model}/transformer"
        args.shift = args.shift or scheduler_shift(args.model)


def default_batch(args, dp):
    return 16 if args.config == "tiny" else dp * args.accumulation


def is_benchmark(args):
    """Whether it trains on noise: nothing of it is worth saving."""
    return not args.data and args.config != "tiny"


def check_flags(args, names, low, high=math.inf):
    """ValueError for the first of the flags whose value is outside low .. high."""
    for name in names.split():
        value = getattr(args, name)
        if value is not None and not (low <= value <= high and value != math.inf):
            least = f"at least {low}{' and finite' * (value == math.inf)}"
            raise ValueError(f"--{name} {value} is not {least if high == math.inf else f'in {low} .. {high}'}")


def get_config(args):
    """--config and --blocks, or --model's own: ValueError for what cannot be."""
    changes = {}
    if args.model and (args.config or args.blocks):
        raise ValueError("--model brings its own config: leave out --config and --blocks")
    if args.blocks:
        try:
            changes = dict(zip(("double_depth", "single_depth"), map(int, args.blocks.split(",")), strict=True))
            if min(changes.values()) < 0:
                raise ValueError
        except ValueError:
            raise ValueError(f"--blocks {args.blocks} is not two numbers D,S, e.g. 4,8") from None
    if args.model:
        config = config_from_diffusers(Path(args.model) / "transformer" / "config.json")
    else:
        config = HunyuanConfig.preset(args.config, **changes)
    if (args.sp or 1) > config.num_heads:
        raise ValueError(f"sequence_parallel_size {args.sp} is more than the {config.num_heads} heads")
    return config


def scheduler_shift(snapshot):
    """The flow shift of a snapshot's scheduler. ValueError for one with other rules than `shift_sigma` over even steps."""
    file = Path(snapshot) / "scheduler/scheduler_config.json"
    switches = ("use_", "invert_sigmas", "shift_terminal", "stochastic_sampling")  # of other schedules
    try:
        config = json.loads(file.read_text())
        kind, shift = config["_class_name"], float(config["shift"])
        on = [name for name, value in config.items() if name.startswith(switches) and value]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not say which schedule it is, and its shift ({error!r})") from None
    if kind != "FlowMatchEulerDiscreteScheduler" or on or not 0 < shift < math.inf:
        told = f"{kind} with a shift of {shift}{' and ' * bool(on)}{', '.join(on)}"
        raise ValueError(f"{file} is {told}: only the release's schedule is known, FlowMatchEulerDiscreteScheduler")
    return shift


def compute_dtype(args, device):
    return getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))


def build_model(config, pm, args, checkpoints, path):
    """On the meta device first: no rank ever holds all weights. path: the checkpoint that they come from, or None."""
    with torch.device("meta"):
        model = HunyuanVideo(config, args.attention)
        dtype = compute_dtype(args, pm.device)
        if args.lora:  # beside frozen weights in the dtype that is computed in
            add_lora(model.to(dtype), args.lora, args.lora_alpha)
    half = None if dtype == torch.float32 else dtype
    pm.shard(model, model.blocks, half, args.shard_size, offload="weights" in args.offload)
    if "weights" in args.offload and pm.device.type == "cuda":  # AdamW then runs on CPUs, and torchrun gives a rank one
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    # a checkpoint, loaded last, holds all that is trained: of a LoRA not the frozen weights
    if args.lora or not path:
        if args.weights:
            load_weights(model, args.weights)
        init_weights(model, args.seed, "lora_" if args.weights else "", pm.device)
    if args.compile:
        model.compile_blocks()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr, (0.9, 0.99), weight_decay=0.01, fused=True)
    average = Average(model, args.ema)
    if path:
        checkpoints.load(path, model, optimizer, average.values)
    return model, optimizer, average


def build_preview(config, pm, args, data):
    """What makes the clips of --sample_prompt, of the largest sample's shape; None without it."""
    if args.sample_prompt is None:
        return None
    from infer_min import Preview  # it imports this file

    shape = max(data.shapes, key=math.prod) if data.shapes else data[0][1].shape
    return Preview(pm, config, shape, args.sample_prompt, args.model)


class Average:
    """An exponential moving average of what is trained, sharded as that is. Decay 0: there is none, and nothing to do."""

    def __init__(self, model, decay):
        self.decay, trained = decay, ((n, p) for n, p in model.named_parameters() if decay and p.requires_grad)
        self.params = {name: param.detach() for name, param in trained}
        self.values = {name: param.clone() for name, param in self.params.items()}

    def update(self, skip=False):
        """After an optimizer step that was taken."""
        if self.params and not skip:
            values, params = ([x.to_local() for x in tensors.values()] for tensors in (self.values, self.params))
            torch._foreach_lerp_(values, params, 1 - self.decay)

    @contextlib.contextmanager
    def used(self):
        """The model has the average's values inside, its own afterwards."""
        self._swap()
        yield
        self._swap()

    def _swap(self):
        for name, param in self.params.items():
            own = param.clone()
            param.copy_(self.values[name])
            self.values[name].copy_(own)


def plan(config, args):
    """{part: GiB} that a GPU needs for these flags in bf16 with --compile, and of the host's memory each rank: to 10 % of
    what was measured.

    In multiples of one activation, 2 bytes x hidden size for each of a rank's tokens: what a block keeps until its backward,
    and what the backward of one block works with. The keys of the first dict are --checkpointing's.
    """
    blocks, working = dict(none=(18, 24), attention=(2, 22), full=(1, 30))[args.checkpointing]
    kept = blocks - ("activations" in args.offload)
    with torch.device("meta"):
        model = HunyuanVideo(config)
        if args.lora:
            add_lora(model, args.lora, args.lora_alpha)
    dp, shard = args.dp or 1, args.shard_size or (args.dp or 1) * args.sp
    params = [(param.numel(), param.requires_grad) for param in model.parameters()]
    trained, frozen = (sum(n for n, trains in params if trains == kind) for kind in (True, False))
    largest = max(([*block.parameters()] for block in model.blocks), key=lambda own: sum(p.numel() for p in own))
    gathered = sum(2 * 2 * p.numel() + 4 * p.numel() * p.requires_grad for p in largest)  # the next block too

    data = build_data(config, args)
    largest_sample = max(data.shapes or [data[0][1].shape], key=math.prod)
    video, batch = math.prod(largest_sample[1:]) // math.prod(config.patch_size), args.batch or default_batch(args, dp)
    tokens = -(-batch // (dp * args.accumulation)) * -(-(video + 60) // args.sp)
    activation = 2 * config.hidden_size * tokens
    averaged = 4 * trained / shard * (args.ema > 0)
    told = dict(weights=(4 * trained + 2 * frozen) / shard + averaged, optimizer=8 * trained / shard)
    told |= dict(gradients=4 * trained / (shard if args.accumulation == 1 else 1))
    told |= dict(kept=len(model.blocks) * (kept * activation + 4 * config.num_heads * tokens))
    told |= dict(working=working * activation + gathered)
    # a save copies what is trained to the host, and writes beside training
    told["host"] = 0 if is_benchmark(args) else 12 * trained / shard + averaged
    if "weights" in args.offload:  # a trained one with its gradient, and two averages that are not pinned
        told |= dict(weights=0, optimizer=0, gradients=0, host=averaged)  # a save makes no copy
        for n, trains in params:
            told["host"] += 2 * pinned(4 * n / shard) + 8 * n / shard if trains else pinned(2 * n / shard)
    if "activations" in args.offload:
        told["host"] += len(model.blocks) * pinned(activation)
    # the kept activations go as the gradients come
    told["all"] = told["weights"] + told["optimizer"] + max(told["kept"], told["gradients"]) + told["working"]
    return {name: round(value / 2**30, 1) for name, value in told.items()}


def pinned(size):
    """What so many bytes of pinned memory take: torch asks for powers of two."""
    return 2 ** math.ceil(math.log2(size))


def learning_rate(step, args):
    """Linear warm-up, then a cosine to a tenth at the last step."""
    done = min(1.0, max(0, step - args.warmup) / max(1, args.steps - args.warmup))
    return args.lr * min(1.0, (step + 1) / max(1, args.warmup)) * (0.55 + 0.45 * math.cos(math.pi * done))


def find_start(checkpoints, args):
    """(path, manifest) of the checkpoint to go on from; (None, {"tag": ..}) for a new run. Equal on all ranks.

    run.json names the run under way in --out, and its launch: a job that torchrun restarts goes on with its own newest
    checkpoint, never with one that an older run left in the same folder. A run's name is the tag of its checkpoints.
    """
    file, pm = Path(args.out) / "run.json", checkpoints.manager
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    launch = f"process {os.getppid()}" if run_id == "none" else run_id
    # an agent that was replaced, with the same rendezvous id, counts from 0 again
    restarted = run_id != "none" or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0

    def name_under_way():
        try:
            last = json.loads(file.read_text()) if restarted else {}
            return str(last["run"]) if last.get("launch") == launch and not last.get("done") else None
        except (OSError, ValueError, KeyError, AttributeError, RecursionError):
            return None  # none, or none that can be read

    name = pm.on_main(name_under_way)
    path, state = None, dict(tag=name or pm.on_main(lambda: f"{time.time():.6f}"))
    try:
        if name or args.resume:
            path, state = checkpoints.find(name)
    except FileNotFoundError as error:  # fine where there was nothing to go on from
        if "no whole checkpoint" in str(error) or not name and args.resume != "auto":
            raise
    pm.on_main(lambda: replace_file(file, json.dumps(dict(run=state["tag"], launch=launch))))
    return path, state


def what_is_trained(args, weights, held):
    """Beside the config. The frozen weights belong to a LoRA's checkpoint, which does not hold them."""
    lora = [args.lora, args.lora_alpha or args.lora, weights] if args.lora else None
    return dict(lora=lora, ema=args.ema > 0, held_out=len(held or ()))


def check_same(config, trained, state, path):
    """ValueError with what differs from what a checkpoint was trained with."""
    new = dict(image_condition_type=None, lora=None, ema=False, held_out=trained["held_out"])  # an older checkpoint's
    was = new | state["config"] | {name: state[name] for name in trained if name in state}
    now = json.loads(json.dumps(asdict(config) | trained))
    if wrong := [name for name in sorted({*was, *now}) if was.get(name) != now.get(name)]:
        told = "; ".join(f"{name}: {was.get(name)} there, {now.get(name)} here" for name in wrong)
        raise ValueError(f"{path} is of another model: {told}")


def tell_changes(pm, args, state):
    """What a resumed run does otherwise than before. Layout and length may change; what else does is said."""
    names = "batch lr warmup clip shift guidance caption_drop ema seed dtype data weights".split()
    was = state["args"] | dict(batch=state.get("batch", args.batch))
    changed = [f"--{n} {getattr(args, n)} (was {was[n]})" for n in names if n in was and was[n] != getattr(args, n)]
    if changed and pm.is_main:
        print(f"other than before: {', '.join(changed)}", flush=True)


def check_samples(pm, micro_batches, step):
    """The classic silent bug: sp ranks that work on different samples, or on one that each has augmented for itself."""

    def sums(batch):
        return {name: zlib.crc32(x.contiguous().view(torch.uint8).numpy()) for name, x in batch.items()}

    contents = [sums(batch) for batch in micro_batches]
    samples = [batch["samples"].tolist() for batch in micro_batches]
    shapes = [[list(batch[name].shape) for name in ("latents", "text")] for batch in micro_batches]
    pm.check_equal(dict(step=step, samples=samples, shapes=shapes, contents=contents), pm.sp_group)


def name_odd_samples(pm, micro_batches, data):
    """The names of a step's samples that hold a value that is not finite, on any rank."""

    def odd():
        parts = ("samples", "target", "text", "pooled", "image")
        rows = [row for b in micro_batches for row in zip(*(b[name] for name in parts if name in b))]
        return [data.name(int(i)) for i, *parts in rows if not all(part.isfinite().all() for part in parts)]

    return sorted({name for names in pm.together(odd) for name in names})


# --------------------------------------------------------------------------------------------------------------------
# rectified flow: x = (1 - sigma) clip + sigma noise, and the model learns the velocity noise - clip


def flow_loss(model, batch, guidance, group, checkpointing="none", offload=False):
    """The sum over this rank's tokens of their mean squared error, to be divided by the global token count."""
    config, kind = model.config, model.config.image_condition_type
    inputs = {name: batch[name] for name in ("latents", "timestep", "text", "pooled")}
    inputs["latents"] = with_image(batch["latents"], batch.get("image"), kind)
    inputs["text_mask"] = text_lengths(batch["text_mask"])  # FSDP2 would take the mask to the GPU, to be fetched back
    scale = guidance_input(guidance, len(batch["latents"]), batch["latents"].device) if config.guidance_embed else None
    rules = dict(group=group, gather=False, checkpointing=checkpointing, offload=offload)
    velocity = model(**inputs, guidance=scale, **rules)
    target = patchify(batch["target"], config.patch_size)
    mine = split_sequence(target, group)
    error = (velocity.to(mine.dtype) - mine).square().mean(2) * batch["weight"][:, None]
    if kind == "token_replace":  # the image is given, not learned: its tokens are the first
        place = split_sequence(torch.arange(target.shape[1], device=error.device), group, 0)
        error = error * (place >= target.shape[1] // batch["target"].shape[2])
    return error.sum()


def count_tokens(batch, config):
    """Video tokens that carry weight: what the mean is taken over."""
    frames, height, width = batch["target"].shape[2:]
    frames -= config.image_condition_type == "token_replace"
    return batch["weight"].sum().item() * frames * height * width / math.prod(config.patch_size)


def batch_flops(config, batch, frozen):
    """Of the samples that carry weight, forward and backward; frozen weights have no gradients of their own."""
    video = math.prod(batch["target"].shape[2:]) // math.prod(config.patch_size)
    text = batch["text_mask"].sum(1).float().mean().item()
    return batch["weight"].sum().item() * forward_flops(config, video, text, 2 if frozen else 3, 3)


def collate(items, seed, shift, caption_drop, fixed_sigma=None):
    """Items -> one batch, noise included: it is a function of (seed, epoch, sample), so resume is exact on any layout.

    fixed_sigma: this noise level for all, else each its own.
    """
    rows, images = [], []
    for index, clip, text, pooled, *more in items:
        generator = seeded("flow", seed, getattr(index, "epoch", 0), int(index))
        noise = torch.randn(clip.shape, generator=generator)
        sigma = shift_sigma(torch.randn((), generator=generator).sigmoid(), shift)
        sigma = sigma if fixed_sigma is None else torch.tensor(fixed_sigma)
        image, empty = more or (None, None)
        if torch.rand((), generator=generator) < caption_drop:
            text, pooled = empty or (torch.zeros_like(text[:1]), torch.zeros_like(pooled))
        images += [image] * (image is not None)
        rows.append(((1 - sigma) * clip + sigma * noise, noise - clip, 1000 * sigma, text, pooled))
    noisy, target, timestep, texts, pooled = zip(*rows)
    mask = torch.arange(max(map(len, texts))) < torch.tensor([len(t) for t in texts])[:, None]
    batch = dict(image=torch.stack(images)) if images else {}
    return batch | dict(
        latents=torch.stack(noisy),
        target=torch.stack(target),
        timestep=torch.stack(timestep),
        text=torch.nn.utils.rnn.pad_sequence(texts, batch_first=True),
        text_mask=mask,
        pooled=torch.stack(pooled),
        weight=torch.tensor([getattr(item[0], "weight", 1.0) for item in items]),
        samples=torch.tensor([int(item[0]) for item in items]),
    )


def to_device(batch, device):
    """All but the text mask, which is read on the CPU."""
    return {k: v if k == "text_mask" else v.to(device, non_blocking=True) for k, v in batch.items()}


@torch.no_grad()
def validate(model, held, pm, args):
    """The mean flow loss over the samples held out, each at four noise levels with the same noise every time: far quieter
    than the training loss, and the same on any layout. A batch is as large as a micro-batch of training."""
    total, count = torch.zeros((), device=pm.device), 0.0
    size = pm.dp_size * -(-args.batch // (pm.dp_size * args.accumulation))
    for sigma in (0.2, 0.4, 0.6, 0.8):
        sampler = DPSPBatchSampler(len(held), size, pm.dp_rank, pm.dp_size, shapes=held.shapes, names=held.names)
        rules = partial(collate, seed=0, shift=1.0, caption_drop=0.0, fixed_sigma=sigma)
        for batch in DataLoader(held, batch_sampler=sampler, collate_fn=rules):
            batch = to_device(batch, pm.device)
            total += flow_loss(model, batch, args.guidance, pm.sp_group)
            count += count_tokens(batch, model.config)
    return (pm.sum(total.double()) / pm.sum(count, pm.dp_group)).item()


def batches(data, sampler, pm, args):
    """Batches without end; every pass over the loader is what is left of the sampler's epoch."""
    rules = dict(seed=args.seed, shift=args.shift, caption_drop=args.caption_drop)
    loader = DataLoader(
        data,
        batch_sampler=sampler,
        collate_fn=partial(collate, **rules),
        num_workers=args.workers,
        pin_memory=pm.device.type == "cuda",
        worker_init_fn=ignore_signals,
        timeout=args.timeout if args.workers else 0,
    )
    while True:
        yield from loader


# --------------------------------------------------------------------------------------------------------------------
# data: item i is (i, latents [C, T, h, w], text [L, text_dim], pooled [pooled_dim]); of a folder also the image's latents
# [C, 1, h, w] or None, and the (text, pooled) that a dropped caption becomes, or None


def hold_out(data, args):
    """(what is trained on, what is held out or None): the same samples are held out on any layout and after a resume."""
    if not args.validate_every:
        return data, None
    share = 0.05 if args.validate is None else args.validate
    held = max(1, round(share * len(data)))
    if held >= len(data):
        raise ValueError(f"--validate {share} of {len(data)} samples leaves none to train on")
    order = sorted(range(len(data)), key=lambda i: (zlib.crc32(Path(data.name(i)).name.encode()), i))
    return Part(data, sorted(order[held:])), Part(data, sorted(order[:held]))


class Part:
    """Some of the samples of a data set."""

    def __init__(self, data, indices):
        self.data, self.indices = data, indices
        self.shapes, self.names = ([x[i] for i in indices] if x else None for x in (data.shapes, data.names))

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        return i, *self.data[self.indices[i]][1:]

    def name(self, i):
        return self.data.name(self.indices[i])

    def fingerprint(self):
        return self.data.fingerprint()


def build_data(config, args):
    if args.data:
        return Folder(config, args.data)
    if args.config == "tiny":
        return Shapes(config)
    return RandomLatents(config, latent_shape(config, args.height, args.width, args.frames))


class Folder:
    """One .safetensors a sample: latents [C, T, h, w] (already times the VAE's 0.476986), text [L, 4096], pooled [768].

    For image-to-video models also image [C, 1, h, w], and empty_text and empty_pooled, what a dropped caption becomes; for
    others that is in empty_prompt.safetensors, where there is one, else a token of zeros.
    """

    EMPTY = "empty_prompt.safetensors"

    def __init__(self, config, folder):
        self.with_image, self.empty = config.image_condition_type is not None, None
        self.files = [file for file in sorted(Path(folder).glob("*.safetensors")) if not file.name.startswith(".")]
        if not self.with_image and Path(folder, self.EMPTY) in self.files:
            self.files.remove(Path(folder, self.EMPTY))
            self.empty = read_text(Path(folder, self.EMPTY), config)
        if not self.files:
            raise FileNotFoundError(f"no data: there is no .safetensors file in {folder}")
        self.shapes, self.names = [self._shape(config, file) for file in self.files], [file.name for file in self.files]

    def _shape(self, config, file):
        """(C, T, h, w) of a file's latents. ValueError where it does not hold what it should, and that alone."""
        allowed = ["latents", "text", "pooled", *("image empty_text empty_pooled".split() if self.with_image else ())]
        if not file.is_file():
            raise ValueError(f"{file} is not a file")
        with open_safetensors(file) as handle:
            shapes = shapes_in(handle)
        if more := sorted(set(shapes) - set(allowed)):
            told = f"{file} holds {', '.join(more)} beside {', '.join(allowed)}, which would be ignored"
            raise ValueError(f"{told}: text has valid tokens only, and needs no mask")
        channels, latents = config.out_channels, shapes.get("latents", [])
        whole = len(latents) == 4 and latents[0] == channels
        if not (whole and text_fits(shapes, config)) or any(
            n < 1 or n % p for n, p in zip(latents[1:], config.patch_size)
        ):
            texts = f"text [L, {config.text_dim}] and pooled [{config.pooled_dim}]"
            raise ValueError(f"{file} holds {shapes}, expected latents [{channels}, T, h, w] with h, w even, {texts}")
        if self.with_image:
            empty = {name: shapes.get(f"empty_{name}", []) for name in ("text", "pooled")}
            if shapes.get("image") != [channels, 1, *latents[2:]] or not text_fits(empty, config):
                told = f"{file} holds {shapes}: an image-to-video model needs image [{channels}, 1, h, w], empty_text"
                raise ValueError(f"{told} and empty_pooled too, as infer_min.py --encode writes them")
        if config.image_condition_type == "token_replace" and latents[1] == 1:
            raise ValueError(f"{file} is one frame, which a token_replace model is given: it learns those after it")
        return tuple(latents)

    def __len__(self):
        return len(self.files)

    def name(self, i):
        return str(self.files[i])

    def fingerprint(self):
        """What must be equal on all ranks."""
        shapes = zlib.crc32(repr(self.shapes).encode())
        return f"{len(self.files)} files, {fingerprint(self.files)}, {shapes:08x}"

    def __getitem__(self, i):
        with open_safetensors(self.files[i]) as handle:
            sample = {name: handle.get_tensor(name).float() for name in handle.keys()}
        empty = (sample["empty_text"], sample["empty_pooled"]) if self.with_image else self.empty
        return i, sample["latents"], sample["text"], sample["pooled"], sample.get("image"), empty


class Made:
    """Samples that are made, not read: equal everywhere."""

    shapes = names = None

    def __len__(self):
        return self.length

    def name(self, i):
        return f"sample {i}"

    def fingerprint(self):
        return f"{self.length} samples"


class RandomLatents(Made):
    """Noise of the right shape, and texts of 60 tokens: what a benchmark needs."""

    def __init__(self, config, shape, length=4096):
        self.config, self.shape, self.length = config, shape, length

    def __getitem__(self, i):
        draw, config = partial(torch.randn, generator=seeded("random", int(i))), self.config
        return i, draw(self.shape), draw(60, config.text_dim), draw(config.pooled_dim)


class Shapes(Made):
    """Clips of coloured shapes that move, with captions of five or six words: a toy that a tiny model learns in minutes.

    Its `draw` makes the clip of a caption, and `measure` reads a clip's colour and direction from the pixels.
    """

    CLIP_SHAPE = (3, 4, 12, 12)
    COLOURS = dict(red=(1, 0, 0), green=(0, 1, 0), blue=(0, 0, 1), yellow=(1, 1, 0), purple=(1, 0, 1), cyan=(0, 1, 1))
    SHAPES = ("square", "circle", "cross")
    DIRECTIONS = dict(left=(0, -1), right=(0, 1), up=(-1, 0), down=(1, 0))

    def __init__(self, config, length=4096):
        self.config, self.length = config, length

    def __getitem__(self, i):
        generator, captions = seeded("clip", int(i)), self.captions()
        caption = captions[i % len(captions)]
        if torch.rand((), generator=generator) < 0.3:
            caption = caption.replace("a ", "a small ", 1)
        return i, self.draw(caption, generator), *self.embed(caption, self.config)

    @classmethod
    def captions(cls):
        return [f"a {c} {s} moves {d}" for c in cls.COLOURS for s in cls.SHAPES for d in cls.DIRECTIONS]

    @staticmethod
    def embed(prompt, config):
        """A fixed text embedder: a word is a random vector that only depends on its letters. For the two text encoders.

        prompt -> text [words, text_dim], pooled [pooled_dim]. No words give one token of zeros, as a dropped caption does.
        """
        words, dims = prompt.lower().split(), (config.text_dim, config.pooled_dim)
        if not words:
            return torch.zeros(1, config.text_dim), torch.zeros(config.pooled_dim)
        vectors = [torch.randn(sum(dims), generator=seeded("word", word)) for word in words]
        text, pooled = torch.stack(vectors).split(dims, 1)
        return text, pooled.sum(0) / math.sqrt(len(words))

    @classmethod
    def draw(cls, caption, generator):
        """The clip that a caption describes, [3, 4, 12, 12] in -1..1, at a random place: 2 pixels a frame."""
        _, frames, size, _ = cls.CLIP_SHAPE
        words = caption.split()
        colour = next(cls.COLOURS[w] for w in words if w in cls.COLOURS)
        direction = next(cls.DIRECTIONS[w] for w in words if w in cls.DIRECTIONS)
        radius, way = (1 if "small" in words else 2), 2 * (frames - 1)
        spans = [(radius + way * (d < 0), size - 1 - radius - way * (d > 0)) for d in direction]
        start = [int(torch.randint(low, high + 1, (), generator=generator)) for low, high in spans]
        y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        clip = torch.full((3, frames, size, size), -1.0)
        for t in range(frames):
            dy, dx = [(axis - s - 2 * t * d).abs() for axis, s, d in zip((y, x), start, direction)]
            inside = torch.maximum(dy, dx) <= radius
            if "circle" in words:
                inside = dy**2 + dx**2 <= radius**2 + 1
            if "cross" in words:
                inside &= torch.minimum(dy, dx) <= radius // 3
            clip[:, t] = torch.where(inside, torch.tensor(colour)[:, None, None] * 2.0 - 1, clip[:, t])
        return clip

    @classmethod
    def measure(cls, clip):
        """(colour, direction) of what moves in the pixels: the nearest colour, and where its centre goes."""
        light = (clip.float().clamp(-1, 1) + 1) / 2
        solid = (light.amax(0) > 0.5).float()  # [T, h, w]
        rgb = (light * solid).sum((1, 2, 3)) / solid.sum().clamp(min=1)
        colour = min(cls.COLOURS, key=lambda name: (rgb - torch.tensor(cls.COLOURS[name])).square().sum())
        mass = solid.sum((1, 2)).clamp(min=1)
        y = (solid.sum(2) * torch.arange(clip.shape[2])).sum(1) / mass
        x = (solid.sum(1) * torch.arange(clip.shape[3])).sum(1) / mass
        moved = (y[-1] - y[0], x[-1] - x[0])
        return colour, max(cls.DIRECTIONS, key=lambda name: sum(a * b for a, b in zip(cls.DIRECTIONS[name], moved)))


# --------------------------------------------------------------------------------------------------------------------
# what the user sees


class Progress:
    """One line that updates in place, one JSON line a step in log.jsonl, and a curve at the end. Only rank 0 speaks."""

    def __init__(self, pm, model, data, args, start):
        self.pm, self.args, self.start, self.losses, self.skipped = pm, args, start, [], 0
        if pm.is_main:
            nothing = f" of {args.steps}: nothing to do" if start >= args.steps else ""
            total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad >= kind) for kind in (0, 1))
            print(
                f"{total:,} parameters{f', {trained:,} of them trained,' * (trained < total)} on {pm.world_size} x {pm.device.type} = "
                f"dp {pm.dp_size} x sp {pm.sp_size}, {len(data)} samples, global batch {args.batch}, from step {start}{nothing}",
                flush=True,
            )
            path = Path(args.out) / "log.jsonl"
            lines = path.read_text(errors="replace").splitlines(True) if path.exists() else []
            if lines and not start:
                os.replace(path, path.with_name("log-before.jsonl"))
                print(
                    f"{args.out} has an earlier run, which --resume would go on with: its log is log-before.jsonl now"
                )
                lines = []
            # steps after the one resumed from are taken again; a line that is none is dropped
            replace_file(path, "".join(x for x in lines if x.endswith("\n") and 0 < step_of(x) <= start))
            self.log, self.board = open(path, "a"), tensorboard(args.out, start) if args.tensorboard else None

    def step(self, step, loss, norm, lr, clock, skipped, more):
        """more: what else goes into the step's line of log.jsonl."""
        self.losses.append(loss)
        self.skipped += skipped
        if not self.pm.is_main:
            return
        speed, steps, seconds = clock.rates(), self.args.steps, clock.seconds[-1]
        entry = dict(step=step, loss=loss, grad_norm=norm, lr=lr, skipped=skipped) | speed | more
        # NaN is no JSON
        entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        try:
            self.log.write(json.dumps(entry) + "\n")
            self.log.flush()
            for name, value in entry.items() if self.board else ():
                if type(value) in (int, float) and name != "step":
                    self.board.add_scalar(name, value, step)
            if self.board:
                self.board.flush()
        except OSError as error:  # it is no reason to stop
            self.say(f"step {step} could not be logged: {error}")
        recent = [loss for loss in self.losses if math.isfinite(loss)][-20:] or [math.nan]
        left = (steps - step) * sum(clock.seconds) / len(self.losses)
        mfu = f" · MFU {100 * speed['mfu']:.1f} %" if "mfu" in speed else ""
        line = (
            f"step {step}/{steps}{' skipped' if skipped else ''} · loss {sum(recent) / len(recent):.4f} · "
            f"grad norm {norm:.2f} · {seconds:.2f} s/step · {speed['tokens_per_s']} tokens/s{mfu} · "
            f"{speed['peak_gib']:.1f} GiB · {printed_time(left)} left"
        )
        if "validation_loss" in more:
            self.say(f"step {step}: loss {more['validation_loss']:.5f} on the samples held out")
        for name in more.get("not_finite", ()):
            self.say(f"step {step} is skipped: {name} has values that are not finite")
        if seconds > 20 and len(self.losses) == 3:
            self.say(
                f"a step takes {seconds:.0f} s, and torchrun kills 30 s after a SIGTERM: start it with --shutdown-timeout "
                f"{60 + 3 * seconds:.0f} (torch 2.13 and newer), so that a stop is saved"
            )
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="\n" if step == steps else "", flush=True)
        elif step % max(1, steps // 20) == 0 or step == steps or len(self.losses) == 1:
            print(line, flush=True)

    @staticmethod
    def say(text):
        """In place of the line that updates, which comes again below."""
        print(f"\r\033[K{text}" if sys.stdout.isatty() else text, flush=True)

    def end(self, clock, step, saved):
        """The curve, the speed as one JSON line, and what was saved. ValueError if nothing was learned."""
        if self.skipped == len(self.losses) > 0 == self.start:
            raise ValueError(f"none of {self.skipped} steps had a finite loss and gradient: nothing was learned")
        if not self.pm.is_main:
            return
        if self.losses:
            print(curve([loss for loss in self.losses if math.isfinite(loss)] or [0.0]))
            print(json.dumps(clock.report() | dict(skipped=self.skipped)), flush=True)
        why = ", stopped by a signal" if step < self.args.steps else ""
        print(f"saved {self.args.out}/step-{saved}{why}" if saved else f"nothing saved{why}", flush=True)
        if self.args.lora and saved:
            print(f"its LoRA: {self.args.out}/lora.safetensors")
        elif saved and not self.args.data and self.args.config == "tiny":
            print('now: torchrun --nproc_per_node=2 infer_min.py --prompt "a blue circle moves up"')


def tensorboard(folder, start):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=start + 1)  # steps that are taken again


def printed_time(seconds):
    return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


def step_of(line):
    """The step of a line of log.jsonl; 0 where it is none."""
    try:
        step = json.loads(line)["step"]
        return step if type(step) is int else 0
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0


def curve(values, columns=64, rows=8):
    """A small plot in the terminal: each column the mean of its share of the values."""
    columns = min(columns, len(values))
    edges = [len(values) * i // columns for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:])]
    low, high = min(means), max(means)
    heights = [(v - low) / ((high - low) or 1) * (8 * rows - 1) + 1 for v in means]
    lines = ["".join(" ▁▂▃▄▅▆▇█"[min(8, max(0, round(h - 8 * row)))] for h in heights) for row in reversed(range(rows))]
    labels = [f"{high:.4f}", *[""] * (rows - 2), f"{low:.4f}"]
    return "\n".join(f"{label:>10} │{line}" for label, line in zip(labels, lines)) + f"\n{'loss':>10} └{'─' * columns}"


def replace_file(path, data):
    """Bytes, or text: all or nothing, whenever the process is killed."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(data if isinstance(data, bytes) else data.encode())
    except OSError as error:  # a full disk does not say where
        raise OSError(f"{path} could not be written: {error.strerror}") from None
    os.replace(temporary, path)


class Clock:
    """Seconds, tokens and FLOPs of each step; the last one may run under torch's profiler, and then does not count.

    path: where the profiler's Chrome traces go, PATH-RANK.json.gz, if anywhere. wait: until the GPU is done, before and
    after a step; training does so by itself, when it asks for the loss.
    """

    PEAK_TFLOPS = dict(A100=312, H100=989, H200=989, B200=2250)  # dense bf16, by the vendor's datasheets

    def __init__(self, pm, steps, path=None, profiled=False, wait=False):
        self.pm, self.steps, self.path, self.wait = pm, steps, path, wait and pm.device.type == "cuda"
        self.seconds, self.work, self.shares = [], [], {}
        gpu, self.profiler = [ProfilerActivity.CUDA] * (pm.device.type == "cuda"), None
        if profiled and (gpu or path):
            self.profiler = profile(activities=gpu + [ProfilerActivity.CPU] * bool(path), acc_events=True)

    def start(self):
        """A step begins."""
        if self.profiler and len(self.seconds) == self.steps - 1:
            self.profiler.start()
        self.began = self.now()

    def now(self):
        if self.wait:
            torch.cuda.synchronize()
        return time.perf_counter()

    def stop(self, tokens, flops):
        """A step of so many tokens and FLOPs, over all ranks, is over."""
        self.seconds.append(self.now() - self.began)
        self.work.append((tokens, flops))
        self.peak = torch.cuda.max_memory_allocated() if self.pm.device.type == "cuda" else 0
        if self.profiler and len(self.seconds) == self.steps:
            self.profiler.stop()
            events = [e for e in self.profiler.events() if not e.is_user_annotation]
            kernels = [(e.time_range, "nccl" in e.name.lower()) for e in events if e.device_type == DeviceType.CUDA]
            self.shares = shares([(time.start, time.end, collective) for time, collective in kernels])
            if self.path:
                self.profiler.export_chrome_trace(f"{self.path}-{self.pm.rank}.json.gz")

    def rates(self, step=-1):
        """Of one step over all ranks; tflops and the share of a known GPU's peak are per rank, memory is rank 0's."""
        seconds, (tokens, flops), cuda = self.seconds[step], self.work[step], self.pm.device.type == "cuda"
        tflops = flops / seconds / 1e12 / self.pm.world_size
        told = dict(s_per_step=round(seconds, 4), tokens_per_s=round(tokens / seconds))
        told |= dict(tflops_per_rank=round(tflops, 4))
        if not cuda:
            return told | dict(peak_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2))
        name = torch.cuda.get_device_name(self.pm.device)
        if peak := next((peak for gpu, peak in self.PEAK_TFLOPS.items() if gpu in name), None):
            told |= dict(mfu=round(tflops / peak, 4))
        memory = dict(peak_gib=self.peak, resident_gib=torch.cuda.memory_allocated())
        return told | {name: round(value / 2**30, 2) for name, value in memory.items()}

    def report(self):
        """Of the median step. The first two compile, allocate, and in training multiply zeros, as blocks begin as identities."""
        whole = len(self.seconds) - bool(self.profiler and len(self.seconds) == self.steps > 1)
        timed = range(2, whole) or range(whole)[-1:]
        median = sorted(timed, key=lambda step: self.seconds[step])[len(timed) // 2]
        return self.rates(median) | dict(timed_steps=max(0, whole - 2)) | self.shares


def shares(spans):
    """Kernels (start, end, is_collective) -> shares of the time from first to last: collectives, those with nothing
    beside them (exposed), nothing at all (idle)."""
    if not spans:
        return {}
    edges = sorted([(start, 1, kind) for start, _, kind in spans] + [(end, -1, kind) for _, end, kind in spans])
    running, totals, last = [0, 0], {}, edges[0][0]
    for now, change, kind in edges:
        state = (running[0] > 0, running[1] > 0)
        totals[state] = totals.get(state, 0) + now - last
        running[kind] += change
        last = now
    exposed, beside, idle = (totals.get(state, 0) for state in ((False, True), (True, True), (False, False)))
    named = dict(collectives=exposed + beside, exposed=exposed, idle=idle)
    return {name: round(part / sum(totals.values()), 4) for name, part in named.items()}


# --------------------------------------------------------------------------------------------------------------------
# signals


def catch_signals():
    """SIGUSR1: save at the end of the step. SIGTERM (Slurm, spot hosts, torchrun), Ctrl-C: save there and stop.

    Ctrl-C again stops at once. (torchrun passes the first one on, so that each rank gets it twice within a moment.)
    """
    asked, first = dict(save=False, stop=False), []

    def stop(number, _):
        if failed := failed_ranks():  # torchrun clears up after a rank: there will be no next step
            if torch.distributed.get_rank() in failed:
                return  # this one is about to say so
            os.write(2, f"error: rank {failed[0]} has failed\n".encode())
            os._exit(1)
        if number == signal.SIGINT:
            first.append(time.monotonic())
            if first[-1] - first[0] > 1:
                os._exit(130)
        asked["stop"] = True

    signal.signal(signal.SIGUSR1, lambda *_: asked.update(save=True))
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    return asked


def ignore_signals(_):
    """In a process that loads data: launchers signal whole process groups, and what comes is for the training to decide."""
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    args = parse()
    if not args.plan:
        run(partial(train, args), args.out, args.debug)
    try:
        config = get_config(args)
        check_args(args, config)
        told = plan(config, args)
        print(json.dumps(dict(gib_a_gpu=told.pop("all"), host_gib_a_rank=told.pop("host"), of_the_gpu=told)))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
