"""What is published: the adapter or the model as it was saved, the base's tokenizer as it was used, the evidence."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraline.core.errors import failed_precondition
from loraline.trainer.engines.encoding import ChatEncoder
from loraline.trainer.engines.model_card import model_card
from loraline.trainer.engines.samples import FILE_NAME as SAMPLES
from loraline.trainer.engines.tiny_tokenizer import make_loadable
from loraline.trainer.spec import TrainingSpec

if TYPE_CHECKING:
    from loraline.trainer.engines.training import FinishedRun, RunInputs

REJECTED = "token_receipt_rejected.json"
"""Receipt of the rejected answers, beside that of the chosen ones."""
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def complete(folder: Path, finished: FinishedRun, inputs: RunInputs, spec: TrainingSpec, encoder: ChatEncoder) -> None:
    """Add tokenizer, evidence, log and card to the weights that were saved."""
    if spec.full:
        _check_model(folder, inputs)
    else:
        _check_adapter(folder, inputs)
    for name in _TOKENIZER_FILES:
        if (inputs.base.folder / name).is_file():
            shutil.copyfile(inputs.base.folder / name, folder / name)
    make_loadable(folder)
    (folder / "chat_template.jinja").write_text(encoder.template, encoding="utf-8")
    finished.receipt.save(folder)
    if finished.rejected is not None:
        finished.rejected.save(folder, REJECTED)
    finished.probes.save(folder)
    write_json(folder / SAMPLES, {"version": 1, "samples": [asdict(sample) for sample in finished.samples]})
    write_json(folder / "base_model.json", inputs.base.record())
    log = {"version": 1, "log_history": finished.run.log, "resumed_from": finished.run.resumed_from}
    write_json(folder / "training_log.json", log)
    (folder / "README.md").write_text(model_card(finished, inputs, spec), encoding="utf-8")


def _check_adapter(folder: Path, inputs: RunInputs) -> None:
    if not (folder / "adapter_model.safetensors").is_file():
        raise failed_precondition(
            "ADAPTER_NOT_SAFETENSORS", "The adapter was not saved as safetensors; install safetensors."
        )
    _name_base(folder, inputs)


def _check_model(folder: Path, inputs: RunInputs) -> None:
    """Take over how the base is generated with, and the code that it brought."""
    if not list(folder.glob("*.safetensors")):
        raise failed_precondition("ADAPTER_NOT_SAFETENSORS", "The model was not saved as safetensors.")
    generation = inputs.base.folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    if inputs.base.trust_remote_code:
        for file in inputs.base.folder.glob("*.py"):
            shutil.copyfile(file, folder / file.name)


def adapter_config(folder: Path) -> dict[str, Any]:
    """Return peft's adapter_config.json, target modules sorted."""
    content = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if isinstance(content.get("target_modules"), list):
        content["target_modules"] = sorted(content["target_modules"])
    else:
        content["target_modules"] = [str(content.get("target_modules"))]
    return content


def _name_base(folder: Path, inputs: RunInputs) -> None:
    """Replace the local folder in adapter_config.json by the base's name; sort what peft keeps in sets."""
    content = adapter_config(folder)
    content["base_model_name_or_path"] = inputs.base.label
    if inputs.base.model.revision:
        content["revision"] = inputs.base.model.revision
    write_json(folder / "adapter_config.json", content)


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
