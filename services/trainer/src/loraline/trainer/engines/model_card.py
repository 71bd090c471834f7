"""README.md of an adapter: what it is and what is proven about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraline.core.evidence.receipt import TokenReceipt
from loraline.trainer.spec import TrainingSpec

if TYPE_CHECKING:
    from loraline.trainer.engines.training import FinishedRun, RunInputs


def model_card(finished: FinishedRun, inputs: RunInputs, spec: TrainingSpec) -> str:
    """Return the card as Markdown with the front matter that the Hub reads."""
    base = inputs.base
    library, tag = ("transformers", "full") if spec.full else ("peft", "lora")
    front = ["---", f"library_name: {library}", "pipeline_tag: text-generation", f"tags: [{tag}, loraline]"]
    if base.model.hub_id:
        front.append(f"base_model: {base.model.hub_id}")
    sections = [
        "\n".join([*front, "---"]),
        f"# {inputs.name}\n\n{_what(spec)} `{base.label}`, trained by Loraline.",
        "## How it was trained\n\n" + _table(_settings(finished, inputs, spec)),
        "## Token receipt\n\nWhat the run trained on, from `token_receipt.json`.\n\n"
        + _table(_receipt(finished.receipt)),
        *_rejected(finished),
        "## Result\n\n" + _table(_result(finished)),
        "## Probes\n\nMean log-probability of the response's tokens, in nats, from `probes.json`.\n\n"
        + _probes(finished),
        "## Answers\n\nGreedy, base beside adapter, at the end of training; all of them are in `samples.json`.\n\n"
        + _samples(finished),
    ]
    return "\n\n".join(sections) + "\n"


def _what(spec: TrainingSpec) -> str:
    return "All weights of" if spec.full else "A LoRA adapter for"


def _method(spec: TrainingSpec) -> str:
    lora = spec.lora
    kind = "DoRA" if lora.dora else "rsLoRA" if lora.rslora else "LoRA"
    how = "all weights" if spec.full else f"{kind}, rank {lora.r}, alpha {lora.alpha:g}, dropout {lora.dropout:g}"
    return f"{how}; DPO, beta {spec.dpo_beta:g}" if spec.preference else how


def _rejected(finished: FinishedRun) -> list[str]:
    if finished.rejected is None:
        return []
    told = "Those above are the chosen answers; these are the rejected ones, from `token_receipt_rejected.json`."
    return [f"## Rejected answers\n\n{told}\n\n" + _table(_receipt(finished.rejected))]


def _settings(finished: FinishedRun, inputs: RunInputs, spec: TrainingSpec) -> dict[str, str]:
    return {
        "Started from": f"`{inputs.init_adapter_name}`" if inputs.init_adapter_name else "the base",
        "Datasets": ", ".join(f"`{name}`" for name in inputs.dataset_names) or "local files",
        "Method": _method(spec),
        "Modules": ", ".join(finished.target_modules) or "all",
        "Learning rate": f"{spec.learning_rate:g}, {spec.lr_scheduler}",
        "Batch": f"{spec.batch_size} rows × {spec.grad_accum}",
        "Weights": f"{finished.precision.dtype}, quantisation {finished.precision.note}",
        "Seed": str(spec.seed),
    }


def _receipt(receipt: TokenReceipt) -> dict[str, str]:
    counts = receipt.counts
    return {
        "Rows": f"{counts.unique_rows}; an epoch shows {counts.rows}",
        "Tokens": f"{counts.tokens}, of which {counts.trained_tokens} carry loss",
        "Mask made by": receipt.mask_method,
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
    if "reward_accuracy" in finished.figures:
        rows["Pairs whose chosen answer is rewarded more"] = f"{finished.figures['reward_accuracy']:.4f}"
        rows["Reward of the chosen answers above the rejected ones"] = f"{finished.figures['reward_margin']:.4f}"
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
