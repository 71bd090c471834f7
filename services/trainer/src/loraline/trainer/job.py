"""What the trainer's jobs do in their own process: fetch inputs, run an engine, publish."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core import hub
from loraline.core.artifacts.refs import format_ref
from loraline.core.jobs.context import JobContext
from loraline.core.jobs.handlers import StopRequested
from loraline.trainer.base_models import ResolvedBase, resolve_base
from loraline.trainer.config import TrainerSettings
from loraline.trainer.continuing import bring_checkpoint, checkpoints_folder, continuation, drop_earlier_checkpoints
from loraline.trainer.init_adapter import check_base
from loraline.trainer.observing import ContextObserver
from loraline.trainer.outcome import as_dict, count_parameters, library_versions, publish
from loraline.trainer.published import publishing, recover
from loraline.trainer.reporting import prepare_reports
from loraline.trainer.results import train_result
from loraline.trainer.rows import LoadedDataset, load_dataset
from loraline.trainer.spec import not_servable, servability_problems, training_spec
from loraline.trainer.verdicts import counting_divergence, verdict_of


def train(context: JobContext, request: pb.TrainRequest) -> pb.TrainResult:
    """Run a training job and publish the adapter, or the model where all weights are trained."""
    settings = _start()
    spec = training_spec(request)
    prepare_reports(spec.report_to, request.name, context.settings.data_dir / "reports")
    if request.existing_run == pb.EXISTING_RUN_POLICY_CONTINUE:
        bring_checkpoint(context, request)
    recover(context, request.name, checkpoints_folder(context.settings.data_dir, context.job))
    datasets, references = _datasets(context, request, pairs=spec.preference)
    base = _base(context, settings, request.base_model)
    with context.loading():
        from loraline.trainer.engines import launching, training

    inputs = training.RunInputs(
        name=request.name,
        base=base,
        datasets=datasets,
        validation_fraction=request.validation_fraction,
        dataset_names=[format_ref(reference) for reference in references],
        init_adapter=_init_adapter(context, request, base),
        init_adapter_name=format_ref(request.init_adapter) if request.HasField("init_adapter") else "",
        sample_prompts=list(request.sample_prompts),
    )
    _check_servable(request, base)
    with publishing(context, settings, request.name) as publisher, counting_divergence(context):
        observer = ContextObserver(context, request.name, publisher, begun=lambda: _begun(context, request))
        if spec.ranks:
            finished = launching.run_on_ranks(inputs, spec, context.workdir, observer, count=settings.ranks)
        else:
            finished = training.run(inputs, spec, context.workdir, observer)
    if finished is None:
        context.check_stop()
        raise StopRequested("handover")
    made = publish(context, request, base, references, finished)
    result = train_result(finished, made.ref, base.model)
    if stood := continuation(context.settings.data_dir, context.job):
        result.continuation.CopyFrom(stood)
    if not spec.preference:  # DPO's loss starts at 0.69 whatever the data; the bands of answers say nothing about it
        context.count("trainer_runs", verdict=verdict_of(result, request.parameters.epochs))
    return result


def _begun(context: JobContext, request: pb.TrainRequest) -> None:
    """Let the checkpoints go that OVERWRITE gives up: only now is it sure that there are rows and a base to train."""
    if request.existing_run == pb.EXISTING_RUN_POLICY_OVERWRITE:
        drop_earlier_checkpoints(context, request.name)


def import_model(context: JobContext, request: pb.ImportModelRequest) -> pb.ModelResult:
    """Bring a base model into the store: config, tokenizer and safetensors weights, nothing that could run code."""
    settings = _start()
    base = _base(context, settings, request.source)
    folder = context.workdir / "model"
    _copy_model(context, base, folder)
    parameters = count_parameters(folder)
    inputs = [base.model.artifact] if base.model.HasField("artifact") else []
    artifact = context.publish(
        artifact_pb2.ARTIFACT_KIND_MODEL,
        request.name,
        folder,
        inputs=inputs,
        settings=as_dict(request.source),
        facts={"parameters": parameters, "source": base.label, "revision": base.model.revision},
        library_versions=library_versions(),
    )
    shutil.rmtree(folder, ignore_errors=True)
    return pb.ModelResult(model=artifact.ref, parameters=parameters, revision=base.model.revision)


def create_tiny_model(context: JobContext, request: pb.CreateTinyModelRequest) -> pb.ModelResult:
    """Make the toy base and publish it."""
    _start()
    from loraline.trainer.tiny.texts import folder_texts

    texts = [text for reference in request.tokenizer_texts for text in folder_texts(context.fetch(reference))]
    with context.loading():
        from loraline.trainer.engines.tiny_model import TinyModelSettings
        from loraline.trainer.engines.tiny_model import create_tiny_model as create

    defaults = TinyModelSettings()
    settings = TinyModelSettings(
        steps=request.steps or defaults.steps,
        vocab_size=request.vocab_size or defaults.vocab_size,
        seed=request.seed,
    )

    def report(step: int, total: int, loss: float) -> None:
        message = f"pretraining step {step}/{total}, loss {loss:.3f}"
        context.progress(step=step, total_steps=total, message=message, unit="step", metrics={"loss": loss})
        context.check_stop()

    folder = context.workdir / "model"
    shutil.rmtree(folder, ignore_errors=True)
    made = create(folder, settings, extra_texts=texts, report=report)
    artifact = context.publish(
        artifact_pb2.ARTIFACT_KIND_MODEL,
        request.name or "tiny",
        folder,
        inputs=list(request.tokenizer_texts),
        settings={"steps": settings.steps, "vocab_size": settings.vocab_size, "seed": settings.seed},
        facts={"parameters": made.parameters, "final_loss": made.final_loss, "architecture": "Qwen2ForCausalLM"},
        library_versions=library_versions(),
    )
    return pb.ModelResult(model=artifact.ref, parameters=made.parameters, final_loss=made.final_loss)


def _start() -> TrainerSettings:
    """Set what libraries read when they are loaded, and return the stage's settings."""
    settings = TrainerSettings()
    if settings.threads:
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    # Threads that spin while they wait take the cores from the servers on the same machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    return settings


