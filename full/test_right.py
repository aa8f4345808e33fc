"""Right inputs and right outputs: fingerprints, flags, samples, snapshots of strangers; and files that play right."""

import io
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from full import faults, screen
from full.average import Average
from full.captions import Entry
from full.checkpoints import read_manifest, write_manifest
from full.clips import Clip
from full.encode import encode_one, size_of
from full.encode import parse as parse_encode
from full.export import parse as parse_export
from full.files import fingerprint, printable
from full.flags import check_together, parse_train
from full.folder import Folder, check_origin, contents_of
from full.infer import parse as parse_infer
from full.names import config_from_diffusers
from full.snapshot import Snapshot, TextEncoders
from full.video import mp4, strip
from hunyuan_sp import HunyuanConfig
from test_sp import close, draws, fork, random_model

TINY = HunyuanConfig.preset("tiny")

# --------------------------------------------------------------------------------------------------------------------
# flags


@pytest.mark.parametrize("parse, flags, said", [
    (parse_train, "--lora_alpha 2", "--lora_alpha goes with --lora"),
    (parse_train, "--init_lora a.safetensors", "--init_lora goes with --lora"),
    (parse_train, "--validate 0.1", "--validate goes with --validate_every"),
    (parse_train, "--sample_prompt x", "--sample_prompt goes with --validate_every"),
    (parse_train, "--data x --height 512", "--data and --height can't be used together"),
    (parse_infer, "--image a.png", "--image goes with --model"),
    (parse_infer, "--embeds a --prompt b", "--embeds and --prompt can't be used together"),
    (parse_infer, "--embeds a --score 3", "--embeds and --score can't be used together"),
    (parse_infer, "--score 3 --prompt b", "--prompt and --score can't be used together"),
    (parse_infer, "--negative_embeds a", "--negative_embeds goes with --embeds"),
    (parse_infer, "--negative_prompt a", "--negative_prompt goes with --cfg"),
    (parse_infer, "--negative_prompt a --cfg 1", "--negative_prompt goes with --cfg"),
    (parse_train, "--data x --height 720", "--data and --height can't be used together"),
    (parse_encode, "--model x --output y --videos a --image b", "--videos and --image can't be used together"),
    (parse_infer, "--embeds a --negative_embeds a", "--negative_embeds goes with --cfg"),
    (parse_encode, "--model x --output y --prompts b --frames 5", "--prompts and --frames can't be used together"),
    (parse_infer, "--checkpoint a --config tiny", "--checkpoint and --config can't be used together"),
    (parse_encode, "--model x --output y --videos a --prompts b", "--videos and --prompts can't be used together"),
    (parse_encode, "--model x --output y --prompts b --no_buckets", "--no_buckets goes with --videos"),
    (parse_export, "--output y --checkpoint a --config tiny", "--checkpoint and --config can't be used together"),
])  # fmt: skip
def test_a_flag_is_used_or_refused(parse, flags, said):
    args = parse("", flags.split()) if parse is parse_train else parse(flags.split())
    pairs = "prompts-height prompts-width prompts-frames videos-image" if parse is parse_encode else ""
    with pytest.raises(ValueError, match=said):
        check_together(args, pairs)


@pytest.mark.parametrize("program, flags, said", [
    ("full.train", "--height 64 --steps 1", "--height has no effect: this model makes clips of one size"),
    ("full.train", "--guidance 6 --steps 1", "--guidance has no effect: this model embeds no guidance scale"),
    ("full.infer", "--config tiny --frames 5", "--frames has no effect: this model makes clips of one size"),
    ("full.infer", "--config tiny --cfg 0.5", "--cfg 0.5 is not at least 1.0"),
    ("full.export", "--config tiny --output {tmp}/x", "nothing to export: give --checkpoint, --model or --weights"),
    ("full.infer", "--config tiny --guidance 2", "--guidance has no effect: this model embeds no guidance scale"),
])  # fmt: skip
def test_a_flag_that_the_model_has_no_use_for(program, flags, said, tmp_path):
    ((code, printed),) = fork(program, *flags.format(tmp=tmp_path).split(), out=tmp_path)
    assert code == 1 and printed.startswith(f"error: {said}"), printed


