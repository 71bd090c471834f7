"""GGUF and 8-bit exports: every tensor read back, measured against the model, and read by llama.cpp."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file

from loraline.core.errors import LoralineError
from loraline.merger.engines import gguf_export
from loraline.merger.engines.gguf_names import rope_factors
from loraline.merger.exporting import ExportOutcome, export_folder
from loraline.merger.merging import MergeWatch
from loraline.merger.spec import EXPORT_FORMATS, ExportSpec, MeasureSettings, MergeBounds

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
ARCHITECTURES = ["llama", "llama-tied", "mistral", "qwen2", "qwen2-untied", "qwen3"]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def export(base: Path, out: Path, kind: str, bounds: MergeBounds | None = None, **options: Any) -> ExportOutcome:
    bounds = bounds or next(MergeBounds(kl, diff) for name, diff, kl in EXPORT_FORMATS.values() if name == kind)
    return export_folder(base, out, ExportSpec("voice", kind, bounds, **options), MeasureSettings(), MergeWatch())


def sound(shared_base: Any, architecture: str, **more: Any) -> Path:
    window = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 128}}.get(architecture, {})
    return shared_base(architecture, dtype=torch.bfloat16, shard="60KB", **{**SIZES, **window, **more})


@pytest.mark.parametrize("kind", ["gguf_f16", "gguf_q8_0"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gguf(tmp_path, shared_base, architecture, kind):
    base = sound(shared_base, architecture)
    outcome = export(base, tmp_path / "out", kind)
    measured, within = outcome.measurements[-1]
    assert within
    assert measured.tokens > 100
    (path,) = (tmp_path / "out").glob("*.gguf")
    reader = gguf.GGUFReader(str(path))
    assert len(reader.tensors) == sum(len(load_file(p)) for p in base.glob("*.safetensors"))
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds == {"F32", "Q8_0" if kind == "gguf_q8_0" else "F16"}
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == {"mistral": "llama", "llama-tied": "llama"}.get(
        architecture, architecture.removesuffix("-untied")
    )
    tokens = transformers.AutoTokenizer.from_pretrained(base)
    assert fields["tokenizer.ggml.tokens"][:300] == tokens.convert_ids_to_tokens(range(300))
    assert fields["tokenizer.ggml.eos_token_id"] == tokens.eos_token_id
    assert fields["tokenizer.chat_template"] == tokens.chat_template


def test_values_that_read_back_otherwise_are_refused(tmp_path, shared_base, monkeypatch):
    encode = gguf_export._encode

    def faulty(library: Any, values: numpy.ndarray, stored: str) -> numpy.ndarray:
        made = encode(library, values, stored).copy()
        if made.ndim == 2 and stored == "F16":
            made[0, 0] += 1
        return made

    monkeypatch.setattr(gguf_export, "_encode", faulty)
    with pytest.raises(LoralineError) as error:
        export(sound(shared_base, "llama"), tmp_path / "out", "gguf_f16")
    assert error.value.reason == "EXPORT_DIFFERS"
    assert not list((tmp_path / "out").glob("*.gguf*"))


@pytest.mark.parametrize(
    ("architecture", "settings", "words"),
    [("gemma", {}, "model type gemma"), ("mixtral", {}, "model type mixtral"), ("mistral", {}, "sliding window")],
)
def test_models_that_gguf_is_not_written_for(tmp_path, shared_base, architecture, settings, words):
    with pytest.raises(LoralineError) as error:
        export(shared_base(architecture, **settings), tmp_path / "out", "gguf_f16")
    assert error.value.reason == "NOT_SUPPORTED"
    assert words in error.value.message


def test_parameters_have_no_place_in_a_gguf(tmp_path, shared_base):
    with pytest.raises(LoralineError) as error:
        export(sound(shared_base, "llama"), tmp_path / "out", "gguf_f16", system_prompt="Hello")
    assert error.value.reason == "NOT_SUPPORTED"


def test_frequencies_of_llama_3(shared_base):
    base = sound(shared_base, "llama", rope_parameters=LLAMA3)
    sizes = gguf_export.read_sizes(json.loads((base / "config.json").read_text()))
    factors = rope_factors(sizes)
    assert factors is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16)
    assert torch.allclose(model.model.rotary_emb.inv_freq.float(), plain / torch.from_numpy(factors), rtol=1e-5)


@pytest.mark.parametrize("kind", ["gguf_f16", "gguf_q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_llama_cpp_reads_it_and_answers_alike(tmp_path, shared_base, architecture, kind):
    """llama.cpp itself: as many ids for a text, and likeliest next tokens with the probabilities of transformers."""
    runtime = pytest.importorskip("xllamacpp")
    base = sound(shared_base, architecture)
    export(base, tmp_path / "out", kind)
    params = runtime.CommonParams()
    params.model.path = str(next((tmp_path / "out").glob("*.gguf")))
    params.n_ctx, params.warmup, params.cpuparams.n_threads = 128, False, 1
    text = "Where is the boat? 14 비가 와요"
    request = {"prompt": text, "max_tokens": 2, "temperature": 0, "ignore_eos": True, "n_probs": 5}
    said = runtime.Server(params).handle_completions(request)
    likeliest = said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    ids = transformers.AutoTokenizer.from_pretrained(base).encode(text)
    assert said["usage"]["prompt_tokens"] == len(ids)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], dim=0)
    for one in likeliest:
        assert abs(one["logprob"] - float(expected[one["id"]])) < (0.05 if kind == "gguf_f16" else 0.5)
    assert likeliest[0]["id"] == int(expected.argmax()) or kind == "gguf_q8_0"


SENTENCES = [
    "where is the boat? it is in the harbour, behind the old wall.",
    "the keeper counted the lamps and went up the stairs.",
    "a number of boats, not a name.",
] * 8


def with_sentencepiece(base: Path, folder: Path, **settings: Any) -> Path:
    """Return a copy of a folder whose only vocabulary is a SentencePiece model trained here, as Llama 2 has it."""
    shutil.copytree(base, folder)
    settings = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        **settings,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(folder / "tokenizer"), vocab_size=320, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, **settings,
    )  # fmt: skip
    for name in ("tokenizer.json", "tokenizer.vocab", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "vocab_file": "tokenizer.model", "add_bos_token": True, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
        (folder / name).write_text(json.dumps({**content, **ids}))
    return folder


def test_llama_cpp_splits_text_as_sentencepiece_does(tmp_path, shared_base):
    runtime = pytest.importorskip("xllamacpp")
    folder = with_sentencepiece(sound(shared_base, "llama"), tmp_path / "model")
    assert export(folder, tmp_path / "out", "gguf_f16").measurements[-1][1]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    fields = {n: f.contents() for n, f in gguf.GGUFReader(str(next((tmp_path / "out").glob("*.gguf")))).fields.items()}
    assert fields["tokenizer.ggml.model"] == "llama"
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    pieces = [processor.id_to_piece(number) for number in range(processor.vocab_size())]
    assert fields["tokenizer.ggml.tokens"][: len(pieces)] == pieces
    params = runtime.CommonParams()
    params.model.path = str(next((tmp_path / "out").glob("*.gguf")))
    params.n_ctx, params.warmup, params.cpuparams.n_threads = 256, False, 1
    server = runtime.Server(params)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    compared = []
    for text in ("where is the boat? 14", "a 비", "가", "two  blanks", "灯光", "14 비가 와요", "a 😀 keeper", "a 一"):
        ids = [1, *processor.encode(text)]
        assert tokenizer.encode(text) == ids
        request = {"prompt": text, "max_tokens": 2, "temperature": 0, "ignore_eos": True, "n_probs": 5}
        said = server.handle_completions(request)
        assert said["usage"]["prompt_tokens"] == len(ids), text
        with torch.inference_mode():
            expected = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], dim=0)
        likeliest = processor.id_to_piece(int(expected.argmax()))
        if likeliest.startswith("<0x") and int(likeliest[3:5], 16) >= 0x80:
            continue  # llama.cpp tells nothing of a next token that is no whole character
        for one in said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            assert abs(one["logprob"] - float(expected[one["id"]])) < 0.05, text
        compared.append(text)
    assert len(compared) >= 4, compared


@pytest.mark.parametrize(
    "settings", [{"model_type": "unigram"}, {"normalization_rule_name": "nmt_nfkc"}, {"add_dummy_prefix": False}]
)
def test_other_sentencepiece_models_are_refused(tmp_path, shared_base, settings):
    folder = with_sentencepiece(sound(shared_base, "llama"), tmp_path / "model", **settings)
    with pytest.raises(LoralineError) as error:
        export(folder, tmp_path / "out", "gguf_f16")
    assert error.value.reason == "NOT_SUPPORTED"


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
def test_8_bit_exports(tmp_path, shared_base, architecture, kind):
    base = sound(shared_base, architecture)
    outcome = export(base, tmp_path / "out", kind, MergeBounds(0.3, 8.0))  # large random weights, hence far apart
    assert outcome.measurements[-1][1]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    tensors = {name: value for p in (tmp_path / "out").glob("*.safetensors") for name, value in load_file(p).items()}
    name = next(name for name in tensors if name.endswith("o_proj.weight"))
    original = {n: v for p in base.glob("*.safetensors") for n, v in load_file(p).items()}[name].float()
    back = tensors[name].float() * tensors[f"{name}_scale"].float()
    assert (back - original).abs().max() < original.abs().max() * 0.05
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
