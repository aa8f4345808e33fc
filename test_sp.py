"""One check per rule. The rules about ranks run on every layout (dp x sp), one spawn a layout, all checks inside it:

    $ pytest                        # CPU and gloo; a layout with enough GPUs runs on them with NCCL
    $ pytest -k gradients -x        # one rule, and it alone
    $ pytest -k "1x3 and sampling"  # one rule on one layout
    $ LAYOUTS="1x1 3x1 2x3" pytest -k three_steps          # on other layouts
    $ COMPILE=1 LAYOUTS=1x3 pytest -k "1x3 and gradients"  # the same gradients from blocks that Inductor compiled

Everything is compared with one device (group=None) in float64 at sizes that do not divide: what is left is summation order.
This file tests the lesson and needs nothing else; `full/` has its tests beside it, and their harness from here.
"""

import contextlib
import importlib
import itertools
import json
import math
import os
import pickle
import random
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from concurrent import futures
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

import hunyuan_sp
import infer_min
import train_min
from comm import ParallelManager, all_to_all, gather_sequence, group_rank, split_sequence, split_sizes, ulysses
from hunyuan_sp import HunyuanConfig, HunyuanVideo, init_weights, joint_attention, load_release, patchify, text_lengths
from sampler import BatchSamplerShard, DPSPBatchSampler, SampleIndex, seeded
from train_min import Shapes

torch.set_num_threads(1)  # here and in what is forked; OMP's threads would spin where other ranks compute
os.environ["OMP_NUM_THREADS"] = "1"  # in what is started
HERE = Path(__file__).parent
GOLD = HERE / "golden"
LAYOUTS = os.environ.get("LAYOUTS", "1x1 1x2 2x1 1x3 2x2 1x5").split()
# 5 heads divide by no sp but 1 and 5; more channels in than out, as in image-to-video
CONFIG = HunyuanConfig(5, (2, 2, 4), 256.0, 2, 2, 1, 2.0, 5, 4, (1, 2, 2), 12, 6, True)
GOLDEN = HunyuanConfig(6, (2, 2, 4), 256.0, 2, 2, 2, 2.0, 8, 8, (1, 2, 2), 40, 24, True)
NAMES = ("latents", "timestep", "text", "lengths", "pooled", "guidance")


def close(ours, truth, tolerance=1e-10):
    """Largest difference, relative to the tensor's own size."""
    difference, size = (ours.double() - truth.double()).abs().max().item(), truth.abs().max().item()
    assert difference <= tolerance * (size + 1e-3), f"{difference:.3e} off at size {size:.3e}"


def equal(ours, truth):
    """Two dicts or lists of tensors, bit for bit."""
    if isinstance(truth, dict):
        assert truth.keys() == ours.keys()
        ours, truth = [ours[name] for name in truth], truth.values()
    return all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


def draws(seed, dtype=torch.float64):
    return partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_model(config, device="cpu", dtype=torch.float64, seed=0):
    """No parameter is zero: zero-initialised modulation would hide every block."""
    model, draw = HunyuanVideo(config).to(dtype), draws(seed, dtype)
    for param in model.parameters():
        param.data = draw(param.shape) * (0.5 if param.dim() < 2 else 0.2)
    return model.to(device)


def random_inputs(config, latents, lengths, device="cpu", seed=1):
    """latents (T, h, w), lengths: B valid text lengths."""
    draw, batch, length = draws(seed), len(lengths), max(lengths) + 1
    shapes = dict(latents=(config.in_channels, *latents), text=(length, config.text_dim), pooled=(config.pooled_dim,))
    inputs = {name: draw(batch, *shape) for name, shape in shapes.items()}
    inputs |= dict(timestep=torch.linspace(990.5, 3.25, batch), guidance=torch.full((batch,), 6016.0))
    inputs = {name: inputs[name].to(device) for name in NAMES if name != "lengths"} | dict(lengths=[*lengths])
    return inputs if config.guidance_embed else inputs | dict(guidance=None)


def sums(pm, tensors, group):
    """Each one's sum over the ranks of `group`, in one collective."""
    whole = pm.sum(torch.cat([t.flatten() for t in tensors]), group)
    return [part.view(t.shape) for part, t in zip(whole.split([t.numel() for t in tensors]), tensors)]


def golden_frequencies():
    """The fixture's 128 time frequencies, bit for bit. Another CPU's float32 exp rounds two of them the other way, and at
    t = 6016 that moves the output by 2e-4: a property of the model, seen with every implementation."""
    frequencies = load_file(GOLD / "time_frequencies.safetensors")["frequencies"]
    return mock.patch.object(hunyuan_sp, "time_frequencies", lambda device=None: frequencies.to(device))


def golden_model(dtype=torch.float64):
    model = HunyuanVideo(GOLDEN).to(dtype)
    load_release(model, GOLD / "weights_tencent.safetensors")
    return model


def golden_inputs(stored, case):
    """In the order of NAMES. The fixture holds masks, the model takes lengths."""
    lengths = text_lengths(stored[f"{case}.text_mask"])
    return {name: lengths if name == "lengths" else stored[f"{case}.{name}"] for name in NAMES}


def eager_compiler():
    """torch.compile without Inductor: dynamo's graphs, as many as there would be, run as they are."""
    compiler = torch.compile
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return mock.patch.object(torch, "compile", lambda part, **_: compiler(part, backend="eager"))


def losses(path):
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def load_checkpoint(path):
    assert path.is_dir()
    return {f"{f.name}/{k}": t for f in path.glob("*.safetensors") for k, t in load_file(f).items()}


def flip(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place:][1:]


class Touch:
    """A malicious pickle: it makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# --------------------------------------------------------------------------------------------------------------------
# ranks: a module with layouts has CHECKS {name: check(pm, folder, **options)}; it may have ONLY {name: layouts where
# others would show nothing new}, NEEDED {name: checks that must have run on 1x1} and setup_worker()

PRELOAD = ["test_sp", "torch._dynamo"]  # what a forked process has imported
PATIENCE = 119.0  # seconds that a collective waits here: only a hang takes so long
POOL = futures.ThreadPoolExecutor(1)  # layouts run one after another, whichever module they are of


def setup_worker():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product on a GPU


def worker(rank, world, layout, module, checks, folder, cuda):
    """One rank: every check of the module with its options, its traceback in a file of its own."""
    dp, sp = map(int, layout.split("x"))
    torch.multiprocessing.set_start_method("fork", force=True)  # of processes that load data
    os.environ["LOCAL_RANK"] = str(rank)
    printed = os.open(folder / f"{layout}.{rank}.printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(printed, 1), os.dup2(printed, 2)
    if cuda:
        torch.cuda.set_device(rank)
        torch.backends.cudnn.allow_tf32 = False  # GPUs would round what the VAE convolves
    module, patience = importlib.import_module(module), timedelta(seconds=PATIENCE)
    getattr(module, "setup_worker", lambda: None)()
    store, backend = dist.FileStore(str(folder / f"store-{layout}"), world), "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=world)
    pm = ParallelManager(dp, sp, "cuda" if cuda else "cpu")
    for group in (pm.dp_group, pm.sp_group):
        (getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout)(patience, group)
    for name, options in checks.items():
        try:
            module.CHECKS[name](pm, folder, **options)
            message = "ok"
        except BaseException:
            message = traceback.format_exc()
        (folder / f"{layout}.{name}.{rank}").write_text(message)
        if message != "ok":
            os._exit(1)
    pm.close()


def spawn(layout, module, checks, folder, cuda=False):
    """Run checks of a module, {name: options}, on a layout; the ranks' exit codes."""
    world, until = math.prod(map(int, layout.split("x"))), time.time() + 1800
    # forked from a process that has imported everything, which would break CUDA
    context = torch.multiprocessing.get_context("spawn" if cuda else "forkserver")
    if not cuda:
        context.set_forkserver_preload(PRELOAD)
    options = world, layout, module, checks, folder, cuda
    ranks = [context.Process(target=worker, args=(rank, *options)) for rank in range(world)]
    for process in ranks:
        process.start()
    while any(p.is_alive() for p in ranks) and not any(p.exitcode for p in ranks) and time.time() < until:
        time.sleep(0.05)
    for process in ranks:
        process.join(1.0 if any(p.exitcode for p in ranks) else 0)  # others may want to say something too
        process.kill()
        process.join()
    return [p.exitcode for p in ranks]


def assert_ok(layout, checks, folder, exitcodes):
    for check, rank in itertools.product(checks, range(len(exitcodes))):
        result = folder / f"{layout}.{check}.{rank}"
        assert result.is_file(), f"rank {rank} never finished {check}: exit codes {exitcodes}"
        assert result.read_text() == "ok", f"rank {rank}: {result.read_text()}"


@contextlib.contextmanager
def background_layouts(items, module, folder):
    """A function: (folder, exit codes) of a layout's ranks, spawned once a session, for the checks selected of it alone.

    items: pytest's, of which those of `module`, a name, with a layout count. The layouts run one after another, beside the
    tests of one process: those wait for other things than the processor.
    """
    wanted, rules = {}, importlib.import_module(module)
    needed = getattr(rules, "NEEDED", {})

    def key(layout):  # and whether it runs on GPUs
        return layout, torch.cuda.device_count() >= math.prod(map(int, layout.split("x")))

    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") and item.module.__name__ == module else {}
        if "layout" in params:
            wanted.setdefault(key(params["layout"]), set()).add(params.get("check"))
            if params.get("check") in needed:  # what the others resume and sample
                wanted.setdefault(("1x1", key(params["layout"])[1]), set()).update(needed[params["check"]])

    def run(layout, cuda):
        checks = {name: {} for name in rules.CHECKS if name in wanted[layout, cuda]}
        here = folder / ("cuda" if cuda else "cpu")  # other kernels, other rounding: no comparisons between the two
        here.mkdir(exist_ok=True)
        return here, spawn(layout, module, checks, here, cuda)

    done = {layout: POOL.submit(run, *layout) for layout in sorted(wanted, key=lambda k: k[0] != "1x1")}
    try:
        yield lambda layout: done[key(layout)].result()
    finally:
        futures.wait([job for job in done.values() if not job.cancel()])


def on_layouts(checks, only):
    """Parametrize a test by layout and check."""
    pairs = [(layout, name) for layout in LAYOUTS for name in checks if layout in only.get(name, layout).split()]
    return pytest.mark.parametrize("layout, check", pairs)


@pytest.fixture(scope="session", autouse=True)
def ranks_of_layout(request, tmp_path_factory):
    with background_layouts(request.session.items, "test_sp", tmp_path_factory.mktemp("layouts")) as function:
        yield function


# --------------------------------------------------------------------------------------------------------------------
# launches as a user types them. Seconds below are bounds against hanging alone: a test asserts order and outcome


