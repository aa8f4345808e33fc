"""--model by a name of the hub: a hand-made cache, and a downloader that is a stub."""

import json
import shutil
from types import SimpleNamespace
from unittest import mock

import huggingface_hub
import pytest
from huggingface_hub import constants

from full.hub import find_model
from full.snapshot import ENCODERS, PARTS, Snapshot

ALL = [*PARTS, *ENCODERS, "image_processor"]


@pytest.fixture
def cache(tmp_path, snapshot, monkeypatch):
    """A cache that holds the tiny snapshot as owner/tiny, and no network; the folder of the model in it."""
    folder = tmp_path / "hub/models--owner--tiny"
    shutil.copytree(snapshot, folder / "snapshots/0123abc")
    for name, commit in (("main", "0123abc"), ("v1", "0123abc")):
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / name).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return folder / "snapshots/0123abc"


def found(name, parts=ALL):
    args = SimpleNamespace(model=name)
    find_model(args, parts)
    assert args.named == name
    return args.model


def test_a_model_in_the_cache(cache, tmp_path):
    """By name and revision, offline; a path that exists wins."""
    assert found("owner/tiny") == found("owner/tiny@v1") == str(cache)
    Snapshot(found("owner/tiny"))
    (tmp_path / "owner/tiny").mkdir(parents=True)
    assert found("owner/tiny") == "owner/tiny" and found(None) is None


@pytest.mark.parametrize("name", ["owner/none", "owner/tiny@v2", "no such folder", "a/b/c"])
def test_a_model_that_is_nowhere(name, cache):
    """One sentence names both readings."""
    with pytest.raises(
        ValueError, match="there is no such folder, and (no such model in the cache or on the hub|a model of)"
    ) as error:
        found(name)
    assert str(error.value).startswith(f"--model {name}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("lost", [
    "vae/diffusion_pytorch_model.safetensors", "text_encoder_2", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json", "transformer/config.json",
])  # fmt: skip
def test_a_model_of_which_a_part_is_missing(lost, cache):
    """The library returns it without an error."""
    shutil.rmtree(cache / lost) if (cache / lost).is_dir() else (cache / lost).unlink()
    with pytest.raises(
        ValueError, match="its copy in the cache is incomplete, .* is missing: go online, or: hf download owner/tiny"
    ) as error:
        found("owner/tiny@v1")
    assert lost.partition("/")[0] in str(error.value) and "--revision v1" in str(error.value)


def test_a_shard_that_is_missing(cache):
    index = dict(weight_map=dict(a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors"))
    (cache / "text_encoder/model.safetensors.index.json").write_text(json.dumps(index))
    (cache / "text_encoder/model-00001-of-00002.safetensors").touch()
    with pytest.raises(ValueError, match="text_encoder/model-00002-of-00002.safetensors is missing"):
        found("owner/tiny")
    found("owner/tiny", ["vae", "scheduler"])  # of no concern there


def test_links_that_lead_nowhere_and_shards_without_an_index(cache):
    file = cache / "text_encoder/model.safetensors"
    file.rename(cache / "text_encoder/model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"text_encoder/\*.safetensors is missing"):
        found("owner/tiny")
    (cache / "text_encoder/model-00001-of-00002.safetensors").unlink()
    file.symlink_to(cache / "blobs/nothing")
    with pytest.raises(ValueError, match=r"text_encoder/\*.safetensors is missing"):
        found("owner/tiny")


def test_what_is_fetched(cache, tmp_path):
    """The parts that are used, and no other format of the same weights; whatever the library raises is a sentence."""
    asked = []

    def download(name, **rules):
        asked.append((name, rules))
        return str(cache)

    with mock.patch.object(huggingface_hub, "snapshot_download", download):
        assert found("some-one/The.Model@abc/def", ["transformer/config.json", "vae"]) == str(cache)
    ((name, rules),) = asked
    assert name == "some-one/The.Model" and rules["revision"] == "abc/def"
    assert rules["allow_patterns"] == ["transformer/config.json", "vae/*"] and "*.bin" in rules["ignore_patterns"]
    for error in (OSError("No space left on device"), RuntimeError("401 Client Error: gated\nmore")):
        with mock.patch.object(huggingface_hub, "snapshot_download", mock.Mock(side_effect=error)):
            with pytest.raises(ValueError, match=r"\((No space left on device|401 Client Error: gated)\)$"):
                found("owner/other")
