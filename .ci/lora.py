"""Time a training step of a LoRA of rank 32 on the full 13B (random weights, frozen in bf16), all GPUs in one sp group:

    $ torchrun --nproc_per_node=1 .ci/lora.py 720x1280x49 attention
    $ torchrun --nproc_per_node=1 .ci/lora.py 544x960x129 attention activations
    $ torchrun --nproc_per_node=1 .ci/lora.py 544x960x49 attention activations weights memory=8
    $ torchrun --nproc_per_node=1 .ci/lora.py 720x1280x129 full activations weights memory=24 slices=8 steps=2

activations and weights are full.train's --offload. Several runs of one model, which is made once: put `then` between them; memory= holds until another run names one.
It prints a JSON line a run: seconds of each step (the first two compile and allocate), peak memory, the gradient
norm of the first step. Without trained modulations a fresh model's gates would stay zero, and zeros run faster: so all weights are
random.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch.distributed.fsdp import CPUOffloadPolicy  # noqa: E402

from comm import ParallelManager  # noqa: E402
from full.lora import add_lora  # noqa: E402
from full.memory import limit_memory  # noqa: E402
from full.offload import offloaded  # noqa: E402
from full.slices import slice_mlps  # noqa: E402
from full.speed import forward_flops  # noqa: E402
from hunyuan_sp import HunyuanConfig, HunyuanVideo, latent_shape  # noqa: E402


def main(*words):
    runs = parse(words)
    limit_memory(runs[0].get("memory"), "cuda")
    manager = ParallelManager(1, None)
    torch.set_num_threads(len(os.sched_getaffinity(0)) // torch.cuda.device_count())
    generator = torch.Generator(manager.device).manual_seed(0)
    model, optimizer = build_model(manager, "weights" in runs[0]["words"], generator)
    for run in runs:
        measure(manager, model, optimizer, generator, **run)
    manager.close()


def parse(words):
    """Return the arguments of `measure` of each run."""
    runs = []
    for run in " ".join(words).split(" then "):
        size, checkpointing, *rest = run.split()
        numbers = {name: int(value) for name, _, value in (word.partition("=") for word in rest) if value}
        runs.append(dict(size=size, checkpointing=checkpointing, words=rest) | numbers)
    return runs


def build_model(manager, on_host, generator):
    with torch.device("meta"):
        model = HunyuanVideo(HunyuanConfig.preset("13b")).to(torch.bfloat16)
        add_lora(model, 32)
    manager.shard(model, model.blocks, torch.bfloat16, offload_policy=CPUOffloadPolicy() if on_host else None)
    for param in model.parameters():
        local = param.to_local().data
        local.copy_(torch.randn(local.shape, device=manager.device, generator=generator).mul_(0.02))
    model.compile_blocks()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)
    return model, optimizer


def measure(manager, model, optimizer, generator, size, checkpointing, words, memory=0, slices=1, steps=4):
    config, device = model.config, manager.device
    shape = latent_shape(config, *map(int, size.split("x")))
    torch.compiler.reset()  # each run compiles for its own size, as a program of its own would
    torch.cuda.empty_cache()
    torch._C._host_emptyCache()  # pinned memory of other sizes
    torch.cuda.reset_peak_memory_stats()
    limit_memory(memory, "cuda")
    for module in (*(block.img_mlp for block in model.double_blocks), *model.single_blocks):
        vars(module).pop("forward", None)  # the slices of an earlier run
    slice_mlps(model, slices)
    offload = "activations" in words
    given = dict(latents=torch.randn(1, *shape, device=device, generator=generator), lengths=[60])
    given |= dict(text=torch.randn(1, 60, 4096, device=device, generator=generator))
    given |= dict(pooled=torch.randn(1, 768, device=device, generator=generator))
    given |= dict(timestep=torch.full((1,), 500.0, device=device), guidance=torch.full((1,), 1000.0, device=device))
    tokens, seconds, norms = shape[1] * shape[2] * shape[3] // 4, [], []
    rules = dict(group=manager.sp_group, gather=False, checkpointing=checkpointing)
    for _ in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        with offloaded() if offload else contextlib.nullcontext():
            velocity = model(**given, **rules)
            manager.backward(model, velocity.float().square().sum() / (tokens * 64))
        norms.append(float(manager.clip_grad_norm(model, 1.0)))
        assert 0 < norms[-1] < float("inf"), norms  # a step that is skipped is fast
        manager.step(optimizer)
        torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - began, 3))
        if manager.is_main:
            print(seconds[-1], flush=True)
    flops = forward_flops(config, tokens, 60, linears=2, attention=3)  # frozen weights have no gradients of their own
    report = dict(size=size, tokens=tokens, checkpointing=checkpointing, words=words, gpus=manager.world_size)
    report |= dict(gpu=torch.cuda.get_device_name(), seconds=seconds, gib=torch.cuda.max_memory_allocated() / 2**30)
    report |= dict(weights_gib=sum(p.to_local().nbytes for p in model.parameters()) / 2**30, norm=norms[0])
    report |= dict(tflops=round(flops / min(seconds) / manager.world_size / 1e12, 1))
    if manager.is_main:
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