STARTED, FORKED = [], []  # so that no process outlives its test


def python(*command, ranks=1, agent=(), out, cwd=HERE, **environment):
    """torchrun (one rank: plain python) with a script and its flags, printing to the file `out`."""
    run = ["-m", "torch.distributed.run", *(agent or ("--standalone", f"--nproc_per_node={ranks}"))]
    command = [sys.executable, *(run if ranks > 1 or agent else ()), *map(str, command)]
    environment = os.environ | dict(PYTHONPATH=str(cwd)) | environment
    with open(out, "a") as file:
        STARTED.append(subprocess.Popen(command, stdout=file, stderr=file, cwd=cwd, env=environment))
    return STARTED[-1]


def end_what_is_left():
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.terminate()  # an agent ends its ranks, unless it is killed
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
    while FORKED:
        FORKED.pop().kill()


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    end_what_is_left()


def launch(*command, out, timeout=300, **more):
    """Until it ends: (exit code, everything printed). `out`: a folder."""
    file = out / f"printed-{len(list(out.glob('printed-*')))}"
    return python(*command, out=file, **more).wait(timeout=timeout), file.read_text()


def one_rank(program, flags, rank, world, port, printed):
    """A rank as torchrun would start it; what it prints goes to a file."""
    if world > 1:
        ranks = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)  # fmt: skip
        os.environ.update({name: str(value) for name, value in ranks.items()})
    torch.multiprocessing.set_start_method("fork", force=True)  # of processes that load data
    os.chdir(HERE)
    file = os.open(printed, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.argv = [program, *flags, "--device", "cpu"]
    runpy.run_path(str(HERE.joinpath(*program.split(".")).with_suffix(".py")), run_name="__main__")


def start_forked(program, *flags, ranks=1, out):
    """A program, "train_min" or "full.train", with its flags, in processes forked from one that has imported everything,
    which saves seconds: [(process, file that it prints to)] of each rank."""
    context, port, n = torch.multiprocessing.get_context("forkserver"), free_port(), len(list(out.glob("forked-*")))
    context.set_forkserver_preload(PRELOAD)
    printed, flags = [out / f"forked-{n}.{rank}" for rank in range(ranks)], [*map(str, flags)]
    work = [context.Process(target=one_rank, args=(program, flags, r, ranks, port, printed[r])) for r in range(ranks)]
    for process in work:
        process.start()
    FORKED.extend(work)
    return list(zip(work, printed))


def fork(program, *flags, ranks=1, out):
    """Start a program like that, wait until its ranks end, and return [(exit code, what it printed)] of each."""
    work = start_forked(program, *flags, ranks=ranks, out=out)
    for process, _ in work:
        process.join(300)
    return [(process.exitcode, file.read_text()) for process, file in work]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def workers_of(agent):
    """Process ids of the ranks of a torchrun agent, in order."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, text=True).stdout
    return [int(line) for line in listed.split()]


def wait_for(condition, seconds=300):
    until = time.time() + seconds
    while not condition():
        assert time.time() < until
        time.sleep(0.02)


def steps_done(run):
    return (run / "log.jsonl").read_text().count("\n") if (run / "log.jsonl").exists() else 0


class Ragged:
    """Seven samples in float64, for 3 steps of a global batch of 5: an uneven tail, and ragged text."""

    def __len__(self):
        return 7

    def __getitem__(self, i):
        draw = draws(int(i))
        return i, draw(4, 2, 4, 6), draw(1 + i % 4, CONFIG.text_dim), draw(CONFIG.pooled_dim)


# latents (T, h, w), valid text lengths
CASES = {"ragged": ((3, 6, 10), (7, 2)), "equal": ((1, 6, 6), (3, 3))}
CASES |= {"fewer text tokens than ranks": ((2, 4, 6), (1,)), "fewer video tokens": ((1, 2, 4), (4, 2, 3))}


def gpu(major, minor):
    """A GPU of that compute capability; 0: none."""
    found = dict(is_available=lambda: major > 0, get_device_capability=lambda *_: (major, minor))
    return mock.patch.multiple(torch.cuda, **found)


class Attention(TorchDispatchMode):
    """Counts attention's forwards, and keeps the strides of the gradients that its backward gets."""

    count, strides = 0, ()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if "scaled_dot_product" in op.name():
            self.count += "backward" not in op.name()
            self.strides += (args[0].stride(),) * ("backward" in op.name())
        return op(*args, **kwargs or {})


# --------------------------------------------------------------------------------------------------------------------
# checks on every layout: (pm, folder) -> None; `folder` is shared by the ranks and by all layouts


def check_groups_are_who_they_say(pm, folder):
    """sp ranks are neighbours; an own mesh gives the ranks that it says, in whatever order it has them."""

    def members(manager):
        return [dist.get_process_group_ranks(group) for group in (manager.dp_group, manager.sp_group)]

    dp, sp, kind, names = pm.dp_size, pm.sp_size, pm.device.type, ("dp", "sp")
    assert (pm.rank, pm.world_size, pm.is_main) == (dist.get_rank(), dp * sp, dist.get_rank() == 0)
    assert pm.rank == pm.dp_rank * sp + pm.sp_rank
    assert members(pm) == [[*range(pm.sp_rank, dp * sp, sp)], [*range(pm.dp_rank * sp, (pm.dp_rank + 1) * sp)]]
    for size in {1, sp, dp * sp}:
        layer = torch.nn.Linear(4, 4, device=pm.device)
        pm.shard(layer, [], shard_size=size)
        assert layer.weight.device_mesh.mesh_dim_names == ("replicate", "shard")[size == dp * sp :]
    own = ParallelManager(mesh=init_device_mesh(kind, (dp, sp), mesh_dim_names=names))
    for name in ("rank", "world_size", "is_main", "dp_rank", "dp_size", "sp_rank", "sp_size", "device"):
        assert getattr(own, name) == getattr(pm, name), name
    assert members(own) == members(pm)
    other = ParallelManager(mesh=init_device_mesh(kind, (sp, dp), mesh_dim_names=names[::-1]))
    assert (other.sp_rank, other.dp_rank, other.sp_size, other.dp_size) == (*divmod(pm.rank, dp), sp, dp)
    assert other.sum(1, other.sp_group) == sp and other.sum(1, other.dp_group) == dp
    # ranks in another order: those that share a sample must agree on which one it is
    order = torch.tensor([3, 1, 0, 2] if (dp, sp) == (2, 2) else [*range(dp * sp)][::-1]).view(dp, sp)
    odd = ParallelManager(mesh=DeviceMesh(kind, order, mesh_dim_names=names))
    everyone = [None] * pm.world_size
    dist.all_gather_object(everyone, (odd.dp_rank, odd.sp_rank))
    rows = [sorted(everyone[rank] for rank in row) for row in order.tolist()]
    assert rows == [[(n, m) for m in range(sp)] for n in range(dp)], rows
    assert (odd.dp_size, odd.sp_size) == (dp, sp) and odd.sp_rank == group_rank(odd.sp_group)
    whole = torch.arange(7, device=pm.device)
    assert torch.equal(gather_sequence(split_sequence(whole, odd.sp_group, 0), odd.sp_group, 7, 0), whole)

    wrong = [init_device_mesh(kind, (dp, sp), mesh_dim_names=("dp", "tp"))]
    wrong += [DeviceMesh(kind, torch.arange(1).view(1, 1), mesh_dim_names=names)] * (pm.world_size > 1)
    for mesh in wrong:
        with pytest.raises(ValueError, match="a mesh needs the dims dp and sp over all ranks"):
            ParallelManager(mesh=mesh)


def check_all_to_all_moves_what_it_says(pm, folder):
    group, ranks = pm.sp_group, pm.sp_size
    tokens, heads = [3 * (r % 2) + r for r in range(ranks)], split_sizes(7, group)  # rank 0 holds nothing
    whole = draws(0)(2, sum(tokens), 7, 3).to(pm.device)
    mine_t, mine_h = whole.split(tokens, 1)[pm.sp_rank], whole.split(heads, 2)[pm.sp_rank]
    assert torch.equal(all_to_all(mine_t, group, 2, 1, heads, tokens), mine_h)
    assert torch.equal(all_to_all(mine_h, group, -3, -2, tokens, heads), mine_t)
    every_other = torch.stack((mine_t, mine_t), -1)[..., 0]
    assert torch.equal(all_to_all(every_other, group, -2, 1, heads, tokens), mine_h)
    stacked = all_to_all(torch.stack((mine_t, -mine_t), 2), group, 3, 1, heads, tokens)
    assert torch.equal(stacked, torch.stack((mine_h, -mine_h), 2))
    for length, dim in itertools.product((1, ranks, 4 * ranks + 1), (1, -2)):
        x = torch.arange(6.0 * length, device=pm.device).view(2, length, 3)
        assert torch.equal(gather_sequence(split_sequence(x, group, dim), group, length, dim), x)
    with pytest.raises(ValueError, match="does not fit the sizes"):
        all_to_all(mine_t, group, 2, 1, heads, [t + 1 for t in tokens])
    for sizes in ((heads + [0], tokens), (heads, tokens + [0])):
        with pytest.raises(ValueError, match=f"{ranks} ranks need {ranks} sizes"):
            all_to_all(mine_t, group, 2, 1, *sizes)


def check_collectives_are_transposes(pm, folder):
    """<Ax, y> = <x, A'y>, summed over ranks, at uneven splits: backward is the exact transpose of forward."""
    group, ranks, me = pm.sp_group, pm.sp_size, pm.sp_rank
    tokens, heads = [r + 1 for r in range(ranks)], split_sizes(ranks + 1, group)
    draw, length = draws(pm.rank), 3 * ranks - 1
    cases = [
        (draw(2, tokens[me], sum(heads), 3), lambda x: all_to_all(x, group, 2, 1, heads, tokens)),
        (draw(2, sum(tokens), heads[me], 3), lambda x: all_to_all(x, group, 1, 2, tokens, heads)),
        (draw(2, split_sizes(length, group)[me], 3), lambda x: gather_sequence(x, group, length)),
        (draw(2, length, 3), lambda x: split_sequence(x, group)),
    ]
    for n, (x, collective) in enumerate(cases):
        x = x.to(pm.device).requires_grad_()
        ax = collective(x)
        y = draw(*ax.shape).to(pm.device)
        ax.backward(y)
        v = draw(*x.shape).to(pm.device)
        sides = pm.sum(torch.stack(((collective(v) * y).sum(), (v * x.grad).sum())), group)
        assert abs(sides[0] - sides[1]) < 1e-10 and abs(sides[0]) > 1e-3, f"case {n}: {sides.tolist()}"


def check_second_order_gradients(pm, folder):
    """A gradient penalty, the squared gradient of the loss by its input, beside a residual: equal to one device."""
    draw, length = draws(0), 11
    x, weight = (t.to(pm.device).requires_grad_() for t in (draw(1, length, 5, 4), draw(4, 4)))

    def gradients(group):
        tokens, heads, part = split_sizes(length, group), split_sizes(5, group), split_sequence(x, group)
        h = all_to_all((part @ weight).tanh(), group, 2, 1, heads, tokens)  # [1, L, H/P, D]
        h = all_to_all(h + h.softmax(1) * h.sum(1, keepdim=True), group, 1, 2, tokens, heads)
        h = h * gather_sequence(h, group, length).tanh().mean(1, keepdim=True)
        loss = (part + h).square().sum()
        (slope,) = torch.autograd.grad(loss, part, create_graph=True)
        pairs = zip(*(torch.autograd.grad(y, (x, weight), retain_graph=True) for y in (loss, slope.square().sum())))
        return [g + h for g, h in pairs]

    for ours, truth in zip(gradients(pm.sp_group), gradients(None)):
        close(pm.sum(ours, pm.sp_group), truth)


def check_ulysses(pm, folder):
    """`ulysses` around a kernel, beside the kernel on one device: outputs and the gradients of q, k, v and a float mask, for
    keys of another length, masks, joined streams, heads that do not divide; and inside a function that is compiled."""
    group, draw, counters = pm.sp_group, draws(0), torch._dynamo.utils.counters

    def kernel(q, k, v, mask):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    def attend(group, q, k, v, length, keys, mask):
        q, k, v = (2 * q).sin(), k.cos(), v * 3
        return (kernel(q, k, v, mask) if group == 0 else ulysses(kernel, q, k, v, group, length, keys, mask)).tanh()

    def part(x, length, dim=1):
        streams = x.split(length if isinstance(length, tuple) else (length,), dim)
        return torch.cat([split_sequence(stream, group, dim) for stream in streams], dim)

    assert split_sizes((11, 4), group) == [a + b for a, b in zip(split_sizes(11, group), split_sizes(4, group))]
    cases = [  # tokens, keys (None: the same), heads, heads of the mask (None: no mask; 0: of bool)
        (11, None, 5, None), (11, 7, 7, 1), (3, 13, 5, 5), ((11, 4), None, 7, 1), ((2, 1), 8, 5, 0), ((11, 4), (3, 9), 6, 6),
    ]  # fmt: skip
    for length, keys, heads, mask_heads in cases:
        tokens, there = (sum(n) if isinstance(n, tuple) else n for n in (length, keys or length))
        q, k, v = inputs = [draw(2, n, heads, 4).to(pm.device).requires_grad_() for n in (tokens, there, there)]
        mask = None if mask_heads is None else draw(2, mask_heads or 1, 1, there).to(pm.device)
        if mask_heads:
            inputs.append(mask.requires_grad_())
        elif mask_heads == 0:
            mask = mask > mask.amin(3, keepdim=True)
        truth = attend(0, q, k, v, length, keys, mask)
        cotangent = draw(*truth.shape).to(pm.device)
        true_grads = torch.autograd.grad(truth, inputs, cotangent, retain_graph=True)
        assert min(grad.abs().max() for grad in true_grads) > 1e-6, "it is not tested: a gradient is zero"
        close(attend(None, q, k, v, length, keys, mask), truth)
        counters.clear()
        for function in (attend, torch.compile(attend, backend="eager"))[: 1 + (keys == (3, 9))]:
            parts = part(q, length), part(k, keys or length), part(v, keys or length)
            out = function(group, *parts, length, keys, None if mask is None else part(mask, keys or length, 3))
            padded, wanted = (F.pad(x, (0, 1)) for x in (out, part(truth, length)))  # a rank may have no token
            assert out.shape == part(truth, length).shape and torch.allclose(padded, wanted, 0, 1e-10)
            grads = torch.autograd.grad(out, inputs, part(cotangent, length))
            for grad, true in zip(sums(pm, grads, group), true_grads):
                close(grad, true)
        assert keys != (3, 9) or any("ulysses" in reason for reason in counters["graph_break"]), counters


def check_gradients(pm, folder, around=contextlib.nullcontext):
    """Forward, input gradients and every parameter gradient, under every checkpointing setting. around: a context manager
    for the forward and backward of what is checkpointed."""
    group, still = pm.sp_group, replace(CONFIG, image_condition_type="token_replace")
    everything = [(CONFIG, case, hunyuan_sp.CHECKPOINTING) for case in CASES]
    everything += [(still, case, ["attention"]) for case in CASES]
    everything += [(replace(CONFIG, guidance_embed=False, in_channels=9), "ragged", ["none"])]
    for config, name, settings in everything:
        model, draw = random_model(config, pm.device), draws(2)
        inputs, params = random_inputs(config, *CASES[name], pm.device), dict(model.named_parameters())
        wanted = [*params.values(), *(inputs[n].requires_grad_() for n in ("latents", "text", "pooled"))]
        truth = model(**inputs)
        cotangents = [draw(truth.shape).to(pm.device) for _ in range(pm.sp_size)]
        true_grads = torch.autograd.grad(truth, wanted, sum(cotangents))
        for n, g in zip(params, true_grads if name == "ragged" else ()):
            assert g.abs().max() > 1e-6, f"{n} is not tested: its gradient is zero"

        if os.environ.get("COMPILE"):
            model.compile_blocks()
        # split: what training does. The whole gradient is the plain sum over ranks
        true_patches, local = (patchify(x, (1, 2, 2)) for x in (truth, sum(cotangents)))
        for checkpointing in settings:
            with contextlib.nullcontext() if checkpointing == "none" else around():
                patches = model(**inputs, group=group, gather=False, checkpointing=checkpointing)
                grads = torch.autograd.grad(patches, wanted, split_sequence(local, group))
            close(gather_sequence(patches, group, true_patches.shape[1]), true_patches)
            for g, t in zip(sums(pm, grads, group), true_grads):
                close(g, t)

        # gathered: every rank has the whole output, and here a loss of its own
        out = model(**inputs, group=group)
        close(out, truth)
        for g, t in zip(sums(pm, torch.autograd.grad(out, wanted, cotangents[pm.sp_rank]), group), true_grads):
            close(g, t)


def check_flow_loss_with_an_image(pm, folder):
    """token_replace: frame 0 is the image, given and not learned. latent_concat: the image and its mask beside, all learned."""
    for kind, channels in (("token_replace", 4), ("latent_concat", 9)):
        config = replace(CONFIG, in_channels=channels, out_channels=4, image_condition_type=kind)
        model, draw, first = random_model(config, pm.device), draws(7), int(kind == "token_replace")
        noisy, target, image = (draw(2, 4, frames, 4, 6).to(pm.device) for frames in (3, 3, 1))
        inputs = random_inputs(config, (3, 4, 6), (5, 2), pm.device)
        batch = inputs | dict(latents=noisy, target=target, image=image, weight=torch.ones(2, device=pm.device))
        latents = torch.cat((image, noisy[:, :, 1:]), 2)
        if channels == 9:
            condition, mask = torch.zeros_like(noisy), torch.zeros_like(noisy[:, :1])
            condition[:, :, :1], mask[:, :, 0] = image, 1
            latents = torch.cat((noisy, condition, mask), 1)
        truth = (model(**inputs | dict(latents=latents)) - target)[:, :, first:].square().mean()
        ours = train_min.flow_loss(model, batch, 6.0, pm.sp_group) / train_min.count_tokens(batch, config)
        close(pm.sum(ours.detach(), pm.sp_group), truth.detach())


class SplitThenGather(torch.autograd.Function):
    """A split whose backward is an all-gather: right only where each rank's gradient would otherwise be discarded."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.rest = group, x.shape[1]
        return split_sequence(x, group).clone()

    @staticmethod
    def backward(ctx, grad):
        return gather_sequence(grad, *ctx.rest), None


def gather_then_slice(x, group, length):
    """A gather whose backward is a slice."""
    parts = gather_sequence(x.detach(), group, length).split(split_sizes(length, group), 1)
    return torch.cat([x if rank == group_rank(group) else part for rank, part in enumerate(parts)], 1)


MISTAKES = [  # and their cures
    ("losses divided by the global count, gradients averaged over the ranks (DDP's and FSDP's default)", "sum: `set_gradient_divide_factor(1.0)`"),
    ("the mean of local means", "local sums divided by the global count"),
    ("a gather whose backward is a slice, the loss of all tokens on every rank, gradients averaged", "`gather_sequence`, or the loss of my tokens alone"),
    ("an exact gather, the loss of all tokens on every rank, gradients summed", "every rank has the same loss: divide it by sp, or take my tokens alone"),
    ("parameters before the split, replicated on every rank, are not summed over sp", "sum them over sp as well"),
    ("a split whose backward is an all-gather, gradients summed", "`split_sequence`: a slice, whose backward is zeros elsewhere"),
    ("padding is counted: each shard is padded to 4 tokens, with error 0", "count real tokens"),
    ("the mean over two micro-batches, of 11 and 5 tokens", "one count for the whole step, over all micro-batches"),
    ("each rank clips its shard by the shard's own norm", "`clip_grad_norm`: one norm over all shards"),
]  # fmt: skip


def commit_mistakes(pm):
    """Commit each mistake on 3 ranks with 4, 4 and 3 tokens, and yield what one sees. Of three weights `refine`
    comes before the split, whole on every rank; `attend` is on split tokens; `read` after them (and after a gather)."""
    draw, group, P = draws(0), pm.sp_group, 3
    sizes, rank = split_sizes(11, group), pm.sp_rank
    weights = [(0.4 * draw(6, columns)).requires_grad_() for columns in (6, 18, 6)]
    data = {length: (draw(1, length, 6), draw(1, length, 6)) for length in (11, 5)}
    exact = partial(pytest.approx, rel=1e-10, abs=1e-10)

    def errors(group, length=11, split=split_sequence, gather=None):
        """The mean squared error of each of this rank's tokens, or of all of them after `gather`."""
        (x, target), (refine, attend, read) = data[length], weights
        h = split(x @ refine, group)
        out = h + joint_attention((h @ attend).unflatten(2, (3, 3, 2)), length, [0], group)
        out, target = (gather(out, group, length), target) if gather else (out, split_sequence(target, group))
        return (out @ read - target).square().mean(2)

    def of_rank(loss):
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, weights)])

    def of_all(loss):
        return pm.sum(of_rank(loss), group)

    def seen(wrong, right):
        """(factor, what is not in the right gradient's direction, relative to its norm)."""
        factor = (wrong @ right / (right @ right)).item()
        return factor, ((wrong - factor * right).norm() / right.norm()).item()

    def mixed(wrong, right):
        factor, other = seen(wrong, right)
        assert other > 0.01, "a pure factor"
        return f"× {factor:.2f} in all, plus {100 * other:.0f} % that points elsewhere"

    def factors(wrong, *expected):
        """Return the factors of the three weights' gradients, which have no other direction."""
        parts = [seen(*pair) for pair in zip(wrong.split((36, 108, 36)), truth.split((36, 108, 36)))]
        assert [f for f, _ in parts] == exact(expected) and max(other for _, other in parts) < 1e-10, parts
        first, _, last = (f"× {factor:.3g}" for factor, _ in parts)
        return first, last

    truth = of_rank(errors(None).mean())
    close(of_all(errors(group).sum() / 11), truth)  # the rule

    every, _ = factors(of_all(errors(group).sum() / 11) / P, *[1 / 3] * 3)
    yield f"{every}, 1 / (dp × sp), for every parameter"
    wrong, count = of_all(errors(group).mean()) / P, [11 / (P * n) for n in sizes]
    close(wrong, of_all(count[rank] * errors(group).sum() / 11))
    yield f"tokens count × {count[0]:.3f} on ranks with 4, × {count[2]:.3f} on the one with 3: {mixed(wrong, truth)}"
    before, after = factors(of_all(errors(group, gather=gather_then_slice).mean()) / P, 1 / 3, 1 / 3, 1)
    yield f"{before}, 1 / sp, before the gather, {after} after it"
    every, _ = factors(of_all(errors(group, gather=gather_sequence).mean()), 3, 3, 3)
    yield f"{every}, sp, for every parameter"
    parts = [torch.empty_like(truth) for _ in sizes]
    dist.all_gather(parts, of_rank(errors(group).sum() / 11), group=group)
    shares = [seen(part[:36], truth[:36]) for part in parts]
    assert sum(factor for factor, _ in shares) == exact(1) and min(other for _, other in shares) > 0.01
    factors_of_ranks = ", ".join(f"{factor:.2f}" for factor, _ in shares)
    yield f"each rank sees its own share, × {factors_of_ranks}, which points elsewhere: the copies drift apart"
    before, after = factors(of_all(errors(group, split=SplitThenGather.apply).sum() / 11), 3, 1, 1)
    yield f"{before}, sp, before the split, {after} after it"
    padded = F.pad(errors(group), (0, 4 - sizes[rank]))
    every, _ = factors(of_all(padded.mean() / P), *[11 / 12] * 3)
    yield f"{every}, 11 / 12, for every parameter; another factor at another length"
    counts, both = {n: 16 / (2 * n) for n in (11, 5)}, torch.cat([errors(None, n) for n in (11, 5)], 1)
    right, wrong = of_rank(both.mean()), of_all(sum(errors(group, n).sum() / n for n in (11, 5)) / 2)
    close(of_all(sum(errors(group, n).sum() / 16 for n in (11, 5))), right)
    close(wrong, of_all(sum(counts[n] * errors(group, n).sum() / 16 for n in (11, 5))))
    yield f"tokens count × {counts[11]:.3f} in the first, × {counts[5]:.3f} in the second: {mixed(wrong, right)}"
    limit = truth.norm() / 2
    wrong = torch.cat([part * (limit / part.norm()).clamp(max=1) for part in truth.tensor_split(P)])
    assert 1.01 * limit < wrong.norm() <= P**0.5 * limit
    yield f"too long after clipping: {mixed(wrong, truth / 2)}"


