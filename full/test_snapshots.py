"""Journeys with a snapshot, as a user types them: prompts to videos, videos to a fine-tuned model."""

import json
import math
import os
import re
import shutil
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import full.infer
from full.clips import file_name
from full.flags import check_train, get_config, parse_train, take_from_model
from full.folder import Folder
from full.lora import merge_lora
from full.snapshot import Snapshot, TextEncoders
from full.test_layouts_model import SIZE
from full.weights import load_weights
from hunyuan_sp import HunyuanVideo
from test_sp import close, draws, equal, fork, load_checkpoint, losses, start_forked, wait_for


def test_prompts_to_videos(snapshot, tmp_path):
    """As a user types it: a file of prompts in, a folder of clips out; clips that exist are skipped; bad input is refused."""
    clips = tmp_path / "clips"
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\na cat {}\n")
    flags = [*SIZE, "--model", snapshot, "--prompts", tmp_path / "prompts.txt", "--sp", 1, "--output", f"{clips}/"]
    (code, printed), _ = fork("full.infer", *flags, ranks=2, out=tmp_path)
    assert code == 0 and "clip 3 of 3 · step 3/3" in printed, printed
    made = sorted(file.name for file in clips.glob("[!.]*"))
    names = [file_name(prompt, 0) for prompt in ("a cat", "a cat {}", "a dog")]
    assert made == sorted(f"{name}.{ending}" for name in names for ending in ("mp4", "png", "safetensors"))
    assert names[0] == "a-cat-0" and re.fullmatch("a-cat-[0-9a-f]{6}-0", names[1]) and names[2] == "a-dog-0"
    import av

    with av.open(clips / "a-dog-0.mp4") as video:
        frames, stream = [*video.decode(video=0)], video.streams.video[0]
        assert (len(frames), frames[0].width, frames[0].height, stream.average_rate) == (9, 96, 64, 24)
        assert (stream.codec.name, stream.pix_fmt) == ("h264", "yuv420p")

    before = load_file(clips / "a-dog-0.safetensors")
    (clips / "a-dog-0.mp4").unlink()
    lines = (tmp_path / "prompts.txt").read_text()
    (tmp_path / "prompts.txt").write_text("grass " * 300 + "\n" + lines)  # on top: it changes nothing below
    ((code, printed),) = fork("full.infer", *flags, out=tmp_path)
    assert code == 0 and "2 of 4 clips exist already" in printed and printed.count("wrote") == 2, printed
    assert re.search(r"'grass grass .*'\.\. has \d+ tokens: what follows the first 256 is cut off", printed), printed
    close(load_file(clips / "a-dog-0.safetensors")["latents"], before["latents"], 1e-5)
    bad_snapshots(snapshot, tmp_path)
    for line, expected in BAD_SNAPSHOTS:
        line = line.format(good=snapshot, tmp=tmp_path).split()
        line = ["--prompt", "a cat", "--output", f"{tmp_path}/never", *SIZE, *line]
        try:
            with mock.patch.object(full.infer.faults, "init", lambda *_: 1 / 0):
                full.infer.infer(full.infer.parse(line))
        except ValueError as error:  # before the ranks meet
            assert re.search(expected, str(error)), (line, error)
            continue
        except ZeroDivisionError:
            ((code, printed),) = fork("full.infer", *line, out=tmp_path)
        lines = [x for x in printed.splitlines() if not x.startswith(("clip ", "encoding ", "loading "))]
        assert code == 1 and len(lines) == 1 and re.match(f"error: .*{expected}", lines[0]), (line, printed)
    assert not [*tmp_path.glob("never*")] and not [*clips.glob(".*.part")]


