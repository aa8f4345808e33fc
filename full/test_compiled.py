"""The lesson's compiled blocks at many sizes: how often they compile, and that the gradients stay."""

import contextlib
import copy
import random
import shutil
from dataclasses import replace

import pytest
import torch

from hunyuan_sp import HunyuanConfig, HunyuanVideo
from test_sp import CASES, CONFIG, close, eager_compiler, random_inputs, random_model


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler on CPUs"
)
def test_compiled_blocks_have_the_same_gradients():
    """By Inductor, which takes 20 s for one kind of block; COMPILE=1 takes both, on any layout."""
    model, compiled = (random_model(replace(CONFIG, double_depth=0, single_depth=1)) for _ in "12")
    compiled.compile_blocks()
    inputs, how = random_inputs(CONFIG, *CASES["ragged"]), dict(checkpointing="attention")
    truth = model(**inputs)
    for a, b in zip(*(torch.autograd.grad(m(**inputs, **how), [*m.parameters()], truth) for m in (model, compiled))):
        close(b, a)


def test_another_size_compiles_once_more():
    """One shape, another one, and then any."""
    graphs, compiled = [], random_model(CONFIG)
    with eager_compiler():
        compiled.compile_blocks()
    for latents, length in (((2, 4, 8), 5), ((3, 6, 6), 2), ((2, 8, 6), 7), ((2, 4, 6), 3)):
        inputs = random_inputs(CONFIG, latents, (length, length), seed=length)
        compiled(**inputs, checkpointing="attention").sum().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and set(graphs[1:]) == {graphs[1]}, f"recompiled: {graphs}"


@torch._dynamo.config.patch(recompile_limit=3)
def test_more_sizes_than_graphs():
    """Dynamo compiles a function at most eight times (here three), and sizes 0 and 1 apart: what comes then runs as it is.
    It breaks at attention and nowhere else; and a copy of a compiled model computes with its own weights."""
    plain, compiled = random_model(CONFIG), random_model(CONFIG)
    with eager_compiler():
        compiled.compile_blocks()
    for seed in range(10):
        draw = random.Random(seed)
        latents, lengths = (draw.choice((1, 3)), 2, draw.choice((2, 6))), [draw.choice((1, 4))] * draw.choice((1, 2))
        inputs = random_inputs(CONFIG, latents, lengths, seed=seed)
        with contextlib.nullcontext() if seed % 3 else torch.no_grad():
            outs = [model(**inputs, checkpointing="attention") for model in (plain, compiled)]
            close(*outs)
        if seed % 3:
            close(*(torch.autograd.grad(o.sum(), m.img_in.proj.weight)[0] for o, m in zip(outs, (plain, compiled))))
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert breaks and all("joint_attention" in reason for reason in breaks), breaks
    copied, other = copy.deepcopy(compiled), random_model(CONFIG, seed=1)
    copied.load_state_dict(other.state_dict())
    close(copied(**inputs), other(**inputs))
    close(compiled(**inputs), plain(**inputs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's kernels need a GPU")
def test_compiled_gradients_at_real_size():
    """bf16 at the 13B model's width and 46,800 + 60 tokens: sums over so many tokens are kernels of another kind."""
    model = HunyuanVideo(HunyuanConfig.preset("13b", double_depth=1, single_depth=1)).to("cuda", torch.bfloat16)
    for param in model.parameters():
        param.data.normal_(0, 0.02)
    inputs, compiled, both = random_inputs(model.config, (13, 90, 160), (60,), "cuda"), copy.deepcopy(model), []
    compiled.compile_blocks()
    for m in (compiled, model):
        out = m(**inputs, checkpointing="attention")
        both.append(torch.autograd.grad(out, [*m.parameters()], inputs["latents"].to(out)))
    for (name, _), ours, truth in zip(model.named_parameters(), *both):
        assert (ours - truth).float().norm() < 3e-2 * truth.float().norm(), name
