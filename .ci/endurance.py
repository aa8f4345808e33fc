"""Run what takes longer than the suite: the same checks as in its files, with larger numbers. On two cores, from anywhere:

    $ python .ci/endurance.py kills      # 50 kill -9 of random ranks over 306 steps; weights equal an undisturbed run's
    $ python .ci/endurance.py saves      # 50 kill -9 inside saves; the last checkpoint is always whole
    $ python .ci/endurance.py faults     # a rank raises, dies, hangs, is stopped; seconds until the job has ended
    $ python .ci/endurance.py exits      # 100 runs in a row end with status 0
    $ python .ci/endurance.py soak       # 2,000 steps, without saves and with them: memory and file handles
    $ python .ci/endurance.py resume     # each of five layouts resumed on each other
    $ python .ci/endurance.py adamw      # 50 AdamW steps in float64 on 8 layouts equal one process to 1e-12
    $ python .ci/endurance.py nodes      # 10 kill -9 over 200 steps on two torchrun agents
    $ python .ci/endurance.py stream     # a billion parameters stream into a sharded model: memory
    $ python .ci/endurance.py kills saves faults ...    # several

Each prints what it measured and ends with one line, `NAME: ok` or `NAME: FAILED`; the status is 0 if all were ok.
"""

import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file

import test_sp
from full import test_runs
from full.test_runs import start
from hunyuan_sp import HunyuanConfig, HunyuanVideo
from test_sp import launch, spawn, steps_done, wait_for, workers_of


def kills(folder):
    """50 kill -9 of random ranks, at random moments."""
    test_runs.test_kill_a_random_rank_and_go_on(folder, kills=50)


def saves(folder):
    """50 kill -9 that fall into a save."""
    test_runs.test_kill_inside_a_save(folder, kills=50)


def faults(folder):
    """The stopped one too: torchrun waits 30 s before it kills what does not end."""
    silent = "rank 1 does not answer"
    expected = dict(raises="rank 1 has had enough", dies=rf"({silent}|exitcode +: -9)", hangs=silent, stops=silent)
    for fault, sentence in expected.items():
        (folder / fault).mkdir()
        test_runs.test_a_fault_ends_the_job_and_names_the_rank(fault, sentence, folder / fault)
        took = time.time() - (folder / fault / "run" / "log.jsonl").stat().st_mtime
        print(f"{fault}: {took:.1f} s after the last step")


def exits(folder):
    """End 100 runs with status 0; by Python's own way out every second one crashes in gloo's threads."""
    flags = ["--steps", 1, "--device", "cpu", "--out", folder / "run"]
    codes = [launch("train_min.py", *flags, ranks=2, out=folder)[0] for _ in range(100)]
    print(f"{codes.count(0)} of {len(codes)} runs ended with status 0")
    assert codes == [0] * 100


