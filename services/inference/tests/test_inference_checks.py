"""Bad adapters are refused before the engine sees them; names, ranks, engines and state without any engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from loraline.api.trainer.v1.trainer_pb2 import BaseModel
from loraline.core.artifacts.refs import format_ref, parse_ref
from loraline.core.config import CoreSettings
from loraline.core.errors import LoralineError
from loraline.inference.adapters.checks import check_adapter
from loraline.inference.adapters.names import AdapterNames, adapter_ref, internal_name
from loraline.inference.adapters.proof import tolerance
from loraline.inference.base_model import LocalBase, open_base, parse_base
from loraline.inference.engines import amx, watch
from loraline.inference.engines.choice import choose
from loraline.inference.engines.port import EngineOptions
from loraline.inference.engines.text_stream import TextStream
from loraline.inference.engines.vllm_process import engine_arguments
from loraline.inference.state import ServedState, StateFile


def base_of(folder: Path) -> LocalBase:
    library: Any = None
    return open_base(BaseModel(path=str(folder)), library, CoreSettings(), trusted=True)


def edit(folder: Path, name: str, **values: Any) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def rewrite(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def test_good_adapter_passes(toy: Any) -> None:
    facts = check_adapter(toy.adapters["mareva"], base_of(toy.model), 16)
    assert (facts.rank, facts.target_modules) == (8, ("down_proj", "gate_proj", "q_proj", "v_proj"))


def spoil_pickle(folder: Path) -> None:
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")


def spoil_embedding(folder: Path) -> None:
    import torch

    rewrite(folder, lambda t: {**t, "base_model.model.model.embed_tokens.weight": torch.zeros(4, 4)})


def spoil_half(folder: Path) -> None:
    rewrite(folder, lambda t: dict(list(t.items())[1:]))


def spoil_width(folder: Path) -> None:
    rewrite(folder, lambda t: {k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in t.items()})


def spoil_layers(folder: Path) -> None:
    rewrite(folder, lambda t: {k.replace("layers.1.", "layers.9."): v for k, v in t.items()})


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_pickle, "ADAPTER_HAS_PICKLE"),
        (lambda f: edit(f, "adapter_config.json", modules_to_save=["lm_head"]), "ADAPTER_SAVES_MODULES"),
        (lambda f: edit(f, "adapter_config.json", use_dora=True), "ADAPTER_NOT_SERVABLE"),
        (lambda f: edit(f, "adapter_config.json", bias="all"), "ADAPTER_NOT_SERVABLE"),
        (lambda f: edit(f, "adapter_config.json", peft_type="IA3"), "ADAPTER_NOT_LORA"),
        (lambda f: edit(f, "adapter_config.json", r=4), "ADAPTER_RANK_MISMATCH"),
        (lambda f: edit(f, "base_model.json", config_sha256="0" * 64), "ADAPTER_OF_ANOTHER_BASE"),
        (lambda f: (f / "adapter_config.json").unlink(), "ADAPTER_INCOMPLETE"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "ADAPTER_INCOMPLETE"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 20), "WEIGHTS_MALFORMED"),
        (spoil_embedding, "ADAPTER_NOT_SERVABLE"),
        (spoil_half, "ADAPTER_INCOMPLETE"),
        (spoil_width, "ADAPTER_OF_ANOTHER_BASE"),
        (spoil_layers, "ADAPTER_OF_ANOTHER_BASE"),
    ],
)
def test_bad_adapters_are_refused(toy: Any, tmp_path: Path, copy_adapter: Any, spoil: Any, reason: str) -> None:
    folder = copy_adapter(toy.adapters["mareva"], tmp_path / "bad")
    spoil(folder)
    with pytest.raises(LoralineError) as caught:
        check_adapter(folder, base_of(toy.model), 16)
    assert caught.value.reason == reason


def test_rank_above_the_servers_is_refused_with_both_figures(toy: Any) -> None:
    with pytest.raises(LoralineError) as caught:
        check_adapter(toy.adapters["mareva"], base_of(toy.model), 4)
    assert caught.value.metadata == {"rank": "8", "max_lora_rank": "4"}


def test_paths_of_requests_need_permission(toy: Any) -> None:
    library: Any = None
    spec = BaseModel(path=str(toy.model))
    with pytest.raises(LoralineError) as caught:
        open_base(spec, library, CoreSettings(), trusted=False)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PATH_NOT_ALLOWED")
    missing = BaseModel(path=str(toy.model.parent / "nowhere"))
    for trusted in (False, True):
        with pytest.raises(LoralineError) as caught:
            open_base(missing, library, CoreSettings(allowed_paths=[toy.model.parent]), trusted=trusted)
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_PATH_MISSING")
    assert (
        open_base(spec, library, CoreSettings(allowed_paths=[toy.model.parent]), trusted=False).default_name == "base"
    )
    spec.trust_remote_code = True
    with pytest.raises(LoralineError) as caught:
        open_base(spec, library, CoreSettings(), trusted=True)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.PERMISSION_DENIED, "REMOTE_CODE_REFUSED")


def test_incomplete_model_folder_is_refused(toy: Any, tmp_path: Path, copy_adapter: Any) -> None:
    folder = copy_adapter(toy.model, tmp_path / "half")
    (folder / "model.safetensors").unlink()
    with pytest.raises(LoralineError) as caught:
        base_of(folder)
    assert caught.value.reason == "MODEL_INCOMPLETE"


def test_settings_name_models(tmp_path: Path) -> None:
    assert parse_base("model/tiny:v2").artifact.version == 2
    assert parse_base(str(tmp_path)).path == str(tmp_path)
    assert parse_base("Qwen/Qwen2.5-0.5B").hub_id == "Qwen/Qwen2.5-0.5B"
    assert parse_base("hub:gpt2").hub_id == "gpt2"


def test_names_of_adapters() -> None:
    for text in ("mareva", "mareva:v3", "mareva@production", "adapter/mareva:v3"):
        ref = adapter_ref(text)
        assert ref is not None
        assert format_ref(ref).removeprefix("adapter/") == text.removeprefix("adapter/")
    assert adapter_ref("model/mareva") is None
    assert adapter_ref("No Such Name!") is None
    refs = [parse_ref("adapter/mareva:v1"), parse_ref("adapter/mareva:v2"), parse_ref("adapter/other:v1")]
    for ref, letter in zip(refs, "abb", strict=True):
        ref.digest = "sha256:" + letter * 64
    internal = {internal_name(ref) for ref in refs}
    assert len(internal) == 3
    assert all(name.isalnum() for name in internal)


async def test_resolution_is_remembered_for_a_moment() -> None:
    class Library:
        version = 1

        def resolve(self, ref: Any) -> Any:
            exact = parse_ref(f"adapter/{ref.name}:v{self.version}")
            exact.digest = "sha256:" + f"{self.version:064d}"
            return exact

    now, library = [0.0], Library()
    names = AdapterNames(library, 1.0, lambda: now[0])  # type: ignore[arg-type]
    alias = parse_ref("adapter/mareva@production")
    assert (await names.resolve(alias)).version == 1
    library.version = 2
    assert (await names.resolve(alias)).version == 1
    now[0] = 1.5
    assert (await names.resolve(alias)).version == 2
    library.version = 3
    names.forget()
    assert (await names.resolve(alias)).version == 3


def test_engine_choice_says_why_and_what_to_install() -> None:
    def without(*missing: str) -> Any:
        return lambda package: package not in missing

    assert choose("auto", without()).name == "vllm"
    plain = choose("auto", without("vllm"))
    assert (plain.name, "vllm not installed" in plain.why) == ("transformers", True)
    assert choose("transformers", without("vllm")).name == "transformers"
    for wanted in ("auto", "vllm", "transformers"):
        with pytest.raises(LoralineError) as caught:
            choose(wanted, without("vllm", "torch", "peft"))
        assert caught.value.reason == "ENGINE_NOT_INSTALLED"
        assert "loraline-inference[transformers]" in caught.value.message


def test_stage_imports_without_any_engine() -> None:
    code = (
        "import sys, importlib.abc\n"
        "class No(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'vllm', 'transformers', 'peft', 'xgrammar'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, No())\n"
        "import loraline.inference.component, loraline.inference.engines.vllm_engine\n"
        "import loraline.inference.engines.transformers_engine\n"
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_vllm_arguments_on_cpu_and_gpu(toy: Any) -> None:
    cpu = engine_arguments(toy.model, EngineOptions(max_lora_rank=20), on_cpu=True)
    assert (cpu["dtype"], cpu["enforce_eager"], cpu["max_lora_rank"]) == ("float32", True, 32)
    assert "gpu_memory_utilization" not in cpu
    gpu = engine_arguments(toy.model, EngineOptions(gpu_memory_utilization=0.5, extra={"seed": 3}), on_cpu=False)
    assert (gpu["dtype"], gpu["enforce_eager"], gpu["gpu_memory_utilization"], gpu["seed"]) == ("auto", False, 0.5, 3)
    assert gpu["structured_outputs_config"]["disable_any_whitespace"] is True


def test_bounds_follow_the_coarser_type() -> None:
    assert tolerance("float32", "float32")[0] < tolerance("float32", "float16")[0] < tolerance("bfloat16", "float16")[0]
    assert tolerance("nf4", "float32")[0] > tolerance("bfloat16", "bfloat16")[0]


def test_amx_is_asked_for_only_where_it_is(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor: 0\nflags\t\t: fpu avx512f amx_bf16 amx_tile amx_int8\n")
    import platform

    on_x86_linux = platform.system() == "Linux" and platform.machine() == "x86_64"
    assert amx.has_amx(cpuinfo) is on_x86_linux
    cpuinfo.write_text("flags : fpu avx512f\n")
    assert not amx.has_amx(cpuinfo)
    assert not amx.has_amx(tmp_path / "missing")
    assert isinstance(amx.enable(), bool)


def test_watch_leaves_the_owner_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(watch.OWNER_VARIABLE, raising=False)
    assert not watch.enable()
    monkeypatch.setenv(watch.OWNER_VARIABLE, "0")
    watch.claim()
    assert not watch.enable()


def test_state_comes_back_and_broken_state_is_none(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "inference" / "state.json")
    assert file.read() == ServedState()
    state = ServedState(BaseModel(artifact=parse_ref("model/tiny:v1")), "tiny", ["adapter/mareva:v1"], ["sha256:x"])
    file.write(state)
    assert file.read() == state
    (tmp_path / "inference" / "state.json").write_text('{"model": [')
    assert file.read() == ServedState()


def test_text_stream_holds_back_half_characters_and_stop_texts() -> None:
    class Bytes:
        def decode(self, ids: Any) -> str:
            return bytes(ids).decode("utf-8", "replace")

    def run(text: str, *stop: str) -> tuple[list[str], bool]:
        stream, given = TextStream(Bytes(), stop), []  # type: ignore[arg-type]
        for byte in text.encode():
            piece, stopped = stream.push(byte)
            given.append(piece)
            if stopped:
                return given, True
        return [*given, stream.finish()], False

    for text in ("바다 🌊 abc", "plain", "日本"):
        pieces, stopped = run(text, "never")
        assert ("".join(pieces), stopped) == (text, False)
        assert "\ufffd" not in "".join(pieces)
    assert run("one END two", "END") == (["o", "n", "e", " ", "", "", ""], True)
    assert "".join(run("one EN two", "END")[0]) == "one EN two"