def _base(context: JobContext, settings: TrainerSettings, model: pb.BaseModel) -> ResolvedBase:
    return resolve_base(
        model,
        fetch=context.fetch,
        allowed_paths=[*context.settings.allowed_paths, *settings.models_dirs],
        remote_code=context.settings.allow_remote_code,
        download=lambda hub_id, revision: hub.download(
            hub_id, revision, timeout=settings.hub_timeout_seconds, code=model.trust_remote_code
        ),
    )


def _datasets(
    context: JobContext, request: pb.TrainRequest, *, pairs: bool
) -> tuple[list[LoadedDataset], list[artifact_pb2.ArtifactRef]]:
    several = len(request.datasets) > 1
    loaded, references = [], []
    for dataset in request.datasets:
        label = f"{format_ref(dataset.ref)}/" if several else ""
        loaded.append(load_dataset(context.fetch(dataset.ref), weight=dataset.weight, label=label, pairs=pairs))
        references.append(dataset.ref)
    return loaded, references


def _init_adapter(context: JobContext, request: pb.TrainRequest, base: ResolvedBase) -> Path | None:
    if not request.HasField("init_adapter"):
        return None
    folder = context.fetch(request.init_adapter)
    check_base(folder, base)
    return folder


def _check_servable(request: pb.TrainRequest, base: ResolvedBase) -> None:
    """Check the contract again, now that the base's vocabulary is known."""
    from loraline.trainer.engines.loading import model_limits

    _, vocab_size = model_limits(base.folder, remote_code=base.trust_remote_code)
    problems = servability_problems(request, vocab_size=vocab_size)
    if problems:
        raise not_servable(problems)


def _copy_model(context: JobContext, base: ResolvedBase, folder: Path) -> None:
    """Copy the files of a model folder that belong to a model; links are followed, code and pickles left out."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    patterns = [*hub.PATTERNS, "*.py"] if base.trust_remote_code else hub.PATTERNS
    names = {file.name for pattern in patterns for file in base.folder.glob(pattern) if file.is_file()}
    for count, name in enumerate(sorted(names - {"manifest.json"}), start=1):
        context.check_stop()
        shutil.copyfile(base.folder / name, folder / name)
        context.progress(step=count, total_steps=len(names), message=f"copied {name}", unit="file")
    left = sorted(file.name for file in base.folder.iterdir() if file.is_file() and file.name not in names)
    if left:
        context.note(f"left out: {', '.join(left[:20])}", reason="FILES_LEFT_OUT")
