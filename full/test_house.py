"""The house: the lesson stands alone, arrows go one way, old commands name the new ones, the README's command works."""

import ast
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
