"""The domain request: a TrainRequest with its defaults filled in and what this version cannot do refused. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.errors import LoralineError, failed_precondition
from loraline.trainer.refusals import refuse_contradictions, refuse_unknown, refuse_unsupported

_POLICIES = {
    pb.LENGTH_POLICY_UNSPECIFIED: "error",
    pb.LENGTH_POLICY_ERROR: "error",
    pb.LENGTH_POLICY_TRUNCATE: "truncate",
    pb.LENGTH_POLICY_DROP: "drop",
    pb.LENGTH_POLICY_SPLIT: "split",
}
_QUANTIZATIONS = {
    pb.QUANTIZATION_UNSPECIFIED: "auto",
    pb.QUANTIZATION_AUTO: "auto",
    pb.QUANTIZATION_NONE: "none",
    pb.QUANTIZATION_NF4: "nf4",
    pb.QUANTIZATION_INT8: "int8",
}
_RATE, _CAREFUL_RATE = 2e-4, 2e-5
"""Learning rates of an adapter that learns answers, and of what moves further with each step: all weights, or DPO."""
_BETA = 0.1


@dataclass(frozen=True)
class LoraSpec:
    """LoRA's settings, resolved."""

    r: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]
    rslora: bool
    dora: bool
    modules_to_save: tuple[str, ...]


@dataclass(frozen=True)
class TrainingSpec:
    """A run's settings, resolved; names and units as in TrainingParameters."""

    epochs: float
    max_steps: int
    learning_rate: float
    batch_size: int
    grad_accum: int
    max_length: int
    length_policy: str
    max_truncated_share: float
    lora: LoraSpec
    lr_scheduler: str
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    neftune_alpha: float
    seed: int
    dtype: str
    quantization: str
    gradient_checkpointing: bool
    save_steps: int
    keep_checkpoints: int
    eval_steps: int
    early_stopping_patience: int
    allow_unlearned_eos: bool
    report_to: tuple[str, ...]
    full: bool = False
    """All weights are trained; `lora` means nothing then."""
    preference: bool = False
    """DPO on pairs instead of supervised fine-tuning."""
    dpo_beta: float = _BETA
    packing: bool = False
    ranks: bool = False
    """torchrun starts the training processes."""


def resolve(request: pb.TrainRequest) -> pb.TrainRequest:
    """Return a copy with every default written out, as PlanRun shows it."""
    filled = pb.TrainRequest()
    filled.CopyFrom(request)
    p = filled.parameters
    filled.method = filled.method or pb.METHOD_LORA
    filled.objective = filled.objective or pb.OBJECTIVE_SFT
    full, preference = filled.method == pb.METHOD_FULL, filled.objective == pb.OBJECTIVE_DPO
    p.epochs = p.epochs or 3.0
    p.learning_rate = p.learning_rate or (_CAREFUL_RATE if full or preference else _RATE)
    p.batch_size = p.batch_size or 4
    p.grad_accum = p.grad_accum or 1
    p.max_length = p.max_length or 1024
    p.length_policy = p.length_policy or pb.LENGTH_POLICY_ERROR
    if not full:
        p.lora.r = p.lora.r or 16
        p.lora.alpha = p.lora.alpha or 2.0 * p.lora.r
    if preference:
        p.dpo_beta = p.dpo_beta or _BETA
    p.lr_scheduler = p.lr_scheduler or "cosine"
    if not p.HasField("warmup_ratio"):
        p.warmup_ratio = 0.03
    p.max_grad_norm = p.max_grad_norm or 1.0
    p.quantization = p.quantization or pb.QUANTIZATION_AUTO
    p.keep_checkpoints = p.keep_checkpoints or 2
    p.max_truncated_share = p.max_truncated_share or 0.1
    filled.existing_run = filled.existing_run or pb.EXISTING_RUN_POLICY_FAIL
    filled.launcher = filled.launcher or pb.LAUNCHER_PROCESS
    for dataset in filled.datasets:
        dataset.weight = dataset.weight or 1.0
    return filled