def check_wrong_gradients(pm, folder):
    """README, "Why is my gradient wrong?": its table is what `commit_mistakes` measures. (On 1x3 alone.)"""
    rows = [(mistake, seen, cure) for (mistake, cure), seen in zip(MISTAKES, commit_mistakes(pm), strict=True)]
    head = ("mistake", "what you see, on 3 ranks with 4, 4 and 3 tokens", "cure")
    table = ["| " + " | ".join(row) + " |\n" for row in (head, *rows)]
    table.insert(1, "|---|---|---|\n")
    assert "".join(table) in (HERE / "README.md").read_text(), "README.md's table should be\n" + "".join(table)


def check_bfloat16(pm, folder):
    """Against one device with the same weights: what attention rounds differently in another order of tokens.
    On GPUs at real size: 46,800 tokens, 4 + 8 blocks of the 13B."""
    config, case, size = CONFIG, CASES["ragged"], 0.3
    if pm.device.type == "cuda":
        config = HunyuanConfig.preset("13b", double_depth=4, single_depth=8)
        case, size = ((13, 90, 160), (60,)), 0.02
    with pm.device:
        model = HunyuanVideo(config).to(torch.bfloat16).requires_grad_(False)
    generator = torch.Generator(pm.device).manual_seed(0)
    for param in model.parameters():
        param.normal_(0, size, generator=generator)
    inputs = random_inputs(config, *case, pm.device)
    truth, ours = (model(**inputs, group=group).float() for group in (None, pm.sp_group))
    assert truth.norm() > 0 and (ours - truth).norm() <= 2e-2 * truth.norm()


