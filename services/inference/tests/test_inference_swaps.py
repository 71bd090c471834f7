"""Adapters come and go by the hundred: bad ones leave nothing behind, good ones no memory."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
from counting_engine import TOY, CountingEngine, MakeHost, answer, generation_of
from safetensors.numpy import load_file, save_file
from served_toy import ADAPTER, Served, ask, served_toy

from loraline.core.errors import LoralineError
from loraline.core.serving.component import Platform

MIB = 1024 * 1024


def spoil_weights(folder: Path, dice: random.Random) -> None:
    """Cut the file anywhere, or write over its header."""
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    if dice.random() < 0.5:
        file.write_bytes(content[: dice.randrange(len(content))])
        return
    at = dice.randrange(0, 8)
    content[at : at + 8] = dice.randbytes(8)
    file.write_bytes(content)


def spoil_config(folder: Path, dice: random.Random) -> None:
    """Put something into the settings that cannot be served."""
    name, value = dice.choice([
        ("r", -1), ("r", "eight"), ("r", 10**9), ("r", None), ("peft_type", "IA3"), ("peft_type", None),
        ("modules_to_save", ["lm_head"]), ("use_dora", True), ("bias", "all"), ("lora_bias", True),
        ("layer_replication", [[0, 1]]), ("rank_pattern", {"q_proj": 3}),
    ])  # fmt: skip
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))


def spoil_tensors(folder: Path, dice: random.Random) -> None:
    """Drop, rename, cut or add a tensor."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = dice.choice(sorted(tensors))
    tensor = tensors.pop(name)
    match dice.randrange(4):
        case 1:
            tensors[name.replace("layers.", "layers.9")] = tensor
        case 2:
            tensors[name] = np.ascontiguousarray(tensor[:-1])
        case 3:
            tensors |= {name: tensor, name.replace("lora_", "other_"): tensor.copy()}
    save_file(tensors, file)


def raise_rank(folder: Path, dice: random.Random) -> None:
    """Widen every factor beyond the server's rank of 16, settings and weights agreeing."""
    times = dice.randrange(3, 9)
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    widened = {
        name: np.concatenate([tensor] * times, axis=0 if "lora_A" in name else 1)
        for name, tensor in load_file(weights).items()
    }
    save_file(widened, weights)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "r": 8 * times}))


def resize_vocabulary(folder: Path, dice: random.Random) -> None:
    """Bring an embedding of more tokens than the base has: whole, as factors of its own, or as the output layer's."""
    file, tokens = folder / "adapter_model.safetensors", 400 + dice.randrange(1, 9)
    rank_by_hidden, tokens_by_rank = np.zeros((8, 128), np.float32), np.zeros((tokens, 8), np.float32)
    embedding, output = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
    added = dice.choice([
        {f"{embedding}.weight": np.zeros((tokens, 128), np.float32)},
        {f"{embedding}.lora_embedding_A": np.ascontiguousarray(tokens_by_rank.T),
         f"{embedding}.lora_embedding_B": np.ascontiguousarray(rank_by_hidden.T)},
        {f"{output}.lora_A.weight": rank_by_hidden, f"{output}.lora_B.weight": tokens_by_rank},
    ])  # fmt: skip
    save_file({**load_file(file), **added}, file)


def spoil_files(folder: Path, dice: random.Random) -> None:
    """Take a file away, break it, or lay a pickle beside."""
    match dice.randrange(4):
        case 0:
            (folder / "adapter_config.json").write_bytes(dice.randbytes(50))
        case 1:
            (folder / f"optimizer{dice.choice(['.bin', '.pt', '.pkl'])}").write_bytes(dice.randbytes(50))
        case 2:
            (folder / dice.choice(["adapter_config.json", "adapter_model.safetensors"])).unlink()
        case 3:
            (folder / "base_model.json").write_text(json.dumps({"config_sha256": f"{dice.randrange(10**9):064d}"}))


async def test_a_hundred_bad_adapters_leave_the_engine_as_it_was(
    make_host: MakeHost, platform: Platform, toy: Any, tmp_path: Path
) -> None:
    host = make_host()
    await host.load_model(TOY)
    engine = CountingEngine.started[-1]
    platform.library.publish(ADAPTER, "mareva", toy.adapters["mareva"])
    assert await answer(host, "mareva") == "0 1 2 "
    reasons: dict[str, int] = {}
    for number in range(100):
        dice = random.Random(number)
        folder = Path(shutil.copytree(toy.adapters["selkie"], tmp_path / f"bad-{number}"))
        spoils = [spoil_weights, spoil_config, spoil_tensors, spoil_files, raise_rank, resize_vocabulary]
        spoils[number % len(spoils)](folder, dice)
        ref = platform.library.publish(ADAPTER, f"bad-{number}", folder).ref
        with pytest.raises(LoralineError) as caught:
            await host.load_adapter(ref)
        reasons[caught.value.reason] = reasons.get(caught.value.reason, 0) + 1
        assert caught.value.message, number
        assert len(engine.adapters) == 2, number  # the base and mareva
    print(reasons)
    assert engine.most == 1  # nothing bad ever reached it
    assert {"RANK_TOO_HIGH", "ADAPTER_RANK_MISMATCH", "ADAPTER_NOT_SERVABLE", "ADAPTER_OF_ANOTHER_BASE"} <= set(reasons)
    assert len(reasons) >= 8
    assert "UNEXPECTED_ERROR" not in reasons
    assert await answer(host, "mareva") == "0 1 2 "
    assert [adapter.name for adapter in host.serving().adapters.list()] == ["mareva:v1"]


