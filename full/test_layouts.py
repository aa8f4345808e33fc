"""The programs and parts that need several ranks, on every layout (dp x sp): one spawn a layout, all checks inside it."""

import contextlib
import io
import json
import os
import pickle
import resource
import shutil
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import CPUOffloadPolicy

import full.checkpoints
import full.flags
import full.infer
import full.offload
import full.train
import infer_min
import test_sp
import train_min
from full.checkpoints import Checkpoints, manifests
from full.faults import init, limit_waits, on_main, together
from full.resume import find_start
from full.weights import load_weights, save_weights
from hunyuan_sp import HunyuanVideo
from test_sp import (
    CONFIG,
    LAYOUTS,
    Touch,
    as_on_cpus,
    assert_ok,
    equal,
    flip,
    load_checkpoint,
    losses,
    random_model,
    small_preset,
)


def setup_worker():
    test_sp.setup_worker()
    full.offload.LARGE = 1


def layout_flags(pm):
    layout = ["--data_parallel_size", str(pm.dp_size), "--sequence_parallel_size", str(pm.sp_size)]
    return [*layout, "--device", pm.device.type, "--dtype", "float32"]


def train(pm, *flags):
    """full.train itself, in this process; what it printed."""
    same = ["--deterministic"] if pm.device.type == "cuda" else []
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        full.train.train(full.flags.parse_train(None, [*layout_flags(pm), *same, *map(str, flags)]))
    torch.use_deterministic_algorithms(False)
    return printed.getvalue()


def infer(pm, *flags):
    """full.infer itself, in this process; what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        full.infer.infer(full.infer.parse([*layout_flags(pm), *map(str, flags)]))
    together(lambda: None)  # until rank 0 has written the clip
    return printed.getvalue()


def tensors_of(path):
    """The tensors of a checkpoint by name, whatever file they are in."""
    return {name.partition("/")[2]: tensor for name, tensor in load_checkpoint(path).items()}


# --------------------------------------------------------------------------------------------------------------------
# faults


def check_groups_wait_as_long_as_asked(pm, folder):
    """Every group has the time-out of --timeout: those of the mesh, of what is sharded however, and that of saves."""

    def seconds(group, device=pm.device):
        return group._get_backend(device).options._timeout.total_seconds()

    patient = init(pm.dp_size, pm.sp_size, pm.device.type, timeout=97.0)
    groups = [patient.dp_group, patient.sp_group]
    for size in sorted({1, pm.sp_size, pm.world_size}):
        flags = ["--blocks", "0,1", "--timeout", "97", "--shard_size", str(size)]
        args = full.flags.parse_train(None, [*layout_flags(pm), *flags])
        model, *_ = full.train.build_model(full.flags.get_config(args), patient, args, None, None)
        mesh = next(model.parameters()).device_mesh
        assert mesh.mesh_dim_names == (("shard",) if size == pm.world_size else ("replicate", "shard"))
        groups += mesh.get_all_groups()
    assert {*map(seconds, groups), seconds(Checkpoints(patient, folder, 97.0).group, torch.device("cpu"))} == {97.0}
    limit_waits(patient.mesh, test_sp.PATIENCE)
    assert seconds(patient.dp_group) == seconds(patient.sp_group) == test_sp.PATIENCE


def check_bad_input_is_refused_on_every_rank(pm, folder):
    """Before any collective: ranks that went on would hang here."""
    size = pm.world_size
    sizes = {(None, size + 1): f"world size {size} is not a multiple of sequence_parallel_size {size + 1}"}
    sizes |= {(size, size): f"{size} x sequence_parallel_size {size} is not the world size {size}"} if size > 1 else {}
    for (dp, sp), expected in sizes.items():
        with pytest.raises(ValueError, match=expected):
            init(dp, sp, pm.device.type)
    for nothing in (folder / "absent", folder):
        with pytest.raises(FileNotFoundError, match="no checkpoint in"):
            Checkpoints(pm, nothing).find()
    if pm.world_size > 1:
        with pytest.raises(ValueError, match=r"ranks 0 and \d differ in shift: 4.0 and 5.0"):
            train(pm, "--steps", 1, "--out", folder / "never", "--shift", 4.0 + (pm.rank > 0))
    assert together(lambda: pm.rank) == [*range(pm.world_size)] and on_main(lambda: pm.rank) == 0
    for kind in (OSError, ValueError):  # of one rank, and raised on all

        def fail(kind=kind):
            if pm.rank == pm.world_size - 1:
                raise kind("enough")

        with pytest.raises(kind, match="enough"):
            together(fail)


# --------------------------------------------------------------------------------------------------------------------
# training and sampling


def check_three_steps_offloaded(pm, folder):
    """The lesson's three steps, weights or activations in the host's memory: equal to one device, weight by weight."""
    policy = CPUOffloadPolicy(pin_memory=pm.device.type == "cuda")
    test_sp.check_three_steps(pm, folder, steps=3, around=full.offload.offloaded, policy=policy)


def check_gradients_offloaded(pm, folder):
    test_sp.check_gradients(pm, folder, around=full.offload.offloaded)


# 5 samples on 2 x 2 micro-batches: dp ranks have 3 and 2, so that a count that is not global shows
SHORT = (
    "--blocks 1,1 --steps 5 --warmup 2 --lr 1e-3 --batch 5 --accumulation 2 --caption_drop 0.5 --save_every 2".split()
)


def check_loss_curve_and_resume(pm, folder, everyone=False):
    """Compare the same run on every layout. Step 2 of the layout that ran before (or of everyone) goes on here; on one rank and on
    two so does its own, and then that one's step 4."""
    own = folder / f"run-{pm.dp_size}x{pm.sp_size}"
    others = sorted((p for p in folder.glob("run-*") if p != own), key=lambda p: (p / "log.jsonl").stat().st_mtime)
    together(lambda: None)  # until all have looked
    train(pm, *SHORT, "--out", own)
    sources = [(p / "step-2", f"from-{p.name}") for p in (others if everyone else others[-1:])]
    again = [(own / "step-2", "once", [3, 4, 5]), (own / "once/step-4", "twice", [5])]
    again = again[: {1: 1, 2: 2}.get(pm.world_size, 0)]
    for source, name in [*sources, *((source, name) for source, name, _ in again)]:
        on_main(lambda source=source, name=name: shutil.copytree(source, own / name / source.name) and None)
        train(pm, *SHORT, "--out", own / name, "--resume")
    for _, name, _ in again:
        assert equal(load_checkpoint(own / name / "step-5"), load_checkpoint(own / "step-5"))

    truth, ours = losses(others[0] if others else own), losses(own)
    assert [entry["step"] for entry in ours] == [1, 2, 3, 4, 5]
    for a, b in zip(truth, ours):
        for key in ("loss", "grad_norm"):
            assert abs(a[key] - b[key]) <= 1e-5 * a[key], (a, b)
    # resumed: exactly where this layout saved it, to rounding where another one did
    foreign = [(name, [3, 4, 5], 1e-6) for _, name in sources]
    for name, steps, tolerance in [*((name, steps, 0) for _, name, steps in again), *foreign]:
        resumed = losses(own / name)
        assert [entry["step"] for entry in resumed] == steps
        for a, b in zip(ours[-len(steps) :], resumed):
            assert abs(a["loss"] - b["loss"]) <= tolerance * a["loss"], (name, a, b)


