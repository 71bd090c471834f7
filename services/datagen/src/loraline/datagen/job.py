"""What a dataset job does in its own process: make the rows, split them, check them, publish them."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1 import datagen_pb2
from loraline.core.artifacts.refs import format_ref
from loraline.core.errors import LoralineError
from loraline.core.jobs.context import JobContext
from loraline.datagen.convert.engine import ConvertCounts
from loraline.datagen.publish.card import DataCard
from loraline.datagen.publish.facts import convert_facts, gate_facts, template_facts
from loraline.datagen.publish.outcomes import OutcomeCounter
from loraline.datagen.publish.spool import RowSpool
from loraline.datagen.quality.checks import check_folder
from loraline.datagen.quality.findings import Finding
from loraline.datagen.quality.gate import Gate, refusal
from loraline.datagen.quality.report import write_report
from loraline.datagen.quality.request import for_recipe, gate_of, settings_of
from loraline.datagen.quality.rows import RowCheck
from loraline.datagen.rows import Row
from loraline.datagen.sources import convert_rows, located, template_rows
from loraline.datagen.spec import named_sources, split_of

if TYPE_CHECKING:
    from loraline.datagen.llms.intake import Intake

REPORT_EVERY = 500

Source = tuple[str, datagen_pb2.DatasetSource]


def convert_dataset(context: JobContext, request: datagen_pb2.ConvertDatasetRequest) -> datagen_pb2.DatasetResult:
    """Convert raw files into a dataset."""
    sources = [("convert", datagen_pb2.DatasetSource(name="convert", convert=request.source))]
    return _DatasetJob(context, request, sources).run()


def generate_dataset(context: JobContext, request: datagen_pb2.GenerateDatasetRequest) -> datagen_pb2.DatasetResult:
    """Make a dataset from any mix of sources."""
    return _DatasetJob(context, request, named_sources(request.sources)).run()


class _DatasetJob:
    """One dataset on its way. Only the ledgers of language models outlive an attempt; all else is made anew."""

    def __init__(
        self, context: JobContext, sources_of: datagen_pb2.ConvertDatasetRequest | datagen_pb2.GenerateDatasetRequest,
        sources: Sequence[Source],
    ):  # fmt: skip
        self._context, self._request, self._sources = context, sources_of, sources
        self._gate: Gate = gate_of(sources_of.gate)
        self._fraction, self._seed = split_of(sources_of.split)
        self._outcomes: Counter[str] = Counter()
        self._told: list[Mapping[str, Any]] = []
        self._answers: dict[str, int] = {}
        self._costs: dict[str, float] = {}

    def run(self) -> datagen_pb2.DatasetResult:
        """Make and publish the dataset."""
        spool = RowSpool(self._context.workdir, drop_duplicates=self._gate.drop_duplicates)
        try:
            for index, (name, source) in enumerate(self._sources):
                self._take(index, name, source, spool)
            return self._publish(spool)
        except LoralineError as error:
            if any(self._answers.values()):
                error.message = f"{error.message} {self._recorded()}"
            raise
        finally:
            spool.close()

    def _recorded(self) -> str:
        count = sum(self._answers.values())
        return (
            f"{count} answer{'s' if count != 1 else ''} of language models {'are' if count != 1 else 'is'} recorded; a "
            "new job with the same recipe, seed and name of the source starts from them and pays for none again, "
            "until this job is deleted."
        )

    def _take(self, index: int, name: str, source: datagen_pb2.DatasetSource, spool: RowSpool) -> None:
        kind = source.WhichOneof("source")
        if kind == "convert":
            counts = ConvertCounts()
            rows = convert_rows(source.convert, self._context.settings.allowed_paths, self._context.fetch, counts)
            made = self._spool(index, rows, name, spool, counts.outcomes)
            self._tell_convert(name, counts, {**convert_facts(source.convert), "outcomes": dict(made)})
        elif kind == "template":
            known: Counter[str] = Counter()

            def stands_already(messages: list[dict[str, str]]) -> bool:
                known["duplicate"] += spool.has(messages)
                return spool.has(messages)

            rows = template_rows(source.template, self._seed, name, stands_already)
            made = self._spool(index, rows, name, spool, known)
            self._outcomes.update(known)
            facts = template_facts(source.template, name, self._seed)
            self._told.append({"name": name, "kind": "template", "outcomes": dict(made), "in_force": facts})
        else:
            self._ask(index, name, source.llm, spool)

    def _counter(self, part: str) -> OutcomeCounter:
        return OutcomeCounter(self._context.count, self._context.workdir / f"counted-{part}.json")

    def _spool(self, index: int, rows: Iterator[Row], name: str, spool: RowSpool, others: Counter[str]) -> Counter[str]:
        """Take a source's rows in; return what became of its records, `others` included."""
        before, counter = spool.outcomes.copy(), self._counter(str(index + 1))
        try:
            for number, row in enumerate(rows):
                if number % REPORT_EVERY == 0:
                    self._context.check_stop()
                    self._report(name, spool)
                    counter.tell(spool.outcomes - before + others)
                spool.add(row, name)
        finally:
            counter.tell(spool.outcomes - before + others)
        self._report(name, spool)
        return spool.outcomes - before + others

    def _report(self, name: str, spool: RowSpool, metrics: Mapping[str, float] | None = None) -> None:
        told = {f"rows_{name}": float(spool.outcomes[name]) for name in ("accepted", "duplicate")}
        # Nobody knows beforehand how many rows files hold, so a step is a row of the sources that say how many they
        # make; rows of files are in the message, and are the steps where there is nothing else.
        planned = {other: source for other, source in self._sources if source.WhichOneof("source") != "convert"}
        wanted = [source.template.rows + source.llm.rows for source in planned.values()]
        made = spool.statistics.by_source
        message = f"Making rows of {name}" if name in planned else f"Converting {name}: {made[name]} rows"
        self._context.progress(
            step=sum(made[other] for other in planned) if planned else spool.outcomes["accepted"],
            total_steps=sum(wanted) if all(wanted) else 0,  # 0 rows: of each text one, and the texts are not read yet
            message=message, unit="row", metrics={**told, **(metrics or {})},
        )  # fmt: skip

    def _with_cost(self, name: str, figures: Mapping[str, float]) -> dict[str, float]:
        """Return a source's figures with the cost of all sources, and the cost expected once the last one is asked."""
        others = sum(cost for other, cost in self._costs.items() if other != name)
        told = dict(figures, cost_usd=figures["cost_usd"] + others)
        expected = told.pop("cost_usd_expected", None)
        last = [other for other, source in self._sources if source.WhichOneof("source") == "llm"][-1]
        return told if expected is None or name != last else told | {"cost_usd_expected": expected + others}

    def _tell_convert(self, name: str, counts: ConvertCounts, facts: Mapping[str, Any]) -> None:
        self._outcomes.update(counts.outcomes)
        if counts.bad_records:
            self._context.note(
                f"{counts.outcomes['bad_record']} records of {name} were set aside. The first: {counts.bad_records[0]}",
                severity="warning", reason="BAD_RECORDS",
            )  # fmt: skip
        if counts.ignored_files:
            self._context.note(
                f"Files of {name} that are not converted: {', '.join(counts.ignored_files[:20])}",
                reason="FILES_IGNORED",
            )  # fmt: skip
        self._told.append({
            "name": name, "kind": "convert", "files": dict(counts.files), "shapes": dict(counts.shapes),
            "turn_notes": dict(counts.notes), "bad_records": counts.bad_records, "ignored_files": counts.ignored_files,
            **facts,
        })  # fmt: skip

    def _ask(self, index: int, name: str, recipe: datagen_pb2.LlmRecipe, spool: RowSpool) -> None:
        # Here, so that jobs without a language model start without its client.
        from loraline.datagen.llms.source import job_hooks, llm_rows, open_ledger
        from loraline.datagen.llms.texts import open_texts

        context = self._context

        def progress(intake: Intake, figures: Mapping[str, float]) -> None:
            self._answers[name], self._costs[name] = intake.answers, intake.cost
            self._report(name, spool, self._with_cost(name, figures))

        folder = context.workdir / f"llm-{index + 1}"
        folder.mkdir(exist_ok=True)
        texts = None
        if recipe.HasField("texts"):
            texts = open_texts(recipe, folder / "texts", context.settings.allowed_paths, context.fetch)
        hooks = job_hooks(context, recipe.rows, progress)
        check = RowCheck(for_recipe(settings_of(self._request.gate, context.library), recipe), self._gate)
        intake = llm_rows(
            recipe, self._seed, name, folder, lambda row: spool.add(row, name, count=False), hooks,
            context.settings, check, texts=texts, longest_text=self._request.gate.max_response_characters,
            ledger=open_ledger(context, index + 1, folder),
        )  # fmt: skip
        self._outcomes.update(intake.outcomes)
        self._told.append({
            "name": name, "kind": "llm", "recipe": recipe.recipe, "models": dict(intake.models),
            "outcomes": {"accepted": intake.accepted, **intake.outcomes}, "in_force": intake.facts,
            "candidates": intake.candidates, "salvage": dict(intake.rungs),
            "prompt_tokens": intake.prompt_tokens, "completion_tokens": intake.completion_tokens,
            "cost_usd": round(intake.cost, 6), "unparsable": intake.unparsable,
            "answers": intake.answers, "answers_reused": intake.reused,
        })  # fmt: skip

    def _publish(self, spool: RowSpool) -> datagen_pb2.DatasetResult:
        context = self._context
        outcomes = Counter(self._outcomes)
        outcomes.update(spool.outcomes)
        if not len(spool):
            told = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items())) or "no records at all"
            raise refusal([Finding("EMPTY_DATASET", f"No row came out of the sources ({told}).")])
        folder = _new_folder(context.workdir / "dataset")
        train, validation = spool.write(folder, self._fraction, self._seed)
        findings = self._check(folder)
        inputs = self._inputs()
        settings = json_format.MessageToDict(self._request, preserving_proto_field_name=True)
        settings.pop("request_id", None)
        DataCard(
            self._request.name, train, validation, spool.statistics, outcomes, settings,
            inputs, findings, self._told, self._in_force(),
        ).write(folder)  # fmt: skip
        facts = {"rows": train + validation, "train_rows": train, "validation_rows": validation,
                 "answers": spool.statistics.answers, "rows_by_kind": dict(spool.statistics.by_kind)}  # fmt: skip
        artifact = publish_folder(context, self._request.name, folder, inputs, settings, facts)
        return datagen_pb2.DatasetResult(
            dataset=artifact.ref, train_rows=train, validation_rows=validation, rows_by_outcome=outcomes,
            rows_by_kind=spool.statistics.by_kind, findings=[finding.to_proto() for finding in findings],
        )  # fmt: skip

    def _check(self, folder: Path) -> list[Finding]:
        """Check the rows and write the report beside them; a refused dataset leaves its report in the store."""
        context = self._context
        # How fast rows were made says nothing of how fast they are checked.
        context.progress(fraction=0.9, eta_seconds=math.inf, message="Checking rows", unit="row")
        settings = settings_of(self._request.gate, context.library)
        check = check_folder(folder, settings, context.workdir, lambda _: context.check_stop())
        refused = self._gate.refused(check.findings)
        report = _new_folder(context.workdir / "report") if refused else folder
        write_report(report, self._request.name, folder, check, not refused)
        if refused:
            rejected = {f"rejected_{finding.code.lower()}": finding.row_count for finding in refused}
            self._counter("gate").tell(rejected)
            kind = artifact_pb2.ARTIFACT_KIND_REPORT
            facts = {"passed": False, "findings": [finding.code for finding in check.findings]}
            told = publish_folder(context, self._request.name, report, self._inputs(), {}, facts, kind)
            raise refusal(refused, format_ref(told.ref))
        return check.findings

    def _inputs(self) -> list[artifact_pb2.ArtifactRef]:
        return [place.artifact for place in located(source for _, source in self._sources)]

    def _in_force(self) -> dict[str, Any]:
        """Return the settings of the whole dataset with their defaults."""
        return {"seed": self._seed, "validation_fraction": self._fraction, **gate_facts(self._request.gate)}


def _new_folder(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def publish_folder(
    context: JobContext, name: str, folder: Path, inputs: Sequence[artifact_pb2.ArtifactRef],
    settings: Mapping[str, Any], facts: Mapping[str, Any], kind: int = artifact_pb2.ARTIFACT_KIND_DATASET,
) -> artifact_pb2.Artifact:  # fmt: skip
    """Publish a folder with this package's version in its manifest."""
    versions = {"loraline-datagen": version("loraline-datagen")}
    return context.publish(
        kind, name, folder, inputs=inputs, settings=settings, facts=facts, library_versions=versions
    )  # fmt: skip