def copies(adapter: Path, folder: Path, platform: Platform, count: int) -> list[str]:
    """Publish an adapter under several names, with contents of their own, and return the names."""
    names = [f"copy-{number}" for number in range(count)]
    for name in names:
        copy = Path(shutil.copytree(adapter, folder / name))
        (copy / "note.txt").write_text(name)
        platform.library.publish(ADAPTER, name, copy)
    return names


async def test_a_thousand_swaps_keep_the_limit_and_the_memory(
    make_host: MakeHost, platform: Platform, toy: Any, tmp_path: Path
) -> None:
    host = make_host()
    await host.load_model(TOY)
    engine, generation = CountingEngine.started[-1], generation_of(host)
    names = copies(toy.adapters["mareva"], tmp_path, platform, 5)
    unloads = 0
    unload = engine.unload_adapter

    async def counted(name: str) -> None:
        nonlocal unloads
        unloads += 1
        await unload(name)

    engine.unload_adapter = counted  # type: ignore[method-assign]
    before, process = 0, psutil.Process()
    for number in range(1010):
        assert await answer(host, names[number % 5], tokens=1, generation=generation) == "0 "
        if number == 200:
            gc.collect()
            before = process.memory_info().rss
    gc.collect()
    grown = process.memory_info().rss - before
    print(f"{unloads} swaps, most at once {engine.most}, grown by {grown / MIB:.1f} MiB after the first 200")
    assert unloads >= 1000
    assert engine.most <= 3  # two places, and the newcomer while it is proven
    assert grown < 24 * MIB
    assert len(host.serving().adapters.list()) == 5


RANK = 256
"""Of the adapters that the real engine swaps: 2.4 MiB each, so that one in memory for good shows."""


def grown_to(rank: int, source: Path, folder: Path) -> Path:
    """Copy an adapter with factors of a greater rank, the further ones zero: it says what it said."""
    shutil.copytree(source, folder)
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    config = json.loads(settings.read_text())
    more = rank - config["r"]
    zeros = {"A": ((0, more), (0, 0)), "B": ((0, 0), (0, more))}
    factors = load_file(file).items()
    save_file({name: np.pad(factor, zeros["A" if "lora_A" in name else "B"]) for name, factor in factors}, file)
    scaled = {"r": rank, "lora_alpha": config["lora_alpha"] * rank // config["r"]}
    settings.write_text(json.dumps({**config, **scaled}))
    return folder


@pytest_asyncio.fixture
async def served(toy: Any, tmp_path_factory: Any) -> AsyncIterator[Served]:
    pytest.importorskip("vllm")
    data = tmp_path_factory.mktemp("data")
    async with served_toy("vllm", toy.model, data, max_loaded_adapters=2, max_lora_rank=RANK) as one:
        yield one


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1500)
async def test_sixty_swaps_on_the_real_engine_while_it_answers(served: Served, toy: Any, tmp_path: Path) -> None:
    large = grown_to(RANK, toy.adapters["mareva"], tmp_path / "large")
    assert (large / "adapter_model.safetensors").stat().st_size > 2 * MIB
    names = copies(large, tmp_path, served.platform, 4)
    [core] = [one for one in psutil.Process().children(recursive=True) if "EngineCore" in " ".join(one.cmdline())]
    llm = served.component.extra["host"].serving().engine._llm
    expected = "".join(piece.delta for piece in await served.chat(ask(model=names[0], max_tokens=6)))
    base = "".join(piece.delta for piece in await served.chat(ask(max_tokens=6)))
    assert expected != base
    sizes: dict[str, list[int]] = {"server": [], "engine core": []}
    for number in range(66):
        told, plain = await asyncio.gather(
            served.chat(ask(model=names[number % 4], max_tokens=6)), served.chat(ask(max_tokens=6))
        )
        # All copies have the same weights: whichever is swapped in, it answers as the first did, and never as the base.
        assert "".join(piece.delta for piece in told) == expected, number
        assert "".join(piece.delta for piece in plain) == base, number
        # Two places, and the newcomer while it is proven.
        assert len(await llm.list_loras()) <= 3, number
        for name, process in (("server", psutil.Process()), ("engine core", core)):
            sizes[name].append(process.memory_info().rss)
    loads = served.metric("loraline_inference_adapter_loads_total", result="loaded")
    # Of 22 swaps each: adapters that stayed would come to 50 MiB between the middles of these thirds.
    grown = {name: (median(found[44:]) - median(found[22:44])) / MIB for name, found in sizes.items()}
    print(f"{loads:.0f} loads; grown by {grown} MiB from the middle third to the last")
    assert loads >= 60
    assert max(grown.values()) < 20
