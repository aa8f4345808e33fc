"""A run from its data to its checkpoints, and whatever disturbs it: kills, signals, other runs, odd files, lost ranks."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from full import faults
from full.checkpoints import manifests, read_manifest, write_manifest
from full.files import checksum
from full.flags import parse_train
from full.folder import build_data, hold_out
from hunyuan_sp import HunyuanConfig
from test_sp import (
    HERE,
    equal,
    flip,
    fork,
    free_port,
    launch,
    load_checkpoint,
    losses,
    python,
    start_forked,
    steps_done,
    wait_for,
    workers_of,
)

SMALL = ("--blocks", "1,1")


def write_sample(path, latents, words=2):
    path.parent.mkdir(exist_ok=True)
    save_file(dict(latents=latents, text=torch.ones(words, 32), pooled=torch.ones(32)), path)


# --------------------------------------------------------------------------------------------------------------------
# data


def test_hold_out(tmp_path):
    """By name: disjoint, whole, the same whatever else is there; and never all of them."""
    for n in range(20):
        write_sample(tmp_path / f"data/{n}.safetensors", torch.zeros(3, 1, 4, 4 * (1 + n % 2)))
    flags = ["--data", str(tmp_path / "data"), "--validate_every", "5", "--validate", "0.2"]
    split, config = partial(parse_train, None, flags), HunyuanConfig.preset("tiny")
    data = build_data(config, split())
    trained, held = hold_out(data, split())
    assert len(held) == 4 and sorted([*trained.names, *held.names]) == sorted(data.names)
    assert [trained.shapes[i] for i in range(16)] == [tuple(trained[i][1].shape) for i in range(16)]
    (tmp_path / "data/new.safetensors").write_bytes((tmp_path / "data/0.safetensors").read_bytes())
    _, again = hold_out(build_data(config, split()), split())
    assert len({*again.names} & {*held.names}) >= 3
    assert hold_out(data, parse_train(None, [])) == (data, None)
    with pytest.raises(ValueError, match="--validate 1.0 of 20 samples leaves none to train on"):
        hold_out(data, parse_train(None, ["--validate_every", "5", "--validate", "1"]))


def test_data_folder_and_damaged_checkpoint(tmp_path):
    """Samples of two shapes and ragged text train together; a checkpoint with one flipped byte is refused by name."""
    for n in range(9):
        shape, words = ((3, 2, 4, 8) if n % 3 else (3, 1, 8, 4)), 1 + n % 4
        write_sample(tmp_path / f"data/{n}.safetensors", torch.randn(shape), words)
    flags = ["--data", tmp_path / "data", "--out", tmp_path / "out", "--batch", 2, "--workers", 1]
    results = fork("full.train", *flags, "--steps", 6, ranks=2, out=tmp_path)
    assert [code for code, _ in results] == [0, 0] and len(losses(tmp_path / "out")) == 6, results
    file = next((tmp_path / "out" / "step-6").glob("*.safetensors"))
    file.write_bytes(flip(file.read_bytes(), -100))
    ((code, printed),) = fork("full.train", *flags, "--steps", 8, "--resume", out=tmp_path)
    assert code != 0 and re.search(
        f"error: no undamaged checkpoint in .*{file.name} has a crc32 that differs", printed
    ), printed


def test_steps_without_finite_gradients_are_skipped(tmp_path):
    """One sample of four is NaN: its step is left out on all ranks. Nothing but NaN: it stops with a sentence."""
    for n in range(4):
        write_sample(tmp_path / f"data/{n}.safetensors", torch.full((3, 1, 4, 4), math.nan if n == 2 else 0.5))
    flags = ["full.train", "--data", tmp_path / "data", "--batch", 2]
    (code, printed), _ = fork(*flags, "--steps", 4, "--out", tmp_path / "a", ranks=2, out=tmp_path)
    entries = losses(tmp_path / "a")
    odd = str(tmp_path / "data/2.safetensors")
    assert code == 0 and [entry["skipped"] for entry in entries].count(True) == 2, printed
    assert all(entry.get("not_finite") == ([odd] if entry["skipped"] else None) for entry in entries), entries
    assert printed.count(f"is skipped: {odd} has values that are not finite") == 2, printed
    assert all(w.isfinite().all() for w in load_checkpoint(tmp_path / "a" / "step-4").values())
    for n in (0, 1, 3):
        shutil.copy(tmp_path / "data/2.safetensors", tmp_path / f"data/{n}.safetensors")
    ((code, printed),) = fork(*flags, "--steps", 19, "--out", tmp_path / "b", out=tmp_path)
    assert code != 0 and "10 steps in a row, the last one 10, had no finite loss" in printed, printed
    ((code, printed),) = fork(*flags, "--steps", 2, "--out", tmp_path / "c", out=tmp_path)
    assert code != 0 and "none of 2 steps had a finite loss" in printed, printed


# --------------------------------------------------------------------------------------------------------------------
# a run that is disturbed


def start(folder, *flags, ranks=2, script=("-m", "full.train"), agent=()):
    """full.train in the background, its --out folder/run."""
    agent = ("--standalone", f"--nproc_per_node={ranks}", *agent)
    flags = ("--device", "cpu", "--out", folder / "run", *flags)
    return python(*script, *flags, agent=agent, out=folder / "printed")


def numbers_of(run):
    """Return what each step gave; steps that a restart repeated stand in the log twice, and must be the same."""
    return sorted({(entry["step"], entry["loss"], entry["grad_norm"]) for entry in losses(run)})


def test_kill_a_random_rank_and_go_on(tmp_path, kills=1):
    """kill -9 at random moments under --max-restarts: losses and final weights equal an undisturbed run's, bit for bit."""
    steps, draw = 6 + 6 * kills, random.Random(kills)
    flags = [*SMALL, "--steps", steps, "--batch", 4, "--sp", 2, "--save_every", 2]
    calm = fork("full.train", *flags, "--out", tmp_path / "calm", ranks=2, out=tmp_path)
    assert [code for code, _ in calm] == [0, 0]
    agent, run = start(tmp_path, *flags, agent=[f"--max-restarts={kills}", "--monitor-interval=0.1"]), tmp_path / "run"
    wait_for(lambda: list(run.glob("step-*")))
    for n in range(kills):
        # anywhere: at start, in a step, in a save; but never so late that the run might end before
        until, due, victims = time.time() + draw.uniform(0, 8), steps_done(run) + draw.randint(1, 5), []
        while len(victims) < 2 or (time.time() < until and steps_done(run) < due):
            time.sleep(0.05)
            victims = workers_of(agent)
            assert agent.poll() is None, f"it ended before kill {n}"
        os.kill(draw.choice(victims), signal.SIGKILL)
        wait_for(lambda gone=set(victims): not gone & set(workers_of(agent)))
    assert agent.wait(timeout=600) == 0, (tmp_path / "printed").read_text()[-3000:]
    assert re.search("from step [1-9]", (tmp_path / "printed").read_text()), "it started from scratch"
    ours, truth = (numbers_of(p) for p in (run, tmp_path / "calm"))
    assert ours == truth and len(ours) == steps
    assert equal(*(load_checkpoint(p / f"step-{steps}") for p in (run, tmp_path / "calm")))


