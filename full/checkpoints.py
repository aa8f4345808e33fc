"""Checkpoints that survive: a folder step-N of .safetensors, each rank's own part, and manifest.json with every file's size and
crc32. In it: weights, the optimizer's state, and what the caller adds as JSON (full.train: the sampler's position, config,
flags). Nothing is ever unpickled. A save goes through four stages:

1. `save` copies the state to the CPU and returns; 2. beside training every rank writes its part into tmp-step-N, 3. and reads
its share of the files back for their checksums; 4. `finish` writes the manifest and renames the folder.

So what is called step-N was complete once, and the manifest tells whether it still is. What train_min.py saves is read too: its
manifest has no checksums. Needs torch.distributed.checkpoint.
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

FILE_BYTES = 2 << 30  # about so many in each file that a rank writes


class Checkpoints:
    """The step-N checkpoints in `folder`, saved beside training and loaded on any layout. Every rank makes each call.

    Every problem with the disk is an OSError on all ranks; what was saved before stays. A disk that does not answer for
    `timeout` seconds is one. All ranks must see the folder, and one run at a time writes there: `claim` it first.
    """

    def __init__(self, manager, folder, timeout=600.0):
        self.manager, self.folder, self.timeout = manager, Path(folder), timeout
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))  # saves run beside training
        self._written, self._complete = Future(), None

    def claim(self):
        """Keep the folder to this run for as long as rank 0 lives. ValueError where a live run has it, or a rank can't see it."""
        file, owner = self.folder / "lock", claim(self.folder, lock="lock")

        def look():
            until = time.monotonic() + 10
            while not file.is_file() or file.read_text().strip() != owner:
                if time.monotonic() > until:
                    raise ValueError(f"{file} of rank 0 is not there: all ranks must see the same {self.folder}")
                time.sleep(0.1)

        # not rank 0: a lock of POSIX is lost when its process closes the file, however often it has it open
        together((lambda: None) if self.manager.is_main else look)

    def save(self, step, model, optimizer, extra, tag="", keep=0, more=None, copy=True, beside=None):
        """Start saving weights, optimizer and `extra` (JSON) as step-N; training may go on when this returns.

        `finish` completes it. keep: so many checkpoints with this tag stay, the newest (0: all). more: other tensors, by name.
        copy: the state is copied to the CPU and written beside training; without it this returns when all is written.
        beside: a function that writes another .safetensors into the folder that it is given; all ranks call it.
        """
        self.finish()
        manager, temporary = self.manager, self.folder / f"tmp-step-{step}"
        _check_state(model, optimizer)
        on_main(partial(make_empty, temporary))
        if beside:
            together(partial(beside, temporary))
        tensors, held, files = _tensors(model, optimizer, more), 0, {}
        for name, tensor in tensors.items():  # each rank builds a file in memory before it writes it
            files[name], held = 1 + held // (FILE_BYTES * manager.world_size), held + tensor.numel() * tensor.itemsize
        writer = dcp.HuggingFaceStorageWriter(str(temporary), files, save_distributed=True)
        start = dcp.async_save if copy else _save_at_once
        written = start(tensors, storage_writer=writer, process_group=self.group)
        self._written = ThreadPoolExecutor(1).submit(self._read_back, written, temporary)
        manifest = extra | dict(step=step, tag=tag, saved=time.time())
        patience = 0.9 * self.timeout  # less than that of ranks that wait for this one
        self._complete = partial(self._finish_save, temporary, manifest, keep, patience)

    def _read_back(self, written, temporary):
        """Return, in a thread and when all ranks have written, the checksums of this rank's share of the files."""
        written.result()
        files = sorted(temporary.glob("*.safetensors"))
        return {file.name: checksum(file) for file in files[self.manager.rank :: self.manager.world_size]}

    def _finish_save(self, temporary, manifest, keep, patience):
        def wait():
            try:
                return self._written.result(patience)
            except NotInTime:
                raise OSError(f"the disk has not answered for {patience:.0f} seconds") from None

        try:
            parts = together(partial(_or_oserror, f"{temporary} could not be written", wait))
        except OSError:  # on a full disk it takes what the next try needs
            on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
            raise
        manifest["files"] = {name: sums for part in parts for name, sums in part.items()}
        on_main(partial(self._publish, temporary, manifest, keep))

    def _publish(self, temporary, manifest, keep):
        """Write, on rank 0, the manifest, then the name that says that all is there."""
        final = self.folder / f"step-{manifest['step']}"
        # the order is a counter's: a clock may be set back
        serial = 1 + max([there["serial"] for _, there in manifests(self.folder) if there], default=0)
        write_manifest(temporary, manifest | dict(serial=serial))
        if final.exists():
            remove(final)
        os.rename(temporary, final)
        # of this run; what train_min.py saved, without checksums, is never removed
        same = [path for path, m in manifests(self.folder) if m and m["files"] and m["tag"] == manifest["tag"]]
        for path in same[keep:] if keep else []:
            remove(path)

    def ready(self):
        """Whether there is a save to finish, for which this rank need not wait."""
        return self._written.done()

    def finish(self):
        """Complete the save under way, if there is one. OSError if it failed."""
        complete, self._complete = self._complete, None
        if complete:
            complete()
        self._written = Future()

    def find(self, tag=None):
        """The newest checkpoint (with this tag) that is whole: (path, manifest). Damaged ones are named and passed over.

        FileNotFoundError if there is none.
        """
        manager, problems = self.manager, []
        for path, manifest in on_main(lambda: manifests(self.folder)):
            if manifest and tag not in (None, manifest["tag"]):
                continue
            try:
                manifest = on_main(partial(read_manifest, path))
                mine = dict(sorted(manifest["files"].items())[manager.rank :: manager.world_size])
                together(partial(check_files, path, mine))
                return path, manifest
            except (OSError, ValueError) as problem:
                problems += [problem] if manifest or tag is None else []  # else nobody knows whose it is
                if manager.is_main:
                    print(printable(f"skipping {path}: {problem}"), file=sys.stderr, flush=True)
        if problems:
            raise FileNotFoundError(f"no whole checkpoint in {self.folder}: {problems[0]}")
        raise FileNotFoundError(f"no checkpoint in {self.folder}: there is no step-N folder in it")

    def load(self, path, model=None, optimizer=None, more=None):
        """Load what `find` gave into the model, the optimizer, more: any layout, sharded or not. Frozen weights stay."""
        told, reader = f"{path} could not be loaded", dcp.HuggingFaceStorageReader(str(path))
        tensors, saved = _tensors(model, optimizer, more), _or_oserror(told, reader.read_metadata).state_dict_metadata
        # a parameter that never had a gradient has no state, there or here
        stateful = {key.rpartition(".")[0] for key in saved}
        params = {f"optimizer.state.{name}": param for name, param in model.named_parameters()} if optimizer else {}
        fresh = {name: param for name, param in params.items() if name not in stateful}
        wanted = {key: value for key, value in tensors.items() if key.rpartition(".")[0] not in fresh}
        # the tensors are the model's and the optimizer's own: they are filled in place
        _or_oserror(told, partial(dcp.load, wanted, storage_reader=reader))
        for param in fresh.values():
            optimizer.state.pop(param, None)


