"""Everything that the user sees: profiles, the figures of a run, clips at validations."""

import gzip
import io
import json
import re
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from full.screen import Bar, say_some
from full.speed import Clock
from hunyuan_sp import HunyuanConfig, HunyuanVideo
from infer_min import sample
from test_sp import close, fork
from train_min import Shapes


def test_profile_names_what_is_in_it(tmp_path):
    """One Chrome trace a rank, of the last step alone, in which blocks, attention and exchanges go by their names."""
    flags = "--steps 3 --batch 2 --sp 2 --profile --checkpointing attention --out".split()
    assert [code for code, _ in fork("full.train", *flags, tmp_path, ranks=2, out=tmp_path)] == [0, 0]
    for rank in range(2):
        with gzip.open(tmp_path / f"trace-{rank}.json.gz") as file:
            events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
        names = [event["name"] for event in events]
        for name in ("double_block 0", "double_block 1", "single_block 0", "single_block 1"):
            assert names.count(name) == 2, name  # once forward, once recomputed
        assert names.count("attention") >= 8 and names.count("all_to_all") >= 4 * 2 * 3
        assert names.count("Optimizer.step#AdamW.step") == 1
        blocks = [(e["ts"], e["ts"] + e["dur"]) for e in events if re.fullmatch(r"(double|single)_block \d", e["name"])]
        waits = [e for e in events if re.search(r"aten::(item|_local_scalar_dense|is_nonzero)|Synchronize", e["name"])]
        assert waits and not [e for e in waits if any(start <= e["ts"] <= end for start, end in blocks)]


@pytest.mark.parametrize("seconds, expected", [
    ((100.0, 50.0, 2.0, 4.0, 3.0, 90.0), dict(s_per_step=3.0, timed_steps=3)),
    ((100.0, 50.0, 90.0), dict(s_per_step=50.0, timed_steps=0)),
    ((100.0,), dict(s_per_step=100.0, timed_steps=0)),
])  # fmt: skip
def test_the_median_step_of_a_benchmark(seconds, expected):
    """Neither the first two, which compile and whose backward is of zeros, nor the last one, under the profiler."""
    pm = SimpleNamespace(device=torch.device("cpu"), world_size=2)
    clock = Clock(pm, len(seconds))
    clock.seconds, clock.work, clock.profiler = [*seconds], [(12, 6e12)] * len(seconds), True
    report, s = clock.report(), expected["s_per_step"]
    wanted = expected | dict(tokens_per_s=round(12 / s), tflops_per_rank=round(3 / s, 4))
    assert {key: report[key] for key in wanted} == wanted


class Screen(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


def printed_by(function, terminal=False):
    with mock.patch.object(sys, "stdout", Screen(terminal)) as screen:
        function()
    return screen.getvalue()


def test_one_line_that_updates_in_place():
    """On a terminal each step replaces the one before; elsewhere some of them are lines of their own."""

    def steps():
        for step in range(1, 11):
            say_some(f"step {step}", step, 10, shown=5)

    shown = printed_by(steps, terminal=True)
    assert shown == "".join(f"\r\033[Kstep {step}" for step in range(1, 11)) + "\n"
    assert printed_by(steps) == "step 2\nstep 4\nstep 6\nstep 8\nstep 10\n"


@pytest.mark.parametrize("rank, quiet, lines", [(0, False, 6), (0, True, 0), (1, False, 0)])
def test_sampling_shows_where_it_is(rank, quiet, lines):
    """Rank 0 names clip and step. Of a benchmark nothing is shown; the first round alone is timed."""
    model = HunyuanVideo(HunyuanConfig.preset("tiny", double_depth=0, single_depth=0))
    pm = SimpleNamespace(is_main=rank == 0, dp_size=2, world_size=2, device=torch.device("cpu"))
    clock = Clock(pm, 3)
    bar = Bar(pm, clock, 2, 3, quiet)  # two rounds on two groups, of three clips
    text, pooled = Shapes.embed("a red square", model.config)
    noise = torch.randn(1, *Shapes.CLIP_SHAPE)

    def two_rounds():
        for _ in range(2):
            with bar.watching(model):
                sample(model, noise, [text], pooled[None], 3, 4.0)

    shown = re.findall(r"clip (\d) of 3 · step (\d)/3 · .* left\n", printed_by(two_rounds))
    assert shown == [(clip, step) for clip in "13" for step in "123"][:lines]
    assert len(clock.seconds) == 3 and clock.work[0][0] == 4 * 4 * 4, clock.work


def test_a_clip_at_each_validation(tmp_path):
    """It is what full.infer makes of the checkpoint: of the average, where there is one."""
    flags = "--blocks 1,1 --steps 2 --warmup 0 --lr 1e-2 --batch 4 --ema 0.5 --validate_every 1 --validate 0.01".split()
    prompt, out, clip = "a red square moves left", tmp_path / "out", tmp_path / "clip"
    results = fork("full.train", *flags, "--sample_prompt", prompt, "--out", out, ranks=2, out=tmp_path)
    assert [code for code, _ in results] == [0, 0], results
    results = fork("full.infer", "--checkpoint", out, "--prompt", prompt, "--output", clip, out=tmp_path)
    assert [code for code, _ in results] == [0], results
    first, last, clip = (
        load_file(f"{name}.safetensors")["latents"] for name in (out / "sample-1", out / "sample-2", clip)
    )
    close(last, clip, 1e-5)
    assert (first - last).abs().max() > 1e-3
