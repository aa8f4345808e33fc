"""Read files with one sentence on what is wrong with them, and write them completely or not at all."""

import contextlib
import hashlib
import json
import os
import tempfile
import zlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path, and rename its file to `path` when the block ends well: a kill leaves the old file or the new.

    The temporary name is unique, and links are not followed. OSError names `path`.
    """
    path, temporary = Path(path), None
    try:
        handle, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
        os.close(handle)
        temporary = Path(temporary)
        yield temporary
        os.umask(umask := os.umask(0))
        os.chmod(temporary, 0o666 & ~umask)  # temporary files, and the library's, are readable by their owner only
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # the error of a full disk does not say where
        raise OSError(f"{path} could not be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)


def replace_file(path, data):
    """Write bytes or text to `path`, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data if isinstance(data, bytes) else data.encode())


def save_tensors(path, tensors, **header):
    """Write {name: tensor} as a .safetensors file with the strings of `header` in its header."""
    with replacing(path) as temporary:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, temporary, dict(format="pt") | header)


def read_utf8(path):
    """Return the text of a file without its byte order mark. ValueError if it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a text file: {error}") from None


def read_json(path):
    """Return the object in a JSON file. ValueError if the file holds anything else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read as JSON ({error!r})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def checksum(path):
    """Return [bytes, crc32] of a file."""
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def fingerprint(paths, limit=100 << 20, like=""):
    """Return a hex string made of the names, sizes and contents of these files.

    All bytes of a file of at most `limit` bytes count. Of a larger .safetensors the header and the ends of every tensor
    count, of another large file 4 KiB of every MiB. like: the fingerprint to compare with; one of an earlier version is made
    as it was.
    """
    digest, paths = hashlib.sha256(), [Path(path) for path in paths]
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    earlier = like and not like.startswith("2-")
    for path in paths[:: max(1, len(paths) // 16)] if earlier else paths:
        with open(path, "rb") as file:
            for start, length in samples_of(path, file, limit, earlier):
                file.seek(start)
                digest.update(file.read(length))
    return digest.hexdigest()[:16] if earlier else f"2-{digest.hexdigest()[:16]}"


def samples_of(path, file, limit, earlier):
    """Return [(start, length)], the bytes of a file that count in its fingerprint."""
    size, ends = path.stat().st_size, []
    if earlier:
        return [(size * part // 16, 4096) for part in range(16)]
    if size <= limit:
        return [(0, size)]
    header = 8 + int.from_bytes(file.read(8), "little")
    if path.suffix == ".safetensors" and header < min(size, 100 << 20):
        with contextlib.suppress(
            ValueError, KeyError, TypeError, AttributeError, RecursionError
        ):  # such a file is refused when it is read
            tensors = [entry for name, entry in json.loads(file.read(header - 8)).items() if name != "__metadata__"]
            ends = [(start, max(start, stop - 64)) for start, stop in (entry["data_offsets"] for entry in tensors)]
    if not ends:
        return [(start, 4096) for start in range(0, size, 1 << 20)]
    return [(0, header), *((header + place, 64) for places in ends for place in places)]


def printable(text):
    """Escape characters that can't be printed: names from files may hold anything, even commands for the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def visible(folder, pattern):
    """Return the files of a folder that match a pattern, sorted, without hidden ones."""
    return sorted(file for file in Path(folder).glob(pattern) if not file.name.startswith("."))


# --------------------------------------------------------------------------------------------------------------------
# safetensors


def open_safetensors(file):
    """Open a .safetensors file for reading. ValueError if it is not one."""
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        reason = "".join(c for c in str(error) if c.isprintable())[:200]
        raise ValueError(f"{file} is not a readable safetensors file: {reason}") from None


def shapes_in(handle):
    """Return {name: shape} of an open .safetensors file."""
    return {name: handle.get_slice(name).get_shape() for name in handle.keys()}


def was_made_by(file, made_by, ignored=()):
    """Return whether a .safetensors file exists and its header holds the same facts {name: value} as `made_by`.

    ignored: names that do not count. A missing fact equals one that is false, empty or zero.
    """

    def those_that_count(facts):
        return {name: value for name, value in facts.items() if value and name not in ignored}

    try:
        with open_safetensors(file) as handle:
            stored = json.loads((handle.metadata() or {})["made_by"])
        return those_that_count(stored) == those_that_count(json.loads(json.dumps(made_by)))
    except (ValueError, KeyError, AttributeError, RecursionError):
        return False


def text_fits(shapes, config):
    """Return whether {name: shape} has text [L, text_dim], L > 0, and pooled [pooled_dim]."""
    text = shapes.get("text", [])
    return text[1:] == [config.text_dim] and text[0] > 0 and shapes.get("pooled") == [config.pooled_dim]


def read_text(file, config):
    """Return text [L, text_dim] and pooled [pooled_dim] of a .safetensors file.

    ValueError for other shapes, for values that are not finite, and for tensors that would be ignored.
    """
    with open_safetensors(file) as handle:
        shapes = shapes_in(handle)
        if not text_fits(shapes, config):
            wanted = f"text [L, {config.text_dim}] and pooled [{config.pooled_dim}]"
            raise ValueError(f"{file} holds {shapes}, expected {wanted}")
        if more := sorted(set(shapes) - {"latents", "text", "pooled"}):
            raise ValueError(f"{file} holds {', '.join(more)} beside text and pooled, which would be ignored")
        text, pooled = handle.get_tensor("text").float(), handle.get_tensor("pooled").float()
    if not (text.isfinite().all() and pooled.isfinite().all()):
        raise ValueError(f"{file} has values that are not finite")
    return text, pooled
