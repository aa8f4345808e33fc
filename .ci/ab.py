"""Time one version of this project on GPUs; run it for two versions in one sitting, and a change of speed has its figure.

    $ git worktree add /tmp/before HEAD~1
    $ for version in . /tmp/before .; do torchrun --nproc_per_node=2 .ci/ab.py $version; done

Each prints a JSON line: median and fastest seconds, and the peak memory of a forward of 118,800 tokens and of a training step of
46,800 (4 + 8 blocks of the 13B's, all GPUs in one sp group, bf16, compiled, attention kept, FSDP2, AdamW). Weights are random:
a fresh model's gates are zero, and zeros run faster. With --profile after the folder also the shares of one more step's time
that collectives take, that they take with nothing beside them (exposed), and in which no kernel runs (idle).
"""

import inspect
import json
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(sys.argv[1]).resolve()))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from comm import ParallelManager  # noqa: E402
from hunyuan_sp import HunyuanConfig, HunyuanVideo  # noqa: E402

CONFIG = HunyuanConfig.preset("13b", double_depth=4, single_depth=8)


def fill(model, device):
    generator = torch.Generator(device).manual_seed(0)
    for param in model.parameters():
        local = param.to_local() if hasattr(param, "to_local") else param
        local.data.normal_(0, 0.02, generator=generator)
    model.compile_blocks()


def inputs(frames, device):
    draw = partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(1))
    times = dict(timestep=torch.full((1,), 500.0, device=device), guidance=torch.full((1,), 6016.0, device=device))
    latents = draw(1, 16, frames, 90, 160)
    lengths = "lengths" if "lengths" in inspect.signature(HunyuanVideo.forward).parameters else "text_mask"  # as before
    return times | {"latents": latents, "text": draw(1, 60, 4096), lengths: [60], "pooled": draw(1, 768)}


def timed(name, step, count):
    """Time `count` steps; the first two compile and allocate."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(count):
        torch.cuda.synchronize()
        dist.barrier()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    seconds = sorted(seconds[2:])
    median, gib = seconds[len(seconds) // 2], torch.cuda.max_memory_allocated() / 2**30
    figures = {name: round(median, 4), f"{name}_fastest": round(seconds[0], 4), f"{name}_gib": round(gib, 2)}
    if "--profile" in sys.argv:
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            step()
            torch.cuda.synchronize()
        events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        spans = [(e.time_range.start, e.time_range.end, "nccl" in e.name.lower()) for e in events]
        figures |= {f"{name}_{part}": share for part, share in shares(spans).items()}
    return figures


def shares(spans):
    """Convert kernels (start, end, is_collective) into shares of the time from the first to the last."""
    edges = sorted([(start, 1, kind) for start, _, kind in spans] + [(end, -1, kind) for _, end, kind in spans])
    running, totals, last = [0, 0], {}, edges[0][0]
    for now, change, kind in edges:
        state = (running[0] > 0, running[1] > 0)
        totals[state] = totals.get(state, 0) + now - last
        running[kind] += change
        last = now
    exposed, beside, idle = (totals.get(state, 0) for state in ((False, True), (True, True), (False, False)))
    parts = dict(collectives=exposed + beside, exposed=exposed, idle=idle)
    return {name: round(part / sum(totals.values()), 4) for name, part in parts.items()}


def forward(manager):
    with manager.device:
        model = HunyuanVideo(CONFIG).to(torch.bfloat16).requires_grad_(False)
    fill(model, manager.device)
    given = inputs(33, manager.device)
    with torch.no_grad():
        return timed("forward", lambda: model(**given, group=manager.sp_group), 7)


def train(manager):
    with torch.device("meta"):
        model = HunyuanVideo(CONFIG)
    manager.shard(model, model.blocks, torch.bfloat16)
    fill(model, manager.device)
    optimizer, given = torch.optim.AdamW(model.parameters(), 1e-5, fused=True), inputs(13, manager.device)

    def step():
        velocity = model(**given, group=manager.sp_group, gather=False, checkpointing="attention")
        (velocity.float().square().sum() / (46_800 * 64)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor().item()
        assert 0 < norm < float("inf"), norm  # a step that is skipped is fast
        optimizer.step()
        optimizer.zero_grad()

    return timed("train", step, 9)


if __name__ == "__main__":
    manager = ParallelManager(1, None)
    report = dict(version=sys.argv[1], gpus=manager.world_size, gpu=torch.cuda.get_device_name())
    report |= forward(manager)
    report |= train(manager)
    if manager.is_main:
        print(json.dumps(report), flush=True)
    manager.close()