def training_spec(request: pb.TrainRequest) -> TrainingSpec:
    """Return the settings of a run.

    Raises UNIMPLEMENTED (NOT_SUPPORTED) for what this version does not do, INVALID_ARGUMENT for contradictions.
    """
    filled = resolve(request)
    refuse_unsupported(filled)
    refuse_unknown(filled)
    refuse_contradictions(filled)
    p = filled.parameters
    lora = LoraSpec(
        r=p.lora.r,
        alpha=p.lora.alpha,
        dropout=p.lora.dropout,
        target_modules=tuple(p.lora.target_modules),
        rslora=p.lora.rslora,
        dora=filled.method == pb.METHOD_DORA,
        modules_to_save=tuple(p.lora.modules_to_save),
    )
    return TrainingSpec(
        epochs=p.epochs,
        max_steps=p.max_steps,
        learning_rate=p.learning_rate,
        batch_size=p.batch_size,
        grad_accum=p.grad_accum,
        max_length=p.max_length,
        length_policy=_POLICIES[p.length_policy],
        max_truncated_share=p.max_truncated_share,
        lora=lora,
        lr_scheduler=p.lr_scheduler,
        warmup_ratio=p.warmup_ratio,
        weight_decay=p.weight_decay,
        max_grad_norm=p.max_grad_norm,
        neftune_alpha=p.neftune_alpha,
        seed=p.seed,
        dtype=p.dtype,
        quantization=_QUANTIZATIONS[p.quantization],
        gradient_checkpointing=p.gradient_checkpointing,
        save_steps=p.save_steps,
        keep_checkpoints=p.keep_checkpoints,
        eval_steps=p.eval_steps,
        early_stopping_patience=p.early_stopping_patience,
        allow_unlearned_eos=p.allow_unlearned_eos,
        report_to=tuple(dict.fromkeys(p.report_to)),
        full=filled.method == pb.METHOD_FULL,
        preference=filled.objective == pb.OBJECTIVE_DPO,
        dpo_beta=p.dpo_beta or _BETA,
        packing=p.packing,
        ranks=filled.launcher == pb.LAUNCHER_TORCHRUN,
    )


def servability_problems(request: pb.TrainRequest, *, vocab_size: int = 0) -> list[str]:
    """Return why the server described by the contract could not serve the adapter; empty without a contract."""
    if not request.HasField("serving_contract"):
        return []
    filled, contract = resolve(request), request.serving_contract
    # Without an adapter there are no modules and no rank: what was set of them is refused before.
    lora, problems = filled.parameters.lora, []
    if contract.max_lora_rank and lora.r > contract.max_lora_rank:
        problems.append(f"parameters.lora.r is {lora.r}, the server takes at most {contract.max_lora_rank}")
    if lora.modules_to_save:
        problems.append("parameters.lora.modules_to_save is set, and whole modules cannot be served unmerged")
    if filled.method == pb.METHOD_DORA:
        problems.append("method is METHOD_DORA, which cannot be served unmerged")
    allowed = set(contract.target_modules)
    extra = sorted({name.rsplit(".", 1)[-1] for name in lora.target_modules} - allowed) if allowed else []
    if extra:
        problems.append(f"parameters.lora.target_modules has {', '.join(extra)}, which the server cannot adapt")
    if contract.vocab_size and vocab_size and vocab_size > contract.vocab_size:
        problems.append(f"the base has {vocab_size} vocabulary rows, the server's model {contract.vocab_size}")
    if (
        contract.max_model_len
        and filled.parameters.max_length > contract.max_model_len
        and request.parameters.max_length
    ):
        problems.append(
            f"parameters.max_length is {filled.parameters.max_length}, the server takes {contract.max_model_len} tokens"
        )
    return problems


def not_servable(problems: list[str]) -> LoralineError:
    """Return FAILED_PRECONDITION (NOT_SERVABLE) that lists the problems."""
    message = f"The adapter could not be served: {'; '.join(problems)}. Change the run, or the server's settings."
    return failed_precondition("NOT_SERVABLE", message)