BAD_SNAPSHOTS = [
    ("--model {tmp}/none", "none: there is no such folder, and a model of the hub is OWNER/NAME"),
    ("--model {tmp}", "is not a snapshot in the diffusers layout: it has no transformer/"),
    ("--model {good} --image {tmp}/prompts.txt", "is a text-to-video model, which takes no --image"),
    ("--model {tmp}/still", "is a token_replace model, which takes its first frame: give --image"),
    ("--model {tmp}/still --image {tmp}/prompts.txt", "prompts.txt is not an image"),
    ("--model {tmp}/still --image {tmp}/deep.png", "deep.png has 16 or 32 bits a channel"),
    ("--model {tmp}/unknown", "image_condition_type kind and 16 channels: it is neither kind that is known"),
    ("--model {tmp}/dynamic", "a shift of 7.0 and use_dynamic_shifting: only the release's schedule is known"),
    ("--model {good} --frames 10", "multiples of 16, frames 10 must be 4k.1"),
    ("--model {tmp}/words", "the template's head is [0-9]+ tokens, not 95"),
    ("--model {tmp}/words --config 13b", "--model brings its own config"),
    ("--model {tmp}/other", "config.json is of another model: qk_norm is layer_norm, not rms_norm"),
    ("--model {tmp}/lacks", "text_encoder lacks 1 weights, layers.0.mlp.up_proj.weight among them"),
    ("--model {good} --negative_embeds x", "--negative_embeds goes with --embeds"),
    ("--model {tmp}/nan", "x_embedder.proj.bias has values that are not finite"),
    ("--model {good} --height 100", "height 100 and width 96 must be multiples of 16"),
    ("--model {good} --cfg 1e38 --output /proc/none/x", "/proc/none"),
    ("--model {good} --shift 1e300", "the clip of 'a cat' has values that are not finite: nothing is written"),
]


def bad_snapshots(good, folder):
    from PIL import Image

    Image.new("I;16", (4, 4)).save(folder / "deep.png")
    for name in ("still", "unknown", "dynamic", "words", "other", "nan", "lacks"):
        shutil.copytree(good, folder / name)
    changes = dict(still=dict(image_condition_type="token_replace"), other=dict(qk_norm="layer_norm"))
    changes |= dict(unknown=dict(image_condition_type="kind"), dynamic=dict(use_dynamic_shifting=True))
    for name, change in changes.items():
        file = folder / name / ("scheduler/scheduler_config.json" if name == "dynamic" else "transformer/config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    file = folder / "words/tokenizer/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["pre_tokenizer"] = dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=True)
    file.write_text(json.dumps(tokenizer))
    encoder = folder / "lacks/text_encoder/model.safetensors"
    save_file(
        {k: v for k, v in load_file(encoder).items() if k != "layers.0.mlp.up_proj.weight"}, encoder, dict(format="pt")
    )
    file = next((folder / "nan/transformer").glob("*.safetensors"))
    weights = load_file(file)
    weights["x_embedder.proj.bias"][3] = math.nan
    save_file(weights, file, metadata=dict(format="pt"))


