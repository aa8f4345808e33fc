"""Nothing made is lost: clips by prompt and seed, folders that are in use, files half written, a second run in a folder."""

import json
import os
import re
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from full.after import after_training
from full.clips import file_name, make_clips
from full.files import replace_file, replacing
from full.infer import parse as parse_infer
from test_sp import HERE, close, equal, fork, losses, start_forked

# --------------------------------------------------------------------------------------------------------------------
# clips


@pytest.mark.parametrize("words, name", [
    ("a cat walks on the grass", "a-cat-walks-on-the-grass-0"),
    ("一只猫在草地上", "一只猫在草地上-0"),
    ("кот идёт", "кот-идёт-0"),
    ("बिल्ली चलती है", "बिल्ली-चलती-है-0"),
    ("A cat.", "a-cat-######-0"),
    ("a  cat", "a-cat-######-0"),
    ("a-cat", "a-cat-######-0"),
    ("../../etc/passwd", "etc-passwd-######-0"),
    ("🐱", "clip-######-0"),
    ("", "clip-######-0"),
])  # fmt: skip
def test_the_name_of_a_clip(words, name):
    assert re.fullmatch(name.replace("######", "[0-9a-f]{6}"), file_name(words, 0))


def test_names_are_short_and_stay_apart():
    long = [
        "grass " * 300,
        "grass " * 299,
        "草" * 100,
        "草" * 101,
        "a" * 80,
        "a cat",
        "A cat",
        "a cat!",
        "a_cat",
        "e\u0301",
        "\u00e9",
    ]
    for seed in (0, 2**62):
        names = [file_name(words, seed) for words in long]
        assert len({name.lower() for name in names}) == len(long)
        assert all(len(f"{name}.safetensors".encode()) <= 80 and name.endswith(f"-{seed}") for name in names)


def seeds(*flags):
    args = parse_infer([*flags, "--output", "clips/"])
    return [(clip.prompt, clip.seed, clip.name) for clip in make_clips(args, args.prompt, [])]


def test_a_prompt_that_comes_again_takes_the_next_seed():
    assert [x[:2] for x in seeds("--prompt", "a", "--prompt", "b", "--prompt", "a", "--seed", "5")] == [
        ("a", 5),
        ("b", 5),
        ("a", 6),
    ]
    assert seeds("--prompt", "a", "--clips", "3") == [("a", n, f"clips/a-{n}") for n in range(3)]


def test_a_clip_is_its_prompts_and_its_seeds(tmp_path):
    """Whatever its place in a list, on any number of ranks; what other flags have made is not replaced; a score leaves nothing."""
    ((code, printed),) = fork("full.train", "--blocks", "1,1", "--steps", 1, "--out", tmp_path / "run", out=tmp_path)
    flags = ["--checkpoint", tmp_path / "run", "--steps", 2]

    def sample(output, *more, ranks=1, code=0):
        results = fork("full.infer", *flags, *more, "--output", f"{tmp_path}/{output}", ranks=ranks, out=tmp_path)
        assert [ended for ended, _ in results] == [code] * ranks, results
        return results[0][1]

    sample("one", "--prompt", "a red square moves up", "--seed", 1)
    alone = load_file(tmp_path / "one.safetensors")["latents"]
    sample(
        "many/",
        *"--sp 1 --clips 2".split(),
        "--prompt",
        "a blue circle moves up",
        "--prompt",
        "a red square moves up",
        ranks=2,
    )
    close(load_file(tmp_path / "many/a-red-square-moves-up-1.safetensors")["latents"], alone, 1e-5)
    made = {file.name: file.read_bytes() for file in (tmp_path / "many").glob("*.safetensors")}
    assert len(made) == 4 and len({*made.values()}) == 4
    sample("one", "--prompt", "a red square moves up", "--seed", 1)  # the same once more
    printed = sample("one", "--prompt", "a red square moves up", "--seed", 2, code=1)
    assert f"error: 1 of 1 clips exist already, made by other flags ({tmp_path}/one): --overwrite replaces" in printed
    assert equal(load_file(tmp_path / "one.safetensors"), dict(latents=alone))
    sample("one", "--prompt", "a red square moves up", "--seed", 2, "--overwrite")
    assert not equal(load_file(tmp_path / "one.safetensors"), dict(latents=alone))
    (tmp_path / "mine.gif").write_bytes(b"a picture")
    assert "made by other flags" in sample("mine", "--prompt", "a red square moves up", code=1)

    def listing():
        return sorted(path.name for path in tmp_path.rglob("*") if path.suffix != ".log")

    before = listing()
    assert "of 2 prompts" in sample("score", "--score", 2)
    assert [name for name in listing() if name not in before and "score" in name] == []


