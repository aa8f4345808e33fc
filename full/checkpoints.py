"""Save and load checkpoints that survive kills and damaged disks. A checkpoint is a folder step-N: .safetensors files with
each rank's own part of the weights and of the optimizer's state, and manifest.json with the size and crc32 of every file and
whatever the caller adds as JSON (full.train: the sampler's position, config, flags). Nothing is ever unpickled. A save has
four stages:

1. `save` copies the state to the CPU and returns; 2. beside training every rank writes its part into tmp-step-N, 3. and
reads its share of the files back for their checksums; 4. `finish` writes the manifest and renames the folder.

So a folder called step-N was complete once, and the manifest shows whether it still is. Checkpoints of train_min.py are read
too; their manifest has no checksums.
"""

import json
import math
import os
import re
import shutil
import sys
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime  # the builtin one from Python 3.11 on
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from full.claim import claim
from full.faults import on_main, sentence_of, together
from full.files import checksum, printable, read_json, replace_file
from train_min import FLAT, tensors_of

FILE_BYTES = 2 << 30  # approximate size of each file that a rank writes


class Checkpoints:
    """Save the step-N checkpoints of `folder` while training goes on, and load them on any layout. Every rank makes each
    call.

    Any problem with the disk raises OSError on all ranks, and earlier checkpoints stay. A disk that does not answer for
    `timeout` seconds is such a problem. All ranks must see the folder, and one run at a time writes there: `claim` it first.
    """

    def __init__(self, manager, folder, timeout=600.0):
        self.manager, self.folder, self.timeout = manager, Path(folder), timeout
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))  # saves run beside training
        self._written, self._complete = Future(), None

    def claim(self):
        """Reserve the folder for this run until rank 0 ends. ValueError if a live run has it, or if a rank can't see it."""
        file, owner = self.folder / "lock", claim(self.folder, lock="lock")

        def look():
            until = time.monotonic() + 10
            while not file.is_file() or file.read_text().strip() != owner:
                if time.monotonic() > until:
                    raise ValueError(f"rank 0's {file} is not visible here: all ranks must see the same {self.folder}")
                time.sleep(0.1)

        # rank 0 must not look: a process loses its POSIX lock when it closes the file, even if it has it open twice
        together((lambda: None) if self.manager.is_main else look)

    def save(self, step, model, optimizer, extra, tag="", keep=0, more=None, copy=True, beside=None):
        """Start saving weights, optimizer and `extra` (JSON) as step-N; training may go on when this returns.

        `finish` completes it. keep: the number of checkpoints with this tag to keep, the newest ones (0: all). more: {name:
        tensor} of other tensors. copy: copy the state to the CPU and write it while training goes on; if False, return when
        everything is written. beside: a function that writes another .safetensors into the folder it is given; all ranks
        call it.
        """
        self.finish()
        manager, temporary = self.manager, self.folder / f"tmp-step-{step}"
        _check_state(model, optimizer)
        on_main(partial(make_empty, temporary))
        if beside:
            together(partial(beside, temporary))
        tensors, files = _tensors(model, optimizer, more), {}
        so_far = 0  # bytes
        for name, tensor in tensors.items():  # each rank builds a file in memory before it writes it
            files[name] = 1 + so_far // (FILE_BYTES * manager.world_size)
            so_far += tensor.numel() * tensor.itemsize
        writer = dcp.HuggingFaceStorageWriter(str(temporary), files, save_distributed=True)
        start = dcp.async_save if copy else _save_at_once
        written = start(tensors, storage_writer=writer, process_group=self.group)
        self._written = ThreadPoolExecutor(1).submit(self._read_back, written, temporary)
        manifest = extra | dict(step=step, tag=tag, saved=time.time())
        patience = 0.9 * self.timeout  # less than the time-out of the ranks that wait for this one
        self._complete = partial(self._finish_save, temporary, manifest, keep, patience)

    def _read_back(self, written, temporary):
        """Wait, in a thread, until all ranks have written; return the checksums of this rank's share of the files."""
        written.result()
        files = sorted(temporary.glob("*.safetensors"))
        mine = files[self.manager.rank :: self.manager.world_size]
        return {file.name: checksum(file) for file in mine}

    def _finish_save(self, temporary, manifest, keep, patience):
        def wait():
            try:
                return self._written.result(patience)
            except NotInTime:
                raise OSError(f"the disk has not answered for {patience:.0f} seconds") from None

        try:
            parts = together(partial(_or_oserror, f"{temporary} could not be written", wait))
        except OSError:  # on a full disk it takes the space that the next try needs
            on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
            raise
        manifest["files"] = {name: sums for part in parts for name, sums in part.items()}
        on_main(partial(self._publish, temporary, manifest, keep))

    def _publish(self, temporary, manifest, keep):
        """Write the manifest, then rename the folder, which says that it is complete. Only rank 0 calls this."""
        final = self.folder / f"step-{manifest['step']}"
        # a counter gives the order, since a clock may be set back
        serials = [other["serial"] for _, other in manifests(self.folder) if other]
        serial = 1 + max(serials, default=0)
        write_manifest(temporary, manifest | dict(serial=serial))
        if final.exists():
            remove(final)
        os.rename(temporary, final)
        # only checkpoints of this run; those of train_min.py, which have no checksums, are never removed
        complete = [(path, other) for path, other in manifests(self.folder) if other and other["files"]]
        same = [path for path, other in complete if other["tag"] == manifest["tag"]]
        for path in same[keep:] if keep else []:
            remove(path)

    def ready(self):
        """Return whether this rank has written the save in progress, so that `finish` need not wait for it."""
        return self._written.done()

    def finish(self):
        """Complete the save in progress, if there is one. OSError if it failed."""
        complete, self._complete = self._complete, None
        if complete:
            complete()
        self._written = Future()

    def find(self, tag=None, name=None):
        """Return (path, manifest) of the newest undamaged checkpoint (with this tag). Damaged ones are named and skipped.

        name: step-N, if only that one will do. FileNotFoundError if there is none.
        """
        manager, problems = self.manager, []
        for path, manifest in on_main(lambda: manifests(self.folder)):
            if manifest and tag not in (None, manifest["tag"]) or name not in (None, path.name):
                continue
            try:
                manifest = on_main(partial(read_manifest, path))
                mine = dict(sorted(manifest["files"].items())[manager.rank :: manager.world_size])
                together(partial(check_files, path, mine))
                return path, manifest
            except (OSError, ValueError) as problem:
                problems += [problem] if manifest or tag is None else []  # it may be another run's
                if manager.is_main:
                    print(printable(f"skipping {path}: {problem}"), file=sys.stderr, flush=True)
        if problems:
            raise FileNotFoundError(f"no undamaged checkpoint in {self.folder}: {problems[0]}")
        raise FileNotFoundError(f"no checkpoint in {self.folder}: there is no step-N folder in it")

    def load(self, path, model=None, optimizer=None, more=None):
        """Load a checkpoint from `find` into the model, the optimizer and `more`, on any layout, sharded or not. Frozen
        weights are left as they are."""
        problem = f"{path} could not be loaded"
        reader = dcp.HuggingFaceStorageReader(str(path))
        tensors = _tensors(model, optimizer, more)
        saved = _or_oserror(problem, reader.read_metadata).state_dict_metadata
        # a parameter that never had a gradient has no state, there or here
        stateful = {key.rpartition(".")[0] for key in saved}
        params = {f"optimizer.state.{name}": param for name, param in model.named_parameters()} if optimizer else {}
        fresh = {name: param for name, param in params.items() if name not in stateful}
        wanted = {key: value for key, value in tensors.items() if key.rpartition(".")[0] not in fresh}
        # the tensors are the model's and the optimizer's own: they are filled in place
        _or_oserror(problem, partial(dcp.load, wanted, storage_reader=reader))
        for param in fresh.values():
            optimizer.state.pop(param, None)


