"""README.md of an adapter: what it is and what is proven about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraline.trainer.spec import TrainingSpec

if TYPE_CHECKING:
    from loraline.trainer.engines.training import FinishedRun, RunInputs


def model_card(finished: FinishedRun, inputs: RunInputs, spec: TrainingSpec) -> str:
    """Return the card as Markdown with the front matter that the Hub reads."""
    base = inputs.base
    front = ["---", "library_name: peft", "pipeline_tag: text-generation", "tags: [lora, loraline]"]
    if base.model.hub_id:
        front.append(f"base_model: {base.model.hub_id}")
    sections = [
        "\n".join([*front, "---"]),
        f"# {inputs.name}\n\nA LoRA adapter for `{base.label}`, trained by Loraline.",
        "## How it was trained\n\n" + _table(_settings(finished, inputs, spec)),
        "## Token receipt\n\nWhat the run trained on, from `token_receipt.json`.\n\n" + _table(_receipt(finished)),
        "## Result\n\n" + _table(_result(finished)),
        "## Probes\n\nMean log-probability of the response's tokens, in nats, from `probes.json`.\n\n"
        + _probes(finished),
        "## Answers\n\nGreedy, base beside adapter, at the end of training; all of them are in `samples.json`.\n\n"
        + _samples(finished),
    ]
    return "\n\n".join(sections) + "\n"


def _settings(finished: FinishedRun, inputs: RunInputs, spec: TrainingSpec) -> dict[str, str]:
    lora = spec.lora
    kind = "DoRA" if lora.dora else "rsLoRA" if lora.rslora else "LoRA"
    return {
        "Started from": f"`{inputs.init_adapter_name}`" if inputs.init_adapter_name else "a fresh adapter",
        "Datasets": ", ".join(f"`{name}`" for name in inputs.dataset_names) or "local files",
        "Method": f"{kind}, rank {lora.r}, alpha {lora.alpha:g}, dropout {lora.dropout:g}",
        "Modules": ", ".join(finished.target_modules),
        "Learning rate": f"{spec.learning_rate:g}, {spec.lr_scheduler}",
        "Batch": f"{spec.batch_size} rows × {spec.grad_accum}",
        "Weights": f"{finished.precision.dtype}, quantisation {finished.precision.note}",
        "Seed": str(spec.seed),
    }


def _receipt(finished: FinishedRun) -> dict[str, str]:
    counts = finished.receipt.counts
    return {
        "Rows": str(counts.rows),
        "Tokens": f"{counts.tokens}, of which {counts.trained_tokens} carry loss",
        "Mask made by": finished.receipt.mask_method,
        "Rows that teach the end of an answer": str(counts.rows_teaching_eos),
        "Rows cut / dropped / split / without loss": (
            f"{counts.truncated_rows} / {counts.dropped_rows} / {counts.split_rows} / {counts.fully_masked_rows}"
        ),
    }


def _result(finished: FinishedRun) -> dict[str, str]:
    rows = {
        "Steps": f"{finished.run.steps} ({finished.run.epochs:.2f} epochs, {finished.run.tokens} tokens)",
        "Loss over the last tenth": f"{finished.figures['loss']:.4f} nats per token",
        "Token accuracy over the last tenth": f"{finished.figures['token_accuracy']:.4f}",
    }
    if "eval_loss" in finished.figures:
        rows["Last evaluation loss"] = f"{finished.figures['eval_loss']:.4f} nats per token"
    return rows


def _probes(finished: FinishedRun) -> str:
    lines = ["| probe | base | adapter | greatest shift of a token |", "| --- | --- | --- | --- |"]
    for probe in finished.probes.probes:
        count = len(probe.response_ids)
        base, tuned = sum(probe.base_logprobs) / count, sum(probe.adapter_logprobs) / count
        lines.append(f"| {probe.name} | {base:.3f} | {tuned:.3f} | {probe.shift:.3f} |")
    return "\n".join(lines)


def _samples(finished: FinishedRun) -> str:
    lines = ["| prompt | from | base | adapter |", "| --- | --- | --- | --- |"]
    for sample in finished.last_samples:
        cells = (sample.prompt, sample.origin.replace("_", " "), sample.base, sample.adapter)
        lines.append("| " + " | ".join(_cell(text) for text in cells) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])
