"""Little memory: the MLP in slices, a host that is too small, and the cure for a GPU that is too small."""

import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import full.memory
from full import faults
from full.fa4 import fastest_kernel
from full.flags import parse_train
from full.infer import parse as parse_infer
from full.lora import add_lora, layers_of
from full.memory import check_host, cure, host_left, limit_memory
from full.slices import slice_mlps
from test_sp import CONFIG, close, draws, eager_compiler, random_inputs, random_model


def trained(lora, count, checkpointing, compiled=False):
    model, draw = random_model(CONFIG), draws(5)
    if lora:
        add_lora(model, 3, 6.0)
        for _, layer in layers_of(model):
            layer.lora_A.data, layer.lora_B.data = draw(layer.lora_A.shape) * 0.2, draw(layer.lora_B.shape) * 0.2
    slice_mlps(model, count)
    if compiled:
        with eager_compiler():
            model.compile_blocks()
    out = model(**random_inputs(CONFIG, (3, 4, 6), [5, 2]), checkpointing=checkpointing)
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


def test_a_host_that_is_too_small():
    assert 0 < host_left() < float("inf")
    with torch.device("meta"):
        model = torch.nn.Linear(1000, 1000, bias=False, dtype=torch.bfloat16)
    with mock.patch.object(full.memory, "host_left", lambda: 2**21):  # as pinned, 2 MB are a power of two
        check_host(model, 1)
    with mock.patch.object(full.memory, "host_left", lambda: 2**21 - 1):
        with pytest.raises(ValueError, match="--offload weights needs 0.0 GiB of this host's memory, and 0.0 are left"):
            check_host(model, 1)


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
