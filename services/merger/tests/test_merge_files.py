"""Config and tokenizer beside the base's, repairs of the base's defects, proof of rendering and of answers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from loraline.core.errors import LoralineError
from loraline.core.evidence.probes import load_probes
from loraline.core.evidence.receipt import load_receipt
from loraline.merger import merging
from loraline.merger.check.folder import check_folder
from loraline.merger.engines.measure import _require_tokens
from loraline.merger.merging import AdapterInput, MergeOptions, merge_folders
from loraline.merger.spec import MergeBounds
from loraline.merger.texts import MeasuredText


def edit(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    content.update(values)
    path.write_text(json.dumps(content, indent=2))


def merge(tmp_path: Path, base: Path, adapter: Path, **options: Any) -> tuple[Path, merging.MergeOutcome]:
    out = tmp_path / "work" / "model"
    return out, merge_folders(base, [AdapterInput(adapter, name="adapter/test:v1")], out, MergeOptions(**options))


def refused(tmp_path: Path, base: Path, adapter: Path, **options: Any) -> LoralineError:
    with pytest.raises(LoralineError) as caught:
        merge(tmp_path, base, adapter, **options)
    return caught.value


def codes(outcome: merging.MergeOutcome) -> list[str]:
    return [repair.code for repair in outcome.repairs]


def test_every_file_is_the_bases(tmp_path, make_base, make_adapter):
    base = make_base("llama", torch.bfloat16)
    adapter = make_adapter(base)
    (base / "LICENSE").write_text("Do as you like.")
    (base / "modeling_evil.py").write_text("raise SystemExit")
    (base / "training_args.bin").write_bytes(b"\x80\x04.")
    out, outcome = merge(tmp_path, base, adapter)
    assert codes(outcome) == []
    names = {file.path for file in outcome.synced}
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert wanted | {"LICENSE"} <= names
    for file in outcome.synced:
        assert file.difference == ""
        content = (out / file.path).read_bytes()
        assert content == (base / file.path).read_bytes()
        assert file.base_sha256 == file.merged_sha256 == hashlib.sha256(content).hexdigest()
    assert not list(out.glob("*.py"))
    assert not list(out.glob("*.bin"))
    assert (out / "token_receipt.json").read_bytes() == (adapter / "token_receipt.json").read_bytes()
    assert outcome.receipt_rows == 3
    assert check_folder(out, base) == []


def test_blank_eos_is_repaired_in_the_copy_only(tmp_path, make_base, make_adapter):
    base = make_base()
    adapter = make_adapter(base)
    edit(base / "tokenizer_config.json", eos_token=" ")
    before = (base / "tokenizer_config.json").read_bytes()
    out, outcome = merge(tmp_path, base, adapter)
    assert codes(outcome) == ["EOS_TOKEN_BLANK"]
    assert transformers.AutoTokenizer.from_pretrained(out).eos_token == "<|im_end|>"
    assert (base / "tokenizer_config.json").read_bytes() == before
    changed = [file.path for file in outcome.synced if file.difference]
    assert changed == ["tokenizer_config.json"]
    before_keys, after = json.loads(before), json.loads((out / "tokenizer_config.json").read_text())
    assert {key for key in after if after[key] != before_keys.get(key)} == {"eos_token"}


def test_missing_template_is_taken_from_the_adapter(tmp_path, make_base, make_adapter):
    base = make_base(template=None)
    adapter = make_adapter(base)
    assert not (base / "chat_template.jinja").exists()
    out, outcome = merge(tmp_path, base, adapter)
    assert codes(outcome) == ["CHAT_TEMPLATE_FROM_ADAPTER"]
    assert (out / "chat_template.jinja").read_text() == (adapter / "chat_template.jinja").read_text()
    assert outcome.receipt_rows == 3


def test_other_template_of_the_base_gives_way_to_the_trained_one(tmp_path, make_base, make_adapter):
    base = make_base()
    adapter = make_adapter(base)
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    _, outcome = merge(tmp_path, base, adapter)
    assert codes(outcome) == ["CHAT_TEMPLATE_FROM_ADAPTER"]
    assert [file.path for file in outcome.synced if file.difference] == ["chat_template.jinja"]


def test_learned_end_token_that_does_not_stop(tmp_path, make_base, make_adapter):
    base = make_base()
    adapter = make_adapter(base)
    edit(base / "generation_config.json", eos_token_id=0, pad_token_id=0)
    out, outcome = merge(tmp_path, base, adapter)
    assert codes(outcome) == ["EOS_IDS_DISAGREE"]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_disagreeing_pad(tmp_path, make_base, make_adapter):
    base = make_base()
    adapter = make_adapter(base)
    edit(base / "config.json", pad_token_id=7)
    out, outcome = merge(tmp_path, base, adapter)
    assert codes(outcome) == ["PAD_IDS_DISAGREE"]
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == 0


def test_class_that_only_transformers_5_has(tmp_path, make_base, make_adapter):
    base = make_base()
    adapter = make_adapter(base)
    edit(base / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    out, outcome = merge(tmp_path, base, adapter)
    assert codes(outcome) == ["TOKENIZER_CLASS_UNKNOWN"]
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_wrong_sizes_in_the_base_config_do_not_get_published(tmp_path, make_base, make_adapter):
    base = make_base()
    adapter = make_adapter(base)
    edit(base / "config.json", num_attention_heads=8)
    assert refused(tmp_path, base, adapter).reason in ("MODEL_DEFECTIVE", "MODEL_NOT_LOADABLE")


def test_receipt_of_another_tokenizer_is_refused(tmp_path, make_base, make_adapter):
    base = make_base()
    adapter = make_adapter(base)
    receipt = load_receipt(adapter)
    row = receipt.rows[1]
    ids = [*row.input_ids[:6], 77, *row.input_ids[7:]]
    receipt.rows[1] = type(row)(row.source, row.messages, ids, row.labels_mask)
    receipt.save(adapter)
    error = refused(tmp_path, base, adapter)
    assert error.reason == "RECEIPT_MISMATCH"
    assert error.metadata["row"] == "train.jsonl:2"
    assert error.metadata["position"] == "6"
    assert error.metadata["expected"] == "77"


def test_endless_template_is_stopped(tmp_path, make_base, make_adapter, monkeypatch):
    monkeypatch.setattr("loraline.merger.engines.rendering.RENDER_SECONDS", 0.3)
    base = make_base()
    adapter = make_adapter(base)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
    (base / "chat_template.jinja").write_text(loop + "{% endfor %}")
    assert refused(tmp_path, base, adapter).reason == "CHAT_TEMPLATE_TIMEOUT"


def damage(out: Path, factor: float) -> None:
    """Change one merged tensor a little, as a faulty merge would."""
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= factor
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def test_damaged_merge_is_refused_with_figures(tmp_path, make_base, make_adapter, monkeypatch):
    base = make_base()
    adapter = make_adapter(base)
    settle = merging.settle_files

    def settle_and_damage(*arguments: Any) -> Any:
        damage(arguments[2], 1.5)
        return settle(*arguments)

    monkeypatch.setattr(merging, "settle_files", settle_and_damage)
    error = refused(tmp_path, base, adapter)
    assert error.reason == "MERGE_CHANGED_MODEL"
    assert float(error.metadata["max_abs_logprob_diff"]) > 0.05
    assert float(error.metadata["base_to_adapter_diff"]) > 0.1
    assert int(error.metadata["tokens"]) > 20


def test_bound_of_the_request(tmp_path, make_base, make_adapter):
    base = make_base("llama", torch.bfloat16)
    adapter = make_adapter(base)
    _, outcome = merge(tmp_path, base, adapter)
    found, within = outcome.measurements[-1]
    assert within
    assert found.max_abs_logprob_diff > 1e-4  # rounding to bf16 shows
    error = refused(tmp_path, base, adapter, bounds=MergeBounds(max_diff=1e-6))
    assert error.reason == "MERGE_CHANGED_MODEL"


def test_adapter_that_answers_otherwise_than_recorded(tmp_path, make_base, make_adapter):
    base = make_base()
    adapter = make_adapter(base)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * 1.3 for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
    error = refused(tmp_path, base, adapter)
    assert error.reason == "ADAPTER_CHANGED"


def test_adapter_without_effect_is_remarked(tmp_path, make_base, make_adapter):
    base = make_base()
    adapter = make_adapter(base, size=0.0)
    _, outcome = merge(tmp_path, base, adapter)
    assert any("proves little" in remark for remark in outcome.remarks)


def test_foreign_adapter_is_measured_on_plain_texts(tmp_path, make_base, make_adapter):
    base = make_base()
    adapter = make_adapter(base, evidence=False)
    _, outcome = merge(tmp_path, base, adapter)
    assert outcome.measurements[-1][0].tokens > 100
    assert outcome.receipt_rows == 0
    assert any("base_model.json" in remark for remark in outcome.remarks)


def test_probes_are_measured_token_by_token(tmp_path, make_base, make_adapter):
    base = make_base()
    adapter = make_adapter(base)
    _, outcome = merge(tmp_path, base, adapter)
    recorded, _ = outcome.measurements[0]
    assert recorded.tokens == sum(len(probe.response_ids) for probe in load_probes(adapter).probes)


def test_leftovers_of_an_interrupted_attempt_do_not_pass_for_the_bases(tmp_path, make_base, make_adapter):
    base = make_base(template=None)
    adapter = make_adapter(base)
    out = tmp_path / "work" / "model"
    out.mkdir(parents=True)
    (out / "chat_template.jinja").write_text("{{ 'old' }}")
    (out / "generation_config.json.bak").write_text("{}")
    _, outcome = merge(tmp_path, base, adapter)
    assert codes(outcome) == ["CHAT_TEMPLATE_FROM_ADAPTER"]
    assert not (out / "generation_config.json.bak").exists()
    shutil.rmtree(out)


def test_probes_of_a_larger_vocabulary_are_refused(tmp_path, make_base, make_adapter):
    """On a GPU such an id is a device-side assert; here it is a refusal that names probe and id."""
    base = make_base()
    adapter = make_adapter(base)
    (adapter / "token_receipt.json").unlink()  # its rows would be rendered, and measured, as well
    probes = load_probes(adapter)
    first = probes.probes[0]
    probes.probes[0] = dataclasses.replace(first, response_ids=[*first.response_ids[:-1], 320])
    probes.save(adapter)
    with pytest.raises(LoralineError) as error:
        merge_folders(base, [AdapterInput(adapter)], tmp_path / "work" / "model", MergeOptions())
    assert error.value.reason == "ADAPTER_OF_ANOTHER_BASE"
    assert error.value.metadata["token_id"] == "320"
    assert not list((tmp_path / "work").glob("*.f32"))


@pytest.mark.parametrize("merging", [True, False])
@pytest.mark.parametrize(("number", "fits"), [(0, True), (319, True), (320, False), (-1, False)])
def test_ids_at_the_edge_of_the_embedding(number, fits, merging):
    embedding = torch.nn.Embedding(320, 4)
    model = SimpleNamespace(get_input_embeddings=lambda: embedding)
    texts = [MeasuredText("a", (1, 2), (1,)), MeasuredText("b", (1, number), (1,))]
    if fits:
        _require_tokens(model, texts, merging=merging)
        return
    with pytest.raises(LoralineError) as error:
        _require_tokens(model, texts, merging=merging)
    assert error.value.metadata["text"] == "b"
    assert error.value.reason == ("ADAPTER_OF_ANOTHER_BASE" if merging else "TOKEN_ID_OUT_OF_RANGE")
    assert ("adapter" in error.value.message) == merging  # an export has none to speak of


def test_a_quantisation_left_over_in_the_base_is_repaired_in_the_copy(tmp_path, make_base, make_adapter):
    base = make_base("llama", torch.bfloat16)
    adapter = make_adapter(base)
    left = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = base / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": left}))
    out = tmp_path / "work" / "model"
    outcome = merge_folders(base, [AdapterInput(adapter)], out, MergeOptions())
    assert "QUANTIZATION_LEFT_OVER" in {repair.code for repair in outcome.repairs}
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    transformers.AutoModelForCausalLM.from_pretrained(out)
    assert [finding.code for finding in check_folder(out) if finding.severity == "error"] == []
