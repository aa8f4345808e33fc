"""Show what a program does: one line that updates in place, log.jsonl, a loss curve, stages. Only rank 0 prints."""

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

import torch

from full.files import printable
from full.speed import forward_flops


def say(line, live=False, end=True, raw=False):
    """Print a line. live: on a terminal the next call replaces it, unless `end`. After a closed pipe nothing is printed any
    more.

    raw: print commands for the terminal as they are.
    """
    terminal, line = sys.stdout.isatty(), line if raw else printable(line)
    try:
        print(f"\r\033[K{line}" if terminal else line, end="" if live and terminal and not end else "\n", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say_some(line, step, steps, shown, always=False):
    """Print a step's line: on a terminal every one, in place of the last; elsewhere about `shown` of them."""
    turn = step % max(1, steps // shown) == 0 or step == steps
    if always or turn or sys.stdout.isatty():
        say(line, live=True, end=step == steps)


def printed_time(seconds):
    return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


def curve(values, columns=64, rows=8):
    """Return a plot of values in text: each column is the mean of its share of them."""
    columns = min(columns, len(values))
    edges = [len(values) * i // columns for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:])]
    low, high = min(means), max(means)
    scale = (8 * rows - 1) / ((high - low) or 1)
    heights = [scale * (mean - low) + 1 for mean in means]  # in eighths of a character

    def line(row):
        eighths = [min(8, max(0, round(height - 8 * row))) for height in heights]
        return "".join(" ▁▂▃▄▅▆▇█"[n] for n in eighths)

    lines = [line(row) for row in reversed(range(rows))]
    labels = [f"{high:.4f}", *[""] * (rows - 2), f"{low:.4f}"]
    return "\n".join(f"{label:>10} │{line}" for label, line in zip(labels, lines)) + f"\n{'loss':>10} └{'─' * columns}"


# --------------------------------------------------------------------------------------------------------------------
# training


class Progress:
    """Report a training run on the screen and in log.jsonl."""

    def __init__(self, pm, model, data, args, start):
        self.pm = pm
        self.args = args
        self.start = start
        self.losses, self.skipped = [], 0
        if not pm.is_main:
            return
        nothing = f" of {args.steps}: nothing to do" if start >= args.steps else ""
        total = sum(param.numel() for param in model.parameters())
        trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
        some = f", {trained:,} of them trained," * (trained < total)
        say(
            f"{total:,} parameters{some} on {pm.world_size} x {pm.device.type} = dp {pm.dp_size} x sp {pm.sp_size}, "
            f"{len(data)} samples, global batch {args.batch}, from step {start}{nothing}"
        )
        path = Path(args.out) / "log.jsonl"
        if path.exists() and not start:
            number = len([*path.parent.glob("log-before*.jsonl")])
            before = path.with_name(f"log-before{f'-{number + 1}' * (number > 0)}.jsonl")
            path.replace(before)
            say(f"{args.out} has the log of an earlier run: it is {before.name} now")
        self.log, self.board = open(path, "a"), None  # steps that a restart repeats stand there twice
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(args.out, purge_step=start + 1)

    def step(self, step, loss, norm, lr, clock, skipped, more):
        """Report a step. more: further values for its line in log.jsonl."""
        self.losses.append(loss)
        self.skipped += skipped
        if not self.pm.is_main:
            return
        speed, steps, seconds = clock.rates(), self.args.steps, clock.seconds[-1]
        entry = dict(step=step, loss=loss, grad_norm=norm, lr=lr, skipped=skipped)
        self._write(step, entry | speed | more)
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        recent = finite[-20:] or [math.nan]
        left = (steps - step) * sum(clock.seconds) / len(self.losses)
        mfu = f" · MFU {100 * speed['mfu']:.1f} %" if "mfu" in speed else ""
        self.say_validation(step, more)
        for name in more.get("not_finite", ()):
            say(f"step {step} is skipped: {name} has values that are not finite")
        if seconds > 20 and len(self.losses) == 3:
            say(
                f"a step takes {seconds:.0f} s, and torchrun kills 30 s after a SIGTERM: start it with --shutdown-timeout "
                f"{60 + 3 * seconds:.0f} (torch 2.13 and newer), so that a stop is saved"
            )
        say_some(
            f"step {step}/{steps}{' skipped' if skipped else ''} · loss {sum(recent) / len(recent):.4f} · "
            f"grad norm {norm:.2f} · {seconds:.2f} s/step · {speed['tokens_per_s']} tokens/s{mfu} · "
            f"{speed['peak_gib']:.1f} GiB · {printed_time(left)} left",
            step,
            steps,
            shown=20,
            always=len(self.losses) == 1,
        )

    def validation(self, step, more):
        """Report a validation that belongs to no step of this run."""
        if self.pm.is_main:
            self._write(step, dict(step=step) | more)
            self.say_validation(step, more)

    def say_validation(self, step, more):
        if "validation_loss" in more:
            say(f"step {step}: loss {more['validation_loss']:.5f} on the held-out samples")

    def _write(self, step, entry):
        for name, value in entry.items():
            if isinstance(value, float) and not math.isfinite(value):
                entry = entry | {name: None}  # JSON has no NaN
        try:
            self.log.write(json.dumps(entry) + "\n")
            self.log.flush()
            for name, value in entry.items() if self.board else ():
                if type(value) in (int, float) and name != "step":
                    self.board.add_scalar(name, value, step)
            if self.board:
                self.board.flush()
        except OSError as error:  # not a reason to stop training
            say(f"step {step} could not be logged: {error}")

    def end(self, clock, step, saved):
        """Print the loss curve, the speed as one JSON line, and what was saved. ValueError if no step was taken with
        success."""
        if self.skipped == len(self.losses) > 0 == self.start:
            raise ValueError(f"none of {self.skipped} steps had a finite loss and gradient: nothing was learned")
        if not self.pm.is_main:
            return
        if self.losses:
            finite = [loss for loss in self.losses if math.isfinite(loss)]
            say(curve(finite or [0.0]))
            say(json.dumps(clock.report() | dict(skipped=self.skipped)))
        why = ", stopped by a signal" if step < self.args.steps else ""
        say(f"saved {self.args.out}/step-{saved}{why}" if saved else f"nothing saved{why}")
        if self.args.lora and saved:
            say(f"its LoRA: {self.args.out}/lora.safetensors")


# --------------------------------------------------------------------------------------------------------------------
# sampling


class Stages:
    """Measure this rank's seconds and peak memory under `with stages(name)`, and announce the long stages.

    quiet: announce none.
    """

    NAMES = dict(encode="encoding the prompts", load="loading the model", decode="decoding")

    def __init__(self, pm, quiet=False):
        self.pm, self.spent, self.shows = pm, {}, pm.is_main and not quiet

    @contextlib.contextmanager
    def __call__(self, name):
        cuda, began = self.pm.device.type == "cuda", time.perf_counter()
        first = name not in self.spent
        if self.shows and name in self.NAMES and (first or sys.stdout.isatty()):
            say(f"{self.NAMES[name]} ..", live=True, end=False)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        yield
        gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0  # synchronises
        seconds, most = self.spent.get(name, (0.0, 0.0))
        self.spent[name] = seconds + time.perf_counter() - began, max(most, gib)

    def report(self):
        """Return {name: {"s": seconds, "gib": peak memory}}."""
        figures = {}
        for name, (seconds, gib) in self.spent.items():
            figures[name] = dict(s=round(seconds, 2), gib=round(gib, 2))
        return figures


class Bar:
    """Show sampling on the screen: `with bar.watching(model)` reports each forward, and `clock` times those of the first
    round."""

    def __init__(self, pm, clock, rounds, clips, quiet=False):
        self.pm = pm
        self.clock = clock
        self.clips = clips
        self.steps = rounds * clock.steps
        self.shows = pm.is_main and not quiet
        self.done, self.spent = 0, 0.0

    @contextlib.contextmanager
    def watching(self, model):
        hooks = model.register_forward_pre_hook(self.start), model.register_forward_hook(self.stop)
        yield
        for hook in hooks:
            hook.remove()

    def start(self, model, args):
        self.began = time.perf_counter()
        if self.done < self.clock.steps:
            self.clock.start()

    def stop(self, model, args, velocity):
        if self.done < self.clock.steps:
            video = velocity[0, 0].numel() // math.prod(model.config.patch_size)
            flops = sum(forward_flops(model.config, video, length) for length in args[3])
            self.clock.stop(len(velocity) * video, flops)
        self.done += 1
        self.spent += time.perf_counter() - self.began
        per_step, per_clip = self.spent / self.done, self.clock.steps
        round_now, step = divmod(self.done - 1, per_clip)
        if self.shows:
            clip = min(round_now * self.pm.dp_size + 1, self.clips)
            left = printed_time(per_step * (self.steps - self.done))
            line = f"clip {clip} of {self.clips} · step {step + 1}/{per_clip} · {per_step:.2f} s/step · {left} left"
            say_some(line, step + 1, per_clip, shown=4)
