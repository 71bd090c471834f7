"""What a run may not ask for: what this version does not do, names nobody knows, settings that contradict. Pure."""

from __future__ import annotations

from loraline.api.trainer.v1 import trainer_pb2 as pb
from loraline.core.errors import LoralineError, invalid_argument, unsupported

SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "cosine",
    "cosine_with_restarts",
    "inverse_sqrt",
    "linear",
    "polynomial",
)
REPORTERS = ("tensorboard", "trackio", "mlflow", "wandb")


def refuse_unsupported(request: pb.TrainRequest) -> None:
    """Raise UNIMPLEMENTED (NOT_SUPPORTED) for a part of the contract that is not served."""
    if request.method == pb.METHOD_FULL and request.objective == pb.OBJECTIVE_DPO:
        raise unsupported("objective OBJECTIVE_DPO with METHOD_FULL", "Use METHOD_LORA or METHOD_DORA.")
    if request.launcher == pb.LAUNCHER_RAY:
        raise unsupported("launcher LAUNCHER_RAY", "Use LAUNCHER_PROCESS or LAUNCHER_TORCHRUN.")


def refuse_unknown(request: pb.TrainRequest) -> None:
    """Raise INVALID_ARGUMENT for a schedule or a report's name that is not known, and for a seed that torch refuses."""
    p = request.parameters
    if p.lr_scheduler not in SCHEDULES:
        message = f"parameters.lr_scheduler {p.lr_scheduler!r} is not known. Take one of: {', '.join(SCHEDULES)}."
        raise invalid_argument("LR_SCHEDULER_UNKNOWN", message, parameters__lr_scheduler="is not known")
    unknown = [name for name in p.report_to if name not in REPORTERS]
    if unknown:
        message = f"parameters.report_to {', '.join(unknown)} is not known. Take some of: {', '.join(REPORTERS)}."
        raise invalid_argument("REPORTER_UNKNOWN", message, parameters__report_to="is not known")
    if p.seed < 0 or p.seed >= 2**32:
        text = "must be between 0 and 4294967295"
        raise invalid_argument("SEED_OUT_OF_RANGE", f"parameters.seed {text}.", parameters__seed=text)


def refuse_contradictions(request: pb.TrainRequest) -> None:
    """Raise INVALID_ARGUMENT (SETTINGS_CONTRADICT) naming every field that means nothing beside another."""
    p, problems = request.parameters, {}
    if request.method == pb.METHOD_FULL:
        if p.HasField("lora") and p.lora != pb.LoraParameters():
            problems["parameters.lora"] = "belongs to METHOD_LORA and METHOD_DORA; METHOD_FULL has no adapter"
        if p.quantization in (pb.QUANTIZATION_NF4, pb.QUANTIZATION_INT8):
            problems["parameters.quantization"] = (
                "cannot be trained with METHOD_FULL: quantised weights stay as they are"
            )
        if request.HasField("init_adapter"):
            problems["init_adapter"] = "belongs to METHOD_LORA and METHOD_DORA; merge it into the base first"
    if request.objective == pb.OBJECTIVE_DPO:
        problems |= _beside_pairs(p)
    elif p.dpo_beta:
        problems["parameters.dpo_beta"] = "belongs to OBJECTIVE_DPO"
    if problems:
        raise _contradiction(problems)


def _beside_pairs(p: pb.TrainingParameters) -> dict[str, str]:
    problems = {}
    if p.packing:
        problems["parameters.packing"] = "does not go with OBJECTIVE_DPO, whose rows are pairs"
    if p.neftune_alpha:
        problems["parameters.neftune_alpha"] = "does not go with OBJECTIVE_DPO: it would blur the reference too"
    if p.length_policy == pb.LENGTH_POLICY_SPLIT:
        problems["parameters.length_policy"] = "SPLIT does not go with OBJECTIVE_DPO: one question is compared"
    if p.lora.modules_to_save:
        problems["parameters.lora.modules_to_save"] = "does not go with OBJECTIVE_DPO: the reference has none of them"
    return problems


def _contradiction(problems: dict[str, str]) -> LoralineError:
    listed = "; ".join(f"{field} {problem}" for field, problem in problems.items())
    error = invalid_argument("SETTINGS_CONTRADICT", f"The run's settings contradict each other: {listed}.")
    error.fields = problems
    return error