def write_video(file, frames, height, width, rate=24, seed=0):
    """Lossless, so that what comes back is known."""
    import av

    pixels = torch.randint(0, 256, (frames, height // 8, width // 8, 3), generator=torch.Generator().manual_seed(seed))
    pixels = pixels.repeat_interleave(8, 1).repeat_interleave(8, 2).byte()
    with av.open(str(file), "w") as video:
        stream = video.add_stream("libx264rgb", rate=rate, options=dict(crf="0"))
        stream.height, stream.width, stream.pix_fmt = height, width, "rgb24"
        for frame in pixels.numpy():
            video.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        video.mux(stream.encode())
    return pixels


def test_from_videos_to_a_lora(snapshot, tmp_path):
    """As a user types it: a folder of videos is encoded on two ranks, whatever is in it; a LoRA is trained on it, sampled
    with, and merged into the weights."""
    from PIL import Image

    videos, out = tmp_path / "videos", tmp_path / "latents"
    videos.mkdir()
    pixels = write_video(videos / "a.mp4", 11, 64, 96)
    write_video(videos / "fast.mkv", 30, 64, 96, rate=48, seed=1)
    short = write_video(videos / "short.mp4", 3, 64, 96, seed=2)
    write_video(videos / "portrait.mp4", 9, 128, 64, seed=3)
    write_video(videos / "untold.mp4", 9, 64, 96, seed=4)
    (videos / "broken.mp4").write_bytes((videos / "a.mp4").read_bytes()[:900])
    Image.new("RGB", (192, 128), "red").save(videos / "picture.png")
    captions = dict(a="a cat", fast="", short="a dog", portrait="a cat walks", broken="a cow")
    for name, caption in captions.items():
        (videos / f"{name}.txt").write_text(caption + "\n")
    (videos / "captions.jsonl").write_text(json.dumps(dict(file="picture.png", caption="red")) + "\n")
    flags = f"--model {snapshot} --videos {videos} --output {out} --height 64 --width 96 --frames 9".split()
    work = start_forked("full.encode", *flags, ranks=2, out=tmp_path)
    wait_for(lambda: list(out.glob("*.*.safetensors")) or not work[0][0].is_alive())
    for process, _ in work:
        process.kill()
        process.join()
    finished = {file: file.read_bytes() for file in out.glob("*.*.safetensors")}
    results = fork("full.encode", *flags, ranks=2, out=tmp_path)
    assert [code for code, _ in results] == [0, 0], results
    printed = results[0][1]
    counts = re.search(r"wrote (\d) samples to .*, (\d) existed already, (\d) skipped", printed).groups()
    assert counts == (str(5 - len(finished)), str(len(finished)), "2") and finished, printed
    assert "in place of" not in printed
    assert all(file.read_bytes() == data for file, data in finished.items()), "what was finished is made again"
    assert re.search("skipping .*broken.mp4: it is not a video", printed) and "there is no untold.txt" in printed, (
        printed
    )
    shapes = {file.name: list(load_file(file)["latents"].shape) for file in out.glob("*.*.safetensors")}
    assert shapes == {
        "a.mp4.safetensors": [16, 3, 8, 12],
        "fast.mkv.safetensors": [16, 3, 8, 12],  # 15 frames at 24 a second, 13 of them, of which 9 were asked for
        "short.mp4.safetensors": [16, 1, 8, 12],
        "portrait.mp4.safetensors": [16, 3, 14, 6],
        "picture.png.safetensors": [16, 1, 8, 12],
    }

    # equal to what the snapshot's own encoders say
    one = Snapshot(snapshot)
    vae, encoders = one.vae(torch.device("cpu")), TextEncoders(one, torch.device("cpu"))

    def encoded(frames):
        return vae.encode(frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1).latent_dist.mean[0] * 0.476986

    for file, frames in (("a.mp4", pixels[:9]), ("short.mp4", short[:1])):
        close(load_file(out / f"{file}.safetensors")["latents"], encoded(frames), 1e-5)
    for file, caption in (("a.mp4", "a cat"), ("fast.mkv", ""), ("picture.png", "red")):
        sample, (text, pooled) = load_file(out / f"{file}.safetensors"), encoders(caption)
        close(sample["text"], text, 1e-5), close(sample["pooled"], pooled, 1e-5)
    close(load_file(out / Folder.EMPTY)["text"], encoders("")[0], 1e-5)

    # one sample is gone, one has another caption: these two are made, and no other
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("[!.]*")}
    (out / "a.mp4.safetensors").unlink()
    (videos / "short.txt").write_text("a bird")
    ((code, printed),) = fork("full.encode", *flags, out=tmp_path)
    assert code == 0 and re.search(
        "wrote 2 samples to .*, 1 in place of older ones, 3 existed already, 2 skipped", printed
    ), printed
    after = {file.name: file.stat().st_mtime_ns for file in out.glob("[!.]*")}
    assert {name for name in before if before[name] != after[name]} == {
        "a.mp4.safetensors",
        "short.mp4.safetensors",
        Folder.EMPTY,
    }
    close(load_file(out / "a.mp4.safetensors")["latents"], encoded(pixels[:9]), 1e-5)
    (videos / "fast.mkv").write_bytes(b"none")
    with open(videos / "captions.jsonl", "a") as table:
        table.write(json.dumps(dict(file="gone.mp4", caption="a fox")) + "\n")
    ((code, printed),) = fork("full.encode", *flags, out=tmp_path)
    assert (
        code == 0 and "4 existed already, 4 skipped" in printed and "skipping " + str(videos / "gone.mp4") in printed
    ), printed
    assert re.search(
        r"skipping .*fast.mkv: it is not a video.*\(.*fast.mkv.safetensors, made before, is kept\)", printed
    )

    run = (
        f"--model {snapshot} --data {out} --lora 2 --steps 3 --batch 2 --lr 1e-2 --caption_drop 0.5 --workers 0".split()
    )
    run += [*"--validate_every 1 --validate 0.2 --sample_prompt".split(), "a cat", "--out", tmp_path / "cat"]
    results = fork("full.train", *run, ranks=2, out=tmp_path)
    assert [code for code, _ in results] == [0, 0], results
    os.umask(umask := os.umask(0))
    assert (tmp_path / "cat/lora.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask
    entries = losses(tmp_path / "cat")
    assert len({entry["validation_loss"] for entry in entries}) == 3, entries
    lora, clips = tmp_path / "cat/lora.safetensors", []
    clip = ["--model", snapshot, "--prompt", "a cat", *SIZE, "--output"]
    for name, more in (("without", []), ("merged", ["--lora", lora]), ("none", ["--lora", f"{lora}:0"])):
        ((code, printed),) = fork("full.infer", *clip, tmp_path / name, *more, out=tmp_path)
        assert code == 0, printed
        clips.append(load_file(tmp_path / f"{name}.safetensors")["latents"])
    assert torch.equal(clips[0], clips[2]) and (clips[0] - clips[1]).abs().max() > 1e-3
    # the clip of the last step is the one that the LoRA gives
    seen = load_file(tmp_path / "cat/sample-3.safetensors")["latents"]
    assert (tmp_path / "cat/sample-3.mp4").is_file() and (tmp_path / "cat/sample-1.png").is_file()
    size = dict(height=8 * seen.shape[2], width=8 * seen.shape[3], frames=4 * seen.shape[1] - 3, steps=20)
    size = [str(part) for name, value in size.items() for part in (f"--{name}", value)]
    ((code, printed),) = fork("full.infer", *clip, tmp_path / "same", "--lora", lora, *size, out=tmp_path)
    assert code == 0, printed
    close(load_file(tmp_path / "same.safetensors")["latents"], seen, 1e-4)

    export = f"--model {snapshot} --lora {lora} --shard --output {tmp_path}/merged --naming diffusers".split()
    ((code, printed),) = fork("full.export", *export, out=tmp_path)
    assert code == 0, printed
    shutil.copytree(snapshot, tmp_path / "tuned")
    shutil.rmtree(tmp_path / "tuned/transformer")
    shutil.copytree(tmp_path / "merged", tmp_path / "tuned/transformer")
    ((code, printed),) = fork(
        "full.infer", "--model", tmp_path / "tuned", *clip[2:], tmp_path / "tuned-clip", out=tmp_path
    )
    assert code == 0, printed
    close(load_file(tmp_path / "tuned-clip.safetensors")["latents"], clips[1], 2e-2)  # the export is in bfloat16

    # training takes the noise levels that the snapshot's scheduler says
    file = tmp_path / "tuned/scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(shift=5.0)))
    for flags, shift in (([], 5.0), (["--shift", "2"], 2.0)):
        args = parse_train("", ["--model", str(tmp_path / "tuned"), "--data", str(out), *flags])
        check_train(args, get_config(args))
        take_from_model(args)
        assert args.shift == shift
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(use_karras_sigmas=True)))
    with pytest.raises(ValueError, match="use_karras_sigmas: only the release's schedule is known"):
        check_train(parse_train("", ["--model", str(tmp_path / "tuned"), "--data", str(out)]), one.config)