def test_kill_inside_a_save(tmp_path, kills=2):
    """Earlier checkpoints stay, every step-N is complete, and the next run continues from it."""
    run, draw, newest, inside, tries = tmp_path / "run", random.Random(1), 0, 0, 0

    def step_of(path):
        return int(path.name.rpartition("-")[2])

    while inside < kills:
        tries += 1
        assert tries <= 10 * kills, "hardly a kill fell into a save"
        flags = ["--steps", 9999, "--batch", 1, "--save_every", 1, "--out", run, *["--resume"] * (tries > 1)]
        ((process, _),) = start_forked("full.train", *flags, out=tmp_path)
        wait_for(lambda before=newest: max(map(step_of, run.glob("step-*")), default=0) > before)
        wait_for(lambda: list(run.glob("tmp-step-*")))
        time.sleep(draw.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        inside += any(p.name[9:].isdigit() for p in run.glob("tmp-step-*"))
        found = manifests(run)
        for path, manifest in found:
            assert manifest and manifest["files"] == {p.name: checksum(p) for p in path.glob("*.safetensors")}
        last, newest = newest, step_of(found[0][0])
        assert newest > last


def test_sigusr1_saves_and_sigterm_saves_and_stops(tmp_path):
    """Signals reach whole process groups, and the processes that load data with them."""
    agent, run = start(tmp_path, *SMALL, "--steps", 5000, "--batch", 2, "--workers", 1), tmp_path / "run"
    wait_for(lambda: steps_done(run) > 3)
    os.killpg(workers_of(agent)[1], signal.SIGUSR1)  # one rank gets the signal, all save
    wait_for(lambda: list(run.glob("step-*/manifest.json")))
    after = steps_done(run)
    wait_for(lambda: steps_done(run) > after)
    agent.send_signal(signal.SIGTERM)
    agent.wait(timeout=300)
    done = steps_done(run)
    assert (run / f"step-{done}" / "manifest.json").is_file(), (tmp_path / "printed").read_text()[-3000:]
    agent = start(tmp_path, *SMALL, "--resume", "--steps", 5000, "--batch", 2)
    wait_for(lambda: steps_done(run) > done + 1)
    agent.send_signal(signal.SIGINT)  # Ctrl-C once
    agent.wait(timeout=300)
    printed, last = (tmp_path / "printed").read_text(), steps_done(run)
    assert f"from step {done}" in printed and (run / f"step-{last}" / "manifest.json").is_file(), printed[-3000:]


def test_ctrl_c_again_stops_at_once():
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    try:
        asked, now = faults.catch_signals(), time.monotonic()
        with mock.patch.object(faults, "failed_ranks", list), mock.patch.object(os, "_exit") as leave:
            # torchrun passes it on: the second is the first one's echo
            for seconds, left in ((0, 0), (0.5, 0), (3, 1)):
                with mock.patch.object(time, "monotonic", lambda seconds=seconds: now + seconds):
                    signal.raise_signal(signal.SIGINT)
                assert asked == dict(save=False, stop=True) and leave.call_count == left
        leave.assert_called_with(130)
        # torchrun clears up: a rank that is about to say why it ends may do so, another one says who has failed
        asked["stop"] = False
        for failed, left in (([1], 0), ([0], 1)):
            with (
                mock.patch.object(faults, "failed_ranks", lambda failed=failed: failed),
                mock.patch.object(dist, "get_rank", lambda: 1),
                mock.patch.object(os, "_exit") as leave,
                mock.patch.object(os, "write") as said,
            ):
                signal.raise_signal(signal.SIGTERM)
            assert leave.call_count == left
            assert said.call_args_list == [mock.call(2, b"error: rank 0 has failed\n")] * left
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Handlers:
    def __len__(self):
        return 1

    def __getitem__(self, _):
        return [signal.getsignal(number) is signal.SIG_IGN for number in (signal.SIGTERM, signal.SIGUSR1)]


def test_signals_are_not_for_processes_that_load_data():
    """Launchers signal whole groups: a loader that ends with one would take its rank along, unsaved."""
    before = [signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGUSR1)]
    try:
        loader = DataLoader(Handlers(), num_workers=1, worker_init_fn=faults.ignore_signals, collate_fn=list)
        assert list(loader) == [[[True, True]]]
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGUSR1), before):
            signal.signal(number, handler)