# --------------------------------------------------------------------------------------------------------------------
# folders and files


CLAIM = """
import sys, time
from full import faults
from full.claim import claim
pm = faults.init(None, 1, "cpu")
claim(sys.argv[1], sys.argv[2] or None)
print("held", flush=True)
time.sleep(600)
"""


def test_a_name_belongs_to_one_program(tmp_path):
    """A folder, or a name in it, while it lives; what a writer that was killed has left is removed; other names are free."""
    env, claimed, work = os.environ | dict(PYTHONPATH=str(HERE)), [], []
    flags = ["--config", "tiny", "--blocks", "1,1", "--steps", 1, "--overwrite", "--output"]
    places = [(tmp_path / "folder", ""), (tmp_path / "named", "clip")]
    outputs = [f"{tmp_path}/folder/", f"{tmp_path}/named/clip", f"{tmp_path}/named/other"]
    try:
        for folder, name in places:
            command = [sys.executable, "-c", CLAIM, folder, name]
            claimed.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=env))
            assert claimed[-1].stdout.readline() == b"held\n"
            (folder / ".abc.part").touch()
        for n, output in enumerate(outputs):
            (tmp_path / str(n)).mkdir()
            work += start_forked("full.infer", *flags, output, out=tmp_path / str(n))
        for process, _ in work:
            process.join(300)
        for (process, file), (folder, name), owner in zip(work, places, claimed):
            found = f"{folder / name} is in use by another run, process {owner.pid} on"
            assert process.exitcode == 1 and found in file.read_text(), file.read_text()
            assert (folder / ".abc.part").exists()
        assert work[2][0].exitcode == 0, work[2][1].read_text()
    finally:
        for owner in claimed:
            owner.kill()
            owner.wait()
    for output, (folder, name) in zip(outputs, places):
        ((code, printed),) = fork("full.infer", *flags, output, out=tmp_path)
        assert code == 0 and (folder / ".abc.part").exists() == bool(name), printed


def test_another_program_that_writes_the_same_name(tmp_path):
    """A name that was free when this one began, and is taken now, is not replaced."""
    args = parse_infer(["--prompt", "a", "--output", f"{tmp_path}/c"])
    ours, theirs = (make_clips(args, [prompt], [])[0] for prompt in ("a", "b"))
    theirs.write(torch.zeros(3, 2, 4, 4), None)
    before = (tmp_path / "c.safetensors").read_bytes()
    with pytest.raises(ValueError, match="another program has written .*/c meanwhile: 'a' is not written"):
        ours.write(torch.ones(3, 2, 4, 4), None)
    assert (tmp_path / "c.safetensors").read_bytes() == before


def test_files_half_written_are_nobodys(tmp_path):
    """Each writer has a name of its own, follows no link that waits there, and leaves nothing when it fails."""
    file, victim = tmp_path / "a.json", tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".a.json.part").symlink_to(victim)  # the name of the versions before
    with replacing(file) as one, replacing(file) as other:
        assert one != other and one.parent == other.parent == tmp_path
        one.write_text("1")
        other.write_text("2")
    assert file.read_text() == "1" and victim.read_text() == "mine"
    file.unlink()
    file.symlink_to(victim)
    replace_file(file, "new")
    assert victim.read_text() == "mine" and file.read_text() == "new" and not file.is_symlink()
    os.umask(umask := os.umask(0))
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask
    with pytest.raises(RuntimeError), replacing(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.json.part", "a.json", "victim"]


# --------------------------------------------------------------------------------------------------------------------
# training


def test_a_second_run_in_a_folder(tmp_path):
    """Is refused, and nothing is touched; with --overwrite it starts anew, and every log stays."""
    flags = ["--blocks", "1,1", "--steps", 1, "--out", tmp_path / "run"]
    assert fork("full.train", *flags, out=tmp_path)[0][0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "lock"}
    ((code, printed),) = fork("full.train", *flags, "--seed", 1, out=tmp_path)
    assert code == 1 and "has an earlier run (step-1): --resume continues it, another --out keeps it" in printed
    assert all(path.read_bytes() == data for path, data in before.items())
    for n in (2, 3):
        ((code, printed),) = fork("full.train", *flags, "--seed", n, "--overwrite", out=tmp_path)
        assert code == 0, printed
    assert sorted(p.name for p in (tmp_path / "run").glob("earlier-*/*")) == ["step-1", "step-1"]
    logs = [tmp_path / "run" / f"{name}.jsonl" for name in ("log-before", "log-before-2", "log")]
    assert len({json.loads(log.read_text())["loss"] for log in logs}) == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "other/lora.safetensors").touch()
    ((code, printed),) = fork("full.train", *flags[:4], "--out", tmp_path / "other", out=tmp_path)
    assert code == 1 and "has an earlier run (lora.safetensors)" in printed