def check_sampling(pm, folder):
    """Sample what the 1x1 run saved on this layout; with a negative prompt of another length in the same batch."""
    args = ["--checkpoint", folder / "run-1x1", "--steps", 3, "--cfg", 3, "--negative_prompt", "a red thing moves"]
    for name, more in (("whole", []), ("sharded", ["--shard"])):
        output = folder / f"clip-{pm.dp_size}x{pm.sp_size}-{name}"
        printed = infer(pm, *args, *more, "--output", output)
        assert pm.rank != 0 or "a blue circle moves up: wrote" in printed
        truth, ours = (load_file(f"{clip}.safetensors")["latents"] for clip in (folder / "clip-1x1-whole", output))
        assert truth.std() > 0.1 and (ours - truth).abs().max() < 1e-5


def check_noise_is_for_benchmarks(pm, folder):
    """A large model without data trains on noise: as many samples as ranks and micro-batches need, and nothing is saved."""
    flags = "--config 13b --height 32 --width 48 --frames 5 --accumulation 2 --steps 1".split()
    out = folder / f"noise-{pm.dp_size}x{pm.sp_size}"
    with small_preset(replace(CONFIG, in_channels=4)):
        printed = train(pm, *flags, "--out", out / "never")
        train(pm, *flags, "--save_every", "1", "--out", out / "asked")
    assert not pm.is_main or f"global batch {2 * pm.dp_size}," in printed and "nothing saved" in printed, printed
    together(lambda: None)
    assert not [*(out / "never").glob("*step*")] and [p.name for p in (out / "asked").glob("*step*")] == ["step-1"]


