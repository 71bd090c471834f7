"""Inputs that must be refused, with the file and the reason, before anything is published."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraline.core.errors import LoralineError
from loraline.merger.merging import AdapterInput, MergeOptions, MergeWatch, merge_folders
from loraline.merger.weights import target
from loraline.merger.weights.header import read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"


def refused(tmp_path: Path, base: Path, adapter: Path, *more: AdapterInput, **options: Any) -> LoralineError:
    out = tmp_path / "work" / "model"
    with pytest.raises(LoralineError) as caught:
        merge_folders(base, [AdapterInput(adapter, name="adapter/test:v1"), *more], out, MergeOptions(**options))
    return caught.value


def edit(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    content.update(values)
    file.write_text(json.dumps(content))


@pytest.fixture
def pair(make_base, make_adapter) -> tuple[Path, Path]:
    base = make_base("llama", torch.float32)
    return base, make_adapter(base, evidence=False)


@pytest.mark.parametrize("which", ["base", "adapter"])
@pytest.mark.parametrize("harm", ["truncate", "header", "garbage", "empty", "longer"])
def test_corrupt_safetensors(tmp_path, pair, which, harm):
    base, adapter = pair
    file = base / WEIGHTS if which == "base" else adapter / ADAPTER
    content = bytearray(file.read_bytes())
    if harm == "truncate":
        content = content[:-100]
    elif harm == "header":
        content[40] ^= 0xFF
    elif harm == "garbage":
        content = bytearray(os.urandom(4096))
    elif harm == "empty":
        content = bytearray()
    else:
        content += b"\0" * 8
    file.write_bytes(content)
    error = refused(tmp_path, base, adapter)
    assert error.reason == "CORRUPT_WEIGHTS"
    assert error.metadata["file"] == file.name
    assert file.name in error.message
    assert not (tmp_path / "work" / "model" / "config.json").exists()


def test_flipped_bits_that_make_no_number(tmp_path, pair):
    base, adapter = pair
    header = read_header(base / WEIGHTS)
    tensor = next(t for t in header.tensors if t.name == "model.layers.0.self_attn.q_proj.weight")
    with (base / WEIGHTS).open("r+b") as file:
        file.seek(header.data_start + tensor.start)
        file.write(b"\0\0\xc0\x7f")
    assert refused(tmp_path, base, adapter).reason == "MERGE_NOT_FINITE"


@pytest.mark.parametrize(("bit", "seen"), [(0, False), (30, True)], ids=["lowest", "exponent"])
def test_flipped_bits_that_the_merge_only_copies(tmp_path, make_base, make_adapter, bit, seen):
    """In an artifact every byte is compared (test_merger_jobs). A plain folder has no digests: what changes answers is
    found by the trainer's probes; what changes none passes, and the report says that nothing else would show it."""
    base = make_base("llama", torch.float32)
    adapter = make_adapter(base)
    digest = hashlib.sha256((base / "config.json").read_bytes()).hexdigest()
    edit(adapter / "base_model.json", source="path", path="/models/x", config_sha256=digest)
    header = read_header(base / WEIGHTS)
    tensor = next(tensor for tensor in header.tensors if tensor.name == "model.norm.weight")
    with (base / WEIGHTS).open("r+b") as file:
        file.seek(header.data_start + tensor.start)
        value = int.from_bytes(file.read(4), "little") ^ (1 << bit)
        file.seek(header.data_start + tensor.start)
        file.write(value.to_bytes(4, "little"))
    if seen:
        assert refused(tmp_path, base, adapter).reason == "ADAPTER_CHANGED"
        return
    outcome = merge_folders(base, [AdapterInput(adapter)], tmp_path / "work" / "model", MergeOptions())
    assert any("damaged weight" in remark for remark in outcome.remarks)


