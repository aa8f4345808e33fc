"""The pastes into other models, measured: every case of examples/test_models.py, and diffusers' own context parallelism.

    $ python .ci/paste.py                  # all models and variants at sp 2, 3 and 4, float64, against one device
    $ python .ci/paste.py flux "ltx2 i2v"  # those whose names begin so
    $ python .ci/paste.py --diffusers      # diffusers' own on the same cases, and where lengths and heads divide
    $ torchrun --nproc_per_node=2 .ci/paste.py --bench          # Wan, 14B's width, 8 of 40 layers, beside diffusers' own
    $ torchrun --nproc_per_node=2 .ci/paste.py --bench --tiny   # the same on a CPU, to see that it runs

The first three need no GPU; their last line is `paste: ok` or `paste: FAILED`.
"""

import os
import statistics
import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "--bench" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # float64 on CPUs

import diffusers
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig

from comm import ParallelManager
from examples.diffusers_any import parallelise
from examples.plans import OWN_PLAN, PLANS

if "--bench" not in sys.argv:  # they need pytest
    import test_sp
    from examples import test_models
    from examples.test_models import CASES, build, errors, run

PASSED = 1e-11


# --------------------------------------------------------------------------------------------------------------------
# ours


def check_ours(pm, folder, names):
    """Print a row for each case. What fails on all ranks ends that case alone."""
    for name in names:
        try:
            output, gradients = test_models.compare(name, pm.sp_group)
            row = f"output {output:.1e}  gradients {gradients:.1e}  {'ok' if max(output, gradients) < PASSED else 'FAILED'}"
        except Exception as error:
            row = f"FAILED {type(error).__name__}: {str(error)[:300]}"
        if pm.is_main:
            print(f"{name:36} sp {pm.sp_size}  {row}", flush=True)


def refused():
    """Print which transformers of diffusers `parallelise` refuses: those without a plan, here or of their own."""
    kinds = [getattr(diffusers, name) for name in dir(diffusers) if "Transformer" in name and name.endswith("Model")]
    kinds = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, torch.nn.Module)]
    with_one = {kind for kind in kinds if kind.__name__ in PLANS or getattr(kind, OWN_PLAN, None) is not None}
    without = [kind.__name__ for kind in kinds if kind not in with_one]
    print(f"\nrefused by name, {len(without)} of {len(kinds)}: {', '.join(without)}")


# --------------------------------------------------------------------------------------------------------------------
# diffusers' own, on a CPU: its device_count of 0 would be a division by zero


def theirs(model, **config):
    with mock.patch.object(torch.accelerator, "device_count", lambda: torch.cuda.device_count() or 1):
        model.enable_parallelism(config=ContextParallelConfig(**config))


def check_theirs(pm, folder, names, sizes):
    for name in names:
        if getattr(getattr(diffusers, CASES[name][0]), OWN_PLAN, None) is None:
            continue
        for more in ({}, dict(ulysses_anything=True)):
            row = f"{name:28} {sizes} sp {pm.sp_size} {'anything' if more else 'default':9}"
            row += outcome_of(name, getattr(test_models, sizes.upper()), pm, more)
            if pm.is_main:
                print(row, flush=True)


def outcome_of(name, s, pm, more):
    """Return errors of output and gradients, summed over the ranks, as words; or what it raised."""
    model, inputs = build(name, s)
    outs, grads = run(model, inputs)
    words = ""
    try:
        theirs(model, ulysses_degree=pm.sp_size, **more)
        with torch.no_grad(), test_models.all_in_float64():
            ours = model(**inputs, return_dict=False)
        words = f"output {max(errors(dict(enumerate(ours)), dict(enumerate(outs))).values()):.1e}, "
        ours, our_grads = run(model, inputs)  # the whole loss on every rank
        worst, factors = 0.0, set()
        for key, grad in our_grads.items():
            dist.all_reduce(grad, group=pm.sp_group)
            worst = max(worst, errors({key: grad}, {key: grads[key]})[key])
            if grads[key].norm() > 1e-6:
                factors.add(round(((grad * grads[key]).sum() / grads[key].square().sum()).item(), 3))
        words += (
            f"gradients summed {worst:.1e}, × {min(factors)} to × {max(factors)} (averaged: × 1/{pm.sp_size} of it)"
        )
        return words
    except Exception as error:
        return words + f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:110]}"


# --------------------------------------------------------------------------------------------------------------------
# two GPUs


WIDE = dict(num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=8)
TINY = dict(num_attention_heads=4, attention_head_dim=12, ffn_dim=64, num_layers=2, text_dim=32, freq_dim=32)
EVEN, ODD = (21, 45, 80), (23, 19, 173)  # 75,600 and 75,601 tokens