# --------------------------------------------------------------------------------------------------------------------
# "the same" means what goes in


def test_a_fingerprint_is_of_what_is_in_a_file(tmp_path):
    """Each byte of a file of up to 100 MB; of a larger one the header and each tensor; and earlier ones can be compared."""
    file = tmp_path / "a.safetensors"
    tensors = {f"t{n}": draws(n, torch.float32)(40, 50) for n in range(30)}
    save_file(tensors, file, dict(alpha="4"))
    first, large, data = fingerprint([file]), fingerprint([file], limit=100), file.read_bytes()
    for place in range(8, len(data), len(data) // 97):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert fingerprint([file]) != first
    for name in tensors:  # any tensor that is another one
        save_file(tensors | {name: tensors[name] + 1}, file, dict(alpha="4"))
        assert fingerprint([file], limit=100) != large, name
    save_file(tensors, file, dict(alpha="8"))
    assert fingerprint([file], limit=100) != large
    file.write_bytes(data)
    assert (fingerprint([file]), fingerprint([file], limit=100)) == (first, large)
    earlier = fingerprint([file], like="9551d7010b597759")
    assert len(earlier) == 16 and not earlier.startswith("2-")
    for odd in (b"", b"x" * 3000, data[:50], b"\xff" * 300):
        file.write_bytes(odd)
        assert fingerprint([file], limit=0).startswith("2-")


def sample(file, value=1.0, **made_by):
    file.parent.mkdir(exist_ok=True)
    header = dict(made_by=json.dumps(made_by)) if made_by else None
    tensors = dict(latents=torch.full((3, 1, 4, 4), value), text=torch.ones(2, 32), pooled=torch.ones(32))
    save_file(tensors, file, header)


def test_samples_of_another_kind_or_of_two_snapshots_are_refused(tmp_path):
    sample(tmp_path / "a/1.safetensors", kind=None, encoders=["2-1"], caption="x")
    sample(tmp_path / "a/2.safetensors", kind=None, encoders=["2-1"], caption="y")
    Folder(TINY, tmp_path / "a")
    sample(tmp_path / "a/3.safetensors", kind=None, encoders=["2-7"], caption="y")
    with pytest.raises(ValueError, match="1.safetensors and .*3.safetensors were encoded by different snapshots"):
        Folder(TINY, tmp_path / "a")
    sample(tmp_path / "b/1.safetensors", kind="token_replace", encoders=["2-1"])
    with pytest.raises(ValueError, match="was encoded for a token_replace model, and this one is text-to-video"):
        Folder(TINY, tmp_path / "b")


@pytest.mark.parametrize("made_by", ["me", "[" * 10**5, "7", '{"encoders": 5}', '{"encoders": [1]}'])
def test_a_sample_with_an_odd_header(made_by, tmp_path):
    tensors = dict(latents=torch.zeros(3, 1, 4, 4), text=torch.ones(2, 32), pooled=torch.ones(32))
    save_file(tensors, tmp_path / "a.safetensors", dict(made_by=made_by))
    with pytest.raises(ValueError, match="a.safetensors has a header that full.encode did not write"):
        Folder(TINY, tmp_path)


def test_samples_of_another_snapshot_are_refused(snapshot, tmp_path):
    """Also if their fingerprints are an earlier version's; another DiT is no other snapshot for them."""
    other = tmp_path / "other"
    shutil.copytree(snapshot, other)
    facts = Snapshot(snapshot).facts()
    sample(tmp_path / "data/1.safetensors", kind=None, encoders=facts)
    data = Folder(TINY, tmp_path / "data")
    check_origin(data, snapshot)
    weights = next((other / "transformer").glob("*.safetensors"))
    save_file({name: x + 1 for name, x in load_file(weights).items()}, weights)
    check_origin(data, other)
    file = next((other / "vae").glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    save_file(tensors | {name: tensors[name] + 1}, file, dict(format="pt"))
    with pytest.raises(ValueError, match="was encoded by another snapshot than .*other: encode the videos again"):
        check_origin(data, other)
    from full.snapshot import encoder_files

    sample(
        tmp_path / "data/1.safetensors",
        kind=None,
        encoders=[fingerprint([f], like="0") for f in encoder_files(snapshot)],
    )
    check_origin(Folder(TINY, tmp_path / "data"), snapshot)


def test_contents_of_samples(tmp_path):
    """The empty prompt counts too, and so does each tensor of each sample."""
    for n in range(40):
        sample(tmp_path / f"data/{n}.safetensors")
    empty = tmp_path / "data/empty_prompt.safetensors"
    seen = []
    for value in (None, 1.0, 2.0):
        if value:
            save_file(dict(text=torch.full((1, 32), value), pooled=torch.ones(32)), empty)
        seen.append(contents_of(Folder(TINY, tmp_path / "data")))
    for n in (0, 7, 39):
        sample(tmp_path / f"data/{n}.safetensors", value=5.0 + n)
        seen.append(contents_of(Folder(TINY, tmp_path / "data")))
    assert len(set(seen)) == len(seen)


def test_contents_of_large_samples(tmp_path):
    """Each number of a sample of a few MB counts."""
    file = tmp_path / "data/1.safetensors"
    tensors = dict(latents=torch.zeros(3, 8, 128, 128), text=torch.ones(2, 32), pooled=torch.ones(32))
    file.parent.mkdir()
    seen = set()
    for place in (None, 0, 7, 130_000, -1):
        if place is not None:
            tensors["latents"].view(-1)[place] += 1
        save_file(tensors, file)
        seen.add(contents_of(Folder(TINY, tmp_path / "data")))
    assert len(seen) == 5 and file.stat().st_size > 1 << 20


def test_a_resumed_run_says_that_its_samples_are_others(tmp_path):
    for n in range(4):
        sample(tmp_path / f"data/{n}.safetensors")
    flags = [
        "--data",
        tmp_path / "data",
        "--blocks",
        "1,1",
        "--batch",
        2,
        "--config",
        "tiny",
        "--out",
        tmp_path / "out",
    ]
    ((code, printed),) = fork("full.train", *flags, "--steps", 1, out=tmp_path)
    assert code == 0, printed
    sample(tmp_path / "data/2.safetensors", value=2.0)
    ((code, printed),) = fork("full.train", *flags, "--steps", 2, "--resume", out=tmp_path)
    assert code == 0 and "other than before: what is in the samples" in printed, printed
    assert "do not say what encoded them" not in printed
    sample(tmp_path / "data/1.safetensors", kind=None, encoders=["2-1"])
    ((code, printed),) = fork("full.train", *flags, "--steps", 3, "--resume", out=tmp_path)
    assert code == 0 and "3 of 4 samples do not say what encoded them" in printed, printed


def test_a_lora_of_the_version_before_goes_on(tmp_path):
    """Its base weights' fingerprint is compared with one that is made as then; other weights are refused."""
    model = random_model(replace(TINY, double_depth=1, single_depth=1), dtype=torch.float32)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    flags = [
        "--config",
        "tiny",
        "--blocks",
        "1,1",
        "--weights",
        tmp_path / "base.safetensors",
        "--lora",
        2,
        "--batch",
        2,
    ]
    flags += ["--out", tmp_path / "out", "--save_every", 1]
    ((code, printed),) = fork("full.train", *flags, "--steps", 1, out=tmp_path)
    assert code == 0, printed
    earlier, folder = fingerprint([tmp_path / "base.safetensors"], like="0"), tmp_path / "out/step-1"
    for base, status in (("0" * 16, 1), (earlier, 0)):
        manifest = {k: v for k, v in read_manifest(folder).items() if k != "crc32"}
        write_manifest(folder, manifest | dict(lora=[*manifest["lora"][:2], base]))
        ((code, printed),) = fork("full.train", *flags, "--steps", 2, "--resume", out=tmp_path)
        assert code == status and ("is of another model: lora: " in printed) == (status == 1), printed


def test_a_video_that_is_another_one_on_this_host(tmp_path):
    """Is not paired with the caption that rank 0 has read."""
    (tmp_path / "a.mp4").write_bytes(b"one")
    size = size_of(tmp_path / "a.mp4")
    (tmp_path / "a.mp4").write_bytes(b"two")
    args = SimpleNamespace(output=tmp_path)
    entry = Entry(tmp_path / "a.mp4", "a.mp4", "x")
    outcome, _ = encode_one(entry, size, None, None, dict(kind=None), args)
    assert "another file here than on rank 0" in outcome
    assert size_of(tmp_path / "b.mp4") is None


# --------------------------------------------------------------------------------------------------------------------
# the average


def test_the_average_is_of_what_was_trained():
    """The mean of the steps so far, by hand, until these are 1 / (1 - decay); from then on the exponential one."""
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    values, decay = [], 0.99
    with mock.patch.object(torch.Tensor, "to_local", lambda x: x, create=True):
        average = Average(model, decay)
        for step in range(1, 1001):
            model.weight.data = draws(step)(2, 3)
            average.params["weight"] = model.weight.detach()
            values.append(model.weight.detach().clone())
            average.update()
            if step in (1, 10, 100):
                close(average.values["weight"], torch.stack(values).mean(0), 1e-12)
    truth = torch.stack(values[:100]).mean(0)
    for value in values[100:]:
        truth = decay * truth + (1 - decay) * value
    close(average.values["weight"], truth, 1e-12)


# --------------------------------------------------------------------------------------------------------------------
# what is written


def test_an_mp4_says_which_colours_it_has():
    """Decoded by its own tags, each colour is what it was; they are BT.709's, which players assume too."""
    import av

    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (255, 255, 255), (0, 0, 0), (128, 128, 128)]
    frames = torch.zeros(3, 64, 96, 3, dtype=torch.uint8)
    for n, colour in enumerate(colours):
        frames[:, :, 16 * n : 16 * n + 16] = torch.tensor(colour, dtype=torch.uint8)
    with av.open(io.BytesIO(mp4(frames))) as video:
        stream = video.streams.video[0].codec_context
        tags = stream.colorspace, stream.color_primaries, stream.color_trc, stream.color_range
        shown = [*video.decode(video=0)][1].reformat(format="rgb24", src_colorspace="ITU709").to_ndarray()
    assert tuple(map(int, tags)) == (1, 1, 1, 1)
    for n, colour in enumerate(colours):
        assert abs(shown[32, 16 * n + 8].astype(int) - colour).max() <= 3, (colour, shown[32, 16 * n + 8])


def test_a_single_frame_is_a_picture():
    from PIL import Image

    sizes = [Image.open(io.BytesIO(strip(torch.zeros(n, 720, 1280, 3, dtype=torch.uint8)))).size for n in (1, 9)]
    assert sizes[0] == (1280, 720) and sizes[1][1] == 240


# --------------------------------------------------------------------------------------------------------------------
# strangers' files


def test_names_from_files_are_printed_escaped(capsys, tmp_path):
    evil = "a\x1b[2J\x07\u202eb.mp4"
    screen.say(f"skipping {evil}")
    assert capsys.readouterr().out == "skipping a\\x1b[2J\\x07\\u202eb.mp4\n"
    sentence, _ = faults.explain(ValueError(evil), "out")
    assert printable(sentence) == "a\\x1b[2J\\x07\\u202eb.mp4" and printable("größe 猫\n") == "größe 猫\n"
    ((code, printed),) = fork("full.train", "--data", tmp_path / evil, out=tmp_path)
    assert code == 1 and "\x1b" not in printed and "\\x1b[2J" in printed


@pytest.mark.parametrize("change", [
    dict(num_layers=10**7), dict(num_single_layers=-1), dict(num_attention_heads="24"), dict(num_layers=2.5),
    dict(in_channels=10**9), dict(num_refiner_layers=None), dict(text_embed_dim=True), dict(mlp_ratio=1e9),
])  # fmt: skip
def test_a_config_that_can_not_be(change, snapshot, tmp_path):
    """Ends in a sentence with the number, and at once."""
    config = json.loads((snapshot / "transformer/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match="is not the config of a HunyuanVideoTransformer3DModel") as error:
        config_from_diffusers(tmp_path / "config.json")
    assert next(iter(change)) in str(error.value) and repr(next(iter(change.values()))) in str(error.value)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2"])
def test_a_depth_that_no_encoder_has(part, snapshot, tmp_path):
    """Is refused at once; a library would build layers for hours. Hidden files of a file manager are no part of a snapshot."""
    odd = tmp_path / "odd"
    shutil.copytree(snapshot, odd)
    (odd / part / ".DS_Store").write_text("x")
    assert Snapshot(odd).facts() == Snapshot(snapshot).facts()
    file = odd / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(inside=dict(num_hidden_layers=10**7))))
    with pytest.raises(ValueError, match=f"{part}/config.json has num_hidden_layers 10000000"):
        Snapshot(odd)


def test_a_kernel_of_the_hub_is_not_fetched(snapshot, tmp_path):
    """Whatever attention a text encoder's config names, it is torch's own."""
    odd = tmp_path / "odd"
    shutil.copytree(snapshot, odd)
    for part in ("text_encoder", "text_encoder_2"):
        file = odd / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(attn_implementation="someone/kernel")))
    encoders = TextEncoders(Snapshot(odd), torch.device("cpu"))
    assert {encoders.llama.config._attn_implementation, encoders.clip.config._attn_implementation} == {"sdpa"}