def check_blocks_are_compiled_once(pm, folder):
    """Two graphs for each kind of block, one on each side of attention, forward and recomputed, although text arrives as a
    slice; and the gradients are the same."""
    plain, model = (random_model(replace(CONFIG, double_depth=2, single_depth=2), pm.device) for _ in "12")
    inputs = random_inputs(CONFIG, (2, 8, 8), (2 * pm.sp_size + 1,), pm.device)
    with eager_compiler():
        model.compile_blocks()
    for _ in range(2):
        model(**inputs, group=pm.sp_group, checkpointing="attention").sum().backward()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
        plain(**inputs, group=pm.sp_group).sum().backward()
    for ours, truth in zip(model.parameters(), plain.parameters()):
        close(ours.grad, truth.grad)


def check_activation_memory(pm, folder):
    """The sp ranks share what backward keeps, weights aside: together no more than one device's, to 10 %."""
    model, inputs = random_model(CONFIG, pm.device), random_inputs(CONFIG, (4, 24, 24), (3,), pm.device)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def kept(group):
        kept = []  # alive, so that no place is used twice
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.untyped_storage()) or x, lambda x: x):
            assert model(**inputs, group=group, gather=False).requires_grad
        return sum({x.data_ptr(): x.nbytes() for x in kept if x.data_ptr() not in weights}.values())

    assert pm.sum(kept(pm.sp_group), pm.sp_group).item() <= 1.1 * kept(None)


@golden_frequencies()
def check_golden(pm, folder):
    """The published model's own numbers, at 175 video and 10 + 4 text tokens."""
    stored, grads = (load_file(GOLD / f"{n}.safetensors") for n in ("io", "grads_a_tencent"))
    # cosines may round the other way too, which moves the output by 1e-8; where they don't, nothing is left
    same = torch.equal(hunyuan_sp.sinusoid(stored["time.t"].to(pm.device)).cpu(), stored["time.sinusoid256"])
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12 if same else 1e-6)):
        model = golden_model(dtype).to(pm.device)
        for case in "ab":
            inputs = golden_inputs(stored, case).items()
            inputs = {n: x.to(pm.device, dtype) if torch.is_tensor(x) else x for n, x in inputs}
            out = model(**inputs, group=pm.sp_group)
            assert (out.cpu() - stored[f"{case}.out_ref64"]).abs().max() < tolerance
            if case == "a":
                mine = out * (pm.sp_rank == 0)  # the gathered output is on every rank: count it once
                mine.backward(stored["a.cotangent"].to(out))
    summed = sums(pm, [param.grad for param in model.parameters()], pm.sp_group)
    for (name, _), grad in zip(model.named_parameters(), summed):
        grad = grad.cpu().flatten()
        digest = torch.stack([grad.sum(), grad.norm(), (grad * torch.arange(len(grad)).double().cos()).sum()])
        close(digest, grads[f"digest.{name}"], 1e-10 if same else 1e-6)
        if f"param.{name}" in grads:
            close(grad, grads[f"param.{name}"].flatten(), 1e-6)  # stored in float32


def check_three_steps(pm, folder, steps=5, around=contextlib.nullcontext, policy=None):
    """AdamW, clipping, accumulation under FSDP2 and HSDP: equal to one device on the whole batch, weight by weight, after 3
    steps at every setting and after `steps` at the first. Of the second setting, around: a context manager for every step;
    policy: of offloading weights."""
    config = replace(CONFIG, in_channels=4, double_depth=1, single_depth=1)
    collate = partial(train_min.collate, seed=0, shift=3.0, caption_drop=0.3)

    def batches(rank, size, accumulation):
        sampler = DPSPBatchSampler(7, 5, rank, size, accumulation)
        while True:
            yield list(DataLoader(Ragged(), batch_sampler=sampler, collate_fn=collate))[: sampler.micro_batches]
            sampler.advance()

    def make(device, *rules):
        model = random_model(config, device)
        if rules:
            pm.shard(model, model.blocks, None, *rules)
        return model, torch.optim.AdamW(model.parameters(), weight_decay=0.1, fused=True)

    (truth, optimizer), stream, rates, seen, weights = make(pm.device), batches(0, 1, 1), [], [], {}
    for step in range(steps):
        batch = train_min.to_device(next(stream)[0], pm.device)
        inputs = {k: batch[k] for k in NAMES[:5]} | dict(guidance=torch.full_like(batch["timestep"], 1000.0))
        error = truth(**inputs) - batch["target"]
        loss = error[batch["weight"] > 0].square().mean()  # the definition: the mean over everything real
        loss.backward()
        seen.append((loss.item(), torch.nn.utils.clip_grad_norm_(truth.parameters(), 0.5).item()))
        rates.append(1e-2 / (step + 1))
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.step()
        optimizer.zero_grad()
        weights[step] = [p.detach().clone() for p in truth.parameters()] if step in (2, steps - 1) else None

    settings = [(pm.world_size, 1, True, "none"), (pm.world_size, 2, False, "full")]
    settings += [(size, 2, True, "attention") for size in sorted({pm.sp_size, 1} - {pm.world_size})]
    for n, (shard_size, accumulation, reshard, checkpointing) in enumerate(settings):
        here, last = policy if n == 1 else None, 2 if n else steps - 1
        model, optimizer = make("cpu" if here else pm.device, shard_size, reshard, here)
        stream, rules = batches(pm.dp_rank, pm.dp_size, accumulation), dict(clip=0.5, checkpointing=checkpointing)
        for rate, (loss, norm) in zip(rates[: last + 1], seen):
            with around() if n == 1 else contextlib.nullcontext():
                ours = train_min.train_step(pm, model, optimizer, next(stream), rate, guidance=1.0, **rules)
            assert abs(ours[0] - loss) < 1e-10 and abs(ours[1] - norm) < 1e-10 * norm
        for (name, param), true in zip(model.named_parameters(), weights[last]):
            assert isinstance(param, DTensor), name
            close(param.full_tensor().to(true), true, 1e-10 if n else 1e-12)


