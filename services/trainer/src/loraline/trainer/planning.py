"""PlanRun: what can be checked about a run without torch and without loading a model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraline.api.job.v1 import job_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.errors import LoralineError, failed_precondition
from loraline.core.server_paths import model_folder
from loraline.core.serving.component import Platform
from loraline.trainer import hub_base
from loraline.trainer.base_models import check_end, check_folder, weight_files
from loraline.trainer.config import TrainerSettings
from loraline.trainer.doubts import above_model, doubts, unused
from loraline.trainer.hardware import look
from loraline.trainer.init_adapter import with_start
from loraline.trainer.memory_estimate import estimate
from loraline.trainer.published import published_checkpoints
from loraline.trainer.quantization import check_quantization
from loraline.trainer.reporting import check_reporters
from loraline.trainer.rows import LoadedDataset, load_dataset, mix
from loraline.trainer.runs import refuse_existing
from loraline.trainer.spec import TrainingSpec, resolve, servability_problems, training_spec

_RANKS = {job_pb2.SEVERITY_ERROR: 0, job_pb2.SEVERITY_WARNING: 1, job_pb2.SEVERITY_INFO: 2}
_FEW_ROWS = 20


def plan(
    request: pb.TrainRequest, platform: Platform, settings: TrainerSettings, jobs: list[job_pb2.Job]
) -> pb.PlanRunResponse:
    """Return the checklist of a run; blocking."""
    checks: list[pb.PlanCheck] = []
    request = _attempt(checks, "INIT_ADAPTER", "", lambda: with_start(request, platform.library)) or request
    answer = pb.PlanRunResponse(resolved=resolve(request))
    spec = _attempt(checks, "PARAMETERS", "The parameters are sound.", lambda: training_spec(request))
    if spec is not None:
        _attempt(checks, "REPORT_TO", "", lambda: check_reporters(spec.report_to))
        _attempt(checks, "PARAMETERS", "", lambda: check_quantization(spec.quantization))
    refusal = refuse_existing(
        answer.resolved,
        jobs,
        platform.settings.data_dir,
        lambda: published_checkpoints(platform.library, request.name, {job.name for job in jobs}),
    )
    checks.append(_from_error("RUN_NAME", refusal) if refusal else _passed("RUN_NAME", f"{request.name} is free."))
    datasets = _attempt(checks, "DATASETS", "", lambda: _load(request, platform))
    if datasets is not None and spec is not None:
        processes = (settings.ranks or max(1, look().gpus)) if spec.ranks else 1
        rows = _count(datasets, request, spec, answer, checks, processes)
        checks.extend(doubts(spec, rows, answer.total_steps))
    config = _attempt(checks, "BASE_MODEL", "", lambda: _base(request, platform, settings, answer, checks)) or {}
    checks.extend(above_model(request.parameters.max_length, config))
    if spec is not None:
        checks.extend(_hardware(config, spec, answer))
    vocabulary = config.get("vocab_size")
    problems = servability_problems(request, vocab_size=vocabulary if isinstance(vocabulary, int) else 0)
    if problems:
        remedy = "Change the run, or the server's settings."
        checks.append(_failed("SERVING_CONTRACT", "; ".join(problems), remedy))
    elif request.HasField("serving_contract"):
        checks.append(_passed("SERVING_CONTRACT", "The server described can serve the adapter."))
    for check in checks:
        check.phase = pb.RUN_PHASE_BEFORE
    answer.checks.extend(sorted(checks, key=lambda check: (check.passed, _RANKS.get(check.severity, 3))))
    answer.ok = all(check.passed or check.severity != job_pb2.SEVERITY_ERROR for check in checks)
    return answer


def _attempt(checks: list[pb.PlanCheck], code: str, success: str, work):
    """Do the work and note a failure; a success is noted when there is something to say."""
    try:
        found = work()
    except LoralineError as error:
        checks.append(_from_error(code, error))
        return None
    if success:
        checks.append(_passed(code, success))
    return found


def _load(request: pb.TrainRequest, platform: Platform) -> list[LoadedDataset]:
    loaded, pairs = [], request.objective == pb.OBJECTIVE_DPO
    for dataset in request.datasets:
        reference = platform.library.resolve(dataset.ref)
        label = f"{reference.name}:v{reference.version}/" if len(request.datasets) > 1 else ""
        folder = platform.library.fetch(reference)
        loaded.append(load_dataset(folder, weight=dataset.weight, label=label, pairs=pairs))
    return loaded


def _count(
    datasets: list[LoadedDataset],
    request: pb.TrainRequest,
    spec: TrainingSpec,
    answer: pb.PlanRunResponse,
    checks: list[pb.PlanCheck],
    processes: int,
) -> int:
    """Report on the data, fill in the steps, and return the rows of an epoch."""
    mixture = mix(datasets, validation_fraction=request.validation_fraction, seed=spec.seed)
    rows = len(mixture.train)
    an_epoch = max(1, math.ceil(math.ceil(rows / spec.batch_size) / (spec.grad_accum * processes)))
    answer.total_steps = spec.max_steps or max(1, math.ceil(spec.epochs * an_epoch))
    at_most = "at most " if spec.packing and not spec.max_steps else ""
    message = (
        f"{mixture.unique_rows} rows, {rows} an epoch with weights, {len(mixture.validation)} for validation, "
        f"{at_most}{answer.total_steps} steps."
    )
    if len(datasets) > 1:
        parts = [
            f"{dataset.ref.name} {len(loaded.train)} rows × {loaded.weight:g}"
            for dataset, loaded in zip(request.datasets, datasets, strict=True)
        ]
        message += f" {'; '.join(parts)}."
    check = _passed("DATASETS", message)
    if mixture.unique_rows < _FEW_ROWS:
        check.passed, check.severity = False, job_pb2.SEVERITY_WARNING
        check.remedy = "So few rows are learned by heart rather than generalised; add rows."
    checks.append(check)
    own = sum(len(loaded.validation) for loaded in datasets)
    checks.extend(unused(request, own_validation=own, validation=len(mixture.validation)))
    return rows


def _base(
    request: pb.TrainRequest,
    platform: Platform,
    settings: TrainerSettings,
    answer: pb.PlanRunResponse,
    checks: list[pb.PlanCheck],
) -> Mapping[str, Any]:
    """Look at the base without loading it, fill in its weights' bytes, and return its config.json."""
    base = request.base_model
    if base.HasField("hub_id"):
        seen = hub_base.see(base, timeout=settings.hub_timeout_seconds)
        answer.memory_bytes["weights_on_disk"] = seen.weights_bytes
        checks.append(_passed("BASE_MODEL", f"{_shape(seen.config, seen.weights_bytes)} {seen.message}."))
        return seen.config
    if base.HasField("artifact"):
        folder = platform.library.fetch(platform.library.resolve(base.artifact))
    else:
        allowed = [*platform.settings.allowed_paths, *settings.models_dirs]
        folder = model_folder(base.path, allowed, "base_model.path")
    check_folder(folder, base.path or base.artifact.name)
    check_end(folder, base.path or base.artifact.name)
    size = sum((folder / name).stat().st_size for name in weight_files(folder, folder.name))
    answer.memory_bytes["weights_on_disk"] = size
    config = _config(folder)
    checks.append(_passed("BASE_MODEL", _shape(config, size)))
    return config