def test_no_code_of_a_snapshot_is_run(snapshot, tmp_path):
    """An unknown model type with an auto_map: no question is asked, and nothing runs."""
    evil = tmp_path / "evil"
    shutil.copytree(snapshot, evil)
    file = evil / "text_encoder/config.json"
    config = json.loads(file.read_text()) | dict(model_type="strange", auto_map=dict(AutoConfig="code.Config"))
    file.write_text(json.dumps(config))
    (evil / "text_encoder/code.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\nclass Config: pass\n")
    flags = [
        "--model",
        evil,
        "--prompt",
        "x",
        *"--height 64 --width 96 --frames 9 --steps 1 --output".split(),
        tmp_path / "c",
    ]
    with mock.patch("builtins.input", lambda *_: "y"):
        ((code, printed),) = fork("full.infer", *flags, out=tmp_path)
    assert code == 1 and "[y/N]" not in printed and not (tmp_path / "touched").exists(), printed
    assert len([line for line in printed.splitlines() if line.startswith("error: ")]) == 1, printed


def test_the_mark_of_an_image_in_a_prompt():
    encoders = TextEncoders.__new__(TextEncoders)
    encoders.tokenizer = lambda text: SimpleNamespace(
        input_ids=[0] * 103 + [7 if w == "<image>" else 1 for w in text.split()]
    )
    encoders.template, encoders.head, encoders.image_token = "<image> {}", 103, 7
    with pytest.raises(ValueError, match="holds <image>, the mark that stands for the picture: leave it out"):
        encoders("the <image> jumps", image=object())