def _save_at_once(tensors, **rules):
    """Save like dcp.async_save, but return only when everything is written."""
    written = Future()
    try:
        written.set_result(dcp.save(tensors, **rules))
    except (Exception, CheckpointException) as error:
        written.set_exception(error)
    return written


def _tensors(model, optimizer, more):
    """Return {name: tensor} of everything that training changes: train_min.py's tensors without frozen weights, and
    `more`."""
    frozen = {f"model.{name}" for name, param in model.named_parameters() if not param.requires_grad} if model else ()
    named = tensors_of(model, optimizer) if model else {}
    named = {name: tensor for name, tensor in named.items() if name not in frozen}
    return named | {f"more.{name}": value for name, value in (more or {}).items()}


def _check_state(model, optimizer):
    """Raise ValueError if the optimizer has state that is not a tensor, since it would not be saved."""
    for name, value in get_optimizer_state_dict(model, optimizer, options=FLAT).items():
        if name.startswith("state.") and not isinstance(value, torch.Tensor | None):
            raise ValueError(f"optimizer {name} is of type {type(value).__name__}: only tensors are saved")


def _or_oserror(problem, function):
    """Call `function` of torch.distributed.checkpoint, and turn any error in it into an OSError of one sentence."""
    try:
        return function()
    except (Exception, CheckpointException) as error:  # CheckpointException is not an Exception
        raise OSError(f"{problem}: {sentence_of(error)}") from None