@contextlib.contextmanager
def as_on_cpus(pm):
    """On GPUs as on CPUs: in float32, and the same every time."""
    torch.use_deterministic_algorithms(pm.device.type == "cuda")
    with mock.patch.object(torch, "bfloat16", torch.float32 if pm.device.type == "cuda" else torch.bfloat16):
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def small_preset(config=None):
    """In place of every preset: by default the toy with two blocks."""
    config = config or replace(hunyuan_sp.TINY, double_depth=1, single_depth=1)
    return mock.patch.object(HunyuanConfig, "preset", lambda *_, **__: config)


def run_here(program, main, pm, *flags, preset=None):
    """The trainer or sampler itself, in this process; its flags, parsed."""
    args = train_min.parse(program.add_flags, None, None, [*map(str, flags), "--device", pm.device.type])
    with small_preset(preset), as_on_cpus(pm):
        main(args)
    return args


def train(pm, *flags, **more):
    return run_here(train_min, train_min.train, pm, "--dp", pm.dp_size, "--sp", pm.sp_size, *flags, **more)


# 5 samples on 2 x 2 micro-batches: dp ranks have 3 and 2, so that a count that is not global shows
SHORT = "--steps 5 --warmup 2 --lr 1e-3 --batch 5 --accumulation 2 --caption_drop 0.5 --save_every 2".split()


def check_loss_curve_and_resume(pm, folder, everyone=False):
    """Compare the same run on every layout. Step 2 of the layout that ran before (or of everyone) goes on here; on one rank and on
    two so does its own, and then that one's step 4."""
    own = folder / f"run-{pm.dp_size}x{pm.sp_size}"
    others = sorted((p for p in folder.glob("run-*") if p != own), key=lambda p: (p / "log.jsonl").stat().st_mtime)
    dist.barrier()  # until all have looked
    train(pm, *SHORT, "--out", own)
    assert sorted(p.name for p in own.iterdir()) == ["log.jsonl", "step-2", "step-4", "step-5"]
    odd = [p for p in own.glob("step-*/*") if p.name != "manifest.json" and p.suffix != ".safetensors"]
    assert not odd, f"something else, a pickle maybe, is in a checkpoint: {odd}"
    dist.barrier()  # until all have looked again
    # resumed: exactly where this layout saved it, to rounding where another one did
    again = [(own / "step-2", "once", [3, 4, 5], 0), (own / "once/step-4", "twice", [5], 0)]
    again = again[: {1: 1, 2: 2}.get(pm.world_size, 0)]
    foreign = [(p / "step-2", f"from-{p.name}", [3, 4, 5], 1e-6) for p in (others if everyone else others[-1:])]
    truth, ours = losses(others[0] if others else own), losses(own)
    assert [entry["step"] for entry in ours] == [1, 2, 3, 4, 5]
    for a, b in zip(truth, ours):
        for key in ("loss", "grad_norm"):
            assert abs(a[key] - b[key]) <= 1e-5 * a[key], (a, b)
    for source, name, steps, tolerance in [*foreign, *again]:
        if pm.is_main:
            shutil.copytree(source, own / name / source.name)
        dist.barrier()
        train(pm, *SHORT, "--out", own / name, "--resume")
        assert [entry["step"] for entry in losses(own / name)] == steps
        for a, b in zip(ours[-len(steps) :], losses(own / name)):
            assert abs(a["loss"] - b["loss"]) <= tolerance * a["loss"], (name, a, b)
        assert tolerance or equal(load_checkpoint(own / name / "step-5"), load_checkpoint(own / "step-5"))


def check_sampling(pm, folder):
    """Sample what the 1x1 run saved on this layout; with a negative prompt of another length in the same batch; and the
    release's weights with embeddings from a file."""
    own, clips, draw = folder / f"clips-{pm.dp_size}x{pm.sp_size}", {}, draws(6, torch.float32)
    own.mkdir(exist_ok=True)
    if pm.is_main:
        save_file(dict(text=draw(5, GOLDEN.text_dim), pooled=draw(GOLDEN.pooled_dim)), own / "embeds.safetensors")
        save_file(golden_model(torch.float32).state_dict(), own / "release.safetensors")
    dist.barrier()

    def infer(name, *flags, **more):
        """Keep the clip that rank 0 shows; the flags, parsed."""
        with mock.patch.object(infer_min, "show", lambda clip, *_: clips.update({name: clip})):
            args = run_here(infer_min, infer_min.infer, pm, *flags, "--steps", 3, **more)
        assert (name in clips) == pm.is_main
        return args

    args = infer("plain", "--checkpoint", folder / "run-1x1")
    release = ["--weights", own / "release.safetensors", "--embeds", own / "embeds.safetensors"]
    infer("release", *release, "--height", 32, "--width", 48, "--frames", 5, preset=GOLDEN)
    with as_on_cpus(pm):
        model = infer_min.build_model(pm, args)
    prompts = [Shapes.embed(prompt, model.config) for prompt in ("a blue circle moves up", "a red thing")]
    towards, away = (([text.to(pm.device)], pooled[None].to(pm.device)) for text, pooled in prompts)
    noise = draws(5, torch.float32)(1, *Shapes.CLIP_SHAPE).to(pm.device)
    clips["cfg"] = infer_min.sample(model, noise, *towards, 3, 4.0, None, pm.world_group, away, 3.0).cpu()
    if pm.is_main:
        save_file(clips, own / "clips.safetensors")
        for name, truth in load_file(folder / "clips-1x1/clips.safetensors").items():
            assert truth.std() > 0.1 and (clips[name] - truth).abs().max() < 1e-5, name


def check_noise_is_for_benchmarks(pm, folder):
    """A large model without data trains on noise, and saves only if asked."""
    flags = "--config 13b --height 32 --width 48 --frames 5 --accumulation 2 --batch 4 --steps 1".split()
    for more in ([], ["--save_every", 1]):
        train(pm, *flags, *more, "--out", folder / "noise", preset=replace(CONFIG, in_channels=4))
        assert [p.name for p in folder.glob("noise/*step*")] == ["step-1"] * bool(more)
    assert len(losses(folder / "noise")) == 2


def check_bad_input_is_refused_on_every_rank(pm, folder):
    """Before any collective: ranks that went on would hang here."""

    def refused(expected, function, *args, error=ValueError, **more):
        with pytest.raises(error, match=expected):
            function(*args, **more)

    world, sp, kind = pm.world_size, pm.sp_size, pm.device.type
    refused("is not a multiple of", ParallelManager, None, world + 1, kind)
    refused("is not (a multiple|the world size)", ParallelManager, 2, world, kind)
    refused("is not a multiple of shard_size", pm.shard, random_model(CONFIG), [], shard_size=world + 1)
    lost = torch.nn.Linear(4, 4).to(pm.device)
    lost.register_buffer("table", torch.ones(3, device="meta"), persistent=False)
    refused("buffer table is on the meta device and in no state dict", pm.shard, lost, [])
    for nothing in (folder / "absent", folder):
        refused("no checkpoint in", train, pm, "--resume", "--out", nothing, error=FileNotFoundError)
    pm.check_equal(dict(step=1, samples=[pm.dp_rank]), pm.sp_group)
    pm.check_equal(dict(step=pm.rank), None)  # one device, which agrees with itself
    if world > 1:
        flags = ["--steps", 1, "--out", folder / "never", "--shift", 4.0 + (pm.rank > 0)]
        refused(r"ranks 0 and \d differ in shift: 4.0 and 5.0", train, pm, *flags)
    if sp > 1:
        model = random_model(config := replace(CONFIG, num_heads=sp - 1), kind)
        inputs = random_inputs(config, (1, 4, 4), (2,), kind)
        refused(f"{sp} sequence-parallel ranks are more than the {sp - 1} heads", model, **inputs, group=pm.sp_group)
    for group, rank, size in ((pm.sp_group, pm.sp_rank, sp), (pm.world_group, pm.rank, world)):
        if size > 1:
            expected = r"ranks \d and \d differ in samples: \[0\] and \[1\]"
            refused(expected, pm.check_equal, dict(step=1, samples=[int(rank > 0)]), group)


def check_meta_init(pm, folder):
    """Sharded from the meta device: the same initial weights on every layout; and released weights, each rank's part."""
    config, file = replace(CONFIG, in_channels=4), folder / f"weights-{pm.dp_size}x{pm.sp_size}.safetensors"
    init_weights(truth := HunyuanVideo(config).to(pm.device), seed=3)
    with torch.device("meta"):
        model = HunyuanVideo(config)
    pm.shard(model, model.blocks, shard_size=pm.sp_size)
    init_weights(model, seed=3)
    for (name, param), true in zip(model.named_parameters(), truth.parameters()):
        assert torch.equal(param.full_tensor(), true), name
        assert name.endswith("bias") or "mod" in name or "final_layer" in name or true.std() > 0 or "norm" in name
    source = random_model(config, dtype=torch.float32).state_dict()
    if pm.is_main:
        save_file(source, file)
    dist.barrier()
    load_release(model, file)
    assert equal({name: param.full_tensor().cpu() for name, param in model.named_parameters()}, source)


def check_readme_example(pm, folder):
    """"Take just comm.py": the README's own lines, run as they stand."""  # fmt: skip
    (code,) = (b for b in re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S) if "ulysses" in b)
    space = {}
    exec(code, space)
    qkv = draws(0)(3, 2, 11, 5, 8).to(pm.device)
    truth = F.scaled_dot_product_attention(*qkv.transpose(2, 3)).transpose(1, 2)
    ours = space["ulysses_attention"](*(split_sequence(x, pm.sp_group) for x in qkv), pm.sp_group, 11)
    close(ours, split_sequence(truth, pm.sp_group))


CHECKS = {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}
ONLY = dict(wrong_gradients="1x3", noise_is_for_benchmarks="1x2", blocks_are_compiled_once="1x1 1x2")
ONLY |= dict(ulysses="1x2 1x3 2x2 1x5", three_steps="1x1 1x2 2x1 1x3 2x2 1x5", loss_curve_and_resume="1x1 1x2 2x1 2x2")
NEEDED = dict(sampling=["loss_curve_and_resume", "sampling"], loss_curve_and_resume=["loss_curve_and_resume"])


# --------------------------------------------------------------------------------------------------------------------
# the model, on one device


@pytest.fixture(scope="module")
def golden():
    with golden_frequencies():
        yield load_file(GOLD / "io.safetensors")


