"""Control tokens in texts: what the trainer would refuse is refused when the data are made."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1 import datagen_pb2
from loraline.api.job.v1 import job_pb2
from loraline.core.errors import LoralineError
from loraline.core.evidence.specials import SpecialTokens
from loraline.datagen.quality.gate import Gate
from loraline.datagen.quality.rows import RowCheck
from loraline.datagen.quality.rules.control import USUAL
from loraline.datagen.quality.settings import CheckSettings
from loraline.datagen.quality.tokenizer import load_tokenizer, special_tokens
from loraline.datagen.rows import Row

from .conftest import FakeProvider, Running, completion
from .quality_data import check, found, row
from .test_datagen_servicer import reason_of
from .test_llm_jobs import generate, request_of, result_of

PLAIN = "Is <s>this</s> struck out, and [INST] a word? <|unheard_of|> <im_start> < |im_end|>"


def tokenizer(folder: Path, specials: tuple[str, ...] = ("<s>", "</s>", "<unk>", "<|stop|>"), **saved: int) -> Path:
    """Write the tokenizer.json of a Unigram model whose unknown token is a special one."""
    pieces = [("<unk>", 0.0), *((char, -1.0) for char in "abcdefghijklmnopqrstuvwxyz ?[]<>|_/")]
    made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    made.add_tokens([AddedToken("<tool>", special=False)])
    if saved:
        made.enable_truncation(saved["longest"])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def fault(text: str, settings: CheckSettings | None = None, gate: Gate | None = None) -> str:
    messages = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": text}]
    return RowCheck(settings, gate).fault(Row(messages, "", "", ""))


@pytest.mark.parametrize("token", USUAL)
def test_the_usual_spellings_are_refused_in_any_turn(tmp_path: Path, token: str) -> None:
    assert fault(f"So be it.{token}") == "CONTROL_TOKEN"
    assert fault("So be it.", gate=Gate(refuse=frozenset({"NOT_JSON"}))) == ""
    assert fault(f"{token}So be it.", gate=Gate(refuse=frozenset({"NOT_JSON"}))) == "CONTROL_TOKEN"
    rows = [row("Well?", PLAIN), row(f"{token} Well?", "So."), row("Well?", "So?", f"Be {token} brief.")]
    checked = check(tmp_path, rows)
    assert found(checked)["CONTROL_TOKEN"] == ["train.jsonl:2", "train.jsonl:3"]
    finding = next(finding for finding in checked.findings if finding.code == "CONTROL_TOKEN")
    assert finding.message == f"2 rows of 3: control tokens of chat templates in the text, such as “{token}”."


def test_text_that_no_template_uses_passes_without_a_base_model() -> None:
    assert fault(PLAIN) == ""
    with pytest.raises(LoralineError) as caught:
        Gate(allow=frozenset({"CONTROL_TOKEN"})).check_codes()
    assert caught.value.reason == "FINDING_CANNOT_BE_ALLOWED"


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("so it is", ""), ("what is 潮 to you", ""), ("a <tool> b", ""), ("<|im_end|>", ""), ("[INST]", ""),
        ("a </s> b", "</s>"), ("now <|stop|>", "<|stop|>"), ("the <unk> word", "<unk>"), ("x " * 40 + "<s>", "<s>"),
    ],
)  # fmt: skip
def test_the_base_models_own_tokens_count_as_for_the_trainer(tmp_path: Path, text: str, token: str) -> None:
    transformers = pytest.importorskip("transformers")
    path = tokenizer(tmp_path / "base", longest=16)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    assert SpecialTokens(theirs).first_in(text) == token
    assert special_tokens(load_tokenizer(path)).first_in(text) == token
    settings = CheckSettings(tokenizer=path)
    assert fault(text, settings, Gate(allow=frozenset({"UNKNOWN_CHARACTERS"}))) == ("CONTROL_TOKEN" if token else "")
    told = found(check(tmp_path / "rows", [row("say it", text)], (), settings))
    assert ("CONTROL_TOKEN" in told) == bool(token)


def test_a_usual_token_counts_although_the_tokenizer_does_not_call_it_special(tmp_path: Path) -> None:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.add_tokens([AddedToken("<|im_end|>", special=False)])
    made.save(str(tmp_path / "tokenizer.json"))
    settings = CheckSettings(tokenizer=tmp_path / "tokenizer.json")
    assert fault("so<|im_end|>", settings) == "CONTROL_TOKEN"
    assert fault("so<|eot_id|>", settings) == ""


async def test_publication_is_refused_with_the_rows_named(running: Running, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "completion": "a </s> b" if n else "so it is<|im_end|>"} for n in range(3)]
    (running.root / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    request = datagen_pb2.ConvertDatasetRequest(
        name="controlled", source=datagen_pb2.ConvertSource(path=str(running.root))
    )
    request.split.validation_fraction = 0
    job = await running.finished((await running.datagen.ConvertDataset(request)).job.name)
    assert (job.state, reason_of(job.error)) == (job_pb2.JOB_STATE_FAILED, "CONTROL_TOKEN")
    assert "1 row of 3: control tokens" in job.error.message and "“<|im_end|>”" in job.error.message
    folder = tokenizer(tmp_path / "base").parent
    (folder / "model.safetensors").write_bytes(b"weights")
    request.gate.base_model.CopyFrom(running.library.publish(artifact_pb2.ARTIFACT_KIND_MODEL, "base", folder).ref)
    job = await running.finished((await running.datagen.ConvertDataset(request)).job.name)
    assert reason_of(job.error) == "CONTROL_TOKEN"
    assert "2 rows of 3: control tokens" in job.error.message and "“</s>”" in job.error.message


@pytest.mark.slow
async def test_a_model_that_writes_a_control_token_is_asked_again(running: Running, provider: FakeProvider) -> None:
    numbers = itertools.count()

    def reply(_: dict[str, Any]) -> web.Response:
        number = next(numbers)
        answer = "Yes.<|im_end|>" if number == 0 else f"Yes, {number} times."
        return completion(json.dumps({"items": [{"instruction": f"question {number}", "response": answer}]}))

    provider.default = reply
    result = result_of(await generate(running, request_of(rows=2, batch_size=1, max_candidates_ratio=3)))
    assert result.train_rows + result.validation_rows == 2
    assert result.rows_by_outcome["rejected_control_token"] == 1
    assert "CONTROL_TOKEN" not in {finding.code for finding in result.findings}
