"""Find where a run starts: anew, from the newest checkpoint, or, if torchrun restarted it, from its own newest one.

run.json names the run in progress in --out, and its launch: a job that torchrun restarts continues from its own newest
checkpoint, never from one that an older run left in the same folder. A run's name is the tag of its checkpoints.
"""

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

from full.checkpoints import manifests
from full.faults import on_main
from full.files import read_json, replace_file
from full.screen import say
from train_min import learning_rate


def find_start(checkpoints, out, resume=None, overwrite=False):
    """Return (path, manifest) of the checkpoint to continue from, or (None, {"tag": ..}) for a new run. Equal on all ranks.

    resume: "yes", "auto" (start anew if there is none) or None. ValueError for a new run in a folder with an earlier run's
    files, unless `overwrite`.
    """
    file = Path(out) / "run.json"
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    launch = f"process {os.getppid()}" if run_id == "none" else run_id
    # a new agent with the same rendezvous id counts from 0 again
    restarted = run_id != "none" or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0

    def name_under_way():
        try:
            last = read_json(file) if restarted else {}
            return str(last["run"]) if last.get("launch") == launch and not last.get("done") else None
        except (ValueError, KeyError):
            return None  # there is no run.json, or it can't be read

    name = on_main(name_under_way)
    if not (name or resume):
        on_main(lambda: put_aside(Path(out)) if overwrite else check_unused(Path(out)))
    path, state = None, dict(tag=name or on_main(lambda: f"{time.time():.6f}"))
    try:
        if name or resume:
            path, state = checkpoints.find(name)
    except FileNotFoundError as error:  # no error if there is nothing to continue from
        if "no undamaged checkpoint" in str(error) or not name and resume != "auto":
            raise
    under_way = json.dumps(dict(run=state["tag"], launch=launch))
    on_main(lambda: replace_file(file, under_way))
    return path, state


def made_before(out):
    """Return what an earlier run has left that a new one would replace: its checkpoints, and its LoRA."""
    lora = out / "lora.safetensors"
    return [path for path, _ in manifests(out)] + [lora] * lora.exists()


def check_unused(out):
    """Raise ValueError if an earlier run has left files that a new one would replace."""
    made = [path.name for path in made_before(out)]
    if made:
        ways = "--resume continues it, another --out keeps it, --overwrite starts anew and puts its files aside"
        raise ValueError(f"{out} has an earlier run ({', '.join(made[:3])}{', ..' * (len(made) > 3)}): {ways}")


def put_aside(out):
    """Move an earlier run's checkpoints and LoRA to --out/earlier-N, so that --resume can't continue them by mistake."""
    made = made_before(out)
    aside = out / f"earlier-{1 + len([*out.glob('earlier-*')])}"
    for path in made:
        aside.mkdir(exist_ok=True)
        path.rename(aside / path.name)
    if made:
        say(f"{out} has an earlier run: its files are in {aside} now")


def end_run(out, tag):
    """Note that the run is done: the next run under the same rendezvous id is a new one."""
    done = json.dumps(dict(run=tag, done=True))
    on_main(lambda: replace_file(Path(out) / "run.json", done))


def what_is_trained(args, weights, held_out):
    """Return the facts, besides the config, that a checkpoint and a resumed run must agree on. A LoRA's checkpoint lacks the
    frozen weights, so their fingerprint is one of them."""
    lora = [args.lora, args.lora_alpha or args.lora, weights] if args.lora else None
    return dict(lora=lora, ema=args.ema > 0, held_out=len(held_out or ()))


def check_same(config, trained, state, path):
    """Raise ValueError with the differences if a checkpoint was trained with other facts."""
    new = dict(ema=False, held_out=trained["held_out"])  # what an older checkpoint lacks
    was = new | state["config"] | {name: state[name] for name in trained if name in state}
    now = json.loads(json.dumps(asdict(config) | trained))
    names = sorted({*was, *now})
    if wrong := [name for name in names if was.get(name) != now.get(name)]:
        differences = "; ".join(f"{name}: {was.get(name)} there, {now.get(name)} here" for name in wrong)
        raise ValueError(f"{path} is of another model: {differences}")


def say_changes(args, state, contents):
    """Print what a resumed run changes. The layout and the length may change in silence; all else is reported."""
    names = "batch lr warmup clip shift guidance caption_drop ema seed dtype data weights attention".split()
    was = state.get("args", {}) | dict(batch=state.get("batch", args.batch))
    step, before = state["step"], argparse.Namespace(**was)
    changed = [f"--{n} {getattr(args, n)} (was {was[n]})" for n in names if n in was and was[n] != getattr(args, n)]
    if args.init_lora and args.init_lora != was.get("init_lora"):
        changed.append("--init_lora, which is not used: the run continues its checkpoint")
    if state.get("contents", contents) != contents:
        changed.append("what is in the samples")
    if was.get("steps", args.steps) != args.steps and was.keys() >= {"lr", "warmup"}:
        last = learning_rate(step, before)
        due = learning_rate(step + 1, before)
        now = learning_rate(step + 1, args)
        if now != due:
            jump = f"the learning rate goes from {last:.2e} to {now:.2e}"
            changed.append(f"--steps {args.steps} (was {was['steps']}): {jump}")
    if changed:
        say(f"other than before: {', '.join(changed)}")


def say_oddities(args, data, dp):
    """Print what is likely a mistake: samples of unknown origin among others, a batch that leaves ranks idle."""
    if 0 < getattr(data, "unsaid", 0) < len(data):
        say(
            f"{data.unsaid} of {len(data)} samples do not say what encoded them: make sure that it was the same snapshot"
        )
    parts = dp * args.accumulation
    if idle := -args.batch % parts:
        where = f"dp {dp} x accumulation {args.accumulation}"
        say(
            f"--batch {args.batch} over {where}: {idle} of {args.batch + idle} places a step repeat samples, and do not count"
        )