def test_pickles(tmp_path, pair, make_adapter):
    base, adapter = pair
    torch.save(load_file(adapter / ADAPTER), adapter / "adapter_model.bin")
    (adapter / ADAPTER).unlink()
    error = refused(tmp_path, base, adapter)
    assert (error.reason, error.metadata["file"]) == ("PICKLE_WEIGHTS", "adapter_model.bin")
    good = make_adapter(base, name="good", evidence=False)
    torch.save(load_file(base / WEIGHTS), base / "pytorch_model.bin")
    (base / WEIGHTS).unlink()
    assert refused(tmp_path, base, good).reason == "PICKLE_WEIGHTS"


def test_another_base_by_digest(tmp_path, pair):
    base, adapter = pair
    edit(adapter / "base_model.json", source="artifact", ref="model/other:v1", digest="sha256:" + "a" * 64)
    error = refused(tmp_path, base, adapter, base_digest="sha256:" + "b" * 64)
    assert error.reason == "ADAPTER_OF_ANOTHER_BASE"
    assert "model/other:v1" in error.message


def test_another_base_by_config(tmp_path, pair):
    base, adapter = pair
    edit(adapter / "base_model.json", source="path", path="/models/x", config_sha256="0" * 64)
    assert refused(tmp_path, base, adapter).reason == "ADAPTER_OF_ANOTHER_BASE"
    digest = hashlib.sha256((base / "config.json").read_bytes()).hexdigest()
    edit(adapter / "base_model.json", config_sha256=digest)
    outcome = merge_folders(base, [AdapterInput(adapter)], tmp_path / "work" / "model", MergeOptions())
    assert any("config.json" in remark for remark in outcome.remarks)


def test_another_base_by_shapes(tmp_path, pair, make_base):
    _, adapter = pair
    wider = make_base("llama", name="wider", intermediate_size=56)
    error = refused(tmp_path, wider, adapter)
    assert error.reason == "ADAPTER_SHAPE_MISMATCH"
    assert "down_proj" in error.metadata["module"]


def test_another_base_by_layers(tmp_path, make_base, make_adapter):
    deep = make_base("llama", name="deep", num_hidden_layers=3)
    adapter = make_adapter(deep, evidence=False)
    shallow = make_base("llama", name="shallow")
    error = refused(tmp_path, shallow, adapter)
    assert error.reason == "ADAPTER_OF_ANOTHER_BASE"
    assert "layers.2" in error.metadata["module"]


def test_rank_of_another_run(tmp_path, pair):
    base, adapter = pair
    edit(adapter / "adapter_config.json", r=8)
    assert refused(tmp_path, base, adapter).reason == "ADAPTER_RANK_MISMATCH"


