"""A folder of videos and pictures as people have them: what is tried, with which caption, and what its sample is called."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from full.files import read_utf8
from full.folder import Folder
from full.video import IMAGES, VIDEOS


class Entry(NamedTuple):
    """A file that is tried. name: its sample's, without .safetensors. problem: why it is skipped, or ""."""

    file: Path
    name: str = ""
    caption: str = ""
    problem: str = ""


def videos_and_captions(folder):
    """Return ([Entry], [what is not used]) of a folder and its subfolders, sorted by path.

    A file is tried if it has a caption, in NAME.txt or in a line {"file": .., "caption": ..} of the folder's captions.jsonl,
    or an ending of videos or pictures. What is wrong with one file, caption or line is that entry's problem, and no other's.
    """
    if not folder.is_dir():
        raise ValueError(f"--videos {folder} is not a folder")
    files, unused = walk(folder)
    lines, entries = lines_of_table(folder)
    captions = {file for file in files if file.suffix == ".txt"}
    tried = {file for file in files - captions if file.with_suffix(".txt") in captions} | {*lines}
    tried |= {file for file in files if file.suffix.lower() in VIDEOS + IMAGES}
    if not tried and not entries:
        raise ValueError(f"--videos {folder} holds no {', '.join(VIDEOS + IMAGES)}, and nothing that has a caption")
    for file in sorted(tried):
        name = ""
        try:
            name = sample_name(os.path.relpath(file, folder))
            if not file.is_file():  # what is not a regular file is never opened: a pipe would wait for ever
                raise ValueError("it is not a regular file" if file.exists() else "there is no such file")
            entries.append(Entry(file, name, caption_of(file, lines.get(file, []))))
        except (OSError, ValueError) as error:
            entries.append(Entry(file, name, problem=str(error)))
    used = {*tried, *(file.with_suffix(".txt") for file in tried), folder / "captions.jsonl"}
    unused += [file for file in files - used if file.suffix != ".safetensors"]
    return entries, sorted(unused)


def walk(folder):
    """Return {file} of a folder and its subfolders, without hidden ones, and [what can't be or is not walked: links]."""
    files, closed = set(), []
    refused = []  # errors: folders that can't be read
    for place, folders, names in os.walk(folder, onerror=refused.append):
        folders[:] = [name for name in folders if name[0] != "."]
        closed += [Path(place, name) for name in folders if Path(place, name).is_symlink()]
        files |= {Path(place, name) for name in names if name[0] != "."}
    return files, closed + [Path(error.filename) for error in refused]


def lines_of_table(folder):
    """Return {file: [(line number, its caption)]} of captions.jsonl, and [Entry] of the lines that name no file of the folder."""
    table, lines, refused = folder / "captions.jsonl", {}, []
    try:
        if table.exists() and not table.is_file():
            raise ValueError("it is not a regular file")
        data = table.read_bytes() if table.exists() else b""
    except (OSError, ValueError) as error:
        return {}, [Entry(table, problem=str(error))]
    for n, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
            name, caption = row["file"], row["caption"]
            file = place_of(folder, name)
        except (ValueError, KeyError, TypeError, RecursionError):
            refused.append(Entry(Path(f"{table}, line {n}"), problem='it is not {"file": .., "caption": ..}'))
            continue
        if file:
            lines.setdefault(file, []).append((n, caption))
        else:
            refused.append(Entry(Path(f"{table}, line {n}"), problem=f"{name} is not in {folder}"))
    return lines, refused


def place_of(folder, name):
    """Return the path of a file that captions.jsonl names, or None if that is not in the folder."""
    for root in (os.path.abspath(folder), os.path.realpath(folder)):
        inside = Path(os.path.relpath(os.path.join(root, name), root))
        if inside.parts and inside.parts[0] != "..":
            return folder / inside
    return None


def caption_of(file, lines):
    """Return a file's caption; ValueError if it has none, several, or one that is not text. lines: its own in captions.jsonl."""
    text = file.with_suffix(".txt")
    found = [(f"line {n} of captions.jsonl", caption) for n, caption in lines]
    if os.path.lexists(text):
        if not text.is_file():
            raise ValueError(f"{text.name} is not a regular file")
        found.append((text.name, read_utf8(text).strip()))
    if not found:
        raise ValueError(f"there is no {text.name}, and no line for it in captions.jsonl")
    where, caption = found[0]
    if len(lines) > 1 or found[-1][1] != caption:
        several = ", ".join(f"{str(caption)[:40]!r} in {where}" for where, caption in found)
        raise ValueError(f"it has {len(found)} captions: {several}")
    if not isinstance(caption, str):
        raise ValueError(f"its caption in {where} is {json.dumps(caption)[:40]}, not a text")
    if re.search("[\ud800-\udfff]", caption):
        raise ValueError(f"its caption in {where} holds half a surrogate pair")
    return caption


def sample_name(path):
    """Return what to call the sample of a file, by its path in the folder: as in an address, a/b is a%2Fb; no two are the same.

    A hidden name would not be trained on, and one of over 200 bytes may not be written. ValueError for one that is not UTF-8.
    """
    name = re.sub("%(?=(25)*2[EF])", "%25", path).replace(os.sep, "%2F")
    name = re.sub(r"^\.", "%2E", name)
    data = name.encode()
    if len(data) <= 200 and f"{name}.safetensors" != Folder.EMPTY:
        return name
    return f"{data[:160].decode(errors='ignore')}-{hashlib.sha256(data).hexdigest()[:16]}"
