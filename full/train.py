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
from full.flags import (
    check_train,
    compute_dtype,
    default_batch,
    get_config,
    parse_train,
    save_is_due,
    take_from_model,
)
from full.folder import (
    build_data,
    check_origin,
    check_samples,
    contents_of,
    hold_out,
    largest_shape,
    name_odd_samples,
)
from full.hub import find_model
from full.lora import add_lora, in_folder, init_lora, lora_facts, save_lora
from full.memory import cure, limit_memory
from full.offload import offloaded
from full.plan import check_offload
from full.resume import check_same, end_run, find_start, say_changes, say_oddities, what_is_trained
from full.screen import Progress, say
from full.slices import slice_mlps
from full.snapshot import BESIDE_DIT
from full.speed import Clock, work_of
from full.validation import validate
from full.weights import load_weights, weight_files
from hunyuan_sp import HunyuanVideo, init_weights
from sampler import DPSPBatchSampler
from train_min import collate, learning_rate, train_step

MAX_SKIPPED = 10  # steps in a row without finite gradients that end a run
CHECK_EVERY = 100  # steps between checks that sp ranks share their samples

# --------------------------------------------------------------------------------------------------------------------
# the story


def train(args):
    """Build everything, take the steps, save. Return the ParallelManager."""
    run = Run(args)
    pm = run.pm
    step = saved = run.start
    skipped = 0  # steps in a row without finite gradients
    clock = Clock(pm, args.steps - step, f"{args.out}/trace" if args.profile else None)
    progress = Progress(pm, run.model, run.data, args, step)
    rules = dict(clip=args.clip, guidance=args.guidance, checkpointing=args.checkpointing)
    activations = offloaded if "activations" in args.offload else contextlib.nullcontext

    if run.held_out and run.state.get("unvalidated"):
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
        finite = math.isfinite(loss + norm)
        run.average.update(skip=not finite)
        run.sampler.advance()
        clock.stop(*work_of(pm, run.model.config, micro_batches, args))

        save, stop, ready = run.requests()
        more = {} if finite else dict(not_finite=name_odd_samples(micro_batches, run.data))
        validation_is_due = bool(run.held_out) and (step % args.validate_every == 0 or step == args.steps)
        if validation_is_due and not stop:
            more |= run.validate(step)
            stop = run.requests()[1]  # a stop may have been asked for meanwhile
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
            run.save(step, unvalidated=validation_is_due and "validation_loss" not in more)
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
        find_model(args, ["transformer", *BESIDE_DIT])
        config = get_config(args)
        check_train(args, config)
        take_from_model(args)
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product on a GPU
            torch.use_deterministic_algorithms(True)
        data = build_data(config, args)
        if args.model:
            check_origin(data, args.model)
        self.data, self.held_out = hold_out(data, args)
        weights = fingerprint(weight_files(args.weights)) if args.weights else ""
        args.init_lora = args.init_lora and in_folder(args.init_lora)
        first = lora_facts([args.init_lora]) if args.init_lora else []

        # who am I; which samples are mine; where did we stop
        limit_memory(args.memory, args.device)
        pm = faults.init(args.dp, args.sp, args.device, args.timeout)
        self.contents = contents_of(data)
        facts = vars(args) | dict(torch=torch.__version__, device_type=pm.device.type)
        facts |= dict(data=self.contents, weight_files=weights)
        facts |= dict(config=asdict(config), init_lora_file=first)
        pm.check_equal(facts, pm.world_group)
        self.args = args
        self.pm = pm
        self.signals = faults.catch_signals()
        self.checkpoints = Checkpoints(pm, args.out, args.timeout)
        self.checkpoints.claim()
        # the state of a new run has only its tag
        path, self.state = find_start(self.checkpoints, args.out, args.resume, args.overwrite)
        args.batch = args.batch or self.state.get("batch") or default_batch(args, pm.dp_size)
        if pm.is_main:
            say_oddities(args, data, pm.dp_size)
        faults.together(lambda: check_offload(config, args, largest_shape(data), pm))
        kinds = dict(shapes=self.data.shapes, names=self.data.names)  # a step takes samples of one shape
        layout = pm.dp_rank, pm.dp_size, args.accumulation
        self.sampler = DPSPBatchSampler(len(self.data), args.batch, *layout, args.seed, **kinds)
        if base := (self.state.get("lora") or [""])[-1]:  # a fingerprint as the version that saved it made them
            weights = fingerprint(weight_files(args.weights), like=base)
        self.trained = what_is_trained(args, weights, self.held_out)
        if path:
            check_same(config, self.trained, self.state, path)
            self.sampler.load_state_dict(self.state["sampler"])
            if pm.is_main:
                say_changes(args, self.state, self.contents)
        self.start = self.state.get("step", 0)
        self.preview = None
        if args.sample_prompt is not None:  # it frees its encoders before the model is built
            self.preview = Preview(pm, config, largest_shape(self.data), args.sample_prompt, args.model)
        built = build_model(config, pm, args, self.checkpoints, path)
        self.model, self.optimizer, self.average = built
        self.average.updates = self.state.get("ema_updates", self.start)
        self.stream = batches(self.data, self.sampler, pm, args)

    def requests(self):
        """Return three booleans: any rank was asked to save; any was asked to stop; all ranks have written the last save."""
        mine = [self.signals["save"], self.signals["stop"], self.checkpoints.ready()]
        mine = torch.tensor(mine, dtype=torch.int64)
        save, stop, ready = self.pm.sum(mine, self.pm.world_group).tolist()
        self.signals["save"] &= not save  # one save serves every request received so far
        return save, stop, ready == self.pm.world_size

    def validate(self, step):
        """Return the loss on the held-out samples, and write the preview; both use the average if there is one."""
        with self.average.used():
            loss, odd = validate(self.model, self.held_out, self.pm, self.args)
            for name in odd if self.pm.is_main else ():
                say(f"{name}, held out, has values that are not finite")
            if self.preview:
                self.preview.write(self.model, f"{self.args.out}/sample-{step}")
        return dict(validation_loss=loss)

    def save(self, step, unvalidated=False):
        """Start saving a checkpoint, and write the LoRA. unvalidated: a stop left this step's validation to the resumed
        run."""
        args = self.args
        facts = dict(config=asdict(self.model.config), args=vars(args))
        facts |= dict(layout=[self.pm.dp_size, self.pm.sp_size], batch=args.batch)
        facts |= dict(contents=self.contents, sampler=self.sampler.state_dict())
        facts |= dict(ema_updates=self.average.updates, unvalidated=unvalidated)
        rules = dict(tag=self.state["tag"], keep=args.keep, copy="weights" not in args.offload)
        rules |= dict(more=self.average.values)
        rules |= dict(beside=partial(self.write_lora, step)) if args.lora else {}
        self.checkpoints.save(step, self.model, self.optimizer, facts | self.trained, **rules)

    def write_lora(self, step, folder):
        """Write lora.safetensors into a checkpoint, and copy it to --out as the newest one."""
        name = "lora.safetensors"
        named = self.args.model and self.args.named  # of the hub: OWNER/NAME
        base = named if named and not Path(named).exists() else Path(named or self.args.weights or "random").name
        size = " x ".join(map(str, largest_shape(self.data)))
        header = dict(base=base, steps=step, shift=self.args.shift, size=size)
        with self.average.used():
            save_lora(self.model, folder / name, **header)
        if self.pm.is_main:
            replace_file(Path(self.args.out, name), Path(folder, name).read_bytes())


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
    param_dtype = None if dtype == torch.float32 else dtype
    pm.shard(model, model.blocks, param_dtype, args.shard_size, offload_policy=host)
    faults.limit_waits(next(model.parameters()).device_mesh, args.timeout)
    if host and pm.device.type == "cuda":  # AdamW then runs on CPUs, where torchrun gives each rank one thread
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
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


if __name__ == "__main__":
    args = parse_train(__doc__)
    faults.exit_after(partial(train, args), args.out, args.debug, partial(cure, args))