def test_half_an_adapter(tmp_path, pair):
    base, adapter = pair
    tensors = load_file(adapter / ADAPTER)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, adapter / ADAPTER)
    assert refused(tmp_path, base, adapter).reason == "ADAPTER_INCOMPLETE"


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/evil.safetensors", "a/../../evil.safetensors", "..\\e"])
def test_index_that_leads_out_of_the_folder(tmp_path, make_base, make_adapter, name):
    base = make_base("llama", shard="20KB")
    adapter = make_adapter(base, evidence=False)
    index = json.loads((base / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (base / INDEX).write_text(json.dumps(index))
    (tmp_path / "evil.safetensors").write_bytes(b"secret")
    error = refused(tmp_path, base, adapter)
    assert (error.reason, error.metadata["file"]) == ("UNSAFE_PATH", name)


@pytest.mark.parametrize("file", [WEIGHTS, "tokenizer.json"])
def test_links_out_of_the_folder(tmp_path, pair, file):
    base, adapter = pair
    outside = tmp_path / "outside"
    (base / file).rename(outside)
    (base / file).symlink_to(outside)
    assert refused(tmp_path, base, adapter).reason == "UNSAFE_PATH"


def test_index_and_shards_that_disagree(tmp_path, make_base, make_adapter):
    base = make_base("llama", shard="20KB")
    adapter = make_adapter(base, evidence=False)
    shards = sorted(base.glob("model-*.safetensors"))
    kept = shards[1].read_bytes()
    shards[1].unlink()
    error = refused(tmp_path, base, adapter)
    assert (error.reason, error.metadata["file"]) == ("MISSING_SHARD", shards[1].name)
    shards[1].write_bytes(kept)
    index = json.loads((base / INDEX).read_text())
    index["weight_map"].pop("lm_head.weight")
    (base / INDEX).write_text(json.dumps(index))
    assert refused(tmp_path, base, adapter).reason == "INDEX_MISMATCH"


def test_quantised_base(tmp_path, pair):
    base, adapter = pair
    edit(base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    weights = load_file(base / WEIGHTS)
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.uint8)
    save_file(weights, base / WEIGHTS, metadata={"format": "pt"})
    assert refused(tmp_path, base, adapter).reason == "QUANTIZED_BASE"


def test_several_adapters_that_need_peft(tmp_path, make_base, make_adapter):
    base = make_base("llama")
    plain, dora = make_adapter(base, evidence=False), make_adapter(base, name="d", evidence=False, use_dora=True)
    assert refused(tmp_path, base, plain, AdapterInput(dora)).reason == "NOT_SUPPORTED"


def test_full_disk(tmp_path, pair, monkeypatch):
    base, adapter = pair

    def full(descriptor: int, data: memoryview, offset: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(target, "write_at", full)
    assert refused(tmp_path, base, adapter).reason == "DISK_FULL"
    assert not (tmp_path / "work" / "model" / WEIGHTS).exists()


@pytest.mark.parametrize("where", ["room", "thread", "sync"])
def test_full_disk_wherever_it_shows(tmp_path, make_base, make_adapter, monkeypatch, where):
    base = make_base("llama", torch.float32, shard="20KB")
    adapter = make_adapter(base, evidence=False)
    write, main = target.write_at, threading.main_thread()

    def full(*arguments: Any) -> None:
        if where == "thread" and threading.current_thread() is main:
            return write(*arguments)
        raise OSError(28, "No space left on device")

    owner, name = {"room": (target, "reserve"), "thread": (target, "write_at"), "sync": (target.os, "fsync")}[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        assert refused(tmp_path, base, adapter).reason == "DISK_FULL"
    out, again = tmp_path / "work" / "model", tmp_path / "again" / "model"
    merge_folders(base, [AdapterInput(adapter)], out, MergeOptions())  # there is room again
    merge_folders(base, [AdapterInput(adapter)], again, MergeOptions())
    for path in again.glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes()
    assert not list(out.glob("*.partial"))


def test_stopped_merge_goes_on_at_its_shard(tmp_path, make_base, make_adapter):
    base = make_base("llama", torch.bfloat16, shard="20KB")
    adapter = make_adapter(base)
    out, shards = tmp_path / "work" / "model", len(list(base.glob("model-*.safetensors")))
    assert shards > 3

    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total * 0.6:
            raise Stop

    with pytest.raises(Stop):
        merge_folders(base, [AdapterInput(adapter)], out, MergeOptions(), MergeWatch(bytes_done=stop))
    finished = sorted(path.name for path in out.glob("*.safetensors"))
    assert 0 < len(finished) < shards
    outcome = merge_folders(base, [AdapterInput(adapter)], out, MergeOptions())
    assert sorted(outcome.written.resumed_shards) == finished
    again = tmp_path / "again" / "model"
    whole = merge_folders(base, [AdapterInput(adapter)], again, MergeOptions())
    assert whole.written.resumed_shards == []
    assert outcome.written.merged_tensors == whole.written.merged_tensors
    for path in again.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_shards_of_another_merge_are_not_kept(tmp_path, make_base, make_adapter):
    base = make_base("llama", shard="20KB")
    out = tmp_path / "work" / "model"
    merge_folders(base, [AdapterInput(make_adapter(base))], out, MergeOptions())
    outcome = merge_folders(base, [AdapterInput(make_adapter(base, name="b", seed=5))], out, MergeOptions())
    assert outcome.written.resumed_shards == []
