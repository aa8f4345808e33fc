"""The house: the lesson stands alone, arrows go one way, old commands name the new ones, the README's command works and
its pictures show the data."""

import ast
import gzip
import importlib.util
import json
import os
import re
import shutil
import subprocess
from unittest import mock

import pytest

from test_sp import GOLD, HERE, fork, launch, losses

LESSON = "comm.py hunyuan_sp.py sampler.py train_min.py infer_min.py test_sp.py README.md".split()


def commands_of_the_readme(script):
    """The flags of each line of the README that starts a script of the lesson with torchrun."""
    return re.findall(rf"^ +\$ .*torchrun --nproc_per_node=\d+ {script}(.*)$", (HERE / "README.md").read_text(), re.M)


def test_the_first_command_works_twice(tmp_path):
    """Typed again it trains anew and replaces what it saved; what a killed run has left is in nobody's way."""
    command, out = commands_of_the_readme("train_min.py")[0].split(), tmp_path / "out"
    for n in (1, 2):
        (out / "tmp-step-2").mkdir(parents=True)
        (out / "tmp-step-2" / "junk.safetensors").write_bytes(b"half")
        results = fork("train_min", *command, "--steps", 2, "--out", out, ranks=2, out=tmp_path)
        assert [code for code, _ in results] == [0, 0] and f"saved {out}/step-2" in results[0][1], results
        assert sorted(p.name for p in out.iterdir()) == ["log.jsonl", "step-2"]
        assert not (out / "step-2" / "junk.safetensors").exists() and len(losses(out)) == 2 * n
    assert losses(out)[:2] == losses(out)[2:], "the second run is another"


@pytest.mark.parametrize("program, flags, expected", [
    ("train_min", ["--lora", "4"], "full.train"),
    ("train_min", ["--resume", "auto"], "full.train"),
    ("infer_min", ["--model", "X"], "full.infer"),
    ("infer_min", ["--encode", "videos", "--output", "latents/"], "full.encode"),
    ("infer_min", ["--export", "DIR"], "full.export"),
    ("train_min", ["--check"], "--check"),  # no flag is short for another
])  # fmt: skip
def test_an_old_command_names_the_new_one(program, flags, expected, tmp_path):
    ((code, printed),) = fork(program, *flags, out=tmp_path)
    assert code == 2 and expected in printed and "unrecognized arguments" in printed, printed


def test_what_the_programs_write_is_ignored_by_git():
    names = "out/log.jsonl out-2/step-1/manifest.json clip.safetensors clip-3.gif clip-trace-0.json.gz"
    names += " out/trace-1.json.gz"
    inside = shutil.which("git") and subprocess.run(["git", "rev-parse"], cwd=HERE, capture_output=True).returncode == 0
    if not inside:
        pytest.skip("not a git checkout")
    ignored = subprocess.run(["git", "check-ignore", "--", *names.split()], cwd=HERE, capture_output=True, text=True)
    assert ignored.stdout.split() == names.split()
    tracked = subprocess.run(["git", "ls-files", "-ci", "--exclude-standard"], cwd=HERE, capture_output=True, text=True)
    assert not tracked.stdout, "files of the project are ignored"


def test_the_lesson_alone(tmp_path):
    """These files, without `full/`: they train, go on on another layout, sample, score, and test themselves."""
    here, seen = tmp_path / "alone", tmp_path / "seen"
    (here / "golden").mkdir(parents=True), seen.mkdir()
    stored = [f"golden/{file.name}" for file in GOLD.glob("*.safetensors")]
    for name in [*LESSON, "pyproject.toml", "LICENSE", "golden/config.json", *stored]:
        shutil.copy(HERE / name, here / name)

    def run(*command, ranks=1):
        code, printed = launch(*command, ranks=ranks, out=seen, cwd=here)
        assert code == 0, printed
        return printed

    run("train_min.py", "--steps", 3, "--device", "cpu", ranks=2)
    assert "from step 3 of 5" in run("train_min.py", "--steps", 5, "--device", "cpu", "--resume")
    assert [entry["step"] for entry in losses(here / "out")] == [1, 2, 3, 4, 5]
    assert re.search(
        r"of 2 prompts right: colour \d, shape \d, direction \d", run("infer_min.py", "--score", 2, "--device", "cpu")
    )
    with mock.patch.dict(os.environ, LAYOUTS="1x2"):
        quick = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "test_sp.py"]
        assert re.search(r"\n\d\d+ tests collected", run(*quick, "--collect-only"))
        rules = "1x2 and not second_order and (collectives_are_transposes or gradients or all_to_all)"
        assert "3 passed" in run(*quick, "-k", rules)