def test_tables(golden):
    exact = torch.exp(-torch.arange(128).double() / 128 * math.log(10000))
    assert (hunyuan_sp.time_frequencies() / exact - 1).abs().max() < 1e-6
    assert (hunyuan_sp.sinusoid(golden["time.t"]) - golden["time.sinusoid256"]).abs().max() < 1e-6
    cos, sin = hunyuan_sp.rope_table(HunyuanConfig(), (3, 4, 5), 0, 60)
    assert (cos - golden["rope.cos_3x4x5_16_56_56"]).abs().max() < 1e-6
    signs = torch.tensor([-1.0, 1.0]).repeat(64)  # negative at even channels
    assert (sin * signs - golden["rope.sin_3x4x5_16_56_56"]).abs().max() < 1e-6
    part = hunyuan_sp.rope_table(HunyuanConfig(), (3, 4, 5), 17, 41, 3)  # text does not turn
    assert equal(part, (torch.cat((cos[17:41], torch.ones(3, 128))), torch.cat((sin[17:41], torch.zeros(3, 128)))))


def test_every_activation(golden):
    """Block by block, so that a failure says where."""
    truth, model, seen = load_file(GOLD / "intermediates_a_sample1.safetensors"), golden_model(), {}

    def keep(module, *names):
        whole = lambda out: out if isinstance(out, tuple) else (out[:, :175] if len(out[0]) > 175 else out,)  # noqa: E731
        module.register_forward_hook(lambda m, args, out: seen.update(zip(names, (*whole(out), *args[1:2]))))

    for i, (double, single) in enumerate(zip(model.double_blocks, model.single_blocks, strict=True)):
        keep(double, f"double.{i}.img", f"double.{i}.txt"), keep(single, f"single.{i}.img", "vec")
    keep(model.img_in, "img_in"), keep(model.txt_in, "txt_in")
    model(**golden_inputs(golden, "a") | dict(latents=golden["a.latents"].double()))
    for name, wanted in truth.items():
        ours, wanted = seen[name][1:], wanted.view(1, *wanted.shape[-(seen[name].dim() - 1) :])
        if "txt" in name:  # rows after the fourth are padding
            ours, wanted = ours[:, :4], wanted[:, :4]
        assert (ours - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max()), name


def test_image_to_video(golden):
    """By 8 + 8 + 1 input channels, without guidance embedding; and in the blocks, where the 35 tokens of latent frame 0 are
    modulated as those of a clean image."""
    weights, inputs = golden_model(torch.float32).state_dict(), golden_inputs(golden, "a")
    latents = golden["a.latents"].float()
    model = HunyuanVideo(replace(GOLDEN, image_condition_type="token_replace"))
    model.load_state_dict(weights)
    out = model(**inputs | dict(latents=latents))
    assert (out - golden["a.out_token_replace_fp32"]).abs().max() < 1e-5
    weights = {k: v for k, v in weights.items() if not k.startswith("guidance_in")}
    weights["img_in.proj.weight"] = golden["latent_concat.img_in.proj.weight"].float()
    model = HunyuanVideo(replace(GOLDEN, in_channels=17, guidance_embed=False))
    model.load_state_dict(weights)
    image = golden["latent_concat.cond_latents_first_frame"].view(2, 8, 1, 10, 14)
    condition, mask = torch.zeros_like(latents), torch.zeros_like(latents[:, :1])
    condition[:, :, :1], mask[:, :, 0] = image, 1
    out = model(**inputs | dict(latents=torch.cat((latents, condition, mask), 1), guidance=None))
    assert (out - golden["a.out_latent_concat_fp32"]).abs().max() < 1e-5


def test_flow_loss(golden):
    """mean((model(x) - (noise - clip))^2), with the noise given."""
    model, (clip, noise) = golden_model(), (golden[n].double() for n in ("a.latents", "a.cotangent"))
    sigma = golden["a.timestep"].double() / 1000
    batch = dict(latents=clip + sigma.view(2, 1, 1, 1, 1) * (noise - clip), target=noise - clip, weight=torch.ones(2))
    batch |= {n: x for n, x in golden_inputs(golden, "a").items() if n in NAMES[1:5]}
    with mock.patch.object(train_min, "guidance_input", lambda *_: golden["a.guidance"]):  # one scale for each sample
        loss = train_min.flow_loss(model, batch, 6.0, None) / train_min.count_tokens(batch, GOLDEN)
    same = torch.equal(hunyuan_sp.sinusoid(golden["time.t"]), golden["time.sinusoid256"])
    assert abs(loss.item() - golden["train.loss_ref64"].item()) < (1e-10 if same else 1e-6)


def test_collate_is_the_rectified_flow():
    """x = (1 - sigma) clip + sigma noise, target noise - clip, t = 1000 sigma, sigma logit-normal and shifted."""
    collate = partial(train_min.collate, shift=7.0, caption_drop=0.25)
    items = [(SampleIndex(i), torch.randn(4, 2, 4, 6), torch.randn(3, 12), torch.randn(6)) for i in range(400)]
    batch = collate(items, seed=0)
    clip, sigma = torch.stack([item[1] for item in items]), batch["timestep"].view(-1, 1, 1, 1, 1) / 1000
    close(batch["latents"], clip + sigma * batch["target"], 1e-5)
    noise, logits = batch["target"] + clip, torch.logit((sigma / (7 - 6 * sigma)).double())  # the shift undone
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert abs(logits.mean()) < 0.2 and abs(logits.std() - 1) < 0.15
    dropped = (torch.tensor(batch["lengths"]) == 1) & (batch["pooled"].abs().sum(1) == 0)
    assert 60 < dropped.sum() < 140
    assert torch.equal(collate(items[3:5], seed=0)["latents"], batch["latents"][3:5])
    for seed, epoch in ((1, 0), (0, 1)):  # another seed, another epoch: other noise
        other = [(SampleIndex(0, 1.0, epoch), *items[0][1:])]
        assert not torch.equal(collate(other, seed=seed)["latents"], batch["latents"][:1])


def test_sampler_schedule_and_euler(golden):
    """Against the release's own; and true CFG is two forwards."""
    for name, steps, shift in (("n4_shift7", 4, 7.0), ("n50_shift7", 50, 7.0), ("n6_shift17", 6, 17.0)):
        ours = infer_min.sigma_schedule(steps, shift)
        assert (ours - golden[f"sampler.sigmas_{name}"]).abs().max() < 2e-7
    assert (1000 * ours[:1] - 1000).abs().max() == 0
    times = 1000 * infer_min.sigma_schedule(4, 7.0)[:-1]
    assert (times - golden["sampler.timesteps_n4_shift7"]).abs().max() < 2e-4
    text = [t[:n] for t, n in zip(golden["a.text"].float(), text_lengths(golden["a.text_mask"]))]
    given = golden["a.latents"].float(), text, golden["a.pooled"].float()
    with mock.patch.object(infer_min, "guidance_input", lambda *_: golden["a.guidance"]):
        final = infer_min.sample(golden_model(torch.float32), *given, 4, 7.0, 6.0)
    assert (final - golden["sampler.final_latents_fp32"]).abs().max() < 1e-4
    assert hunyuan_sp.guidance_input(6.0, 1, "cpu").item() == 6016

    config = replace(CONFIG, in_channels=4)
    model, inputs = random_model(config), random_inputs(config, (2, 4, 6), (4, 4))
    text, pooled, noise = [*inputs["text"][:, :4]], inputs["pooled"], inputs["latents"]
    negative = [t[:2] for t in text], pooled.flip(0)
    ours = infer_min.sample(model, noise, text, pooled, 1, 3.0, 6.0, None, negative, 2.5)
    towards, away = (infer_min.sample(model, noise, *pair, 1, 3.0, 6.0) for pair in ((text, pooled), negative))
    close(ours, away + 2.5 * (towards - away))


def test_each_sample_is_as_if_alone():
    """Padding influences nothing: the output to the last bit, and NaN in it no gradient either."""
    model, inputs = random_model(CONFIG), random_inputs(CONFIG, (2, 4, 6), (7, 1, 3))
    whole = model(**inputs)
    for b in range(3):
        close(model(**{k: v[b : b + 1] for k, v in inputs.items()}), whole[b : b + 1])
    padding = ~hunyuan_sp.valid_tokens(inputs["lengths"], inputs["text"].shape[1])[..., None]
    odd, lost = (inputs | dict(text=inputs["text"].masked_fill(padding, value)) for value in (1e3, math.nan))
    assert torch.equal(model(**odd), whole)
    for truth, ours in zip(*(torch.autograd.grad(model(**i).sum(), [*model.parameters()]) for i in (inputs, lost))):
        close(ours, truth)


def test_every_linear_is_called_once():
    """A layer that is reached into instead would not be seen by hooks, LoRA or quantisation."""
    model, calls = random_model(CONFIG), Counter()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, module in linears.items():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    model(**random_inputs(CONFIG, *CASES["ragged"]))
    assert calls == Counter(linears.keys()) and sum("_blocks." in name for name in calls) == 2 * 10 + 2 * 3


def test_the_order_of_kernels():
    """cuDNN first from Hopper on, flash before; never a kernel that the GPU lacks, and math last."""
    for capability, first in {(8, 0): "FLASH", (8, 9): "FLASH", (9, 0): "CUDNN", (10, 0): "CUDNN"}.items():
        with gpu(*capability):
            names = [backend.name for backend in hunyuan_sp.backends(torch.device("cuda"))]
        assert names[0].startswith(first) and len(set(names)) == 4 and names[2:] == ["EFFICIENT_ATTENTION", "MATH"]


def test_one_layout_of_gradients_reaches_attention():
    """Whatever the caller does: torch keeps cuDNN's backward by the strides of q, k and v, and reads others out of bounds."""
    qkv = [draws(n)(2, 6, 3, 8).requires_grad_() for n in range(3)]
    uses = {
        "as it is": lambda out: out * 2,
        "a sum, whose gradient is expanded": lambda out: out.sum(),
        "transposed": lambda out: out.transpose(1, 2).contiguous(),
        "cut": lambda out: out.split((2, 4), 1)[1],
        "heads last": lambda out: out.permute(0, 3, 1, 2).flatten(1).cumsum(1),
        "times a transposed tensor": lambda out: out * draws(3)(2, 3, 8, 6).permute(0, 3, 1, 2),
    }
    with Attention() as seen:
        grads = [torch.autograd.grad(use(hunyuan_sp.sdpa(*qkv)).square().sum(), qkv) for use in uses.values()]
    assert len(seen.strides) == len(uses) and len(set(seen.strides)) == 1, dict(zip(uses, seen.strides))
    for use, ours in zip(uses.values(), grads):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)
        for a, b in zip(ours, torch.autograd.grad(use(out).square().sum(), qkv)):
            close(a, b)