def test_one_run_a_folder(tmp_path):
    """A second run with the same --out is refused while the first lives, and nothing of the first is touched."""
    run = tmp_path / "run"
    ((first, _),) = start_forked("full.train", "--steps", 5000, "--batch", 2, "--out", run, out=tmp_path)
    wait_for(lambda: steps_done(run) > 2)
    ((code, printed),) = fork("full.train", "--steps", 2, "--seed", 1, "--out", run, out=tmp_path)
    assert code == 1 and re.search("error: .*run is in use by another run, process ", printed), printed
    before = steps_done(run)
    wait_for(lambda: steps_done(run) > before > 2)
    first.kill()
    first.join()
    ((code, printed),) = fork("full.train", "--steps", 2, "--batch", 2, "--out", run, out=tmp_path)
    assert code == 0, printed


def test_no_screen_and_odd_side_files_end_nothing(tmp_path):
    """A closed pipe, a screen of ASCII, and odd lines in log.jsonl and run.json."""
    run, odd = tmp_path / "run", b'\xff odd\n[]\n{"step": "4"}\n'
    flags = f"-m full.train --device cpu --batch 2 --save_every 2 --out {run}"
    piped = f"{sys.executable} {flags} --steps 4 --resume auto | head -c 9"
    environment = os.environ | dict(PYTHONIOENCODING="ascii")
    results = subprocess.run(piped, shell=True, cwd=HERE, env=environment, timeout=300, capture_output=True)
    assert results.returncode == 0 and [entry["step"] for entry in losses(run)] == [1, 2, 3, 4], results
    with open(run / "log.jsonl", "ab") as log:
        log.write(odd)
    (run / "run.json").write_text("[" * 5000)
    more = [*flags.split(), "--steps", 5, "--resume"]
    code, printed = launch(*more, out=tmp_path, PYTHONIOENCODING="ascii")
    (run / "log.jsonl").write_bytes((run / "log.jsonl").read_bytes().replace(odd, b""))
    assert code == 0 and [entry["step"] for entry in losses(run)] == [1, 2, 3, 4, 5], printed
    assert "step 5/5 ? loss" in printed, printed


