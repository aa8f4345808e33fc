"""Ranks of a layout with LoRA and with snapshots: equal to one device, and to diffusers' own pipelines."""

import os
import shutil
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import full.clips
import full.encode
import full.export
import full.train
import test_sp
from comm import split_sequence
from full.faults import on_main
from full.lora import add_lora
from full.names import config_from_diffusers
from full.snapshot import Snapshot, TextEncoders
from full.test_layouts import infer, train
from full.vae import decode
from full.video import read_image
from full.weights import load_weights, save_weights
from hunyuan_sp import HunyuanConfig, HunyuanVideo, latent_shape, patchify
from sampler import seeded
from test_sp import (
    CONFIG,
    LAYOUTS,
    assert_ok,
    close,
    draws,
    equal,
    load_checkpoint,
    losses,
    random_inputs,
    random_model,
)

KINDS = ("t2v", "i2v_token_replace", "i2v_latent_concat")
PROMPT, NEGATIVE, SIZE = "a cat walks on the grass", "a dog", "--height 64 --width 96 --frames 9 --steps 3".split()


def setup_worker():
    test_sp.setup_worker()


def with_lora(device):
    """A model whose LoRA changes what it computes."""
    model, draw = random_model(CONFIG, device), draws(4)
    add_lora(model, 3, 6.0)
    for name, param in model.named_parameters():
        if "lora_" in name:
            param.data = draw(param.shape).to(device) * 0.2
    return model


def check_lora_gradients(pm, folder):
    """Every A and B, and nothing else, however sharded, checkpointed and accumulated: equal to one device on all samples."""
    lengths = [3, 1, 4, 2, 6, 5, 2, 1, 3, 4][: 2 * pm.dp_size]
    inputs, truth = random_inputs(CONFIG, (3, 4, 6), lengths, pm.device), with_lora(pm.device)
    cotangent = draws(3)(len(lengths), CONFIG.out_channels, 3, 4, 6).to(pm.device)
    (truth(**inputs) * cotangent).sum().backward()
    settings = [(pm.world_size, 1, True, "none"), (pm.world_size, 2, False, "full")]
    settings += [(size, 2, True, "attention") for size in sorted({pm.sp_size, 1} - {pm.world_size})]
    for size, accumulation, reshard, checkpointing in settings:
        model, mine = with_lora(pm.device), [pm.dp_rank, pm.dp_rank + pm.dp_size]
        pm.shard(model, model.blocks, shard_size=size, reshard_after_forward=reshard)
        for n, part in enumerate([mine] if accumulation == 1 else [mine[:1], mine[1:]]):
            batch = {name: x[part] if torch.is_tensor(x) else [x[i] for i in part] for name, x in inputs.items()}
            out = model(**batch, group=pm.sp_group, gather=False, checkpointing=checkpointing)
            local = split_sequence(patchify(cotangent[part], (1, 2, 2)), pm.sp_group)
            pm.backward(model, (out * local).sum(), last=n + 1 == accumulation)
        for (name, param), true in zip(model.named_parameters(), truth.parameters()):
            assert param.requires_grad == ("lora_" in name) == (param.grad is not None), name
            if param.requires_grad:
                assert true.grad.abs().max() > 1e-6, f"{name} is not tested: its gradient is zero"
                close(param.grad.full_tensor(), true.grad)


LORA = "--blocks 1,1 --lora 2 --lora_alpha 4 --ema 0.5 --lr 1e-2 --warmup 1 --steps 4 --batch 5 --accumulation 2 --save_every 1 --keep 0".split()
LORA += "--validate_every 2 --validate 0.001".split()  # 4 samples of 4096