def soak(folder):
    """From step `first` on memory grows by less than 1 %, file handles not at all. (With saves the C library's heap takes
    some hundred steps to find its size.)"""
    for save_every, first in ((0, 100), (40, 700)):
        here = folder / f"every-{save_every}"
        here.mkdir()
        agent, run = start(here, "--steps", 2000, "--save_every", save_every, "--keep", 2), here / "run"
        wait_for(lambda run=run, first=first: steps_done(run) >= first, 1800)
        ranks, seen = workers_of(agent), []
        while steps_done(run) < 1980:
            memory = [int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{p}/status").read_text())[1]) for p in ranks]
            seen.append((steps_done(run), memory, [len(os.listdir(f"/proc/{p}/fd")) for p in ranks]))
            time.sleep(1)
            assert agent.poll() is None, (here / "printed").read_text()[-3000:]
        assert agent.wait(timeout=300) == 0 and len(seen) > 100
        # the most in 30 s, as a save takes some for a moment
        for what, name, most in ((1, "KiB", 0.01), (2, "handles", 1e-9)):
            for rank in range(2):
                early, late = (max(x[what][rank] for x in part) for part in (seen[:30], seen[-30:]))
                growth = late / early - 1
                print(f"save_every {save_every}, rank {rank}: {early} {name} early, {late} late, {100 * growth:+.2f} %")
                assert growth < most, seen[::20]


def resume(folder):
    """Both orders: each layout goes on from each that ran before it."""
    layouts, check = "1x1 1x2 2x1 2x2 1x3".split(), "loss_curve_and_resume"
    for name, order in (("there", layouts), ("back", layouts[::-1])):
        (folder / name).mkdir()
        for n, layout in enumerate(order):
            exitcodes = spawn(layout, "full.test_layouts", {check: dict(everyone=True)}, folder / name)
            test_sp.assert_ok(layout, [check], folder / name, exitcodes)
            resumed = {path.name for path in (folder / name / f"run-{layout}").glob("from-*")}
            assert resumed == {f"from-run-{other}" for other in order[:n]}
            print(f"{layout} went on from {', '.join(order[:n]) or 'itself'}")


def adamw(folder):
    """Up to 6 ranks, and what does not divide."""
    for layout in "1x1 2x1 1x2 3x1 1x3 2x2 2x3 3x2".split():
        exitcodes = spawn(layout, "test_sp", {"three_steps": dict(steps=50)}, folder)
        test_sp.assert_ok(layout, ["three_steps"], folder, exitcodes)
        print(f"{layout}: 50 steps, to 1e-12")


def nodes(folder):
    """10 kills, alternately on both."""
    test_runs.test_two_nodes(folder, kills=10, steps=200)


STREAM = """
import re, sys, threading, time
import torch
from comm import ParallelManager
from full.weights import load_weights
from hunyuan_sp import HunyuanConfig, HunyuanVideo

def anonymous():  # what this process has allocated; pages of the mapped file are not its own
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])

pm = ParallelManager(1, 2, "cpu")
with torch.device("meta"):
    model = HunyuanVideo(HunyuanConfig.preset("13b", double_depth=1, single_depth=2))
pm.shard(model, model.blocks)
before, peak, over = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not over.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
load_weights(model, sys.argv[1])
over.set()
thread.join()
shard = sum(p.to_local().nbytes for p in model.parameters())
largest = max(4 * p.numel() for p in model.parameters())
print(f"whole {2 * shard} shard {shard} largest {largest} grown {peak - before}", flush=True)
pm.close()
"""


def stream(folder):
    """Load 2 GB of weights of the 13B's width: a rank grows by its shard and about one tensor."""
    with torch.device("meta"):
        model = HunyuanVideo(HunyuanConfig.preset("13b", double_depth=1, single_depth=2))
    save_file({k: torch.rand(p.shape).bfloat16() for k, p in model.named_parameters()}, folder / "a.safetensors")
    (folder / "stream.py").write_text(STREAM)
    code, printed = launch(folder / "stream.py", folder, ranks=2, timeout=900, out=folder)
    ranks = re.findall(r"whole (\d+) shard (\d+) largest (\d+) grown (\d+)", printed)
    assert code == 0 and len(ranks) == 2, printed
    for rank in ranks:
        whole, shard, largest, grown = map(int, rank)
        sizes = dict(whole=whole, shard=shard, largest=largest, grown=grown)
        print("GB: " + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items()))
        assert grown <= shard + 2 * largest < 0.7 * whole


CAMPAIGNS = dict(
    kills=kills,
    saves=saves,
    faults=faults,
    exits=exits,
    soak=soak,
    resume=resume,
    adamw=adamw,
    nodes=nodes,
    stream=stream,
)


def main(names):
    if not names or set(names) - set(CAMPAIGNS):
        sys.exit(f"{__doc__}\nerror: expected some of {', '.join(CAMPAIGNS)}, got {' '.join(names) or 'none'}")
    failed = []
    for name in names:
        folder, started = Path(tempfile.mkdtemp(prefix=f"endurance-{name}-")), time.time()
        try:
            CAMPAIGNS[name](folder)
            shutil.rmtree(folder)
        except BaseException as error:
            failed.append(name)
            traceback.print_exc()
            print(f"what it left is in {folder}", file=sys.stderr)
            if isinstance(error, KeyboardInterrupt):
                names = []
        finally:
            test_sp.end_what_is_left()
        print(f"{name}: {'FAILED' if name in failed else 'ok'} ({time.time() - started:.0f} s)", flush=True)
        if not names:
            break
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
