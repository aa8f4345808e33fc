"""Count the FLOPs of a forward and of a training step, and measure each step's seconds and memory."""

import math
import resource
import time

import torch
from torch.profiler import ProfilerActivity, profile

from train_min import count_tokens


def forward_flops(config, video_tokens, text_tokens, linears=1, attention=1):
    """Return the FLOPs of one sample's forward: linear layers and attention of the blocks, 2 per multiply-add.

    video_tokens, text_tokens: the valid ones. linears, attention: factors, 3 in training; 2 for linears with frozen weights.
    """
    dim = config.hidden_size
    blocks = config.double_depth + config.single_depth
    tokens = video_tokens + text_tokens
    of_linears = (8 + 4 * config.mlp_ratio) * dim * dim * tokens * blocks
    of_attention = 4 * dim * tokens * tokens * blocks
    return linears * of_linears + attention * of_attention


def work_of(pm, config, micro_batches, args):
    """Return [tokens, FLOPs] of a step over all ranks, forward and backward, for samples that carry weight."""
    tokens = flops = 0.0
    for batch in micro_batches:
        video_tokens = math.prod(batch["target"].shape[2:]) // math.prod(config.patch_size)
        text_tokens = sum(batch["lengths"]) / len(batch["lengths"])
        tokens += count_tokens(batch, config)
        # frozen weights need no gradients
        of_sample = forward_flops(config, video_tokens, text_tokens, 2 if args.lora else 3, 3)
        flops += batch["weight"].sum().item() * of_sample
    mine = torch.tensor([tokens, flops], dtype=torch.float64)
    return pm.sum(mine, pm.dp_group).tolist()


class Clock:
    """Measure each step's seconds, tokens and FLOPs. The last step may run under torch's profiler, and then does not count.

    traces: write its Chrome traces to TRACES-RANK.json.gz; None for no profile. wait: wait for the GPU before and after each
    step; training waits anyway, when it reads the loss.
    """

    PEAK_TFLOPS = dict(A100=312, H100=989, H200=989, B200=2250)  # dense bf16, by the vendor's datasheets

    def __init__(self, pm, steps, traces=None, wait=False):
        self.pm = pm
        self.cuda = pm.device.type == "cuda"
        self.steps = steps
        self.traces = traces
        self.wait = wait and self.cuda
        self.seconds, self.work, self.profiler = [], [], None
        if traces:
            gpu = [ProfilerActivity.CUDA] * self.cuda
            self.profiler = profile(activities=[ProfilerActivity.CPU, *gpu], acc_events=True)

    def start(self):
        """Begin a step."""
        if self.profiler and len(self.seconds) == self.steps - 1:
            self.profiler.start()
        self.began = self.now()

    def now(self):
        if self.wait:
            torch.cuda.synchronize()
        return time.perf_counter()

    def stop(self, tokens, flops):
        """End a step. tokens, flops: those of all ranks."""
        self.seconds.append(self.now() - self.began)
        self.work.append((tokens, flops))
        self.peak = torch.cuda.max_memory_allocated() if self.cuda else 0
        if self.profiler and len(self.seconds) == self.steps:
            self.profiler.stop()
            self.profiler.export_chrome_trace(f"{self.traces}-{self.pm.rank}.json.gz")

    def rates(self, step=-1):
        """Return one step's figures for all ranks together; tflops and mfu, the share of a known GPU's peak, are per
        rank."""
        seconds = self.seconds[step]
        tokens, flops = self.work[step]
        tflops = flops / seconds / 1e12 / self.pm.world_size
        figures = dict(s_per_step=round(seconds, 4), tokens_per_s=round(tokens / seconds))
        figures |= dict(tflops_per_rank=round(tflops, 4))
        if not self.cuda:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
            return figures | dict(peak_gib=round(peak / 2**20, 2))
        name = torch.cuda.get_device_name(self.pm.device)
        for gpu, peak_tflops in self.PEAK_TFLOPS.items():
            if gpu in name:
                figures |= dict(mfu=round(tflops / peak_tflops, 4))
        resident = torch.cuda.memory_allocated()
        return figures | dict(peak_gib=round(self.peak / 2**30, 2), resident_gib=round(resident / 2**30, 2))

    def report(self):
        """Return the median step's figures without the first two steps, which compile, allocate, and in training multiply
        zeros (blocks start as identities)."""
        profiled = self.profiler and len(self.seconds) == self.steps > 1
        counted = len(self.seconds) - bool(profiled)
        timed = range(2, counted) or range(counted)[-1:]
        by_seconds = sorted(timed, key=lambda step: self.seconds[step])
        median = by_seconds[len(timed) // 2]
        return self.rates(median) | dict(timed_steps=max(0, counted - 2))