def test_odd_samples_held_out_are_named(tmp_path):
    for n in range(6):
        sample(tmp_path / f"data/{n}.safetensors", value=1.0)
    flags = [
        "--data",
        tmp_path / "data",
        "--blocks",
        "1,1",
        "--config",
        "tiny",
        "--validate_every",
        1,
        "--validate",
        0.4,
    ]
    flags += ["--batch", 2, "--steps", 1]
    from full.folder import hold_out

    args = parse_train("", [str(flag) for flag in flags])
    _, held = hold_out(Folder(TINY, tmp_path / "data"), args)
    sample(held.files[0], value=math.nan)
    results = fork("full.train", *flags, "--out", tmp_path / "out", ranks=2, out=tmp_path)
    assert [code for code, _ in results] == [0, 0], results
    assert f"{held.files[0]}, held out, has values that are not finite" in results[0][1], results


def test_another_rope_is_another_model(tmp_path):
    """A clip that another rope_theta made does not count as there. (Ranks: check_ranks_with_other_files.)"""
    assert replace(TINY, rope_theta=10000.0) != TINY
    args = parse_infer(["--model", "S", "--prompt", "x", "--output", str(tmp_path / "clip")])
    made, other = (Clip(args, "x", 0, [dict(rope_theta=theta)], str(tmp_path / "c")) for theta in (256.0, 10000.0))
    made.write(torch.zeros(16, 1, 8, 12), torch.zeros(3, 1, 64, 96))
    assert made.made_by != other.made_by and made.is_made() and not other.is_made()
