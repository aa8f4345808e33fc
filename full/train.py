"""Train or fine-tune on real data: released weights, LoRA, an average, validation, offloading, faults and restarts.

    $ torchrun --nproc_per_node=8 -m full.train --config 13b --sp 4 --data latents/ --weights transformer/ --resume
    $ torchrun --nproc_per_node=1 -m full.train --model SNAPSHOT --data latents/ --lora 32 --validate_every 100 --out cat

It takes its steps with train_min.py's `train_step`. full.encode writes latents/. --sample_prompt needs the extra [pipeline].
"""

import contextlib
import math
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.utils.data import DataLoader

from full import faults
from full.after import after_training
from full.average import Average
from full.checkpoints import Checkpoints
from full.clips import Preview
from full.fa4 import attention_kernel
from full.files import fingerprint, replace_file
from full.flags import check_train, compute_dtype, default_batch, get_config, parse_train, save_is_due
from full.folder import (
    build_data,
    check_origin,
    check_samples,
    contents_of,
    hold_out,
    largest_shape,
    name_odd_samples,
    odd_samples,
)
from full.hub import find_model
from full.lora import add_lora, in_folder, init_lora, lora_facts, save_lora
from full.memory import cure, limit_memory
from full.offload import offloaded
from full.resume import check_same, end_run, find_start, say_changes, say_oddities, what_is_trained
from full.screen import Clock, Progress, forward_flops, say
from full.slices import slice_mlps
from full.snapshot import ENCODERS, PARTS
from full.weights import load_weights, weight_files
from hunyuan_sp import HunyuanVideo, init_weights
from sampler import DPSPBatchSampler
from train_min import collate, count_tokens, flow_loss, learning_rate, to_device, train_step

MAX_SKIPPED = 10  # steps in a row without finite gradients that end a run
CHECK_EVERY = 100  # steps between checks that sp ranks share their samples

# --------------------------------------------------------------------------------------------------------------------
# the story


def train(args):
    """Build everything, take the steps, save. Return the ParallelManager."""
    run = Run(args)
    pm, step, saved, skipped = run.pm, run.start, run.start, 0  # skipped: steps in a row
    clock = Clock(pm, args.steps - step, f"{args.out}/trace" if args.profile else None)
    progress = Progress(pm, run.model, run.data, args, step)
    rules = dict(clip=args.clip, guidance=args.guidance, checkpointing=args.checkpointing)
    activations = offloaded if "activations" in args.offload else contextlib.nullcontext

    if run.held and run.state.get("unvalidated"):
        progress.validation(step, run.validate(step))
    save, stop, ready = run.requests()  # made while all that was built
    while step < args.steps and not stop:
        clock.start()
        step += 1
        micro_batches = [next(run.stream) for _ in range(run.sampler.micro_batches)]
        if step - run.start <= 3 or step % CHECK_EVERY == 1:
            check_samples(pm, micro_batches, step)
        lr = learning_rate(step, args)
        with activations():
            loss, norm = train_step(pm, run.model, run.optimizer, micro_batches, lr, **rules)
        finite = math.isfinite(loss) and math.isfinite(norm)
        run.average.update(skip=not finite)
        run.sampler.advance()
        clock.stop(*work_of(pm, run.model.config, micro_batches, args))

        # one sum says what all ranks were asked by signals
        save, stop, ready = run.requests()
        more = {} if finite else dict(not_finite=name_odd_samples(micro_batches, run.data))
        due = bool(run.held) and (step % args.validate_every == 0 or step == args.steps)
        if due and not stop:
            more |= run.validate(step)
            stop = run.requests()[1]  # that took a while
        progress.step(step, loss, norm, lr, clock, skipped=not finite, more=more)

        skipped = 0 if finite else skipped + 1
        if skipped >= MAX_SKIPPED:
            run.checkpoints.finish()
            last = f"{args.out}/step-{saved}" if saved else "none"
            raise ValueError(
                f"{skipped} steps in a row, the last one {step}, had no finite loss and gradient (loss {loss}, norm {norm}): "
                f"the last checkpoint is {last}"
            )
        if ready:
            run.checkpoints.finish()
        if save or save_is_due(step, stop, args):
            run.save(step, unvalidated=due and "validation_loss" not in more)
            saved = step
    run.checkpoints.finish()
    if step >= args.steps:
        end_run(args.out, run.state["tag"])
    progress.end(clock, step, saved)
    if pm.is_main and step < args.steps:
        say("next: the same command with --resume")
    elif pm.is_main and saved:
        say(f"next: {after_training(pm, args, run.model.config, largest_shape(run.data))}")
    return pm


