"""What is found before an engine is built, and what its own words are recognised as, in three languages."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from counting_engine import TOY, CountingChoice, CountingEngine, MakeHost, generation_of, until
from failing_process import fail
from served_profiles import widened

from loraline.api.inference.v1 import inference_pb2
from loraline.core.diagnostics import match
from loraline.core.errors import LoralineError
from loraline.core.preflight import Finding, recognised
from loraline.inference.base_model import parse_base
from loraline.inference.config import InferenceSettings
from loraline.inference.engines import last_words
from loraline.inference.engines.choice import EngineChoice
from loraline.inference.preflight import diagnosis, engine, gpu
from loraline.inference.preflight.diagnosis import Diagnoses
from loraline.inference.readiness import Readiness
from loraline.inference.servicer import InferenceServicer

FREE = (
    "ValueError: Free memory on device cuda:0 (13.42/23.53 GiB) on startup is less than desired GPU memory utilization "
    "(0.9, 21.17 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
# As libraries, drivers and shells print them.
WORDS = [
    ("GPU_MEMORY_TOO_SMALL", FREE),
    (
        "GPU_MEMORY_TOO_SMALL",
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
        "initializing the engine.",
    ),
    ("CUDA_LIBRARY_MISSING", "ImportError: libcudart.so.13: cannot open shared object file: No such file or directory"),
    (
        "CUDA_DRIVER_TOO_OLD",
        "RuntimeError: The NVIDIA driver on your system is too old (found version 12020). Please update your GPU "
        "driver.",
    ),
    ("CUDA_DRIVER_TOO_OLD", "Failed to initialize NVML: Driver/library version mismatch"),
    (
        "C_COMPILER_MISSING",
        "torch._inductor.exc.InductorError: RuntimeError: Failed to find C compiler. Please specify via CC environment "
        "variable or set triton.knobs.build.impl.",
    ),
    (
        "HUB_UNREACHABLE",
        "requests.exceptions.ProxyError: HTTPSConnectionPool(host='huggingface.co', port=443): Max retries exceeded "
        "with url: /api/models/x (Caused by ProxyError('Unable to connect to proxy', OSError('Connection refused')))",
    ),
    ("HUB_UNREACHABLE", "OSError: [Errno 101] Network is unreachable"),
    (
        "PACKAGE_MANAGER_LOCKED",
        "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 3123 (unattended-upgr)",
    ),
    (
        "PORT_TAKEN",
        "OSError: [Errno 98] error while attempting to bind on address ('0.0.0.0', 8000): address already in use",
    ),
    ("DISK_FULL", "OSError: [Errno 28] No space left on device: '/root/.cache/vllm'"),
    (
        "AMX_REFUSED",
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): "
        "{'EngineCore': -4}",
    ),
    ("AMX_REFUSED", "Fatal Python error: Illegal instruction"),
    ("CUDA_OUT_OF_MEMORY", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
]
GPUS = "0, NVIDIA GeForce RTX 4090, 24564, 13700\n1, NVIDIA GeForce RTX 4090, 24564, 24100\n"
DRIVER = "| NVIDIA-SMI 535.183.01             Driver Version: 535.183.01   CUDA Version: 12.2     |"


@pytest.mark.parametrize(("reason", "words"), WORDS)
def test_real_words_are_recognised_and_explained(reason: str, words: str) -> None:
    found = recognised(words)
    assert found is not None
    assert found.reason == reason
    texts = {found.explained(language) for language in ("en", "zh", "ko")}
    assert len(texts) == 3
    assert all("→" in text for text in texts)


def test_settings_in_a_log_are_no_failure() -> None:
    assert not match("non-default args: {'gpu_memory_utilization': 0.6, 'max_model_len': 512}")


def smi(arguments: list[str]) -> str:
    """Answer as nvidia-smi does: to the query for figures, and to a call without arguments."""
    return GPUS if arguments else DRIVER


def test_free_memory_below_the_share_names_the_highest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "cuda_of_torch", lambda: (12, 1))
    first, second = gpu.check_gpus(0.9, 2, smi)
    assert (first.level, first.reason, second.level) == ("failed", "GPU_MEMORY_TOO_SMALL", "ok")
    assert "13700 of 24564 MiB are free" in first.said
    # (13700 - 600) / 24564 is 0.533
    assert "GPU_MEMORY_UTILIZATION is 0.9; the highest value that fits now is 0.53." in first.said
    assert [one.level for one in gpu.check_gpus(0.53, 1, smi)] == ["ok"]
    assert "need 3 GPUs; the driver shows 2" in next(iter(gpu.check_gpus(0.5, 3, smi))).said
    monkeypatch.setattr(gpu, "cuda_of_torch", lambda: (13, 0))
    *_, driver = gpu.check_gpus(0.5, 1, smi)
    assert driver.reason == "CUDA_DRIVER_TOO_OLD"
    assert driver.said == "torch is built for CUDA 13.0; the driver can do at most 12.2"
    assert gpu.too_little_memory(FREE, 0.9).endswith("the highest value that fits now is 0.57.")
    assert gpu.too_little_memory("something else", 0.9) == ""


def test_the_drivers_tool_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for words, reason in (
        ("Failed to initialize NVML: Driver/library version mismatch", "CUDA_DRIVER_TOO_OLD"),
        ("No devices were found", "GPU_NOT_USED"),
    ):
        script.write_text(f"#!/bin/sh\necho '{words}'\nexit 6\n")
        script.chmod(0o755)
        [found] = gpu.check_gpus(0.5)
        assert (found.level, found.reason, words in found.said) == ("failed", reason, True)
    script.write_text(f"#!/bin/sh\ncase \"$*\" in *query*) printf '{GPUS}';; *) echo '{DRIVER}';; esac\n")
    assert [one.check for one in gpu.check_gpus(0.5)] == ["GPU"]
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert [one.level for one in gpu.check_gpus(0.5)] == ["ok"]


def test_the_cuda_of_torch_is_read_without_torch(tmp_path: Path) -> None:
    (tmp_path / "version.py").write_text("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n")
    assert gpu.cuda_of_torch(tmp_path) == (12, 8)
    (tmp_path / "version.py").write_text("cuda: Optional[str] = None\n")
    assert gpu.cuda_of_torch(tmp_path) is None


def test_no_compiler_matters_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    found = engine.compiler(on_gpu=True, eager=False)
    assert (found.level, found.reason) == ("failed", "C_COMPILER_MISSING")
    assert engine.compiler(on_gpu=True, eager=True).level == "warning"
    assert "does without" in engine.compiler(on_gpu=False, eager=False).said
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    assert engine.compiler(on_gpu=False, eager=False).said == "gcc is there"


def test_amx_that_the_kernel_refuses(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags\t\t: fpu avx2 amx_tile amx_int8\n")
    refused = engine.amx(cpuinfo, permitted=False)
    assert (refused.level, refused.reason) == ("warning", "AMX_REFUSED")
    assert engine.amx(cpuinfo, permitted=True).level == "ok"
    cpuinfo.write_text("flags\t\t: fpu avx2\n")
    assert engine.amx(cpuinfo, permitted=False).said == "this CPU has none"
    assert engine.amx().check == "AMX"  # asks this machine's kernel


def test_the_words_of_another_process_are_heard() -> None:
    assert last_words.enable() is False  # here nobody asked for them
    last_words.listen()
    path = Path(os.environ[last_words.VARIABLE])
    try:
        process = multiprocessing.get_context("spawn").Process(target=fail)
        process.start()
        process.join(60)
        assert last_words.said() == "ValueError: Free memory is less"
    finally:
        last_words.forget()
    assert not path.exists()
    assert last_words.said() == ""


class Unstartable(CountingEngine):
    """Fails as vLLM does on a GPU with too little free memory."""

    async def start(self, model_folder: Path, options: Any) -> None:
        raise RuntimeError(f"{FREE}\nEngine core initialization failed. See root cause above.")


class ChangingChoice(CountingChoice):
    """An engine that cannot start until `mended` is set."""

    mended = False

    def create(self) -> Any:
        return CountingEngine() if ChangingChoice.mended else Unstartable()


@pytest.mark.asyncio
async def test_an_engine_that_cannot_start_is_explained_in_the_status(make_host: MakeHost) -> None:
    ChangingChoice.mended = False
    host = make_host(lambda _: ChangingChoice("transformers", "test"))
    with pytest.raises(LoralineError) as failed:
        await host.load_model(TOY)
    assert (failed.value.reason, failed.value.metadata["cause"]) == ("MODEL_LOAD_FAILED", "GPU_MEMORY_TOO_SMALL")
    for words in (failed.value.message, host.why_not_ready):
        assert "the highest value that fits now is 0.57." in words
    nothing: Any = None
    servicer = InferenceServicer(host, generation_of(host), nothing, nothing)
    answer = await servicer.GetCapabilities(inference_pb2.GetCapabilitiesRequest(), nothing)
    assert answer.not_ready_because == host.why_not_ready
    [told] = answer.diagnoses
    assert told.reason == "GPU_MEMORY_TOO_SMALL"
    assert "显存" in told.explanations["zh"]
    assert "GPU 메모리" in told.explanations["ko"]
    ChangingChoice.mended = True
    await host.load_model(TOY)
    assert host.diagnoses.known() == []


@pytest.mark.asyncio
async def test_a_hopeless_start_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine, "has_gpu", lambda: True)
    monkeypatch.setattr(engine, "check_gpus", lambda share, needed: gpu.check_gpus(share, needed, smi))
    diagnoses = Diagnoses(InferenceSettings(gpu_memory_utilization=0.9), Readiness(), tmp_path)
    with pytest.raises(LoralineError, match=r"highest value that fits now is 0\.53") as refused:
        await diagnoses.before("vllm", "model/toy:v1")
    assert refused.value.metadata["cause"] == "GPU_MEMORY_TOO_SMALL"
    may = Diagnoses(InferenceSettings(gpu_memory_utilization=0.5), Readiness(), tmp_path)
    await may.before("vllm", "model/toy:v1")


class WaitingEngine(CountingEngine):
    """An engine that is never built to its end, as long as the gate is closed."""

    gate_of_start = asyncio.Event()

    async def start(self, model_folder: Path, options: Any) -> None:
        await self.gate_of_start.wait()
        await super().start(model_folder, options)


class WaitingChoice(CountingChoice):
    def create(self) -> Any:
        return WaitingEngine()


@pytest.mark.asyncio
async def test_a_full_disk_and_half_installed_packages_stand_in_the_status_before_the_engine_is_built(
    make_host: MakeHost, platform: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Path] = []

    def full(folder: Path) -> Finding:
        looked.append(folder)
        return Finding("disk", "failed", f"{folder} has 0.1 GiB free", "DISK_FULL")

    undone = Finding("package manager", "warning", "an installation was interrupted", "PACKAGE_MANAGER_INTERRUPTED")
    monkeypatch.setattr(diagnosis, "check_engine", lambda _: iter(()))
    monkeypatch.setattr(diagnosis, "disk", full)
    monkeypatch.setattr(diagnosis, "package_manager", lambda: undone)
    WaitingEngine.gate_of_start = asyncio.Event()
    host = make_host(lambda _: WaitingChoice("vllm", "test"))
    loading = asyncio.create_task(host.load_model(TOY))
    await until(lambda: "starting vllm" in host.why_not_ready)
    nothing: Any = None
    servicer = InferenceServicer(host, generation_of(host), nothing, nothing)
    told = (await servicer.GetCapabilities(inference_pb2.GetCapabilitiesRequest(), nothing)).diagnoses
    assert [one.reason for one in told] == ["DISK_FULL", "PACKAGE_MANAGER_INTERRUPTED"]
    assert "→" in told[0].explanations["ko"]
    assert looked == [platform.settings.data_dir]
    WaitingEngine.gate_of_start.set()
    await loading
    # What is well is not told.
    monkeypatch.setattr(diagnosis, "disk", lambda folder: Finding("disk", "ok", f"{folder} has 40.0 GiB free"))
    monkeypatch.setattr(diagnosis, "package_manager", lambda: Finding("package manager", "ok", "nobody"))
    await host.load_model(TOY, "again")
    assert host.diagnoses.known() == []


@pytest.mark.asyncio
async def test_a_folder_that_is_not_whole_is_named_by_its_reason(make_host: MakeHost, toy: Any, tmp_path: Path) -> None:
    cut = Path(shutil.copytree(toy.model, tmp_path / "cut"))
    weights = next(cut.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    host = make_host(model=str(cut))
    await host.start()
    await until(lambda: "is cut or damaged" in host.why_not_ready)
    assert [found.reason for found in host.diagnoses.known()] == ["MODEL_INCOMPLETE"]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.asyncio
async def test_the_real_engines_own_words(make_host: MakeHost, toy: Any, tmp_path: Path) -> None:
    """A window that the cache has no room for: the engine core, another process, says so, and callers hear it."""
    pytest.importorskip("vllm")
    window = 2**21
    folder = widened(toy.model, tmp_path / "wide", window)
    host = make_host(lambda _: EngineChoice("vllm", "test"), max_model_len=window)
    with pytest.raises(LoralineError) as failed:
        await host.load_model(parse_base(str(folder)), trusted=True)
    assert failed.value.metadata.get("cause") == "GPU_MEMORY_TOO_SMALL", failed.value.message
    assert "KV cache" in failed.value.message
