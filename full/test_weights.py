"""Weights: three namings, files that are not what they should be, exports; and another attention kernel."""

import json
import math
import random
import sys
import types
import zipfile
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

import full.fa4
from full.fa4 import attention_kernel
from full.names import config_from_diffusers, diffusers_config, export_weight, names_in
from full.speed import forward_flops
from full.weights import load_weights, save_weights
from hunyuan_sp import HunyuanConfig, HunyuanVideo, sdpa
from test_sp import CONFIG, GOLD, GOLDEN, Touch, close, equal, flip, golden_model, gpu, random_inputs, random_model

CHECKPOINTED = pytest.mark.parametrize("checkpointing, runs", [("none", 1), ("attention", 1), ("full", 2)])


@pytest.mark.parametrize("prefix", ["", "model.", "model.model.", "transformer.", "module."])
@pytest.mark.parametrize("naming", ["original", "diffusers", "comfyui"])
def test_naming_round_trips(naming, prefix, tmp_path):
    source, tensors = golden_model(torch.float32), {}
    for name, param in source.state_dict().items():
        for key, value in export_weight(source.config, name, param, naming).items():
            old = key.replace("_norm.weight", "_norm.scale") if naming == "comfyui" else key
            tensors[prefix + old] = value.clone()
    if naming == "diffusers":
        fixture = load_file(GOLD / "weights_diffusers.safetensors")
        assert equal(
            {k: tensors[k] for k in sorted(tensors)}, {prefix + k: fixture[k].float() for k in sorted(fixture)}
        )
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save(dict(module=tensors), tmp_path / "model.pt")
    for path in ("model.safetensors", "model.pt", ""):
        target = HunyuanVideo(source.config)
        load_weights(target, tmp_path / path)
        assert equal(target.state_dict(), source.state_dict())