def test_a_resumed_run_says_what_is_other_than_before(tmp_path):
    """It keeps its global batch, and a new run in its folder leaves its log."""
    flags, before = ["--blocks", "1,1", "--out", tmp_path / "run"], tmp_path / "run/log-before.jsonl"
    ((code, printed),) = fork("full.train", *flags, "--steps", 1, "--batch", 3, out=tmp_path)
    assert code == 0 and "global batch 3" in printed and not before.exists(), printed
    ((code, printed),) = fork("full.train", *flags, "--steps", 2, "--resume", out=tmp_path)
    assert code == 0 and "global batch 3" in printed and "other than before" not in printed, printed
    more = ["--steps", 3, "--batch", 2, "--lr", 0.5, "--resume"]
    ((code, printed),) = fork("full.train", *flags, *more, out=tmp_path)
    assert (
        code == 0
        and "other than before: --batch 2 (was 3), --lr 0.5 (was 0.004), --steps 3 (was 2): the learning" in printed
    ), printed
    old = (tmp_path / "run/log.jsonl").read_text()
    ((code, printed),) = fork("full.train", *flags, "--steps", 1, "--batch", 2, "--overwrite", out=tmp_path)
    assert code == 0 and before.read_text() == old and len(losses(tmp_path / "run")) == 1, printed
    assert "run has the log of an earlier run: it is log-before.jsonl now" in printed, printed


def test_a_process_that_loads_data_ends_in_one_sentence(tmp_path):
    for n in range(4):
        write_sample(tmp_path / f"data/{n}.safetensors", torch.full((3, 1, 4, 4), 0.5))
    flags = ["--data", tmp_path / "data", "--batch", 1, "--workers", 1, "--steps", 9999, "--out", tmp_path / "run"]
    ((process, file),) = start_forked("full.train", *flags, out=tmp_path)
    wait_for(lambda: steps_done(tmp_path / "run") > 2)
    (tmp_path / "data/2.safetensors").unlink()
    process.join(300)
    printed = file.read_text()
    assert process.exitcode == 1, printed
    assert len(re.findall(r"^error: loading data: .*2\.safetensors", printed, re.M)) == 1, printed
    assert "_worker_loop" not in printed, printed


def test_orphans_stop_and_the_same_launch_goes_on(tmp_path):
    """An agent is killed and replaced, with the same rendezvous id and a store of its own: its restart count is 0 again."""
    meet = ["--nnodes=1", "--rdzv_backend=c10d", "--rdzv_id=again", "--nproc_per_node=2"]
    run, printed = tmp_path / "run", tmp_path / "printed"
    flags = ["-m", "full.train", *SMALL, "--batch", 2, "--save_every", 2, "--device", "cpu", "--out", run]

    def again(steps):
        agent = [*meet, f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
        environment = dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        return python(*flags, "--steps", steps, agent=agent, out=printed, **environment)

    agent = again(5000)
    wait_for(lambda: list(run.glob("step-*")))
    ranks = workers_of(agent)
    agent.kill()
    wait_for(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), 60)
    done = max(manifest["step"] for _, manifest in manifests(run))
    assert again(done + 2).wait(timeout=300) == 0
    assert f"from step {done}" in printed.read_text()
    assert [step for step, *_ in numbers_of(run)][: done + 2] == list(range(1, done + 3))