def run(folder, program, *flags, ranks=1, code=0):
    """Run a program to the end that it should come to; what rank 0 printed."""
    results = fork(program, *flags, ranks=ranks, out=folder)
    assert [ended for ended, _ in results] == [code] * ranks, results
    return results[0][1]


def clip_of(folder, name, *flags):
    """The latents of a clip that full.infer makes."""
    run(folder, "full.infer", *flags, *SIZE, "--output", folder / name)
    return load_file(folder / f"{name}.safetensors")["latents"]


def exported(folder, name, *flags, ranks=1):
    """The weights that full.export writes, in the original naming."""
    run(folder, "full.export", *flags, "--output", folder / name, ranks=ranks)
    return load_file(folder / name / "diffusion_pytorch_model.safetensors")


def parts_of(checkpoint):
    """A checkpoint's weights and, if it has one, its average: {name: tensor} of each."""
    stored = {name.partition("/")[2]: tensor for name, tensor in load_checkpoint(checkpoint).items()}
    return [{k.removeprefix(kind): v for k, v in stored.items() if k.startswith(kind)} for kind in ("model.", "more.")]


@pytest.fixture(scope="session")
def tune(snapshot, tmp_path_factory):
    """A function: train the snapshot with more flags; the --out folder."""
    folder, config, draw = tmp_path_factory.mktemp("tune"), Snapshot(snapshot).config, draws(7, torch.float32)
    (folder / "data").mkdir()
    for n in range(3):
        sample = dict(latents=draw(16, 1, 8, 12), text=draw(3, config.text_dim), pooled=draw(config.pooled_dim))
        save_file(sample, folder / f"data/{n}.safetensors")
    rules = "--steps 12 --lr 1e-3 --warmup 1 --batch 1 --workers 0 --model".split()

    def trained(name, *more):
        run(folder, "full.train", *rules, snapshot, "--data", folder / "data", *more, "--out", folder / name)
        return folder / name

    return trained