def check_lora_curve_and_resume(pm, folder):
    """A LoRA with its average and its validation loss: the same on every layout; step 2 of the 1x1 run goes on here; what is
    saved is what is trained; and sampling with the file is sampling with the average."""
    base, own, first = folder / "lora-base", folder / f"lora-{pm.dp_size}x{pm.sp_size}", folder / "lora-1x1"
    flags = [*LORA, "--weights", str(base)]
    if pm.world_size == 1:
        model = random_model(HunyuanConfig.preset("tiny", double_depth=1, single_depth=1), dtype=torch.float32)
        save_weights(model, base, dtype=torch.float32)
    train(pm, *flags, "--out", str(own))
    on_main(lambda: shutil.copytree(first / "step-2", own / "again/step-2") and None)
    train(pm, *flags, "--out", str(own / "again"), "--resume")
    for truth, ours in ((losses(first), losses(own)), (losses(first)[2:], losses(own / "again"))):
        assert [entry["step"] for entry in ours] == [entry["step"] for entry in truth]
        for a, b in zip(truth, ours):
            assert ("validation_loss" in a) == ("validation_loss" in b) == (a["step"] % 2 == 0)
            for key in ("loss", "grad_norm", *(["validation_loss"] if a["step"] % 2 == 0 else [])):
                assert abs(a[key] - b[key]) <= 1e-6 * a[key], (key, a, b)
    if pm.world_size == 1:
        assert equal(load_checkpoint(own / "again/step-4"), load_checkpoint(own / "step-4"))
    saved = {name.partition("/")[2] for name in load_checkpoint(own / "step-4")}
    assert all("lora_" in name for name in saved) and any(name.startswith("more.") for name in saved)
    theirs, file = (load_file(path / "lora.safetensors") for path in (first, own))
    for name in theirs:
        close(file[name], theirs[name], 1e-2)  # Adam makes much of what float32 rounds; a wrong shard would be far off
    if pm.world_size == 1:
        before, kept = ({k.partition("/")[2]: x for k, x in load_checkpoint(own / f"step-{n}").items()} for n in (3, 4))
        for name, tensor in file.items():
            name, part, _ = name.removeprefix("transformer.").rsplit(".", 2)
            average = kept[f"more.{name}.{part}"]
            assert torch.equal(tensor, average * (2.0 if part == "lora_B" else 1.0)), name
            close(average, (before[f"more.{name}.{part}"] + kept[f"model.{name}.{part}"]) / 2, 1e-6)
        train(pm, *flags, "--ema", "0", "--out", str(own / "plain"))  # which changes nothing of the training
        assert [e["loss"] for e in losses(own / "plain")] == [e["loss"] for e in losses(own)]
    with pytest.raises(ValueError, match=r"lora: \[2, 4.0, '[\w-]+'\] there, \[3, 4.0, '[\w-]+'\] here"):
        train(pm, *flags, "--out", str(own), "--resume", "--lora", "3")
    if pm.world_size == 1:  # on top of weights that are no snapshot's
        clips = [own / "checkpoint", own / "file"]
        infer(pm, "--checkpoint", own, "--weights", base, "--output", clips[0])
        blocks = ["--config", "tiny", "--blocks", "1,1"]
        infer(pm, "--weights", base, *blocks, "--lora", own / "lora.safetensors", "--output", clips[1])
        close(*(load_file(f"{clip}.safetensors")["latents"] for clip in clips), 1e-5)
    with pytest.raises(ValueError, match="is a LoRA: give its base model"):
        infer(pm, "--checkpoint", own)


def check_offloaded_sampling(pm, folder):
    """Weights that come from the host's memory make the same clip bit for bit, with a LoRA and under --cfg; MLPs in slices the
    same to rounding."""
    own = folder / f"offload-{pm.dp_size}x{pm.sp_size}"

    def files():
        own.mkdir()
        config = HunyuanConfig.preset("tiny", double_depth=1, single_depth=1)
        save_file(random_model(config, dtype=torch.float32).state_dict(), own / "base.safetensors")
        a, b = draws(1, torch.float32)(4, config.hidden_size), draws(2, torch.float32)(config.hidden_size, 4)
        stem = "transformer.double_blocks.0.img_attn_proj.lora_"
        save_file({f"{stem}A.weight": a * 0.1, f"{stem}B.weight": b * 0.1}, own / "lora.safetensors")

    on_main(files)
    flags = ["--config", "tiny", "--blocks", "1,1", "--weights", own / "base.safetensors", "--steps", 3]
    flags += ["--cfg", 3, "--negative_prompt", "a red thing moves", "--dp", pm.dp_size]
    for dtype in ("float32", "bfloat16"):
        clips = []
        for n, more in enumerate(
            (["--lora", own / "lora.safetensors:0.7"], ["--offload", "weights"], ["--mlp_slices", 3], [])
        ):
            lora = ["--lora", own / "lora.safetensors:0.7"] * (0 < n < 3)
            infer(pm, *flags, *more, *lora, "--dtype", dtype, "--output", own / f"{dtype}-{n}")
            clips.append(load_file(own / f"{dtype}-{n}.safetensors")["latents"])
        assert torch.equal(clips[0], clips[1]) and not torch.equal(clips[0], clips[3]), dtype
        close(clips[2], clips[0], 1e-5 if dtype == "float32" else 5e-2)