def test_a_mistake_is_not_tried_again(tmp_path):
    agent = start(tmp_path, "--config", "14b", agent=["--max-restarts=8"])
    assert agent.wait(timeout=300) != 0
    printed = (tmp_path / "printed").read_text()
    assert 1 <= printed.count("error: no preset '14b'") <= 2 and "torchrun is stopped" in printed, printed


@pytest.mark.parametrize("error, expected", [
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"), "loading data: .*--shm-size=8g"),
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: unable to write to file </torch_7_8>"), "--shm-size=8g"),
    (OSError(28, "No space left on device"), "(out|/dev/shm): .*No space left on device"),
    (KeyboardInterrupt(), "^stopped from the keyboard$"),
    (KeyError("a"), r"^KeyError: 'a' \(--debug shows where\)$"),
])  # fmt: skip
def test_whatever_ends_a_program_gives_one_sentence(error, expected):
    sentence, lost = faults.explain(error, "out")
    assert re.search(expected, sentence) and "\n" not in sentence and not lost


FAULTS = """
import os, signal, sys, time
from functools import partial
import full.train
from full import faults
from full.flags import parse_train
fault, healthy = sys.argv.pop(), full.train.learning_rate

def faulty(step, args):
    if step == 4 and os.environ["RANK"] == "1":
        if fault == "hangs":
            time.sleep(1000)
        if fault == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        raise ValueError("rank 1 has had enough")
    return healthy(step, args)

full.train.learning_rate = faulty
args = parse_train(None)
faults.exit_after(partial(full.train.train, args), args.out)
"""


@pytest.mark.parametrize("fault, expected", [
    ("raises", "rank 1 has had enough"),
    ("dies", r"(rank 1 does not answer|exitcode +: -9)"),
    ("hangs", "rank 1 does not answer"),
])  # fmt: skip
def test_a_fault_ends_the_job_and_names_the_rank(fault, expected, tmp_path):
    """Not after 1,000 seconds, when the one that hangs would wake up."""
    (tmp_path / "faulty.py").write_text(FAULTS)
    patience, script = ["--timeout", 600 if fault in ("raises", "dies") else 15], [tmp_path / "faulty.py"]
    agent = start(tmp_path, *SMALL, "--steps", 100, "--batch", 4, *patience, fault, script=script)
    assert agent.wait(timeout=400) != 0
    printed = (tmp_path / "printed").read_text()
    assert re.search(expected, printed), printed
    assert steps_done(tmp_path / "run") == 3


