"""The trainer of Wan's LoRA: one loss curve on every layout, and the whole journey from videos to diffusers' pipeline."""

from argparse import Namespace

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from examples.train_wan_lora import TINY
from examples.wan_samples import read_at_rate
from full.video import mp4, read_frames
from test_sp import close, fork, losses

TRAINER = "examples.train_wan_lora"
TEXTS = {"a": "a red square moves up", "b": "a blue square  moves\ndown", "c": "blue"}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """A complete Wan, tiny and random, as diffusers writes it."""
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    words = {
        word: n for n, word in enumerate(["<pad>", "</s>", "<unk>", *sorted(set(" ".join(TEXTS.values()).split()))])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    encoder = UMT5Config(vocab_size=len(words), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1, dim_mult=[1, 1, 1, 1])
    parts = dict(text_encoder=UMT5EncoderModel(encoder), transformer=WanTransformer3DModel(**TINY))
    WanPipeline(tokenizer, vae=vae, scheduler=UniPCMultistepScheduler(flow_shift=3.0), **parts).save_pretrained(folder)
    return folder


def test_one_curve_on_every_layout(tmp_path):
    """--batch 3 does not divide by dp 2, nor the 45 tokens and 5 heads by sp 2."""
    flags = ["--steps", 4, "--batch", 3, "--accumulation", 2, "--warmup", 1, "--lr", 1e-2]
    curves = []
    for dp, sp in ((1, 1), (1, 2), (2, 1)):
        out = tmp_path / f"{dp}x{sp}"
        results = fork(TRAINER, *flags, "--dp", dp, "--sp", sp, "--out", out, ranks=dp * sp, out=tmp_path)
        assert [code for code, _ in results] == [0] * dp * sp, results
        curves.append(torch.tensor([entry["loss"] for entry in losses(out)]))
    assert curves[0][0] != curves[0][3]
    for curve in curves[1:]:
        assert (curve / curves[0] - 1).abs().max() < 1e-6, curves


def test_from_videos_to_the_pipeline(snapshot, tmp_path):
    videos, data, out = tmp_path / "videos", tmp_path / "latents", tmp_path / "lora"
    videos.mkdir()
    for n, (name, text) in enumerate(TEXTS.items()):
        frames = torch.zeros(20, 32, 48, 3, dtype=torch.uint8)
        frames[:, 8:20, 8:20, n % 3] = 200
        (videos / f"{name}.mp4").write_bytes(mp4(frames))
        (videos / f"{name}.txt").write_text(text)
    (videos / "none.mp4").write_bytes(b"no video")
    (videos / "none.txt").write_text("nothing")
    size = ["--height", 32, "--width", 48, "--frames", 9, "--rate", 24]
    results = fork(TRAINER, "--model", snapshot, "--encode", videos, "--data", data, *size, ranks=2, out=tmp_path)
    assert [code for code, _ in results] == [0, 0] and "skipping" in results[0][1] + results[1][1], results
    assert sorted(file.name for file in data.iterdir()) == [
        "a.mp4.safetensors",
        "b.mp4.safetensors",
        "c.mp4.safetensors",
    ]

    pipeline = WanPipeline.from_pretrained(snapshot)
    pipeline.set_progress_bar_config(disable=True)
    vae = pipeline.vae
    for name, text in TEXTS.items():
        sample = load_file(data / f"{name}.mp4.safetensors")
        frames = read_frames(videos / f"{name}.mp4", Namespace(height=32, width=48, frames=9, no_buckets=True))
        pixels = pipeline.video_processor.preprocess_video(frames, 32, 48)
        mean, std = (torch.tensor(x)[:, None, None, None] for x in (vae.config.latents_mean, vae.config.latents_std))
        close(sample["latents"] * std + mean, vae.encode(pixels).latent_dist.mode()[0].detach(), 1e-5)
        theirs, _ = pipeline.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=16)
        close(sample["text"], theirs[0, : len(sample["text"])], 1e-5)
        assert not theirs[0, len(sample["text"]) :].any()

    flags = ["--model", snapshot, "--data", data, "--rank", 4, "--steps", 3, "--batch", 2, "--lr", 1e-2, "--sp", 2]
    results = fork(TRAINER, *flags, "--out", out, ranks=2, out=tmp_path)
    assert [code for code, _ in results] == [0, 0], results
    given = dict(
        prompt="red", height=32, width=48, num_frames=9, num_inference_steps=2, output_type="latent", guidance_scale=1.0
    )
    before = pipeline(**given, generator=torch.Generator().manual_seed(0)).frames
    pipeline.load_lora_weights(out)
    after = pipeline(**given, generator=torch.Generator().manual_seed(0)).frames
    saved = load_file(out / "pytorch_lora_weights.safetensors")
    loaded = {name: p for name, p in pipeline.transformer.named_parameters() if "lora_" in name}
    assert len(saved) == len(loaded) == 2 * 2 * (4 + 4 + 2) and not torch.equal(before, after)
    for name, param in loaded.items():
        theirs = "transformer." + name.replace(".default_0", "")
        assert torch.equal(saved[theirs], param) and saved[theirs].any(), name
    assert all(
        module.scaling["default_0"] == 1.0 for module in pipeline.transformer.modules() if hasattr(module, "scaling")
    )


def test_frames_of_another_rate(tmp_path):
    """A clip that brightens by 10 a frame, 24 frames a second: at 16 every third frame and the one in the middle."""
    clip = (10 * torch.arange(20, dtype=torch.uint8))[:, None, None, None].expand(-1, 32, 32, 3).contiguous()
    (tmp_path / "clip.mp4").write_bytes(mp4(clip))
    for frames, rate, wanted in ((81, 16.0, 9), (5, 16.0, 5), (81, 24.0, 17), (9, 8.0, 5)):
        images = read_at_rate(tmp_path / "clip.mp4", Namespace(height=32, width=32, frames=frames, rate=rate))
        places = [round(image.getpixel((9, 9))[0] / 10) for image in images]
        assert places == [round(n * 24 / rate) for n in range(wanted)], (frames, rate, places)


@pytest.mark.parametrize("flags, words", [
    (["--encode", "x"], "--encode needs --model"),
    (["--data", "nowhere"], "--data nowhere holds no .safetensors"),
    (["--dp", "2"], "world size 1 is not a multiple of data_parallel_size 2"),
])  # fmt: skip
def test_bad_flags(flags, words, tmp_path):
    ((code, printed),) = fork(TRAINER, *flags, "--steps", 1, "--out", tmp_path / "out", out=tmp_path)
    assert code and words in printed, printed


def test_the_lesson_of_wan(tmp_path):
    results = fork("examples.wan", ranks=3, out=tmp_path)
    assert [code for code, _ in results] == [0, 0, 0], results
    assert "rank 2: 15 tokens and all heads; in attn1 all tokens and 1 heads" in results[0][1], results
