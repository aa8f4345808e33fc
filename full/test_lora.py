"""LoRA files of peft, diffusers and kohya here, and ours in diffusers: the same latents."""

import math
from functools import partial
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import infer_min
from full.lora import add_lora, merge_lora, save_lora
from full.names import config_from_diffusers
from full.weights import load_weights
from hunyuan_sp import HunyuanConfig, HunyuanVideo, init_weights
from test_sp import close, draws, equal


def sample_as_the_pipeline(model, pipe, noise):
    """make_lora.py's call, by our sampler and with the pipeline's text."""
    from make_lora import CALL

    text, pooled, mask = pipe.encode_prompt(prompt=CALL["prompt"])
    text = [row[: m.sum()].float() for row, m in zip(text, mask)]
    exact = mock.patch.object(
        infer_min, "guidance_input", lambda s, b, d: torch.full((b,), 1000.0 * s)
    )  # as in float32
    with exact:
        rules = CALL["num_inference_steps"], 7.0, CALL["guidance_scale"]
        return infer_min.sample(model, noise, text, pooled.float(), *rules)


def loras_latents(pipe, noise, folder, *files):
    """Sample with LoRA files [(file, strength)] added to the weights."""
    model = HunyuanVideo(config_from_diffusers(folder / "transformer" / "config.json"))
    load_weights(model, folder / "transformer")
    for file, strength in files:
        merge_lora(model, file, strength)
    return sample_as_the_pipeline(model, pipe, noise)


def test_lora_files_of_others(snapshot, tmp_path):
    """A LoRA that peft trained gives here what it gives in diffusers' pipeline: at strength 1 and 0.5, alpha in the header or
    in B, and in kohya's naming with alpha in a tensor; and two files add up."""
    from make_lora import load, make_lora

    make_lora(snapshot, tmp_path / "lora")
    truth, pipe = load_file(tmp_path / "lora/effect.safetensors"), load(snapshot)
    ours = partial(loras_latents, pipe, truth["noise"], snapshot)
    header, folded = (tmp_path / f"lora/{name}.safetensors" for name in ("pytorch_lora_weights", "folded"))
    kohya, names = {}, dict(lora_A="lora_down", lora_B="lora_up")
    for name, tensor in load_file(header).items():
        module, part, _ = name.removeprefix("transformer.").rsplit(".", 2)
        stem = "lora_unet_" + module.replace(".", "_")
        kohya |= {f"{stem}.{names[part]}.weight": tensor, f"{stem}.alpha": torch.tensor(8.0)}
    save_file(kohya, tmp_path / "kohya.safetensors")
    close(ours(), truth["without"], 1e-5)
    for file in (header, folded, tmp_path / "kohya.safetensors"):
        close(ours((file, 1.0)), truth["with_lora"], 1e-4)
        close(ours((file, 0.5)), truth["half"], 1e-4)
    close(ours((folded, 0.25), (header, 0.25)), truth["half"], 1e-4)
    assert (truth["with_lora"] - truth["without"]).abs().max() > 0.5
    good = load_file(folded)
    key = next(name for name in good if "lora_A" in name)
    for tensors, expected in (
        (good | {"transformer.more.lora_A.weight": torch.ones(1)}, "transformer.more.lora_A.weight belongs to none"),
        ({k: v for k, v in good.items() if k != key}, "has {'B': .*} for .*, which is .* in the model"),
        (good | {key: torch.ones(4, 7)}, "'A': \\[4, 7\\]"),
        (good | {key: good[key] * math.inf}, "not finite"),
    ):
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match=expected):
            ours((tmp_path / "bad.safetensors", 1.0))


def test_our_lora_in_diffusers(snapshot, tmp_path):
    """The pipeline with our file gives what our own layers give, at strength 1 and 0.5; and at the release's width, where
    diffusers reads the original names, both namings are the same LoRA."""
    from diffusers import HunyuanVideoPipeline
    from make_lora import SHAPE, latents, load

    pipe, noise = load(snapshot), torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    model, draw = (
        HunyuanVideo(config_from_diffusers(snapshot / "transformer/config.json")),
        draws(5, torch.float32),
    )
    load_weights(model, snapshot / "transformer")
    add_lora(model, 4, 8.0)
    for name, param in model.named_parameters():
        if "lora_" in name:
            param.data = draw(param.shape) * 0.2
    save_lora(model, tmp_path / "ours.safetensors", "diffusers")
    save_lora(model, tmp_path / "original.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="ours.safetensors", adapter_name="a")
    own = sample_as_the_pipeline(model, pipe, noise)
    for strength in (1.0, 0.5):
        pipe.set_adapters(["a"], [strength])
        truth = latents(pipe)
        for name in ("ours", "original"):
            close(loras_latents(pipe, noise, snapshot, (tmp_path / f"{name}.safetensors", strength)), truth, 1e-4)
        assert strength < 1 or close(own, truth, 1e-4) is None

    with torch.device("meta"):
        wide = HunyuanVideo(HunyuanConfig(24, double_depth=1, single_depth=1, refiner_depth=1, mlp_ratio=0.5)).to_empty(
            device="cpu"
        )
    add_lora(wide, 2)
    init_weights(wide, only="lora_A")
    files = {}
    for naming in ("original", "diffusers"):
        save_lora(wide, tmp_path / f"{naming}.safetensors", naming)
        files[naming] = HunyuanVideoPipeline.lora_state_dict(load_file(tmp_path / f"{naming}.safetensors"))
    assert equal(files["original"], files["diffusers"]) and len(files["original"]) == 2 * (12 + 5)