def test_weights_that_do_not_fit(tmp_path):
    model, good = HunyuanVideo(GOLDEN), load_file(GOLD / "weights_tencent.safetensors")
    before, name = [p.clone() for p in model.parameters()], "single_blocks.1.linear1.weight"

    def refused(source, *expected):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            load_weights(model, source)
        assert all(t in str(error.value) for t in expected), error.value
        assert equal(model.parameters(), before), "something was loaded"

    refused({k: v for k, v in good.items() if k != name}, "1 missing", name)
    refused(good | {"extra.weight": torch.zeros(1)}, "1 unknown", "extra.weight")
    refused(good | {name: torch.zeros(3, 4)}, "1 of another shape", "[3, 4]", name)
    refused({k.replace("single", "sinlge"): v for k, v in good.items()}, "16 missing", "16 unknown")
    refused({}, "120 missing")
    data = (GOLD / "weights_tencent.safetensors").read_bytes()
    contents = dict(cut=data[:-1], half=data[: len(data) // 2], empty=b"", page=b"<html>" * 9)
    for label, content in contents.items():
        (tmp_path / f"{label}.safetensors").write_bytes(content)
        refused(tmp_path / f"{label}.safetensors", f"{label}.safetensors", "not a readable safetensors file")
    refused(good | {name: good[name].long()}, "floating-point")
    save_file(good | {name: good[name].long()}, tmp_path / "long.safetensors")
    refused(tmp_path / "long.safetensors", "1 tensors that are not floating-point", name)
    torch.save(dict(module=Touch(tmp_path / "touched")), tmp_path / "evil.pt")
    (tmp_path / "page.pt").write_bytes(b"<html>" * 99)
    for file in ("evil.pt", "page.pt"):
        refused(tmp_path / file, file, "is not a file of plain tensors")
    assert not (tmp_path / "touched").exists(), "a pickle was executed"
    refused(tmp_path / "absent.safetensors", "no weights at")
    (tmp_path / "nothing").mkdir()
    refused(tmp_path / "nothing", "no weights at")


def test_weights_mean_what_their_file_says(tmp_path):
    """Facts outside a tensor count: scales, an index, a second file. Refused before anything is assigned, by its name."""
    source, model = golden_model(torch.float32), HunyuanVideo(GOLDEN)
    good, name = dict(source.state_dict()), "single_blocks.1.linear1.weight"
    before = [p.clone() for p in model.parameters()]

    def refused(source, *expected):
        with pytest.raises(ValueError) as error:
            load_weights(model, source)
        assert all(t in str(error.value) for t in expected), error.value
        assert equal(model.parameters(), before), "something was loaded"

    def folder(label, index=None, **files):
        (tmp_path / label).mkdir()
        for stem, tensors in files.items():
            save_file(tensors, tmp_path / label / f"{stem}.safetensors")
        if index is not None:
            (tmp_path / label / "m.safetensors.index.json").write_text(json.dumps(dict(weight_map=index)))
        return tmp_path / label

    fp8 = torch.float8_e4m3fn
    scaled = (good[name] * 448 / good[name].abs().max()).to(fp8)
    for odd, reason in (
        (scaled, "values up to 448.* by a scale"),
        (good[name] * math.inf, "values that are not finite"),
    ):
        with pytest.raises(ValueError, match=f"{name} .*{reason}"):
            load_weights(model, good | {name: odd})  # the values are looked at as they are read, once
    load_weights(model, good)
    before = [p.clone() for p in model.parameters()]
    refused(good | {f"{name}_scale": torch.ones(())}, "1 unknown", f"{name}_scale")
    refused(
        good | {f"{name[:-7]}.query_norm.scale": good[name], f"{name[:-7]}.query_norm.weight": good[name]},
        "same weight",
    )
    refused(good | {7: good[name]}, "7 is of type")
    refused(good | {name: torch.Tensor._make_subclass(Odd, good[name])}, name, "is of type Odd")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "a.gguf", "a.gguf is none of .safetensors, .pt")
    torch.save(good, tmp_path / "scaled.pt")
    torch.save({}, tmp_path / "scaled_map.pt")
    refused(tmp_path / "scaled.pt", "by the scales in scaled_map.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"0" * 99)
    refused(tmp_path / "bomb.pt", "bomb.pt is not a file of plain tensors")
    half, rest = ({k: v for n, (k, v) in enumerate(good.items()) if n % 2 == part} for part in range(2))
    refused(folder("twice", a=good, b={name: good[name]}), name, "another file")
    refused(
        folder("part", **{"m-00001-of-00003": half, "m-00002-of-00003": rest}), "is incomplete: it has 2 of 3 files"
    )
    refused(folder("lost", {name: "b.safetensors"}, a=good), "b.safetensors is missing")
    refused(
        folder("odd", {**dict.fromkeys(good, "a.safetensors"), "x.weight": "a.safetensors"}, a=good), "names x.weight"
    )
    # what is right is read: the index's files alone, hidden ones passed over, types mixed in one layer
    index = dict.fromkeys(half, "a.safetensors") | dict.fromkeys(rest, "b.safetensors")
    whole = folder("whole", index, a=half, b=rest, old={name: good[name]})
    (whole / "._a.safetensors").write_bytes(b"x")
    load_weights(model, whole)
    assert equal(model.state_dict(), good)
    mixed = [export_weight(GOLDEN, n, p, "diffusers") for n, p in good.items()]
    mixed = {k: v.to(fp8) if "to_q.weight" in k else v.bfloat16() for part in mixed for k, v in part.items()}
    load_weights(model, mixed)
    close(model.double_blocks[0].img_attn_qkv.weight[:48], mixed["transformer_blocks.0.attn.to_q.weight"].float(), 1e-7)
    # what is not finite is not exported
    source.img_in.proj.bias.data[0] = math.nan
    with pytest.raises(ValueError, match="img_in.proj.bias has values that are not finite"):
        save_weights(source, tmp_path / "export2")
    assert not list((tmp_path / "export2").glob("*.json"))


class Odd(torch.Tensor):
    """A subclass: what it holds is not what it stands for."""


def test_an_export_is_read_here_and_by_diffusers(tmp_path):
    """An export is of several files or of one, and nothing of an earlier export stays next to it."""
    import diffusers

    source, index = golden_model(torch.float32), "diffusion_pytorch_model.safetensors.index.json"
    parts = [export_weight(GOLDEN, *pair, "diffusers") for pair in source.state_dict().items()]
    theirs = {name: tensor for part in parts for name, tensor in part.items()}
    for naming in ("diffusers", "original"):
        for shard_bytes in (30_000, 10**9, 60_000, 10**9):
            save_weights(source, tmp_path / naming, naming, torch.float32, shard_bytes)
            places = json.loads((tmp_path / naming / index).read_text())["weight_map"]
            files = {*places.values()}
            assert {file.name for file in (tmp_path / naming).iterdir()} == files | {index, "config.json"}
            assert len(files) == 1 if shard_bytes == 10**9 else len(files) > 3
            model = HunyuanVideo(GOLDEN)
            load_weights(model, tmp_path / naming)
            assert equal(model.state_dict(), source.state_dict())
            if naming == "diffusers":
                there = diffusers.HunyuanVideoTransformer3DModel.from_pretrained(tmp_path / naming)
                assert equal(there.state_dict(), theirs)
    assert config_from_diffusers(tmp_path / "diffusers/config.json") == GOLDEN
    assert HunyuanConfig.from_dict(json.loads((tmp_path / "original/config.json").read_text())) == GOLDEN


def test_fuzzed_weights(tmp_path):
    """Bytes changed, cut, inserted, mostly in the header: it loads, or it says so and nothing was loaded."""
    config = HunyuanConfig(1, (2, 2, 4), 256.0, 1, 1, 1, 1.0, 1, 1, (1, 1, 1), 2, 2, False)
    source, model, draw = random_model(config, dtype=torch.float32), HunyuanVideo(config), random.Random(0)
    save_file(source.state_dict(), tmp_path / "good.safetensors")
    good, outcomes = (tmp_path / "good.safetensors").read_bytes(), [0, 0]
    header = 8 + int.from_bytes(good[:8], "little")
    changes = [flip, lambda b, p: b[:p], lambda b, p: b[:p] + b[p + 1 :], lambda b, p: b[:p] + b"0" + b[p:]]
    changes += [lambda b, p: b[:p] + draw.randbytes(8) + b[p + 8 :]]
    for n in range(2000):
        place = draw.randrange(header if n % 4 else len(good))
        (tmp_path / "bad.safetensors").write_bytes(draw.choice(changes)(good, place))
        before = [p.clone() for p in model.parameters()]
        try:
            load_weights(model, tmp_path / "bad.safetensors")
            outcomes[0] += 1
        except ValueError as error:
            outcomes[1] += 1
            if "values" in str(error):  # these are looked at while they are read
                continue
            same = [torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(before, model.parameters())]
            assert all(same), "a partial load"
    assert min(outcomes) > 20, outcomes


def test_diffusers_agrees():
    """Three random models, exported to diffusers and run there."""
    import diffusers

    draw = random.Random(0)
    for seed in range(3):
        dims = draw.choice([(4, 6, 6), (8, 4, 4), (2, 2, 4)])
        config = HunyuanConfig(draw.choice([2, 3, 5]), dims, 256.0, draw.choice([1, 3]), draw.choice([1, 2]),
                               draw.choice([1, 2]), draw.choice([2.0, 4.0]), 4, 4, (1, 2, 2), 20, 10, seed != 1)  # fmt: skip
        model = random_model(config, dtype=torch.float32, seed=seed)
        inputs = random_inputs(config, (3, 4, 6), (5, 3, 1))
        values = {k: v for k, v in diffusers_config(config).items() if not k.startswith("_")}
        theirs = diffusers.HunyuanVideoTransformer3DModel(**values).eval()
        state = [export_weight(config, n, p, "diffusers") for n, p in model.state_dict().items()]
        theirs.load_state_dict({k: v for part in state for k, v in part.items()}, strict=True)
        with torch.no_grad():
            ours = model(**inputs)
            inputs = {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
            mask = (torch.arange(inputs["text"].shape[1]) < torch.tensor(inputs["lengths"])[:, None]).long()
            given = (inputs["latents"], inputs["timestep"], inputs["text"], mask, inputs["pooled"])
            truth = theirs(*given, guidance=inputs["guidance"], return_dict=False)[0]
        close(ours, truth, 2e-5)


def test_13b_in_three_namings():
    with torch.device("meta"):
        model = HunyuanVideo(HunyuanConfig.preset("13b"))
    for naming, count in (("original", 856), ("diffusers", 1264), ("comfyui", 856)):
        assert len({n for name in model.state_dict() for n in names_in(naming, name)}) == count
    assert forward_flops(model.config, 118_800, 256) == 1_617_916_864_757_760 + 10_450_450_859_950_080


# --------------------------------------------------------------------------------------------------------------------
# FlashAttention-4


def math_fa4(monkeypatch):
    """Install FlashAttention-4's two functions, as 4.0.0b36 has them, in plain torch; the calls of forward."""
    calls, module = [], types.ModuleType("flash_attn.cute.interface")

    def forward(q, k, v, return_lse):
        calls.append(q.shape)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        out = (scores.softmax(3) @ v).transpose(1, 2).contiguous()
        return out, scores.logsumexp(3).float() if return_lse else None, None, None, None

    def backward(q, k, v, out, dout, lse):
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and dout.is_contiguous()
        with torch.enable_grad():
            qkv = [x.detach().requires_grad_() for x in (q, k, v)]
            again = forward(*qkv, False)[0]
        calls.pop()
        assert torch.equal(again, out)
        return torch.autograd.grad(again, qkv, dout)

    module._flash_attn_fwd, module._flash_attn_bwd = forward, backward
    for package in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


@CHECKPOINTED
def test_fa4_is_attention(checkpointing, runs, monkeypatch):
    """Same output and gradients as sdpa, through the blocks; `attention` checkpointing keeps what it gave."""
    model, inputs, calls = random_model(CONFIG), random_inputs(CONFIG, (2, 4, 6), (3, 2)), math_fa4(monkeypatch)
    with gpu(9, 0):
        model.attention = attention_kernel("fa4")
    with pytest.raises(ValueError, match="fa4 computes in bfloat16 or float16, the model is in float64"):
        model(**inputs)
    monkeypatch.setattr(full.fa4, "FA4_DTYPES", (torch.float64,))
    out = model(**inputs, checkpointing=checkpointing)
    assert len(calls) == 2 * 4  # of each of 2 samples, as their texts differ; the refiner uses sdpa
    grads = torch.autograd.grad(out.square().sum(), [*model.parameters()])
    assert len(calls) == runs * 2 * 4
    model.attention = sdpa
    truth = model(**inputs)
    close(out, truth)
    for ours, true in zip(grads, torch.autograd.grad(truth.square().sum(), [*model.parameters()])):
        close(ours, true)

    for major, minor, expected in (
        (8, 6, "capability 9 or 10, this one has 8.6"),
        (0, 0, "9 or 10, there is none here"),
    ):
        with gpu(major, minor), pytest.raises(ValueError, match=expected):
            attention_kernel("fa4")
    with pytest.raises(ValueError, match="'fa5' is neither sdpa nor fa4"):
        attention_kernel("fa5")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match="needs FlashAttention-4"):
        attention_kernel("fa4")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention-4 needs a GPU")
def test_fa4_on_this_gpu():
    """The real kernels, bf16, at the model's head size and a length that does not divide by their tiles."""
    pytest.importorskip("flash_attn.cute.interface")
    kernel, both = attention_kernel("fa4"), []
    draw = partial(torch.randn, 2, 1003, 3, 128, device="cuda", dtype=torch.bfloat16)
    qkv, cotangent = [draw(requires_grad=True) for _ in range(3)], draw()
    for attend in (kernel, sdpa):
        out = attend(*qkv)
        both.append([out, *torch.autograd.grad(out, qkv, cotangent)])
    for ours, truth in zip(*both):
        assert (ours - truth).float().norm() < 1e-2 * truth.float().norm()