def check_export(pm, folder):
    """Sharded from the meta device, whole weights are loaded, and exported in several files that load back."""
    config, folder = replace(CONFIG, in_channels=4), folder / f"export-{pm.dp_size}x{pm.sp_size}"
    truth = HunyuanVideo(config).to(pm.device)
    with torch.device("meta"):
        model = HunyuanVideo(config)
    pm.shard(model, model.blocks, shard_size=pm.sp_size)
    source = random_model(config, pm.device, torch.float32)
    load_weights(model, source.state_dict())
    for (name, param), true in zip(model.named_parameters(), source.parameters()):
        assert torch.equal(param.full_tensor(), true), name
    save_weights(model, folder, "diffusers", torch.float32, shard_bytes=30_000)
    dist.barrier()
    assert len(list(folder.glob("*.safetensors"))) > 3 and (folder / "config.json").is_file()
    load_weights(truth, folder)
    assert equal(truth.state_dict(), source.state_dict())


# --------------------------------------------------------------------------------------------------------------------
# the lesson's programs and these


def lesson(pm, program, *flags):
    """train_min or infer_min itself, in this process."""
    run = train_min.train if program is train_min else infer_min.infer
    flags = [*flags, "--device", pm.device.type]
    with as_on_cpus(pm), contextlib.redirect_stdout(io.StringIO()) as printed:
        run(train_min.parse(program.add_flags, None, None, [*map(str, flags)]))
    together(lambda: None)
    return printed.getvalue()


def numbers(run):
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in losses(run)]


def check_the_same_numbers_as_the_lesson(pm, folder):
    """With the same flags, loss and gradient norm are the same bit for bit at each step."""
    own = folder / f"same-{pm.dp_size}x{pm.sp_size}"
    flags = ["--dp", pm.dp_size, "--sp", pm.sp_size, "--steps", 10, "--batch", 6, "--accumulation", 2]
    flags += ["--checkpointing", "attention"]
    lesson(pm, train_min, *flags, "--out", own / "lesson")
    train(pm, *flags, "--out", own / "full")
    ours, truth = numbers(own / "full"), numbers(own / "lesson")
    assert ours == truth and [step for step, *_ in ours] == [*range(1, 11)], (ours, truth)
    assert equal(tensors_of(own / "full/step-10"), tensors_of(own / "lesson/step-10"))


def check_checkpoints_are_shared(pm, folder):
    """Each trainer continues exactly from what the other saved, and the other's sampler samples it."""
    own = folder / f"shared-{pm.dp_size}x{pm.sp_size}"
    flags = ["--dp", pm.dp_size, "--sp", pm.sp_size, "--batch", 5, "--warmup", 0, "--lr", 1e-2, "--save_every", 2]

    def minimal(*more):
        lesson(pm, train_min, *flags, *more)

    def real(*more):
        return train(pm, *flags, *more, "--keep", 0)

    def clips(run):
        """The clips that the two samplers make of a run's newest checkpoint."""
        output, shown = run / "clip", []
        infer(pm, "--checkpoint", run, "--steps", 3, "--output", output)
        with mock.patch.object(infer_min, "show", lambda clip, *_: shown.append(clip)):
            lesson(pm, infer_min, "--checkpoint", run, "--steps", 3, "--output", own / "never")
        return load_file(f"{output}.safetensors")["latents"], *shown

    with small_preset():
        for name, one, other in (("minimal", minimal, real), ("real", real, minimal)):
            one("--steps", 4, "--out", own / name)
            on_main(lambda name=name: shutil.copytree(own / name / "step-2", own / f"{name}-on/step-2") and None)
            other("--steps", 4, "--out", own / f"{name}-on", "--resume")
            assert numbers(own / f"{name}-on") == numbers(own / name)[2:]
            assert equal(tensors_of(own / f"{name}-on/step-4"), tensors_of(own / name / "step-4"))
            theirs, *ours = clips(own / name)
            assert len(ours) == pm.is_main and theirs.std() > 0.1
            assert all(torch.equal(clip, theirs) for clip in ours)

        # taking turns in one folder: the newest is what was saved last, whoever saved it and whatever its step
        turns = [(real, 2, []), (minimal, 4, ["--resume"]), (real, 6, ["--resume"]), (minimal, 8, ["--resume"])]
        turns += [(real, 2, ["--overwrite"]), (minimal, 1, []), (real, 3, ["--resume"])]
        for turn, steps, more in turns:
            turn("--steps", steps, "--out", own / "turns", *more)
            newest, manifest = train_min.newest_checkpoint(own / "turns")
            assert newest.name == f"step-{steps}" and manifest["step"] == steps
            assert Checkpoints(pm, own / "turns").find()[0] == newest
    # a new run of full.train puts the log aside, one of train_min.py appends
    assert [entry["step"] for entry in losses(own / "turns")] == [1, 2, 1, 2, 3]