@pytest.mark.parametrize("more", [[], ["--ema", 0.5]], ids=["plain", "averaged"])
def test_a_tuned_model_is_sampled_and_exported(more, tune, snapshot, tmp_path):
    """--model with --checkpoint: the clip and the export of what training saved, the average if there is one."""
    out, model = tune("full" + "-".join(map(str, more)), *more), ["--model", snapshot]
    trained, average = parts_of(out / "step-12")
    weights = average or trained
    assert bool(average) == bool(more) and not (average and equal(average, trained))
    words = [*model, "--prompt", "a cat"]
    tuned = clip_of(tmp_path, "tuned", *words, "--checkpoint", out)
    assert (tuned - clip_of(tmp_path, "base", *words)).abs().max() > 1e-3
    save_file(weights, tmp_path / "weights.safetensors")
    close(clip_of(tmp_path, "same", *words, "--weights", tmp_path / "weights.safetensors"), tuned, 1e-4)
    close(clip_of(tmp_path, "sharded", *words, "--checkpoint", out, "--shard"), tuned, 1e-4)
    rounded = {name: tensor.bfloat16() for name, tensor in weights.items()}
    assert equal(exported(tmp_path, "export", *model, "--checkpoint", out), rounded)
    assert equal(exported(tmp_path, "alone", "--checkpoint", out, "--shard", ranks=2), rounded)