def _config(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        message = f"{folder.name}: config.json cannot be read ({error}). Fetch it again."
        raise failed_precondition("MODEL_INCOMPLETE", message) from error
    return content if isinstance(content, dict) else {}


def _shape(config: Mapping[str, Any], weights_bytes: int) -> str:
    return f"{config.get('model_type', 'model')}, {weights_bytes / 1e6:.1f} MB of weights."


def _hardware(config: Mapping[str, Any], spec: TrainingSpec, answer: pb.PlanRunResponse) -> Iterator[pb.PlanCheck]:
    """Compare what the run needs with what the machine has, and fill in the estimate."""
    machine = look()
    place, room = (f"GPU {machine.gpu}", machine.gpu_memory) if machine.gpu else ("the CPU's memory", machine.memory)
    parts: dict[str, int] = {}
    if config:
        on_cpu = replace(spec, dtype=spec.dtype or ("" if machine.gpu else "fp32"))
        parts = estimate(config, answer.memory_bytes["weights_on_disk"], on_cpu)
        answer.memory_bytes.update(parts)
    needed = parts.get("total", 0)
    facts = (
        f"About {needed / 1e9:.2f} GB needed, {room / 1e9:.1f} GB on {place}." if needed and room else f"On {place}."
    )
    if room and needed > room:
        remedy = (
            "In this order: lower parameters.max_length, lower parameters.batch_size and raise parameters.grad_accum "
            "by as much, set parameters.gradient_checkpointing, set parameters.quantization QUANTIZATION_NF4."
        )
        yield _warning("MEMORY", facts, remedy)
    if not machine.gpu:
        remedy = "A CPU trains toy models; for others take a machine with a GPU."
        yield _warning("NO_GPU", f"There is no GPU. {facts}", remedy)
    elif not (room and needed > room):
        yield _passed("HARDWARE", facts)


def _warning(code: str, message: str, remedy: str) -> pb.PlanCheck:
    return pb.PlanCheck(code=code, severity=job_pb2.SEVERITY_WARNING, passed=False, message=message, remedy=remedy)


def _passed(code: str, message: str) -> pb.PlanCheck:
    return pb.PlanCheck(code=code, severity=job_pb2.SEVERITY_INFO, passed=True, message=message)


def _failed(code: str, message: str, remedy: str) -> pb.PlanCheck:
    return pb.PlanCheck(code=code, severity=job_pb2.SEVERITY_ERROR, passed=False, message=message, remedy=remedy)


def _from_error(code: str, error: LoralineError) -> pb.PlanCheck:
    return _failed(f"{code}_{error.reason}", error.message, "")