STOP = """
import os, signal, sys
import full.train as program
ask, asked = program.Run.requests, []
def requests(run):
    asked.append(run)
    if len(asked) == 4:  # at the start, in step 1, after its validation, in step 2
        os.kill(os.getpid(), signal.SIGTERM)
    return ask(run)
program.Run.requests = requests
program.train(program.parse_train("", sys.argv[1:])).close()
"""


def test_a_stop_in_a_step_that_validates(tmp_path):
    """The run that goes on makes the validation, with the figure of one that was not stopped."""
    rules = "--blocks 1,1 --batch 2 --steps 2 --warmup 1 --validate_every 1 --validate 0.0005 --device cpu".split()
    command = [sys.executable, "-c", STOP, *rules, "--out", tmp_path / "run"]
    env = os.environ | dict(PYTHONPATH=str(HERE))
    subprocess.run(command, check=True, env=env, capture_output=True, timeout=300)
    assert ["validation_loss" in entry for entry in losses(tmp_path / "run")] == [True, False]
    ((code, printed),) = fork("full.train", *rules, "--out", tmp_path / "run", "--resume", out=tmp_path)
    assert code == 0 and fork("full.train", *rules, "--out", tmp_path / "whole", out=tmp_path)[0][0] == 0, printed
    stopped, whole = ([x.get("validation_loss") for x in losses(tmp_path / name)] for name in ("run", "whole"))
    assert [loss for loss in stopped if loss] == whole
    assert f"step 2: loss {whole[1]:.5f} on the held-out samples" in printed


def test_a_longer_resume_says_that_the_rate_jumps(tmp_path):
    flags = "--blocks 1,1 --batch 2 --warmup 1 --lr 1e-3".split() + ["--out", tmp_path / "run"]
    assert fork("full.train", *flags, "--steps", 5, out=tmp_path)[0][0] == 0
    results = fork("full.train", *flags, "--steps", 10, "--resume", ranks=4, out=tmp_path)
    assert [code for code, _ in results] == [0] * 4, results
    rates = [entry["lr"] for entry in losses(tmp_path / "run")]
    assert f"--steps 10 (was 5): the learning rate goes from {rates[4]:.2e} to {rates[5]:.2e}" in results[0][1]
    assert rates[5] > 2 * rates[4]
    assert (
        "--batch 2 over dp 4 x accumulation 1: 2 of 4 places a step repeat samples, and do not count" in results[0][1]
    )


@pytest.mark.parametrize("flags, channels, command", [
    (dict(model="S S", lora=4, out="cat"), 16, "-m full.infer --model 'S S' --lora cat/lora.safetensors --height 64 --width 96 --frames 9 --prompt"),
    (dict(model="S", out="out"), 16, "-m full.infer --model S --checkpoint out --height 64"),
    (dict(weights="W", out="o"), 16, "-m full.infer --checkpoint o --height 64 --width 96 --frames 9 --embeds FILE"),
    (dict(out="out"), 3, "-m full.infer --prompt 'a blue circle moves up'"),
    (dict(out="o", sample_prompt="x"), 3, "-m full.infer --checkpoint o --prompt x"),
])  # fmt: skip
def test_the_next_command(flags, channels, command):
    args = SimpleNamespace(
        **dict(model=None, named=flags.get("model"), weights=None, lora=None, sample_prompt=None) | flags
    )
    config = SimpleNamespace(out_channels=channels, image_condition_type=None)
    for world, start in ((1, "python "), (2, "torchrun --nproc_per_node=2 ")):
        printed = after_training(SimpleNamespace(world_size=world), args, config, [channels, 3, 8, 12])
        assert printed.startswith(start + command), printed