def test_two_nodes(tmp_path, kills=1, steps=12):
    """Two torchrun agents meet on loopback, and the exchange crosses between them; a killed rank is restarted on both, with
    the environment variable that the README asks for."""
    meet = ["--rdzv_backend=c10d", "--rdzv_id=two", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    agent = ["--nnodes=2", "--nproc_per_node=1", *meet, "--monitor-interval=0.1", f"--max-restarts={3 * kills}"]
    run, printed = tmp_path / "run", tmp_path / "printed"
    flags = [*SMALL, "--sp", 2, "--steps", steps, "--batch", 4, "--save_every", 2, "--device", "cpu", "--out", run]
    with mock.patch.dict(os.environ, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"):
        nodes = [python("-m", "full.train", *flags, agent=agent, out=printed) for _ in "12"]
    for n in range(kills):
        done = steps_done(run)
        wait_for(lambda done=done: steps_done(run) >= max(4, done + 3) and list(run.glob("step-*")))
        os.kill(workers_of(nodes[n % 2])[0], signal.SIGKILL)
        time.sleep(2)
    codes, printed = [node.wait(timeout=300) for node in nodes], printed.read_text()
    assert codes == [0, 0], printed[-3000:]
    assert [step for step, *_ in numbers_of(run)] == list(range(1, steps + 1)) and "dp 1 x sp 2" in printed
    assert kills == 0 or re.search("from step [1-9]", printed), "it started from scratch"


# --------------------------------------------------------------------------------------------------------------------
# checkpoints


def test_the_order_of_checkpoints_is_a_counters(tmp_path):
    """Not a clock's, which may be set back; and what lies beside a manifest's files is no part of a checkpoint."""
    for serial, step in enumerate((4, 2)):
        (tmp_path / f"step-{step}").mkdir()
        save_file(dict(a=torch.ones(1)), tmp_path / f"step-{step}/a.safetensors")
        files = {"a.safetensors": checksum(tmp_path / f"step-{step}/a.safetensors")}
        manifest = dict(step=step, tag="", serial=serial, saved=-3600.0 * serial, files=files)
        write_manifest(tmp_path / f"step-{step}", manifest)
    assert [path.name for path, _ in manifests(tmp_path)] == ["step-2", "step-4"]
    save_file(dict(b=torch.ones(1)), tmp_path / "step-2/b.safetensors")
    with pytest.raises(ValueError, match="b.safetensors is not in its manifest"):
        read_manifest(tmp_path / "step-2")
    for text in ("[" * 10**5, "7", json.dumps(manifest | dict(files={}))):
        (tmp_path / "step-2/manifest.json").write_text(text)
        with pytest.raises(ValueError, match="manifest.json is not what was saved"):
            read_manifest(tmp_path / "step-2")


# what version 0.1, commit 6bf7b78, wrote after `train_min.py --steps 2 --batch 4 --blocks 1,1`, but for its files, and for the
# toy's learning rate and patches, which were 0.002 and [1, 2, 2]
OLD = dict(
    args=dict(accumulation=1, attention="sdpa", batch=4, blocks="1,1", caption_drop=0.1, checkpointing="none", clip=1.0, compile=False, config="tiny", data=None, debug=False, deterministic=False, device="cpu", dp=None, dtype=None, ema=0.0, frames=17, guidance=1.0, height=256, keep=3, lora=None, lora_alpha=None, lr=0.004, model=None, offload=[], out="out", plan=False, profile=False, resume=None, sample_prompt=None, save_every=None, seed=0, shard_size=None, shift=4.0, sp=1, steps=2, tensorboard=False, timeout=600, validate=None, validate_every=0, warmup=50, weights=None, width=256, workers=0),
    batch=4,
    config=dict(double_depth=1, guidance_embed=False, in_channels=3, mlp_ratio=2.0, num_heads=6, out_channels=3, patch_size=[1, 4, 4], pooled_dim=32, refiner_depth=1, rope_dims=[4, 6, 6], rope_theta=256.0, single_depth=1, text_dim=32),
    ema=False,
    held_out=0,
    layout=[1, 1],
    lora=None,
    sampler=dict(consumed=8, epoch=0, history=[[4, 2]], length=4096, samples="67c79a8faf1145d5", seed=0),
    saved=1795852706.7454317,
    serial=1,
    step=2,
    tag="1795852706.329139",
)  # fmt: skip


def test_a_checkpoint_of_the_version_before(tmp_path):
    """It is gone on with, exactly, and sampled. Models had no image_condition_type then."""
    flags, old = ["--blocks", "1,1", "--batch", 4], tmp_path / "old"
    ((code, printed),) = fork(
        "full.train", *flags, "--steps", 3, "--save_every", 2, "--out", tmp_path / "new", out=tmp_path
    )
    assert code == 0, printed
    shutil.copytree(tmp_path / "new/step-2", old / "step-2")
    files = {file.name: checksum(file) for file in (old / "step-2").glob("*.safetensors")}
    assert [*files] == ["shard-00001-model-00001-of-00001.safetensors"]
    names = {*load_file(old / "step-2" / next(iter(files)))}
    kept = ["model.{}", "optimizer.state.{}.exp_avg", "optimizer.state.{}.exp_avg_sq", "optimizer.state.{}.step"]
    assert {form.format("img_in.proj.weight") for form in kept} < names, "tensors have other names now"
    write_manifest(old / "step-2", OLD | dict(files=files))
    ((code, printed),) = fork(
        "full.infer", "--checkpoint", old, "--steps", 2, "--output", tmp_path / "clip", out=tmp_path
    )
    assert code == 0, printed
    ((code, printed),) = fork("full.train", *flags, "--steps", 3, "--resume", "--out", old, out=tmp_path)
    assert code == 0 and "from step 2" in printed and "other than before" not in printed, printed
    assert numbers_of(old) == numbers_of(tmp_path / "new")[2:]
    assert equal(*(load_checkpoint(run / "step-3") for run in (old, tmp_path / "new")))