def bench(tiny):
    """Time forward, and forward + backward with checkpointing, of one set of weights: ours and theirs by turns."""
    pm = ParallelManager(1, None, "cpu" if tiny else None)
    even, odd, text = ((2, 3, 4), (3, 3, 3), (7, 32)) if tiny else (EVEN, ODD, (512, 4096))
    dtype = torch.float32 if tiny else torch.bfloat16
    torch.manual_seed(0)
    with pm.device:
        model = diffusers.WanTransformer3DModel(**(TINY if tiny else WIDE))
    for param in model.parameters():  # the tables of rope stay as they are
        param.data = param.data.to(dtype)
    models = {"ours": model, "diffusers'": shared(model)}
    for each in models.values():
        each.enable_gradient_checkpointing()
        if not tiny:
            each.set_attention_backend("_native_cudnn")
    theirs(models["diffusers'"], ulysses_degree=pm.sp_size)
    parallelise(models["ours"], pm.sp_group)
    outs = {}

    def step(name, shape, backward):
        frames, height, width = shape
        draw = torch.Generator(pm.device).manual_seed(1)
        latents = torch.randn(1, 16, frames, 2 * height, 2 * width, generator=draw, device=pm.device, dtype=dtype)
        words = torch.randn(1, *text, generator=draw, device=pm.device, dtype=dtype)
        with torch.set_grad_enabled(backward):
            out = models[name](latents, torch.full((1,), 500.0, device=pm.device), words, return_dict=False)[0]
            if backward:
                out.float().square().mean().backward()
                model.zero_grad()
        outs[name] = out.detach()

    for backward in (False, True):
        work = "forward + backward" if backward else "forward"
        pairs = timed(pm, {name: (lambda name=name, b=backward: step(name, even, b)) for name in models})
        error = (outs["ours"] - outs["diffusers'"]).abs().max().item()
        odds = timed(pm, {"ours": lambda b=backward: step("ours", odd, b)})
        if pm.is_main:
            for name, (seconds, gib) in pairs.items():
                print(f"{work}, {name}: {tokens_of(even)} tokens, {seconds:.3f} s, {gib:.1f} GiB", flush=True)
            seconds, gib = odds["ours"]
            print(f"{work}, ours: {tokens_of(odd)} tokens, {seconds:.3f} s, {gib:.1f} GiB", flush=True)
            ours, own = (pairs[name][0] for name in models)
            ratios = f"ours / diffusers' {ours / own:.3f}, odd / even {seconds / ours:.3f}"
            print(f"{work}: {ratios}; the two outputs differ by {error:.1e} at most", flush=True)
    if pm.is_main:
        gpus = f"{pm.world_size} x {'a CPU' if tiny else torch.cuda.get_device_name()}"
        print(f"{gpus}, torch {torch.__version__}, diffusers {diffusers.__version__}, {dtype}")
    return pm


def shared(model):
    """Return another model with the same parameters."""
    with torch.device("meta"):
        other = type(model).from_config(model.config)
    other.rope = deepcopy(model.rope)  # its tables are in no state dict
    other.load_state_dict(dict(model.named_parameters()), assign=True)
    return other


def tokens_of(shape):
    frames, height, width = shape
    return f"{frames * height * width:,}"


def timed(pm, work, rounds=3):
    """Return {name: (median seconds, GiB at most)} of `rounds` rounds, in which they take turns, after one to warm up."""
    seconds, cuda = {name: [] for name in work}, pm.device.type == "cuda"
    peak = dict.fromkeys(work, 0.0)
    for _ in range(rounds + 1):
        for name, function in work.items():
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            dist.barrier()
            began = time.perf_counter()
            function()
            if cuda:
                torch.cuda.synchronize()
                peak[name] = max(peak[name], torch.cuda.max_memory_allocated() / 2**30)
            seconds[name].append(time.perf_counter() - began)
    return {name: (statistics.median(times[1:]), peak[name]) for name, times in seconds.items()}


# --------------------------------------------------------------------------------------------------------------------


CHECKS = dict(ours=check_ours, theirs=check_theirs)


def on_ranks(ranks, check, **options):
    """Run a check on ranks of one group and print the rows of the first of them. Return whether all went well."""
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here))  # where the ranks find this module
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    test_sp.PRELOAD[:] = ["examples.test_models", "torch._dynamo"]
    with tempfile.TemporaryDirectory() as folder:
        codes = test_sp.spawn(f"1x{ranks}", Path(__file__).stem, {check: options}, Path(folder))
        printed = Path(folder, f"1x{ranks}.0.printed").read_text()
    print("\n".join(line for line in printed.splitlines() if f" sp {ranks} " in line), flush=True)
    return set(codes) == {0} and "FAILED" not in printed


if __name__ == "__main__":
    if "--bench" in sys.argv:
        bench("--tiny" in sys.argv).close()
    begins = tuple(word for word in sys.argv[1:] if word[:1] != "-")
    names = [name for name in CASES if not begins or name.startswith(begins)]
    print(f"diffusers {diffusers.__version__}, torch {torch.__version__}: {len(names)} cases, float64, relative errors")
    if "--diffusers" in sys.argv:
        pairs = [(ranks, sizes) for ranks in (2, 3) for sizes in ("even", "uneven")]
        well = all([on_ranks(ranks, "theirs", names=names, sizes=sizes) for ranks, sizes in pairs])
    else:
        well = all([on_ranks(ranks, "ours", names=names) for ranks in (2, 3, 4)])
        refused()
    print("paste: ok" if well else "paste: FAILED")
    sys.exit(not well)