class Run:
    """Build the parts of a run on every rank, and do what happens between its steps: requests, validation, saves."""

    def __init__(self, args):
        find_model(args, [*PARTS, *ENCODERS, "image_processor"])
        config = get_config(args)
        check_train(args, config)
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product on a GPU
            torch.use_deterministic_algorithms(True)
        data = build_data(config, args)
        if args.model:
            check_origin(data, args.model)
        self.data, self.held = hold_out(data, args)
        weights = fingerprint(weight_files(args.weights)) if args.weights else ""
        args.init_lora = args.init_lora and in_folder(args.init_lora)
        first = lora_facts([args.init_lora]) if args.init_lora else []

        # who am I; which samples are mine; where did we stop
        limit_memory(args.memory, args.device)
        pm = faults.init(args.dp, args.sp, args.device, args.timeout)
        self.contents = contents_of(data)
        facts = dict(torch=torch.__version__, device_type=pm.device.type, data=self.contents, weight_files=weights)
        pm.check_equal(vars(args) | facts | dict(config=asdict(config), init_lora_file=first), pm.world_group)
        self.args, self.pm, self.signals = args, pm, faults.catch_signals()
        self.checkpoints = Checkpoints(pm, args.out, args.timeout)
        self.checkpoints.claim()
        # the state of a new run has only its tag
        path, self.state = find_start(self.checkpoints, args.out, args.resume, args.overwrite)
        args.batch = args.batch or self.state.get("batch") or default_batch(args, pm.dp_size)
        if pm.is_main:
            say_oddities(args, data, pm.dp_size)
        kinds = dict(shapes=self.data.shapes, names=self.data.names)  # a step takes samples of one shape
        layout = pm.dp_rank, pm.dp_size, args.accumulation
        self.sampler = DPSPBatchSampler(len(self.data), args.batch, *layout, args.seed, **kinds)
        if base := (self.state.get("lora") or [""])[-1]:  # a fingerprint as the version that saved it made them
            weights = fingerprint(weight_files(args.weights), like=base)
        self.trained = what_is_trained(args, weights, self.held)
        if path:
            check_same(config, self.trained, self.state, path)
            self.sampler.load_state_dict(self.state["sampler"])
            if pm.is_main:
                say_changes(args, self.state, self.contents)
        self.start = self.state.get("step", 0)
        prompt, self.preview = args.sample_prompt, None
        if prompt is not None:  # it frees its encoders before the model is built
            self.preview = Preview(pm, config, largest_shape(self.data), prompt, args.model)
        self.model, self.optimizer, self.average = build_model(config, pm, args, self.checkpoints, path)
        self.average.updates = self.state.get("ema_updates", self.start)
        self.stream = batches(self.data, self.sampler, pm, args)

    def requests(self):
        """Return three booleans: any rank was asked to save; any was asked to stop; all ranks have written the last save."""
        flags = [self.signals["save"], self.signals["stop"], self.checkpoints.ready()]
        save, stop, ready = self.pm.sum(torch.tensor(flags, dtype=torch.int64), self.pm.world_group).tolist()
        self.signals["save"] &= not save  # one save serves every request received so far
        return save, stop, ready == self.pm.world_size

    def validate(self, step):
        """Return the loss on the held-out samples, and write the preview; both use the average if there is one."""
        with self.average.used():
            loss, odd = validate(self.model, self.held, self.pm, self.args)
            for name in odd if self.pm.is_main else ():
                say(f"{name}, held out, has values that are not finite")
            if self.preview:
                self.preview.write(self.model, f"{self.args.out}/sample-{step}")
        return dict(validation_loss=loss)

    def save(self, step, unvalidated=False):
        """Start saving a checkpoint, and write the LoRA. unvalidated: a stop left this step's validation to the resumed
        run."""
        args, pm = self.args, self.pm
        extra = dict(config=asdict(self.model.config), args=vars(args), layout=[pm.dp_size, pm.sp_size])
        extra |= dict(batch=args.batch, contents=self.contents, sampler=self.sampler.state_dict())
        extra |= dict(ema_updates=self.average.updates, unvalidated=unvalidated) | self.trained
        rest = dict(more=self.average.values, copy="weights" not in args.offload)
        rest |= dict(beside=partial(self.write_lora, step)) if args.lora else {}
        self.checkpoints.save(step, self.model, self.optimizer, extra, self.state["tag"], args.keep, **rest)

    def write_lora(self, step, folder):
        """Write lora.safetensors into a checkpoint, and copy it to --out as the newest one."""
        args, name = self.args, "lora.safetensors"
        facts = dict(base=Path(args.model or args.weights or "random").name, steps=step, shift=args.shift)
        facts["size"] = " x ".join(map(str, largest_shape(self.data)))
        with self.average.used():
            save_lora(self.model, folder / name, **facts)
        if self.pm.is_main:
            replace_file(Path(args.out, name), Path(folder, name).read_bytes())