def check_ranks_with_other_files(pm, folder):
    """Sampling, export and training compare what goes in: a tensor of the weights, the config, of one rank alone."""
    if pm.world_size == 1:
        return
    own, flags = folder / f"other-{pm.dp_size}x{pm.sp_size}" / str(pm.rank), ["--config", "tiny", "--blocks", "1,1"]
    model = random_model(HunyuanConfig.preset("tiny", double_depth=1, single_depth=1), dtype=torch.float32)
    if pm.rank == pm.world_size - 1:
        model.final_layer.linear.bias.data += 1
    own.mkdir(parents=True)
    save_file(model.state_dict(), own / "a.safetensors")
    os.chdir(own)  # the same flags on all ranks
    with pytest.raises(ValueError, match="differ in shared"):
        infer(pm, *flags, "--weights", "a.safetensors", "--output", "never")
    with pytest.raises(ValueError, match="differ in files"):
        export = full.export.parse(
            [*flags, "--weights", "a.safetensors", "--output", "never", "--device", pm.device.type]
        )
        full.export.export(export)
    with pytest.raises(ValueError, match="differ in weight_files"):
        train(pm, *flags, "--weights", "a.safetensors", "--steps", 1, "--out", "never")
    theta = replace(HunyuanConfig.preset("tiny"), rope_theta=256.0 + (pm.rank > 0))
    with (
        mock.patch.object(full.train, "get_config", lambda args: theta),
        pytest.raises(ValueError, match="differ in config"),
    ):
        train(pm, "--steps", 1, "--out", "never")
    os.chdir(folder)


def tiles_of_64_pixels():
    """Set what enable_tiling() sets, at a size where a tiny clip has tiles."""
    from diffusers import AutoencoderKLHunyuanVideo as VAE

    whole, sizes_and_strides = VAE.enable_tiling, (64, 64, 16, 48, 48, 12)  # height, width, frames
    return mock.patch.object(VAE, "enable_tiling", lambda vae: whole(vae, *sizes_and_strides))


def a_picture(file):
    """With an alpha channel and sides of its own: an image as people have it, on white as they see it."""
    from PIL import Image

    pixels = torch.randint(0, 256, (50, 70, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy(), "RGBA").resize((140, 100)).save(file)
    white = Image.new("RGBA", (140, 100), "white")
    white.alpha_composite(Image.open(file))
    return white.convert("RGB")


def diffusers_makes(folder, kind):
    """A tiny snapshot, and what diffusers' pipeline makes of it, with and without true CFG: latents, frames."""
    from make_snapshot import make_snapshot

    pipe = make_snapshot(folder / kind, kind)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.enable_tiling()
    shape = latent_shape(HunyuanConfig(), 64, 96, 9)
    noise = torch.randn((1, *shape), generator=seeded("sample", 0, 0))
    flags = dict(height=64, width=96, num_frames=9, num_inference_steps=3, guidance_scale=4.0)
    flags |= dict(image=a_picture(folder / "first.png")) if kind != "t2v" else {}
    for cfg in (1.0, 3.0):
        more = flags | dict(prompt=PROMPT, negative_prompt=NEGATIVE, true_cfg_scale=cfg, latents=noise)
        latents = pipe(**more, output_type="latent").frames
        frames = [
            torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8).view(64, 96, 3)
            for frame in pipe(**more).frames[0]
        ]
        save_file(
            dict(latents=latents[0].contiguous(), frames=torch.stack(frames)), folder / f"{kind}-{cfg}.safetensors"
        )
    return pipe


def there_and_back(folder, kind, pipe):
    """Loaded here and exported again, the transformer is the same to diffusers: weights and config."""
    config = config_from_diffusers(folder / kind / "transformer" / "config.json")
    model = HunyuanVideo(config)
    load_weights(model, folder / kind / "transformer")
    save_weights(model, folder / f"{kind}-export", "diffusers", torch.float32)
    exported = type(pipe.transformer).from_pretrained(folder / f"{kind}-export")
    theirs, there = (
        {k: [*v] if isinstance(v, tuple) else v for k, v in m.config.items() if k[0] != "_"}
        for m in (exported, pipe.transformer)
    )
    assert theirs == there, [(k, theirs.get(k), v) for k, v in there.items() if theirs.get(k) != v]
    assert equal(exported.state_dict(), pipe.transformer.state_dict())


def check_decoding(pm, folder):
    """Any number of ranks gives the same frames, bit for bit those of diffusers' VAE with its tiles, ragged in all axes."""
    if pm.world_size == 1:
        diffusers_vae(folder)
    with tiles_of_64_pixels():
        vae = Snapshot.vae(SimpleNamespace(folder=folder), torch.device("cpu"))
    for n, shape in enumerate(((1, 8, 6), (5, 14, 10), (7, 6, 8), (9, 10, 4))):
        latents, file = draws(n, torch.float32)(16, *shape), folder / f"decoded-{n}.safetensors"
        if pm.world_size == 1:
            save_file(dict(pixels=vae.decode(latents[None] / 0.476986).sample[0]), file)
        pixels, truth = decode(vae, latents, pm.sp_group), load_file(file)["pixels"]
        assert (pixels is None) == (pm.sp_rank > 0)
        assert pixels is None or torch.equal(pixels, truth), (shape, (pixels - truth).abs().max())