def _save_at_once(tensors, **rules):
    """What dcp.async_save does, done when this returns."""
    written = Future()
    try:
        written.set_result(dcp.save(tensors, **rules))
    except (Exception, CheckpointException) as error:
        written.set_exception(error)
    return written


def _tensors(model, optimizer, more):
    """Return everything that training changes, by name: train_min.py's tensors but for frozen weights, and `more`."""
    frozen = {f"model.{name}" for name, param in model.named_parameters() if not param.requires_grad} if model else ()
    named = tensors_of(model, optimizer) if model else {}
    named = {name: tensor for name, tensor in named.items() if name not in frozen}
    return named | {f"more.{name}": value for name, value in (more or {}).items()}


def _check_state(model, optimizer):
    """Raise ValueError for a state of the optimizer that is no tensor: it would not be saved."""
    for name, value in get_optimizer_state_dict(model, optimizer, options=FLAT).items():
        if name.startswith("state.") and not isinstance(value, torch.Tensor | None):
            raise ValueError(f"optimizer {name} is of type {type(value).__name__}: only tensors are saved")


def _or_oserror(told, function):
    """Call it. Whatever goes wrong in torch.distributed.checkpoint is an OSError of one sentence."""
    try:
        return function()
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        raise OSError(f"{told}: {sentence_of(error)}") from None


def manifests(folder):
    """[(step-N folder, its manifest)]: the damaged, whose manifest is None, then the one completed last; never links."""
    found = [p for p in Path(folder).glob("step-*") if re.fullmatch(r"step-\d+", p.name) and p.is_dir()]
    read = []
    for path in (p for p in found if not p.is_symlink()):
        try:
            read.append((path, read_manifest(path)))
        except ValueError:
            read.append((path, None))
    return sorted(read, key=lambda r: (r[1]["serial"] if r[1] else math.inf, int(r[0].name[5:])), reverse=True)


def make_empty(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def remove(checkpoint):
    """Delete a step-N folder; killed halfway, it leaves nothing behind that is called so."""
    leaving = checkpoint.with_name(f"tmp-{checkpoint.name}-leaving")
    shutil.rmtree(leaving, ignore_errors=True)
    os.rename(checkpoint, leaving)
    shutil.rmtree(leaving)


def write_manifest(folder, manifest):
    """Write manifest.json with its own crc32."""
    text = json.dumps(manifest, sort_keys=True)
    replace_file(folder / "manifest.json", json.dumps(manifest | dict(crc32=zlib.crc32(text.encode())), indent=1))


def read_manifest(folder):
    """Return the manifest of a checkpoint; ValueError if it is not what was saved, or if other weights lie beside it."""
    try:
        manifest = read_json(Path(folder) / "manifest.json")
        if "files" not in manifest and "crc32" not in manifest:  # train_min.py's
            return dict(tag="", files={}) | manifest
        text = json.dumps({k: v for k, v in manifest.items() if k != "crc32"}, sort_keys=True)
        if zlib.crc32(text.encode()) != manifest["crc32"] or not manifest["files"]:
            raise ValueError("its crc32 is another")
    except (ValueError, KeyError) as error:
        raise ValueError(f"manifest.json is not what was saved: {sentence_of(error)}") from None
    if foreign := sorted({path.name for path in Path(folder).glob("*.safetensors")} - set(manifest["files"])):
        raise ValueError(f"{foreign[0]} is not in its manifest")
    return dict(serial=0) | manifest


def check_files(folder, saved):
    """ValueError for a file that is not the [bytes, crc32] that was saved. Sizes are looked at before anything is read."""
    for name, (size, crc) in saved.items():
        file = Path(folder) / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{name} has {file.stat().st_size} bytes, {size} were saved")
        if checksum(file) != [size, crc]:
            raise ValueError(f"{name} has another crc32 than was saved")