# --------------------------------------------------------------------------------------------------------------------
# the parts of a run


def build_model(config, pm, args, checkpoints, path):
    """Build the model, on the meta device first so that no rank ever holds all weights, its optimizer and its average.

    path: the checkpoint to load them from, or None.
    """
    dtype = compute_dtype(args, pm.device)
    with torch.device("meta"):
        model = HunyuanVideo(config)
        if args.lora:  # frozen weights are in the dtype of the computation
            add_lora(model.to(dtype), args.lora, args.lora_alpha)
    model.attention = attention_kernel(args.attention)
    slice_mlps(model, args.mlp_slices)
    host = CPUOffloadPolicy(pin_memory=pm.device.type == "cuda") if "weights" in args.offload else None
    pm.shard(model, model.blocks, None if dtype == torch.float32 else dtype, args.shard_size, offload_policy=host)
    faults.limit_waits(next(model.parameters()).device_mesh, args.timeout)
    if host and pm.device.type == "cuda":  # AdamW then runs on CPUs, where torchrun gives each rank one thread
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    # a checkpoint is loaded last; of a LoRA's run it lacks the frozen weights
    if args.lora or not path:
        if args.weights:
            if pm.is_main and args.model:
                say(f"loading {args.weights}")
            load_weights(model, args.weights)
        init_weights(model, args.seed, "lora_" if args.weights else "", pm.device)
    if args.init_lora and not path:
        init_lora(model, args.init_lora)
    if args.compile:
        model.compile_blocks()
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr, (0.9, 0.99), weight_decay=0.01, fused=True)
    average = Average(model, args.ema)
    if path:
        checkpoints.load(path, model, optimizer, average.values)
    return model, optimizer, average


def batches(data, sampler, pm, args):
    """Yield batches without end. Each pass over the loader is the rest of the sampler's epoch."""
    loader = DataLoader(
        data,
        batch_sampler=sampler,
        collate_fn=partial(collate, seed=args.seed, shift=args.shift, caption_drop=args.caption_drop),
        num_workers=args.workers,
        pin_memory=pm.device.type == "cuda",
        worker_init_fn=faults.ignore_signals,
        timeout=args.timeout if args.workers else 0,
    )
    while True:
        yield from loader


# --------------------------------------------------------------------------------------------------------------------
# measurements


@torch.no_grad()
def validate(model, held, pm, args):
    """Return the mean flow loss over the held-out samples, and the names of samples that make it not finite.

    Each sample is used at four noise levels, with the same noise every time. So it is far quieter than the training loss,
    and the same on any layout. A batch is as large as training's micro-batch.
    """
    total, count, odd = torch.zeros((), device=pm.device), 0.0, []
    size = pm.dp_size * -(-args.batch // (pm.dp_size * args.accumulation))
    for sigma in (0.2, 0.4, 0.6, 0.8):
        sampler = DPSPBatchSampler(len(held), size, pm.dp_rank, pm.dp_size, shapes=held.shapes, names=held.names)
        rules = partial(collate, seed=0, shift=1.0, caption_drop=0.0, sigma=sigma)
        for batch in DataLoader(held, batch_sampler=sampler, collate_fn=rules):
            odd += [] if odd else odd_samples([batch], held)
            total += flow_loss(model, to_device(batch, pm.device), args.guidance, pm.sp_group)
            count += count_tokens(batch, model.config)
    names = sorted({name for names in faults.together(lambda: odd) for name in names})
    return (pm.sum(total.double(), pm.world_group) / pm.sum(count, pm.dp_group)).item(), names


def work_of(pm, config, micro_batches, args):
    """Return [tokens, FLOPs] of a step over all ranks, forward and backward, for samples that carry weight."""
    tokens = flops = 0.0
    for batch in micro_batches:
        video = math.prod(batch["target"].shape[2:]) // math.prod(config.patch_size)
        text = sum(batch["lengths"]) / len(batch["lengths"])
        tokens += count_tokens(batch, config)
        # frozen weights need no gradients
        flops += batch["weight"].sum().item() * forward_flops(config, video, text, 2 if args.lora else 3, 3)
    return pm.sum(torch.tensor([tokens, flops], dtype=torch.float64), pm.dp_group).tolist()


if __name__ == "__main__":
    args = parse_train(__doc__)
    faults.run(partial(train, args), args.out, args.debug, partial(cure, args))