# --------------------------------------------------------------------------------------------------------------------
# checkpoints


def check_a_damaged_checkpoint_is_never_loaded(pm, folder):
    """A file cut by a byte, halved, emptied, flipped at three places, deleted, swapped; the manifest edited."""
    folder = folder / f"damage-{pm.dp_size}x{pm.sp_size}"
    model, checkpoints = random_model(CONFIG, pm.device), Checkpoints(pm, folder)
    pm.shard(model, model.blocks)
    state = model, torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        with torch.no_grad():
            model.img_in.proj.bias.mul_(2)
        checkpoints.save(step, *state, dict(note=7), "a")
        checkpoints.finish()
    good, manifest = checkpoints.find("a")
    assert good.name == "step-2" and (manifest["step"], manifest["tag"], manifest["note"]) == (2, "a", 7)

    def found():
        """The name of what is found, and rank 0's reasons for passing over the others."""
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            return checkpoints.find()[0].name, printed.getvalue()

    damages = {
        "cut by a byte": lambda data, other: data[:-1],
        "halved": lambda data, other: data[: len(data) // 2],
        "empty": lambda data, other: b"",
        "another step's": lambda data, other: other,
        "deleted": lambda data, other: None,
    }
    for place in (0.001, 0.5, 0.999):
        damages[f"flipped at {place}"] = lambda data, other, place=place: flip(data, int(len(data) * place))
    damages["edited"] = lambda data, other: data.replace(b'"step": 2', b'"step": 7')
    files = on_main(lambda: sorted(p.name for p in good.iterdir()))
    for file in files[:2] + files[-1:]:  # the manifest, and two ranks' parts
        for name, damage in damages.items():
            if name == "edited" and file != "manifest.json":
                continue
            if pm.is_main:
                data, other = ((folder / step / file).read_bytes() for step in ("step-2", "step-1"))
                (good / file).unlink()
                if (damaged := damage(data, other)) is not None:
                    assert damaged != data
                    (good / file).write_bytes(damaged)
            newest, problem = found()
            assert newest == "step-1", (file, name)
            if pm.is_main:
                # with another step's manifest it is the other files that differ
                another = file == "manifest.json" and name == "another step's"
                assert f"skipping {good}: " in problem, (file, name, problem)
                assert another or file in problem.partition(": ")[2], (file, name, problem)
                (good / file).write_bytes(data)
    assert found()[0] == "step-2"

    # a pickle where torch.distributed.checkpoint would have one is not opened
    if pm.is_main:
        (good / ".metadata").write_bytes(pickle.dumps(Touch(folder / "touched")))
    checkpoints.load(checkpoints.find()[0], *state)
    assert not (folder / "touched").exists()

    # a full disk, as a limit on file sizes: every rank raises, and what was there stays
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if pm.rank == pm.world_size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    with pytest.raises(OSError, match="tmp-step-3 could not be written"):
        checkpoints.save(3, *state, {}, "a")
        checkpoints.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found()[0] == "step-2" and not (folder / "tmp-step-3").exists()
    for step in (4, 5, 6):  # of run a two stay, of others all
        checkpoints.save(step, *state, {}, "a" if step > 4 else "b", keep=2)
    checkpoints.finish()
    left = [(path.name, manifest["tag"]) for path, manifest in manifests(folder)]
    assert left == [("step-6", "a"), ("step-5", "a"), ("step-4", "b")]
    assert checkpoints.find("b")[0].name == "step-4"

    # a job that is restarted goes on with its own, ends where that is damaged, and starts anew where it never saved
    def restarted(run):
        on_main(lambda: (folder / "run.json").write_text(json.dumps(dict(run=run, launch="job"))))
        with mock.patch.dict(os.environ, TORCHELASTIC_RUN_ID="job"), contextlib.redirect_stderr(io.StringIO()):
            return find_start(checkpoints, folder)

    assert restarted("b")[0].name == "step-4"
    file = next(iter(checkpoints.find("b")[1]["files"]))
    on_main(lambda: (folder / "step-4" / file).unlink())
    with pytest.raises(FileNotFoundError, match=f"no undamaged checkpoint in .*{file} is missing"):
        restarted("b")
    on_main(lambda: (folder / "step-6" / "manifest.json").unlink())  # whose it was, nobody knows
    assert restarted("c") == (None, dict(tag="c"))


class HalfUsed(torch.nn.Module):
    """A model that uses one of its two layers, or both."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x, both=False):
        return self.a(x) + self.b(x) if both else self.a(x)


class Counting(torch.optim.SGD):
    def step(self):
        super().step()
        self.state[self.param_groups[0]["params"][0]]["count"] = 3.5


def check_what_a_checkpoint_can_hold(pm, folder):
    """A parameter that never had a gradient is saved, loaded, and trained then as if never saved. What can't be kept is
    refused, and so is a disk that does not answer."""

    def make(shard_size=None):
        torch.manual_seed(0)
        model = HalfUsed().to(pm.device)
        pm.shard(model, [model.a, model.b], shard_size=shard_size)
        return model, torch.optim.AdamW(model.parameters(), 0.1)

    def train_one(model, optimizer, both):
        pm.backward(model, model(torch.ones(2, 4, device=pm.device), both).square().sum())
        pm.step(optimizer)

    checkpoints, (model, optimizer), (other, fresh) = Checkpoints(pm, folder / "half"), make(), make()
    train_one(model, optimizer, both=False)
    checkpoints.save(1, model, optimizer, {})
    checkpoints.finish()
    checkpoints.load(checkpoints.find()[0], other, fresh)
    for pair in ((model, optimizer), (other, fresh)):
        train_one(*pair, both=True)
    assert equal(*([p.full_tensor() for p in m.parameters()] for m in (model, other)))

    alone, other = make(1), make(1)  # replicated: a rank may have nothing to write
    train_one(*alone, both=True)
    replicas = Checkpoints(pm, folder / "replicas")
    replicas.save(1, *alone, {})
    replicas.finish()
    replicas.load(replicas.find()[0], *other)
    assert equal(*([p.full_tensor() for p in m.parameters()] for m, _ in (alone, other)))

    # in files of some bytes, beside training or not: what is saved is what was there when `save` returned
    kept = [p.full_tensor() for p in model.parameters()]
    for step in (5, 6):
        with mock.patch.object(full.checkpoints, "FILE_BYTES", 8):
            checkpoints.save(step, model, optimizer, {}, copy=step == 5)
        train_one(model, optimizer, both=True)
        checkpoints.finish()
        assert len(checkpoints.find()[1]["files"]) > 2 * pm.world_size
        checkpoints.load(checkpoints.find()[0], model, optimizer)
        assert equal([p.full_tensor() for p in model.parameters()], kept)
        on_main(partial(full.checkpoints.remove, checkpoints.find()[0]))

    counting = Counting(model.parameters(), 0.1)
    train_one(model, counting, both=True)
    with pytest.raises(ValueError, match="state.a.weight.count is of type float: only tensors are saved"):
        checkpoints.save(2, model, counting, {})
    checkpoints.timeout = 2.0
    checkpoints.save(3, model, optimizer, {})
    checkpoints.timeout, checkpoints._written = 600.0, Future()  # as if the disk hung
    with pytest.raises(OSError, match="tmp-step-3 could not be written: .*not answered for 2 seconds"):
        checkpoints.finish()
    assert checkpoints.find()[0].name == "step-1"


# --------------------------------------------------------------------------------------------------------------------
# what the ranks of each layout have found meanwhile

CHECKS = {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}
ONLY = dict(  # where another layout would show nothing new
    three_steps_offloaded="1x1 1x2 2x1 1x3 2x2 1x5",
    loss_curve_and_resume="1x1 1x2 2x1 2x2",
    noise_is_for_benchmarks="1x2",
    the_same_numbers_as_the_lesson="1x2 2x1",
    checkpoints_are_shared="1x2",
    a_damaged_checkpoint_is_never_loaded="1x2",
    what_a_checkpoint_can_hold="1x2",
)
NEEDED = {  # of 1x1
    "loss_curve_and_resume": ["loss_curve_and_resume"],
    "sampling": ["loss_curve_and_resume", "sampling"],
}


@test_sp.on_layouts(CHECKS, ONLY)
def test_on(layout, check, ranks_of_layout):
    assert_ok(layout, [check], *ranks_of_layout(layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_exits_with_0(layout, ranks_of_layout):
    assert set(ranks_of_layout(layout)[1]) == {0}
