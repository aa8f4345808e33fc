"""Little memory: the MLP in slices, a host that is too small, and the cure for a GPU that is too small."""

import contextlib
import os
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import full.memory
import full.offload
from full import faults
from full.fa4 import fastest_kernel
from full.flags import get_config, parse_train
from full.infer import parse as parse_infer
from full.lora import add_lora, layers_of
from full.memory import check_host, cure, host_left, limit_memory, pinned
from full.plan import check_offload
from full.slices import slice_mlps
from hunyuan_sp import CHECKPOINTING, KEPT
from test_sp import CONFIG, close, draws, eager_compiler, random_inputs, random_model


def trained(lora, count, checkpointing, compiled=False, lengths=(5, 2)):
    model, draw = random_model(CONFIG), draws(5)
    if lora:
        add_lora(model, 3, 6.0)
        for _, layer in layers_of(model):
            layer.lora_A.data, layer.lora_B.data = draw(layer.lora_A.shape) * 0.2, draw(layer.lora_B.shape) * 0.2
    slice_mlps(model, count)
    if compiled:
        with eager_compiler():
            model.compile_blocks()
    out = model(**random_inputs(CONFIG, (3, 4, 6), lengths), checkpointing=checkpointing)
    (out * draws(3)(out.shape)).sum().backward()
    return out, {name: param.grad for name, param in model.named_parameters() if param.requires_grad}


@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
def test_mlps_in_slices(lora, checkpointing):
    """At sizes that do not divide, the output and the gradient of every parameter are as without slices."""
    truth = trained(lora, 1, "none")
    for compiled in (False, True):
        ours = trained(lora, 5, checkpointing, compiled)
        close(ours[0], truth[0])
        assert ours[1].keys() == truth[1].keys()
        for name, gradient in truth[1].items():
            assert gradient.abs().max() > 1e-8, name
            close(ours[1][name], gradient)


def test_mlps_in_slices_keep_less():
    """Compare what autograd keeps between forward and backward of a single-stream block."""
    kept = []
    for count in (1, 4):
        model, sizes = random_model(CONFIG), {}
        slice_mlps(model, count)

        def pack(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = model(**random_inputs(CONFIG, (3, 16, 16), [2]))
            kept.append(sum(sizes.values()))
        del out
    assert kept[1] < 0.85 * kept[0], kept


class Moved:
    """Stand in for full.offload.OnHost on a machine without a GPU: note when each tensor sets out and when it is taken."""

    made, log = 0, []

    def __init__(self, x):
        self.x, self.number, self.back = x.clone(), Moved.made, False
        Moved.made += 1

    def fetch(self):
        if not self.back:
            Moved.log.append(("sets out", self.number))
        self.back = True

    def take(self):
        assert self.back
        Moved.log.append(("taken", self.number))
        return self.x


class Counted(TorchDispatchMode):
    """Count the attention kernels that really run."""

    runs = 0

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        self.runs += kernel in KEPT
        return kernel(*args, **kwargs or {})


@pytest.mark.parametrize("checkpointing, runs", [("attention", 1), ("full", 2)])
@pytest.mark.parametrize("lengths", [(5,), (5, 2)], ids=str)
def test_what_checkpointing_keeps_lies_on_the_host(lengths, checkpointing, runs, monkeypatch):
    """With `attention` its output in 4 blocks is kept too, and it runs once. Every tensor comes back once; with one sample the
    blocks' set out before the one before them is taken. The gradients are those without."""
    run, plain = partial(trained, False, 1, lengths=lengths), CHECKPOINTING["attention"]
    truth = run("none")
    monkeypatch.setattr(Moved, "made", 0)
    monkeypatch.setattr(Moved, "log", [])
    monkeypatch.setattr(full.offload, "OnHost", Moved)
    monkeypatch.setattr(full.offload, "is_large", lambda x: torch.is_tensor(x) and x.numel() >= 800)
    with full.offload.offloaded(), Counted() as count:
        ours = run(checkpointing)
    assert CHECKPOINTING["attention"] is plain
    assert count.runs == len(lengths) * (1 + runs * 4)  # the refiner's is not checkpointed
    taken = [number for what, number in Moved.log if what == "taken"]
    assert sorted(taken) == list(range(Moved.made)) and Moved.made > 4
    if len(lengths) == 1:
        places = [(Moved.log.index(("sets out", n)), Moved.log.index(("taken", m))) for m, n in zip(taken, taken[1:])]
        assert sum(out > before for out, before in places) <= 4 < len(places) / 3, Moved.log  # those outside the blocks
    close(ours[0], truth[0])
    for name, gradient in truth[1].items():
        close(ours[1][name], gradient)


def test_a_host_that_is_too_small():
    assert 0 < host_left() < float("inf") and pinned(2 * 10**6) == 2**21  # a power of two
    with mock.patch.object(full.memory, "host_left", lambda: 6 * 2**30):
        check_host(["weights"], 3 * 2**30, 2)
        sentence = "--offload activations --offload weights needs 9.0 GiB of this host's memory, and 6.0 are left"
        with pytest.raises(ValueError, match=sentence):
            check_host(["activations", "weights"], 3 * 2**30, 3)


def test_training_needs_the_hosts_memory(monkeypatch):
    """Attention's output lies there too, with `attention`: 60 blocks, 512 MiB each as pinned."""
    monkeypatch.setattr(full.memory, "host_left", lambda: 2**30)
    size, shape = "--config 13b --lora 32 --height 720 --width 1280 --frames 49", (16, 13, 90, 160)
    offload = "--offload activations --offload weights"
    pm, needed = SimpleNamespace(dp_size=1, sp_size=1, world_size=1, device=torch.device("cuda")), []
    for checkpointing in ("full", "attention"):
        args = parse_train("", f"{size} {offload} --checkpointing {checkpointing}".split())
        with pytest.raises(
            ValueError, match=f"^{offload} needs .* GiB of this host's memory, and 1.0 are left"
        ) as error:
            check_offload(get_config(args), args, shape, pm)
        needed.append(float(str(error.value).split("needs ")[1].split()[0]))
    assert needed[1] - needed[0] == pytest.approx(30, abs=0.2) and 60 < needed[0] < 70
    monkeypatch.setattr(full.memory, "host_left", lambda: 100 * 2**30)
    check_offload(get_config(args), args, shape, pm)


def test_a_limit_is_one_less(monkeypatch):
    """The limit is one GiB below the card that is named; CUDA and NCCL take the rest."""
    seen = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: seen.append(args))
    for gib, kind in ((16.0, None), (1000.0, "cuda"), (None, "cpu"), (None, "cuda")):
        limit_memory(gib, kind)
    with pytest.raises(ValueError, match="--memory limits a GPU, and this runs on a CPU"):
        limit_memory(16.0, "cpu")
    assert os.environ.pop("PYTORCH_CUDA_ALLOC_CONF") == "expandable_segments:True"
    assert [fraction for fraction, _ in seen] == [15 / 80, 1.0]


