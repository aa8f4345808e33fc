"""Find the videos and pictures of a folder, their captions, and the names of their samples."""

import json
import os
import re
from collections import namedtuple
from pathlib import Path

from full.files import read_utf8
from full.folder import Folder
from full.video import IMAGES, VIDEOS

# name: the sample's name, without .safetensors. problem: why the file is skipped
Entry = namedtuple("Entry", "file name caption problem", defaults=("", "", ""))


def videos_and_captions(folder):
    """Return ([Entry], [unused files]) of a folder and its subfolders, sorted by path.

    A file gets an Entry if it has a caption (in NAME.txt, or in a line {"file": .., "caption": ..} of the folder's
    captions.jsonl) or the ending of a video or picture. If something is wrong with a file, a caption or a line, only that
    entry has a problem.
    """
    if not folder.is_dir():
        raise ValueError(f"--videos {folder} is not a folder")
    files, unused = walk(folder)
    lines, entries = lines_of_table(folder)
    texts = {file for file in files if file.suffix == ".txt"}
    tried = {
        file for file in files - texts if file.suffix.lower() in VIDEOS + IMAGES or file.with_suffix(".txt") in texts
    }
    tried |= {*lines}
    if not tried and not entries:
        raise ValueError(f"--videos {folder} holds no {', '.join(VIDEOS + IMAGES)}, and nothing that has a caption")
    for file in sorted(tried):
        name = caption = problem = ""
        try:
            name = sample_name(os.path.relpath(file, folder))
            if not file.is_file():  # opening a pipe would wait for its writer
                raise ValueError("it is not a regular file" if file.exists() else "there is no such file")
            caption = caption_of(file, lines.get(file, []))
        except (OSError, ValueError) as error:
            problem = str(error)
        entries.append(Entry(file, name, caption, problem))
    used = {*tried, *(file.with_suffix(".txt") for file in tried), folder / "captions.jsonl"}
    return entries, sorted(unused + [file for file in files - used if file.suffix != ".safetensors"])


def walk(folder):
    """Return the set of files in a folder and its subfolders, and a list of the folders not entered: links, and those
    without permission. Hidden files and folders are ignored."""
    files, links, errors = set(), [], []
    for place, folders, names in os.walk(folder, onerror=errors.append):
        folders[:] = [name for name in folders if name[0] != "."]
        links += [Path(place, name) for name in folders if Path(place, name).is_symlink()]
        files |= {Path(place, name) for name in names if name[0] != "."}
    return files, links + [Path(error.filename) for error in errors]


def lines_of_table(folder):
    """Return {file: [(line number, caption)]} of captions.jsonl, and [Entry] for the lines that can't be used."""
    table, lines, refused = folder / "captions.jsonl", {}, []
    try:
        if table.exists() and not table.is_file():
            raise ValueError("it is not a regular file")
        data = table.read_bytes() if table.exists() else b""
    except (OSError, ValueError) as error:
        return {}, [Entry(table, problem=str(error))]
    for n, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            if line.strip():
                row = json.loads(line.decode())
                caption = row["caption"]
                lines.setdefault(place_of(folder, row["file"]), []).append((n, caption))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            problem = str(error) if type(error) is ValueError else 'it is not {"file": .., "caption": ..}'
            refused.append(Entry(Path(f"{table}, line {n}"), problem=problem))
    return lines, refused


def place_of(folder, name):
    """Return the path of a file named in captions.jsonl. ValueError if it is not in the folder."""
    for root in (os.path.abspath(folder), os.path.realpath(folder)):
        inside = Path(os.path.relpath(os.path.join(root, name), root))
        if inside.parts and inside.parts[0] != "..":
            return folder / inside
    raise ValueError(f"{name} is not in {folder}")


def caption_of(file, lines):
    """Return a file's caption. ValueError if it has none or several, or if it is not text. lines: [(number, caption)] of
    captions.jsonl for this file."""
    text_file = file.with_suffix(".txt")
    found = [(f"line {n} of captions.jsonl", caption) for n, caption in lines]
    if os.path.lexists(text_file):
        if not text_file.is_file():
            raise ValueError(f"{text_file.name} is not a regular file")
        found.append((text_file.name, read_utf8(text_file).strip()))
    if not found:
        raise ValueError(f"there is no {text_file.name}, and no line for it in captions.jsonl")
    where, caption = found[0]
    if any(other != caption for _, other in found):
        several = ", ".join(f"{json.dumps(caption)[:60]} in {where}" for where, caption in found)
        raise ValueError(f"it has {len(found)} captions: {several}")
    if not isinstance(caption, str) or re.search("[\ud800-\udfff]", caption):  # half a surrogate pair
        raise ValueError(f"its caption in {where} is {json.dumps(caption)[:60]}, which is not text")
    return caption


def sample_name(path):
    """Return the name of a file's sample, made of its path in the folder: a%2Fb for a/b, as in a URL.

    Different paths give different names. ValueError for a name that can't be written.
    """
    name = re.sub("%(?=(25)*2[EF])", "%25", path).replace(os.sep, "%2F")
    name = re.sub(r"^\.", "%2E", name)  # a hidden sample would not be trained on
    if len(name.encode()) > 220 or f"{name}.safetensors" == Folder.EMPTY:
        raise ValueError("its name can't become its sample's name: rename it")
    return name