def diffusers_vae(folder):
    from make_snapshot import components

    torch.manual_seed(0)
    components("t2v")[1]["vae"].save_pretrained(folder / "vae")


def same_text(folder, kind, pipe):
    """Text states and pooled of prompts short, empty and too long, beside the pipeline's own."""
    ours = TextEncoders(Snapshot(folder / kind), torch.device("cpu"))
    image = read_image(folder / "first.png") if kind != "t2v" else None
    every = dict(image_embed_interleave=ours.every, image=image) if image else {}
    for prompt in (PROMPT, "", "grass {} " * 40, *("the " * n for n in (250, 251, 252, 253, 255, 256, 300))):
        states, pooled, mask = pipe.encode_prompt(prompt=prompt, **every)
        text, vector = ours(prompt, image)
        close(text, states[0, : mask.sum()], 1e-5)
        close(vector, pooled[0], 1e-5)


def embeds_of(pm, folder, kind):
    """The file of --embeds that full.encode writes for the prompt, and the first frame."""
    flags = ["--model", folder / kind, "--prompts", folder / "prompts.txt", "--output", folder / f"{kind}-embeds"]
    flags += ["--image", folder / "first.png"] if kind != "t2v" else []
    (folder / "prompts.txt").write_text(PROMPT)
    full.encode.encode(full.encode.parse([*map(str, flags), "--device", pm.device.type]))
    return folder / f"{kind}-embeds/0000.safetensors"


def check_pipelines(pm, folder):
    """full.infer from a prompt to frames, and diffusers' pipeline with the same noise: each kind, true CFG on and off; and
    from what full.encode writes for the prompt."""
    with tiles_of_64_pixels():
        for kind in KINDS:
            if pm.world_size == 1:
                pipe = diffusers_makes(folder, kind)
                same_text(folder, kind, pipe)
                there_and_back(folder, kind, pipe)
            embeds_guidance = config_from_diffusers(folder / kind / "transformer/config.json").guidance_embed
            size = [*SIZE, *(["--guidance", 4] if embeds_guidance else [])]
            for cfg in (1.0, 3.0):
                output, frames = folder / f"{kind}-{cfg}-{pm.dp_size}x{pm.sp_size}", []
                flags = ["--model", folder / kind, *size, "--cfg", cfg]
                flags += ["--image", folder / "first.png"] if kind != "t2v" else []
                flags += ["--prompt", PROMPT, *(["--negative_prompt", NEGATIVE] if cfg > 1 else []), "--output", output]
                flags += ["--shard"] if cfg > 1 and pm.world_size > 1 else []
                with mock.patch.object(full.clips, "mp4", lambda x, seen=frames: seen.append(x) or b"."):
                    infer(pm, *flags)
                truth, ours = (
                    load_file(folder / f"{kind}-{cfg}.safetensors"),
                    load_file(f"{output}.safetensors")["latents"],
                )
                close(ours[:, ours.shape[1] - truth["latents"].shape[1] :], truth["latents"], 1e-5)
                if pm.sp_rank == 0:
                    difference = (frames[0].int() - truth["frames"].int()).abs()
                    assert difference.max() <= 1 and difference.float().mean() < 1e-3, difference.float().mean()
            if pm.world_size == 1:
                output = folder / f"{kind}-embedded"
                flags = ["--model", folder / kind, *size, "--embeds", embeds_of(pm, folder, kind)]
                flags += ["--image", folder / "first.png"] if kind != "t2v" else []
                infer(pm, *flags, "--output", output)
                ours, truth = (load_file(f"{name}.safetensors") for name in (output, folder / f"{kind}-1.0-1x1"))
                close(ours["latents"], truth["latents"], 1e-5)


# --------------------------------------------------------------------------------------------------------------------
# what the ranks of each layout have found meanwhile

CHECKS = {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}
ONLY = dict(
    ranks_with_other_files="1x2",
    offloaded_sampling="1x1 1x2 2x1",
    lora_curve_and_resume="1x1 1x2 2x2",
    pipelines="1x1 1x2 1x3",
    decoding="1x1 1x2 1x3",
)
NEEDED = {name: [name] for name in ONLY if "1x1" in ONLY[name] and name != "offloaded_sampling"}  # of 1x1


@test_sp.on_layouts(CHECKS, ONLY)
def test_on(layout, check, ranks_of_layout):
    assert_ok(layout, [check], *ranks_of_layout(layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_exits_with_0(layout, ranks_of_layout):
    assert set(ranks_of_layout(layout)[1]) == {0}