def test_a_gpu_that_is_too_small_names_what_would_fit():
    text = (
        "CUDA out of memory. Tried to allocate 1.36 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.02 GiB is free. "
        "9.00 GiB allowed; Of the allocated memory 7.2 GiB is allocated by PyTorch"
    )
    args = parse_train("", "--config 13b --checkpointing full --offload activations".split())
    sentence = faults.about_gpu(torch.OutOfMemoryError(text), lambda: cure(args))
    assert sentence.startswith(
        "the GPU's memory of 9.00 GiB is too small: it needs 1.36 GiB more; less with --compile, "
    )
    assert "--offload weights, --mlp_slices 8, more GPUs" in sentence and "--checkpointing" not in sentence
    args = parse_infer("--offload encoders --compile --mlp_slices 4 --memory 12".split())
    assert cure(args) == "--offload weights, more GPUs, or a smaller --height, --width or --frames"


def test_the_fastest_kernel_without_a_gpu():
    assert fastest_kernel(torch.device("cpu")) == "sdpa" and parse_infer([]).attention == "auto"
    assert parse_train("", []).attention == "sdpa"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies beside the computation need a GPU")
def test_attention_comes_back_from_the_host(monkeypatch):
    """In bfloat16, with the kernels that checkpointing keeps: gradients as without offloading, up to the order of sums."""
    monkeypatch.setattr(full.offload, "LARGE", 1)
    model = random_model(CONFIG, "cuda").to(torch.bfloat16)
    inputs = random_inputs(CONFIG, (3, 4, 6), [5, 2], "cuda")
    grads = []
    for around in (contextlib.nullcontext, full.offload.offloaded):
        with around():
            out = model(**inputs, checkpointing="attention")
            grads.append(torch.autograd.grad(out.float().square().sum(), [*model.parameters()]))
    for ours, true in zip(*grads):
        close(ours, true, 0.02)