def manifests(folder):
    """Return [(step-N folder, manifest)]: first those with a damaged manifest (None), then the newest ones first. Links are
    ignored."""
    named = [path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    read = []
    for path in (path for path in named if path.is_dir() and not path.is_symlink()):
        try:
            read.append((path, read_manifest(path)))
        except ValueError:
            read.append((path, None))

    def age(pair):
        path, manifest = pair
        return manifest["serial"] if manifest else math.inf, int(path.name.removeprefix("step-"))

    return sorted(read, key=age, reverse=True)


def make_empty(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def remove(checkpoint):
    """Delete a step-N folder. It is renamed first, so that a kill halfway leaves no damaged step-N."""
    leaving = checkpoint.with_name(f"tmp-{checkpoint.name}-leaving")
    shutil.rmtree(leaving, ignore_errors=True)
    os.rename(checkpoint, leaving)
    shutil.rmtree(leaving)


def write_manifest(folder, manifest):
    """Write manifest.json with its own crc32."""
    manifest = manifest | dict(crc32=crc32_of(manifest))
    replace_file(folder / "manifest.json", json.dumps(manifest, indent=1))


def crc32_of(manifest):
    """Return the crc32 of a manifest without its own crc32."""
    content = {name: value for name, value in manifest.items() if name != "crc32"}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def read_manifest(folder):
    """Return the manifest of a checkpoint. ValueError if it was changed, or if the folder has weights that are not in it."""
    try:
        manifest = read_json(Path(folder) / "manifest.json")
        if "files" not in manifest and "crc32" not in manifest:  # train_min.py's
            return dict(tag="", files={}) | manifest
        if crc32_of(manifest) != manifest["crc32"] or not manifest["files"]:
            raise ValueError("its crc32 differs")
    except (ValueError, KeyError) as error:
        raise ValueError(f"manifest.json is not what was saved: {sentence_of(error)}") from None
    names = {path.name for path in Path(folder).glob("*.safetensors")}
    if foreign := sorted(names - set(manifest["files"])):
        raise ValueError(f"{foreign[0]} is not in its manifest")
    return dict(serial=0) | manifest


def check_files(folder, saved):
    """Raise ValueError for a file that differs from the [bytes, crc32] that were saved. Sizes are compared first."""
    for name, (size, crc) in saved.items():
        file = Path(folder) / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{name} has {file.stat().st_size} bytes, {size} were saved")
        if checksum(file) != [size, crc]:
            raise ValueError(f"{name} has a crc32 that differs from the saved one")