@pytest.mark.parametrize("checkpointing, runs", [("none", 1), ("attention", 1), ("full", 2)])
def test_checkpointing_keeps_attention(checkpointing, runs):
    """`full` computes each block's attention again in backward, `attention` does not."""
    model, inputs = random_model(CONFIG), random_inputs(CONFIG, (2, 4, 6), (3, 3))
    with Attention() as seen:
        model(**inputs, checkpointing=checkpointing).sum().backward()
    assert seen.count == CONFIG.refiner_depth + runs * (CONFIG.double_depth + CONFIG.single_depth)


def test_another_kernel():
    """`model.attention = f` is what the blocks call, on every sample's valid tokens; the refiner keeps its own."""
    model, inputs, seen = random_model(CONFIG), random_inputs(CONFIG, (2, 4, 6), (3, 2)), []
    truth = model(**inputs)
    model.attention = lambda q, k, v: seen.append(q.shape[1]) or hunyuan_sp.sdpa(q, k, v)
    close(model(**inputs), truth)
    assert seen == [12 + 3, 12 + 2] * (CONFIG.double_depth + CONFIG.single_depth)


def test_the_presets():
    """13b is the release; and the first values of both are zero where they must be."""
    with torch.device("meta"):
        model = HunyuanVideo(HunyuanConfig.preset("13b"))
    assert sum(p.numel() for p in model.parameters()) == 12_821_012_544 and len(model.state_dict()) == 856
    narrow = dict(double_depth=1, single_depth=1, refiner_depth=1, num_heads=1)
    for config in (HunyuanConfig.preset("tiny"), HunyuanConfig.preset("13b", **narrow)):
        init_weights(model := HunyuanVideo(config))
        for name, param in model.named_parameters():
            zero = re.search("mod|adaLN|final|norm.*bias", name) or name == "img_in.proj.bias"
            assert (param.abs().max() == 0) == bool(zero), name
            if "mlp.fc1.weight" in name:
                assert abs(param.std() * (3 * param.shape[1]) ** 0.5 - 1) < 0.05, name  # U(-1/sqrt(n), 1/sqrt(n))


def test_released_weights(tmp_path):
    """The release's own names, from a file, a folder of parts, and its .pt; a bare one too. What does not fit is named."""
    source, name = golden_model(torch.float32).state_dict(), "single_blocks.1.linear1.weight"
    half, rest = ({k: v for n, (k, v) in enumerate(source.items()) if n % 2 == part} for part in range(2))
    (tmp_path / "parts").mkdir(), (tmp_path / "empty").mkdir()
    save_file(half, tmp_path / "parts/a.safetensors"), save_file(rest, tmp_path / "parts/b.safetensors")
    torch.save(dict(module=source), tmp_path / "release.pt"), torch.save(source, tmp_path / "bare.pt")
    torch.save(dict(module=Touch(tmp_path / "touched")), tmp_path / "evil.pt")
    for path in (GOLD / "weights_tencent.safetensors", *(tmp_path / p for p in ("parts", "release.pt", "bare.pt"))):
        load_release(model := HunyuanVideo(GOLDEN), path)
        assert equal(model.state_dict(), source), path
    save_file({k: v for k, v in source.items() if k != name}, tmp_path / "missing.safetensors")
    save_file(source | {"x.weight": torch.zeros(1)}, tmp_path / "unknown.safetensors")
    save_file(source | {name: torch.zeros(3, 4)}, tmp_path / "shape.safetensors")
    save_file(source | {name: source[name].to(torch.float8_e4m3fn)}, tmp_path / "fp8.safetensors")
    for file, expected in {
        "missing.safetensors": rf"missing.safetensors lacks 1 of the model's weights, {name} among them",
        "unknown.safetensors": r"x.weight \[1\] .*unknown.safetensors does not fit the model",
        "shape.safetensors": rf"{name} \[3, 4\] .*does not fit the model",
        "fp8.safetensors": rf"{name} .* torch.float8_e4m3fn in .*does not fit the model",
        "empty": "empty lacks 120 of the model's weights",
        "evil.pt": "Weights only load failed",
    }.items():
        with pytest.raises((ValueError, pickle.UnpicklingError), match=expected):
            load_release(HunyuanVideo(GOLDEN), tmp_path / file)
    assert not (tmp_path / "touched").exists(), "a pickle was executed"


# --------------------------------------------------------------------------------------------------------------------
# the batch samplers


def ranks_of(n, batch, dp, accumulation=1, **more):
    return [DPSPBatchSampler(n, batch, rank, dp, accumulation, **more) for rank in range(dp)]


def test_sampler_rules():
    """Over random draws: equal batch counts, exactly once, the same steps on every layout, resume without repeat or gap."""
    draw = random.Random(0)
    for trial in range(400):
        n, batch = draw.randint(1, 60), draw.randint(1, 17)
        dp, accumulation = draw.randint(1, 5), draw.randint(1, 3)
        shapes = [draw.choice("abc") for _ in range(n)] if trial % 2 else None
        same = dict(seed=draw.randint(0, 9), shapes=shapes)
        ranks, orders = ranks_of(n, batch, dp, accumulation, **same), []
        for epoch in range(2):
            batches = [list(r) for r in ranks]
            assert {len(b) for b in batches} == {len(ranks[0])}, "every rank the same number of batches"
            assert all(len({len(b) for b in turn}) == 1 for turn in zip(*batches)), "of the same sizes"
            state, streams, seen = ranks[0].state_dict(), [iter(b) for b in batches], []
            for _ in range(len(batches[0])):
                if ranks[0].epoch > epoch:
                    break
                micro = ranks[0].micro_batches
                assert 1 <= micro <= accumulation
                seen.append([i for stream in streams for _ in range(micro) for i in next(stream)])
                assert sum(1 for i in seen[-1] if not i.weight) < dp, "fillers cost nothing"
                ranks[0].advance()
            assert not any([*stream] for stream in streams)
            ranks[0].load_state_dict(state)
            real = [sorted(int(i) for i in step if i.weight) for step in seen]
            assert sorted(i for step in real for i in step) == list(range(n)), "every sample counts exactly once"
            assert all(i.weight in (0.0, 1.0) and i.epoch == epoch for step in seen for i in step)
            if shapes:
                assert all(len({shapes[i] for i in step}) == 1 for step in seen), "one shape, one cost a step"
            if epoch == 0:
                alone = list(DPSPBatchSampler(n, batch, **same))
                assert [sorted(int(i) for i in b if i.weight) for b in alone] == real, "dp changes nothing"
            orders.append([int(i) for step in seen for i in step])
            # stop after `at` steps; go on with another dp size, accumulation and batch size; stop and go on again
            at, going = draw.randint(0, len(seen) - 1), ranks[0]
            again, third = DPSPBatchSampler(n, draw.randint(1, 17), **same), ranks_of(n, draw.randint(1, 17), 3, **same)
            assert not any([going.advance() for _ in range(at)])
            again.load_state_dict(json.loads(json.dumps(going.state_dict())))
            after = [int(i) for i in next(iter(again)) if i.weight]
            if not again.advance():
                for r in third:
                    r.load_state_dict(again.state_dict())
                after += [int(i) for r in third for b in r for i in b if i.weight]
            assert sorted([i for step in real[:at] for i in step] + after) == list(range(n)), "no repeat and no gap"
            for r in ranks:  # and as if never stopped on the same layout
                r.load_state_dict(state)
                assert [r.advance() for _ in seen] == [False] * (len(seen) - 1) + [True]
        assert n < 9 or orders[0] != orders[1], "each epoch is a new order"


def test_a_tail_is_padded_or_dropped():
    """Samples of seven shapes are computed once; few samples make few micro-batches, and no rank is without one."""
    shapes = [i for i, n in enumerate([1, 1, 9, 1, 2, 2, 2]) for _ in range(n)]
    assert sum(map(len, DPSPBatchSampler(18, 18, shapes=shapes))) == 18
    assert [[i.weight for i in b] for b in DPSPBatchSampler(2, 1, accumulation=4)] == [[1.0], [1.0]]
    assert [[i.weight for b in r for i in b] for r in ranks_of(1, 8, 3, 2)] == [[1.0], [0.0], [0.0]]
    for n, batch, dp in ((10, 4, 2), (12, 4, 2), (61, 6, 3)):
        ranks = ranks_of(n, batch, dp, tail="drop")
        seen = [i for r in ranks for b in r for i in b]
        assert len(seen) == len(set(seen)) == n // batch * batch and all(i.weight for i in seen)
        while not ranks[0].advance():
            pass
        assert ranks[0].epoch == 1 and len(ranks[0]) == n // batch