@pytest.mark.parametrize("more", [[], ["--ema", 0.5]], ids=["plain", "averaged"])
def test_a_lora_run_is_sampled_and_exported(more, tune, snapshot, tmp_path):
    """--model with --checkpoint of a LoRA run: what --lora gives with the file that the run wrote."""
    out, model = tune("lora" + "-".join(map(str, more)), *more, "--lora", 2, "--lora_alpha", 4), ["--model", snapshot]
    words, file = [*model, "--prompt", "a cat"], out / "lora.safetensors"
    tuned = clip_of(tmp_path, "tuned", *words, "--checkpoint", out)
    assert (tuned - clip_of(tmp_path, "base", *words)).abs().max() > 1e-3
    close(clip_of(tmp_path, "file", *words, "--lora", file), tuned, 1e-5)
    close(clip_of(tmp_path, "step", *words, "--checkpoint", out / "step-12"), tuned, 1e-5)
    merged = HunyuanVideo(Snapshot(snapshot).config)
    load_weights(merged, snapshot / "transformer")
    if not more:  # on another base it is said
        save_file({k: x + 1e-3 for k, x in merged.state_dict().items()}, tmp_path / "other.safetensors")
        flags = [*words, *SIZE, "--checkpoint", out, "--output", tmp_path / "on-other"]
        printed = run(tmp_path, "full.infer", *flags, "--weights", tmp_path / "other.safetensors")
        printed_twice = run(tmp_path, "full.infer", *flags, "--lora", out, code=1)
        assert "is what --checkpoint holds, and would be added twice" in printed_twice
        assert "step-12: LoRA of rank 2, alpha 4" in printed and "step-12 was trained on other weights than" in printed
    base = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    merge_lora(merged, file)
    ours = exported(tmp_path, "export", *model, "--checkpoint", out, "--shard", ranks=2)
    assert equal(ours, {name: tensor.bfloat16() for name, tensor in merged.state_dict().items()})
    changed = {name for name, tensor in ours.items() if not torch.equal(tensor, base[name].bfloat16())}
    wanted = {name for name in base if "blocks" in name and "refiner" not in name and "mod" not in name}
    assert changed == {name for name in wanted if name.endswith("weight") and "norm" not in name}


def test_a_checkpoint_that_is_not_there(snapshot, tmp_path):
    for program in ("full.infer", "full.export"):
        flags = ["--model", snapshot, "--checkpoint", tmp_path / "nowhere", "--output", tmp_path / "never"]
        flags += ["--prompt", "a cat", *SIZE] if program == "full.infer" else []
        printed = run(tmp_path, program, *flags, code=1)
        assert printed == f"error: no checkpoint in {tmp_path}/nowhere: there is no step-N folder in it\n"
    assert not [*tmp_path.glob("never*")]


def test_prompts_are_encoded_alone(snapshot, tmp_path):
    """full.encode --prompts writes what --embeds takes: the same clip."""
    (tmp_path / "prompts.txt").write_text("a dog\n\na cat\n")
    flags = ["--model", snapshot, "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "embeds"]
    run(tmp_path, "full.encode", *flags, ranks=2)
    files = sorted((tmp_path / "embeds").glob("*"))[1:]  # the first is the lock
    assert [file.name for file in files] == ["0000.safetensors", "0001.safetensors"]
    embedded = [clip_of(tmp_path, f"embedded-{n}", "--model", snapshot, "--embeds", files[n]) for n in range(2)]
    close(clip_of(tmp_path, "worded", "--model", snapshot, "--prompt", "a cat"), embedded[1], 1e-5)
    assert (embedded[0] - embedded[1]).abs().max() > 1e-3
    with safe_open(files[0], "pt") as handle:
        made_by = json.loads(handle.metadata()["made_by"]) | dict(kind="token_replace")
    save_file(load_file(files[0]), tmp_path / "other.safetensors", dict(made_by=json.dumps(made_by)))
    words = ["--model", snapshot, "--embeds", tmp_path / "other.safetensors", "--output", tmp_path / "never"]
    printed = run(tmp_path, "full.infer", *words, *SIZE, code=1)
    assert "other.safetensors was made with another kind: make it again with full.encode --prompts" in printed
    (tmp_path / "prompts.txt").write_text("a fox\n")
    printed = run(tmp_path, "full.encode", *flags, code=1)
    assert "0000.safetensors is of another prompt, 'a dog': give another --output" in printed
    (tmp_path / "prompts.txt").write_text("a dog\n\na cat\n")
    printed = run(tmp_path, "full.encode", *flags, "--image", tmp_path / "none.png", code=1)
    assert "is a text-to-video model: --image is not used" in printed
