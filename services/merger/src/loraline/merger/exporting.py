"""A finished model folder written for another runtime, read back and measured. Publishes nothing itself."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraline.core.errors import failed_precondition, unsupported
from loraline.core.evidence.probes import FILE_NAME as PROBES_FILE
from loraline.core.evidence.receipt import FILE_NAME as RECEIPT_FILE
from loraline.core.model_files.tokenizer import read_tokenizer
from loraline.merger.check.findings import loadable
from loraline.merger.check.folder import check_folder
from loraline.merger.check.tokenizer import stopping_ids
from loraline.merger.check.tokens import chat_template
from loraline.merger.engines.gguf_export import F16, Q8_0, write_gguf
from loraline.merger.engines.judgement import changed_model, measure_export
from loraline.merger.engines.measure import Measurement
from loraline.merger.engines.quantised_export import FP8, INT8, write_quantised
from loraline.merger.engines.rendering import load_tokenizer, text_renderer
from loraline.merger.exports.chat_shape import ChatShape, find_shape
from loraline.merger.exports.licence import find_licence
from loraline.merger.exports.modelfile import Modelfile, go_template, parameters_of, read_modelfile
from loraline.merger.json_files import read_json
from loraline.merger.merging import MergeWatch
from loraline.merger.spec import ExportSpec, MeasureSettings

GGUF_FILE = {"gguf_f16": "model-f16.gguf", "gguf_q8_0": "model-q8_0.gguf", "ollama": "model.gguf"}
_SCHEMES = {"fp8": FP8, "int8": INT8}


@dataclass
class ExportOutcome:
    """Everything that an export found out."""

    format: str
    size: int
    greatest_error: float
    """Greatest difference of a stored weight from the model's."""
    measurements: list[tuple[Measurement, bool]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def export_folder(
    source: Path, out: Path, spec: ExportSpec, settings: MeasureSettings, watch: MergeWatch
) -> ExportOutcome:
    """Write `source` to `out` as `spec.format` and measure it against the source.

    Raises FAILED_PRECONDITION (MODEL_DEFECTIVE, EXPORT_DIFFERS, MERGE_CHANGED_MODEL), UNIMPLEMENTED for models that the
    format does not take, INVALID_ARGUMENT for parameters that the runtime does not have.
    """
    _require_sound(source)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    _refuse_unused(spec)
    if spec.format in _SCHEMES:
        watch.stage(f"quantising to {spec.format}")
        written = write_quantised(source, out, _SCHEMES[spec.format], advance=watch.bytes_done)
        outcome = ExportOutcome(spec.format, written.size, written.greatest_error)
        for name in (RECEIPT_FILE, PROBES_FILE):
            if (source / name).exists():
                shutil.copyfile(source / name, out / name)
    else:
        outcome = _gguf(source, out, spec, watch)
    watch.check()
    for name in find_licence(source).files:
        shutil.copyfile(source / name, out / name)
    watch.stage("measuring the export against the model")
    found = measure_export(source, out, spec.format, GGUF_FILE.get(spec.format, ""), settings, watch)
    within = found.max_abs_logprob_diff <= spec.bounds.max_diff and found.mean_kl <= spec.bounds.max_kl
    outcome.measurements.append((found, within))
    if not within:
        raise changed_model(found, spec.bounds, spec.format, reference="the model it was made from")
    return outcome


def _require_sound(source: Path) -> None:
    findings = check_folder(source)
    if not loadable(findings):
        raise failed_precondition(
            "MODEL_DEFECTIVE",
            f"The model would not load: {findings[0].code}: {findings[0].message} Repair it with RepairModel first.",
            file=findings[0].file,
        )


def _refuse_unused(spec: ExportSpec) -> None:
    if spec.format != "ollama" and (spec.system_prompt or spec.parameters):
        what = "system_prompt" if spec.system_prompt else "parameters"
        raise unsupported(f"{what} with the format {spec.format}", "Only EXPORT_FORMAT_OLLAMA has a place for it.")


def _gguf(source: Path, out: Path, spec: ExportSpec, watch: MergeWatch) -> ExportOutcome:
    shape = _shape_of(source) if spec.format == "ollama" else None
    if shape is not None:  # before the weights, as it may be refused
        (out / "Modelfile").write_text(modelfile_of(source, shape, spec).text(), encoding="utf-8")
        _prove_modelfile(out / "Modelfile", modelfile_of(source, shape, spec))
    watch.stage("writing GGUF")
    written = write_gguf(
        source,
        out / GGUF_FILE[spec.format],
        Q8_0 if spec.format == "gguf_q8_0" else F16,
        name=spec.name,
        add_bos=None if shape is None else bool(shape.opening),
        advance=watch.bytes_done,
    )
    notes = [f"{written.tensors} tensors were read back and equal the model's to {written.greatest_error:.3g}"]
    if shape is not None:
        notes.append("the chat template was translated; on ten conversations it gives the texts of the original")
    return ExportOutcome(spec.format, written.size, written.greatest_error, notes=notes)


def _shape_of(source: Path) -> ChatShape:
    if not chat_template(source):
        raise failed_precondition(
            "CHAT_TEMPLATE_MISSING",
            "The model has no chat template, so Ollama would not know how to write conversations. "
            "Export it as GGUF, or merge an adapter that brings its template.",
            file="chat_template.jinja",
        )
    tokenizer = load_tokenizer(source)
    return find_shape(text_renderer(tokenizer), str(tokenizer.bos_token or ""))


def modelfile_of(source: Path, shape: ChatShape, spec: ExportSpec) -> Modelfile:
    """Return the Modelfile of a folder: its GGUF, the translated template, prompt, parameters, stops, licence."""
    if spec.system_prompt and shape.system is None:
        raise unsupported("system_prompt with a chat template that refuses system messages", "Leave it empty.")
    generation = source / "generation_config.json"
    settings = read_json(generation, "CONFIG_UNREADABLE") if generation.is_file() else {}
    parameters = parameters_of(spec.parameters, settings, stop_texts(source, settings))
    licence = find_licence(source)
    texts = tuple((source / name).read_text(encoding="utf-8", errors="replace") for name in licence.files)
    return Modelfile(
        f"./{GGUF_FILE['ollama']}", go_template(shape), spec.system_prompt, tuple(parameters),
        texts or ((licence.identifier,) if licence.identifier else ()),
    )  # fmt: skip


def stop_texts(source: Path, generation: Mapping[str, Any]) -> Sequence[str]:
    """Return the texts of all tokens that end an answer."""
    files = read_tokenizer(source)
    _, ids = stopping_ids(read_json(source / "config.json", "CONFIG_UNREADABLE"), generation)
    texts = [files.text_of(number) for number in ids]
    return [text for text in dict.fromkeys([files.token("eos_token"), *texts]) if text and text.strip()]


def _prove_modelfile(path: Path, meant: Modelfile) -> None:
    """Read the file by Ollama's grammar; anything lost in quoting would change every prompt."""
    if read_modelfile(path.read_text(encoding="utf-8")) != meant:
        raise failed_precondition(
            "EXPORT_DIFFERS", "The Modelfile does not read back as it was meant. Nothing was published.", file=path.name
        )