def test_sampler_refuses_and_warns():
    """A state of other samples is refused: two that swapped places would be repeated and left out. So is a forgotten advance."""
    shapes, names = ["a", "b", "a", "b"], ["1", "2", "3", "4"]
    saved = DPSPBatchSampler(4, 1, shapes=shapes, names=names)
    saved.advance()
    good = saved.state_dict()
    for other in (dict(shapes=["b", "a", "a", "b"], names=names), dict(shapes=shapes, names=["2", "1", "3", "4"])):
        with pytest.raises(ValueError, match=r"the state was saved with samples \w+, this sampler has \w+"):
            DPSPBatchSampler(4, 1, **other).load_state_dict(good)
    for change, expected in ((dict(length=5), "length 5, this .* 4"), (dict(seed=1), "seed 1, this .* 0")):
        with pytest.raises(ValueError, match=f"the state was saved with {expected}"):
            saved.load_state_dict(good | change)
        assert saved.state_dict() == good
    sampler = DPSPBatchSampler(4, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len([sampler.advance() for _ in sampler]) == len([sampler.advance() for _ in sampler]) == 4
    list(sampler)
    with pytest.warns(UserWarning, match=r"advance\(\) was not called"):
        list(sampler)


def test_another_sampler_is_dealt_out():
    """Over random draws: every batch once, with weight 1; as many on all ranks, and as many as len() says, in each epoch."""
    draw = random.Random(0)
    for trial in range(200):
        n, dp, tail = draw.randint(0, 40), draw.randint(1, 5), draw.choice(("pad", "drop"))
        order = [[3 * i + j for j in range(draw.randint(1, 3))] for i in range(n)]
        ranks = [BatchSamplerShard(order, rank, dp, tail) for rank in range(dp)]
        for epoch in range(2):
            dealt = [list(rank) for rank in ranks]
            assert {len(d) for d in dealt} == {len(ranks[0])} == {-(-n // dp) if tail == "pad" else n // dp}
            assert all(i.epoch == epoch for d in dealt for batch in d for i in batch)
            whole = [batch for turn in zip(*dealt) for batch in turn]  # in the order of the batches
            real = [[int(i) for i in batch] for batch in whole if batch[0].weight == 1]
            assert real == (order if tail == "pad" else order[: n // dp * dp]), trial
            fillers = [batch for batch in whole if batch[0].weight != 1]
            assert all(i.weight == 0 and [*map(int, batch)] in order for batch in fillers for i in batch)
        assert {rank.epoch for rank in ranks} == {2}

    batches = BatchSampler(RandomSampler(range(7), generator=torch.Generator().manual_seed(0)), 2, drop_last=False)
    collate = partial(train_min.collate, seed=0, shift=3.0, caption_drop=0.0)
    loader = DataLoader(Ragged(), batch_sampler=BatchSamplerShard([*batches], 2, 3), collate_fn=collate, num_workers=1)
    assert [batch["weight"].tolist() for batch in loader] == [[1, 1], [0]] and len(loader) == 2


def test_sampler_through_workers():
    """The weight and the epoch reach the dataset through a DataLoader's processes; what they read ahead does not count."""
    collate = partial(train_min.collate, seed=0, shift=3.0, caption_drop=0.0)
    sampler = DPSPBatchSampler(7, 4, 1, 2)
    loader = DataLoader(Ragged(), batch_sampler=sampler, collate_fn=collate, num_workers=2)
    stream = iter(loader)
    assert next(stream)["weight"].tolist() == [1, 1] and sampler.consumed == 0
    sampler.advance()
    assert next(stream)["weight"].tolist() == [1, 0] and sampler.consumed == 4


def test_bad_model_inputs():
    """The model refuses what would be silent, or hang on some ranks. For other shapes torch has errors of its own."""
    model, good = random_model(CONFIG), random_inputs(CONFIG, (2, 4, 6), (4, 2))
    latents, text, pooled, guidance = (good[name] for name in ("latents", "text", "pooled", "guidance"))
    changes = {
        "latents of [2, 3, 6] are not a multiple of the patch size (1, 2, 2)": dict(latents=latents[:, :, :, :3]),
        "latents of [2, 4, 3] are not a multiple": dict(latents=latents[..., :3]),
        "guidance must be given to this model": dict(guidance=None),
        "'timestep': 1, 'text': 2": dict(timestep=good["timestep"][:1]),
        "'lengths': 1": dict(lengths=[4]),
        "'latents': 1": dict(latents=latents[:1]),
        "every input is for as many samples": dict(guidance=guidance[:1]),
        "text lengths [5, 0] are not in 1 .. 5": dict(lengths=[5, 0]),
        "text lengths [6, 1] are not in 1 .. 5": dict(lengths=[6, 1]),
    }
    for expected, change in changes.items():
        with pytest.raises(ValueError, match=re.escape(expected)):
            model(**good | change)
    with pytest.raises(ValueError, match="guidance must not be given to this model"):
        random_model(replace(CONFIG, guidance_embed=False))(**good)
    for change in (dict(latents=latents[:, :3]), dict(text=text[..., :7]), dict(pooled=pooled[:, :5])):
        with pytest.raises(RuntimeError, match="shape"):
            model(**good | change)
    assert text_lengths(torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0]])) == [4, 1]
    for row in ([1, 0, 1, 1, 0], [0, 0, 0, 1, 1]):
        with pytest.raises(ValueError, match="a text mask must be true for the first tokens of each row"):
            text_lengths(torch.tensor([[1, 1, 1, 1, 0], row]))


@pytest.mark.parametrize("call, expected", [
    (partial(DPSPBatchSampler, 0, 4), "the dataset has 0 samples"),
    (partial(DPSPBatchSampler, 8, 0), "global_batch_size 0"),
    (partial(DPSPBatchSampler, 8, 4, 2, 2), "dp_rank 2 between 0 and 1"),
    (partial(DPSPBatchSampler, 8, 4, tail="keep"), "'keep' is neither pad nor drop"),
    (partial(DPSPBatchSampler, 8, 5, 0, 2, tail="drop"), "global_batch_size 5 is not a multiple of dp_size 2 x accumulation 1"),
    (partial(DPSPBatchSampler, 3, 4, 0, 2, tail="drop"), "3 samples never fill a global batch of 4"),
    (partial(DPSPBatchSampler, 3, 4, 0, 2, shapes=[1, 2]), "2 shapes for 3 samples"),
    (partial(BatchSamplerShard, [], 3, 3), "dp_rank 3 is not between 0 and 2"),
    (partial(BatchSamplerShard, [], 0, 3, "keep"), "'keep' is neither pad nor drop"),
    (partial(HunyuanConfig.preset, "14b"), "no preset '14b': choose one of 13b, tiny"),
    (partial(hunyuan_sp.latent_shape, HunyuanConfig(), 250, 256, 17), "height 250 and width 256 must be multiples of 16.*: 240 x 256 x 17 would do"),
    (partial(hunyuan_sp.latent_shape, HunyuanConfig(), 256, 0, 17), "width 0 must be multiples of 16"),
    (partial(hunyuan_sp.latent_shape, HunyuanConfig(), 256, 256, 16), r"frames 16 must be 4k\+1: 256 x 256 x 13 or 17 would do"),
    (partial(infer_min.embed, "a cat", HunyuanConfig(), mock.Mock(embeds=None, config=None), "cpu"), "give --embeds instead"),
])  # fmt: skip
def test_bad_arguments(call, expected):
    with pytest.raises(ValueError, match=expected):
        call()


# --------------------------------------------------------------------------------------------------------------------
# the programs


@pytest.mark.parametrize("lesson, ranks, expected", [
    ("comm", 3, [r"rank 2 before: 50 .* 54 \| 60 .* 64\n +after: +04 \| 14 \| 24 \| 34 \| 44 \| 54 \| 64\n", r"<all_to_all\(x\), y> = (\d+), <x, transpose\(y\)> = \1,"]),
    ("sampler", 1, ["the epoch is over, each sample was seen once", r"stopped. The state: .*'consumed': 8"]),
    ("hunyuan_sp", 2, [r"all tokens, some heads rank 0: \[1, 52, 3, 16\]   rank 1: \[1, 52, 3, 16\]"]),
])  # fmt: skip
def test_lessons(lesson, ranks, expected, tmp_path):
    """The files explain themselves when they are run, in at most 25 lines, and what they say is right."""
    code, printed = fork(lesson, ranks=ranks, out=tmp_path)[0]
    lines = [line for line in printed.splitlines() if "[Gloo]" not in line]
    assert code == 0 and 0 < len(lines) <= 25 and all(re.search(part, printed) for part in expected), printed
    assert (printed.count(": True"), printed.count("False")) == (3 * (lesson == "comm"), 0), printed
    assert "Warning" not in printed, printed


def test_measure_reads_the_pixels():
    """The score that CI asks of the trained model is right about clips whose captions are known."""
    for n, caption in enumerate(Shapes.captions()[::5]):
        _, colour, shape, _, direction = caption.split()
        for words, noise in ((caption, 0), (caption, 0.4), (f"a small {colour} {shape} moves {direction}", 0)):
            clip = Shapes.draw(words, seeded(n))
            found = Shapes.measure(clip + noise * torch.randn(clip.shape, generator=seeded("noise", n)))
            assert found == (colour, shape, direction), words


def test_a_folder_of_latents(tmp_path):
    """Samples of two shapes and ragged text train together, and go on on one rank; a sample that is NaN is a step skipped;
    and what is another folder is not gone on with."""
    (tmp_path / "data").mkdir(), (tmp_path / "odd").mkdir()
    for n in range(9):
        latents = torch.randn((3, 2, 4, 8) if n % 3 else (3, 1, 8, 4))
        sample = dict(latents=latents, text=torch.ones(1 + n % 4, 32), pooled=torch.ones(32))
        save_file(sample, tmp_path / f"data/{n}.safetensors")
        save_file(sample | dict(latents=latents * (math.nan if n == 4 else 1)), tmp_path / f"odd/{n}.safetensors")
    save_file(dict(text=torch.ones(1, 32)), tmp_path / "data/empty_prompt.safetensors")  # is no sample
    data, out = train_min.LatentFolder(tmp_path / "data"), tmp_path / "out"
    assert data.names == [f"{n}.safetensors" for n in range(9)]
    assert data.shapes == [tuple(data[n][1].shape) for n in range(9)] and len({*data.shapes}) == 2
    flags = ["--data", tmp_path / "data", "--out", out, "--batch", 2]
    results = fork("train_min", *flags, "--steps", 6, ranks=2, out=tmp_path)
    assert [code for code, _ in results] == [0, 0] and len(losses(out)) == 6, results
    ((code, printed),) = fork("train_min", *flags, "--steps", 8, "--resume", out=tmp_path)
    assert code == 0 and [entry["step"] for entry in losses(out)] == [*range(1, 9)], printed
    assert all(math.isfinite(entry["loss"] + entry["grad_norm"]) for entry in losses(out))
    (tmp_path / "data/8.safetensors").rename(tmp_path / "data/9.safetensors")
    ((code, printed),) = fork("train_min", *flags, "--steps", 9, "--resume", out=tmp_path)
    assert code == 1 and re.search(r"ValueError: the state was saved with samples \w+, this sampler has \w+", printed)
    flags = ["--data", tmp_path / "odd", "--out", tmp_path / "odd-out", "--batch", 3, "--steps", 3]  # one epoch
    (code, printed), _ = fork("train_min", *flags, ranks=2, out=tmp_path)
    gone = [entry["loss"] is None and entry["grad_norm"] is None for entry in losses(tmp_path / "odd-out")]
    assert code == 0 and len(gone) == 3 and gone.count(True) == 1, printed
    assert all(w.isfinite().all() for w in load_checkpoint(tmp_path / "odd-out/step-3").values())


def test_the_newest_checkpoint(tmp_path):
    """Which was saved last, whatever its step; without its manifest it is none; and of another model it is refused."""
    config = replace(hunyuan_sp.TINY, double_depth=0, single_depth=0)
    for step, serial in ((9, 1), (3, 3), (5, 2)):
        (tmp_path / f"step-{step}").mkdir()
        manifest = dict(step=step, serial=serial, config=json.loads(json.dumps(asdict(config))))
        (tmp_path / f"step-{step}/manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "step-10").mkdir()
    folder, manifest = train_min.newest_checkpoint(tmp_path)
    assert folder.name == "step-3" and HunyuanConfig.from_dict(manifest["config"]) == config
    with pytest.raises(ValueError, match="step-3 is of another model: .*'double_depth': 0"):
        train_min.load_checkpoint(tmp_path, HunyuanVideo(replace(config, single_depth=1)), None, None)


@on_layouts(CHECKS, ONLY)
def test_on(layout, check, ranks_of_layout):
    """Report what the ranks of each layout have found meanwhile."""
    assert_ok(layout, [check], *ranks_of_layout(layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_exits_with_0(layout, ranks_of_layout):
    assert set(ranks_of_layout(layout)[1]) == {0}