def imports_of(file):
    """The modules that a file imports, anywhere in it: a name imported from a package may be a module too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_arrows_go_one_way():
    """Nothing at the top imports `full`; and nowhere is a circle."""
    files = {name.removesuffix(".py"): HERE / name for name in LESSON if name.endswith(".py")}
    for name, file in files.items():
        assert not [module for module in imports_of(file) if module.split(".")[0] == "full"], name
    files |= {f"full.{file.stem}": file for file in HERE.glob("full/*.py") if file.stem != "__init__"}
    left = {name: {*imports_of(file)} & {*files} - {name} for name, file in files.items()}
    while ready := [name for name, needs in left.items() if not needs & {*left}]:
        for name in ready:
            del left[name]
    assert not left, f"a circle: {left}"


def pictures_in(folder):
    """Return .ci/pictures.py, which reads and writes there."""
    spec = importlib.util.spec_from_file_location("pictures", HERE / ".ci" / "pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    pictures.ASSETS = folder
    return pictures


def write_trace(path, clock, late=0):
    """Write a block of 100 ms on a GPU whose clock is `clock` ms ahead; late: it comes to each exchange so much later."""
    ready, done = 14 + late, 72 + late  # where its exchanges begin
    events = [("gpu_user_annotation", "double_block 0", 0, 100, 7), ("gpu_user_annotation", "all_to_all", 12, ready, 7)]
    events += [("gpu_user_annotation", "attention", 22, done, 7)]
    events += [("kernel", "nvjet_sm90", 0, 10, 7), ("kernel", "triton_poi_fused_add", 10, 12, 7)]
    events += [("kernel", "CatArrayBatched", 12, ready - 1, 7), ("kernel", "CatArrayBatched", ready - 1, ready, 7)]
    events += [("kernel", "ncclDevKernel_SendRecv", ready, 22, 7), ("kernel", "triton_fused_attention", 22, done, 7)]
    events += [("kernel", "ncclDevKernel_SendRecv", done, 80, 7), ("kernel", "nvjet_sm90", 81, 100, 7)]
    events += [("kernel", "ncclDevKernel_AllGather", 30, 40, 9)]  # FSDP's, on a stream of its own
    rows = [dict(cat=c, name=n, ts=1e3 * (s + clock), dur=1e3 * (e - s), tid=t) for c, n, s, e, t in events]
    with gzip.open(path, "wt") as file:
        json.dump(dict(traceEvents=rows, deviceProperties=[dict(name="NVIDIA H200")]), file)


@pytest.mark.parametrize("clock", [0, 1000])
def test_the_picture_of_a_block_shows_who_waits(clock, tmp_path):
    """Count as waiting what lies before the other rank's beginning, in an exchange of the rank that comes first."""
    write_trace(tmp_path / "x-0.json.gz", 0)
    write_trace(tmp_path / "x-1.json.gz", clock, late=5)
    pictures = pictures_in(tmp_path)
    pictures.measure_block(tmp_path / "x", "")
    facts = json.loads((tmp_path / "block.json").read_text())
    first = [["block", 0, 100], ["linear", 0, 10], ["pointwise", 10, 2], ["packing", 12, 2], ["waiting", 14, 5]]
    first += [["exchange", 19, 3], ["attention", 22, 50], ["waiting", 72, 5], ["exchange", 77, 3], ["linear", 81, 19]]
    second = [["block", 0, 100], ["linear", 0, 10], ["pointwise", 10, 2], ["packing", 12, 7], ["exchange", 19, 3]]
    second += [["attention", 22, 55], ["exchange", 77, 3], ["linear", 81, 19]]
    assert facts["ranks"] == [first, second] and facts["clocks_moved_ms"] == [0, -clock]
    pictures.draw_block()
    drawn = (tmp_path / "block.svg").read_text()
    assert drawn.count("waits for rank 1: 5.0") == 2 and "waits for rank 0" not in drawn
    assert "two H200s: 100 ms" in drawn


def test_the_picture_of_a_block_needs_ranks_of_one_run(tmp_path):
    pictures = pictures_in(tmp_path)
    write_trace(tmp_path / "x-0.json.gz", 0)
    with pytest.raises(ValueError, match="two ranks"):
        pictures.measure_block(tmp_path / "x", "")
    write_trace(tmp_path / "x-1.json.gz", 0)
    with gzip.open(tmp_path / "x-1.json.gz", "rt") as file:
        trace = json.load(file)
    next(e for e in trace["traceEvents"] if "SendRecv" in e["name"])["dur"] -= 3e3
    with gzip.open(tmp_path / "x-1.json.gz", "wt") as file:
        json.dump(trace, file)
    with pytest.raises(ValueError, match="1.50 ms apart"):
        pictures.measure_block(tmp_path / "x", "")


def test_pictures_are_drawn_from_their_data(tmp_path):
    for file in (HERE / "assets").glob("*.json"):
        shutil.copy(file, tmp_path)
    pictures = pictures_in(tmp_path)
    for draw in (pictures.draw_layout, pictures.draw_all_to_all, pictures.draw_scaling, pictures.draw_block):
        draw()
    drawn = sorted(tmp_path.glob("*.svg"))
    assert [file.name for file in drawn] == sorted(file.name for file in (HERE / "assets").glob("*.svg"))
    for file in drawn:
        assert file.read_text() == (HERE / "assets" / file.name).read_text(), f"{file.name}: run .ci/pictures.py"
