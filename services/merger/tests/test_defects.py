"""One table of defective model folders: each is found under its code, and mended where that is promised.

The base is a sound folder. `no`: only found. `alone`: RepairModel mends it from the folder itself. `base`: it takes the
base's file or value for it, so a base must be given.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from loraline.merger.check.findings import loadable
from loraline.merger.check.folder import check_folder
from loraline.merger.model_jobs import check_everything
from loraline.merger.repair import repair_folder

TABLE = Path(__file__).parents[3] / "docs" / "merger-defects.md"
SOURCES = Path(__file__).parents[1] / "src"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Harm = Callable[[Path], None]


def edit(file: str, **values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / file
        content = json.loads(path.read_text()) if path.exists() else {}
        content.update(values)
        path.write_text(json.dumps(content, indent=2))

    return apply


def drop(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def write(file: str, content: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / file).write_bytes(content)

    return apply


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return apply


def without(prefix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return change


def one_more_token(folder: Path) -> None:
    """Give the tokenizer an id for which the embedding has no row, and a use for it in the conversation below."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([*(f"<|extra {number}|>" for number in range(len(tokenizer), 320)), "boat"])
    tokenizer._tokenizer.save(str(folder / "tokenizer.json"))


def head_beside_norm(weight_map: dict[str, str]) -> None:
    weight_map["lm_head.weight"] = weight_map["model.norm.weight"]


def index_edit(change: Callable[[dict[str, str]], Any]) -> Harm:
    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return apply


def shard_renamed(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.rename(shard.with_name("model-00099-of-00099.safetensors"))


def shard_gone(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def shard_doubled(folder: Path) -> None:
    first = sorted(folder.glob("model-*.safetensors"))[0]
    shutil.copyfile(first, first.with_name("model-00098-of-00099.safetensors"))


def linked_out(name: str) -> Harm:
    def apply(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return apply


def in_turn(*harms: Harm) -> Harm:
    def apply(folder: Path) -> None:
        for harm in harms:
            harm(folder)

    return apply


def resized(name: str, *shape: int) -> Harm:
    return weights(lambda tensors: tensors.update({name: torch.zeros(*shape)}))


CFG, GEN, TOK = "config.json", "generation_config.json", "tokenizer_config.json"
LAYER = "model.layers.1."
ATTENTION = f"{LAYER}self_attn."
UNNAMED = "TOKENIZER_MODEL_UNNAMED"
DRIFT = "CONFIG_DIFFERS_FROM_BASE"
QUANTISED = {"quant_method": "bitsandbytes", "load_in_4bit": True}
# name -> (architecture, what makes the defect, the code that must be found, how it is mended)
DEFECTS: dict[str, tuple[str, Harm, str, str]] = {
    # Sizes in config.json against the tensors.
    "vocabulary one more": ("llama", edit(CFG, vocab_size=321), "VOCAB_SIZE_MISMATCH", "alone"),
    "vocabulary one less": ("llama", edit(CFG, vocab_size=319), "VOCAB_SIZE_MISMATCH", "alone"),
    "vocabulary missing": ("qwen2", edit(CFG, vocab_size=None), "VOCAB_SIZE_MISMATCH", "alone"),
    "hidden": ("llama", edit(CFG, hidden_size=64, head_dim=8), "HIDDEN_SIZE_MISMATCH", "alone"),
    "hidden of gpt2": ("gpt2", edit(CFG, n_embd=64), "HIDDEN_SIZE_MISMATCH", "alone"),
    "intermediate": ("llama", edit(CFG, intermediate_size=47), "INTERMEDIATE_SIZE_MISMATCH", "alone"),
    "intermediate fused": ("phi3", edit(CFG, intermediate_size=49), "INTERMEDIATE_SIZE_MISMATCH", "alone"),
    "intermediate of phi": ("phi", edit(CFG, intermediate_size=64), "INTERMEDIATE_SIZE_MISMATCH", "alone"),
    "intermediate of opt": ("opt", edit(CFG, ffn_dim=64), "INTERMEDIATE_SIZE_MISMATCH", "alone"),
    "intermediate of neox": ("gpt-neox", edit(CFG, intermediate_size=64), "INTERMEDIATE_SIZE_MISMATCH", "alone"),
    "layers too many": ("llama", edit(CFG, num_hidden_layers=3), "LAYER_COUNT_MISMATCH", "alone"),
    "layers too few": ("llama", edit(CFG, num_hidden_layers=1), "LAYER_COUNT_MISMATCH", "alone"),
    "layers of gpt2": ("gpt2", edit(CFG, n_layer=3), "LAYER_COUNT_MISMATCH", "alone"),
    "layers of neox": ("gpt-neox", edit(CFG, num_hidden_layers=4), "LAYER_COUNT_MISMATCH", "alone"),
    "heads": ("llama", edit(CFG, num_attention_heads=8, head_dim=8), "ATTENTION_HEADS_MISMATCH", "base"),
    "heads missing": ("llama", edit(CFG, num_attention_heads=None), "HEADS_MISSING", "base"),
    "heads fused": ("phi3", edit(CFG, num_key_value_heads=4), "ATTENTION_HEADS_MISMATCH", "base"),
    "kv heads": ("llama", edit(CFG, num_key_value_heads=4), "KV_HEADS_MISMATCH", "alone"),
    "kv heads missing": ("llama", edit(CFG, num_key_value_heads=None), "KV_HEADS_MISMATCH", "alone"),
    "head dim": ("llama", edit(CFG, head_dim=16), "ATTENTION_HEADS_MISMATCH", "base"),
    "head dim of qwen3": ("qwen3", edit(CFG, head_dim=8), "ATTENTION_HEADS_MISMATCH", "base"),
    "experts": ("mixtral", edit(CFG, num_local_experts=8), "EXPERT_COUNT_MISMATCH", "alone"),
    "experts of qwen": ("qwen3-moe", edit(CFG, num_local_experts=3), "EXPERT_COUNT_MISMATCH", "alone"),
    "expert width": ("qwen3-moe", edit(CFG, moe_intermediate_size=24), "EXPERT_SIZE_MISMATCH", "alone"),
    "experts per token": ("mixtral", edit(CFG, num_experts_per_tok=9), "EXPERTS_PER_TOKEN_INVALID", "base"),
    "untied without head": ("llama", weights(without("lm_head.weight")), "TIE_WORD_EMBEDDINGS_MISMATCH", "no"),
    "tied said untied": ("qwen2", edit(CFG, tie_word_embeddings=False), "TIE_WORD_EMBEDDINGS_MISMATCH", "base"),
    "untied said tied": ("llama", edit(CFG, tie_word_embeddings=True), "HEAD_IGNORED", "base"),
    "head of another size": ("llama", resized("lm_head.weight", 319, 32), "LM_HEAD_MISMATCH", "no"),
    # Tensors.
    "tensor missing": ("llama", weights(without(f"{LAYER}mlp.up_proj.weight")), "MISSING_TENSOR", "no"),
    "layer missing": ("llama", weights(without("model.layers.0.")), "MISSING_LAYER", "no"),
    "norm missing": ("llama", weights(without("model.norm.weight")), "MISSING_TENSOR", "no"),
    "shape off by one": ("llama", resized(f"{ATTENTION}o_proj.weight", 32, 31), "TENSOR_SHAPE_MISMATCH", "no"),
    "truncated": ("llama", lambda f: write(WEIGHTS, (f / WEIGHTS).read_bytes()[:-9])(f), "CORRUPT_WEIGHTS", "no"),
    "garbage": ("llama", write(WEIGHTS, b"\xff" * 64), "CORRUPT_WEIGHTS", "no"),
    "no weights": ("llama", drop(WEIGHTS), "NO_SAFETENSORS", "no"),
    "pickle beside": ("llama", write("pytorch_model.bin", b"\x80\x04."), "PICKLE_WEIGHTS", "no"),
    "pickle alone": (
        "llama", in_turn(write("pytorch_model.bin", b"\x80\x04."), drop(WEIGHTS)), "PICKLE_WEIGHTS", "no",
    ),
    "link out of the folder": ("llama", linked_out(WEIGHTS), "UNSAFE_PATH", "no"),
    # Index and shards.
    "unsafe index": ("llama", write(INDEX, b'{"weight_map": {"a": "../model.safetensors"}}'), "UNSAFE_PATH", "no"),
    "index to nothing": ("llama", write(INDEX, b'{"weight_map": {"a": "b.safetensors"}}'), "MISSING_SHARD", "no"),
    "index to a pickle": ("llama", write(INDEX, b'{"weight_map": {"a": "b.bin"}}'), "PICKLE_WEIGHTS", "no"),
    "broken index": ("llama", write(INDEX, b"{}"), "INDEX_UNREADABLE", "no"),
    "index to another name": (
        "llama", write(INDEX, b'{"weight_map": {"a": "model.safetensors"}}'), "INDEX_MISMATCH", "alone",
    ),
    "index lacks a tensor": ("sharded", index_edit(lambda m: m.pop("lm_head.weight")), "INDEX_MISMATCH", "alone"),
    "index swaps shards": ("sharded", index_edit(head_beside_norm), "INDEX_MISMATCH", "alone"),
    "shard gone": ("sharded", shard_gone, "MISSING_SHARD", "no"),
    "shard renamed": ("sharded", shard_renamed, "MISSING_SHARD", "no"),
    "shard twice": ("sharded", shard_doubled, "INDEX_MISMATCH", "no"),
    # config.json and generation_config.json.
    "left over quantisation": ("llama", edit(CFG, quantization_config=QUANTISED), "QUANTIZATION_LEFT_OVER", "alone"),
    "no architecture": ("llama", edit(CFG, architectures=None), "ARCHITECTURES_MISSING", "base"),
    "remote code": ("llama", edit(CFG, auto_map={"AutoConfig": "x.Y"}), "REMOTE_CODE", "base"),
    "model type unknown": ("llama", edit(CFG, model_type="nothing"), "CONFIG_NOT_LOADABLE", "base"),
    "no config": ("llama", drop(CFG), "FILE_MISSING", "base"),
    "broken config": ("llama", write(CFG, b"{"), "FILE_UNREADABLE", "base"),
    "broken generation config": ("llama", write(GEN, b"[]"), "FILE_UNREADABLE", "base"),
    "rope of another base": ("llama", edit(CFG, rope_parameters={"rope_theta": 1.0}), DRIFT, "base"),
    # Tokenizer.
    "broken tokenizer": ("llama", write("tokenizer.json", b"{"), "FILE_UNREADABLE", "base"),
    "no tokenizer": ("llama", drop("tokenizer.json"), "TOKENIZER_MISSING", "base"),
    "broken tokenizer config": ("llama", write(TOK, b"nothing"), "FILE_UNREADABLE", "base"),
    "class of other files": ("llama2", edit(TOK, tokenizer_class="MarianTokenizer"), UNNAMED, "alone"),
    "class of another kind": ("llama2", edit(TOK, tokenizer_class="Qwen2Tokenizer"), UNNAMED, "alone"),
    "class of any kind": ("llama2", edit(TOK, tokenizer_class="PreTrainedTokenizerFast"), UNNAMED, "alone"),
    "null for a vocabulary": ("llama2", edit(TOK, vocab_file=None), UNNAMED, "alone"),
    "vocabulary named beside": ("llama2", edit(TOK, vocab_file="tokenizer.model"), "TOKENIZER_FILE_MISSING", "alone"),
    "vocabulary named elsewhere": ("llama", edit(TOK, vocab_file="/home/t.model"), "TOKENIZER_FILE_MISSING", "alone"),
    "tokenizer file not there": ("llama", edit(TOK, tokenizer_file="t.json"), "TOKENIZER_FILE_MISSING", "alone"),
    "unknown class": ("llama", edit(TOK, tokenizer_class="TokenizersBackend"), "TOKENIZER_CLASS_UNKNOWN", "alone"),
    "blank eos": ("llama", edit(TOK, eos_token=" "), "EOS_TOKEN_BLANK", "alone"),
    "empty eos": ("llama", edit(TOK, eos_token=""), "EOS_TOKEN_BLANK", "alone"),
    "newline eos": ("qwen2", edit(TOK, eos_token="\n"), "EOS_TOKEN_BLANK", "alone"),
    "blank eos object": ("llama", edit(TOK, eos_token={"content": ""}), "EOS_TOKEN_BLANK", "alone"),
    "blank eos in map": ("llama", edit("special_tokens_map.json", eos_token="\t"), "EOS_TOKEN_BLANK", "alone"),
    "no eos at all": (
        "llama", in_turn(edit(TOK, eos_token=None), *(edit(f, eos_token_id=None) for f in (CFG, GEN))),
        "EOS_TOKEN_MISSING", "no",
    ),
    "eos of many tokens": ("llama", edit(TOK, eos_token="<eos> of"), "SPECIAL_TOKEN_NOT_SINGLE", "base"),
    "pad of many tokens": ("llama", edit(TOK, pad_token="[PAD]"), "SPECIAL_TOKEN_NOT_SINGLE", "base"),
    "added special of many": (
        "llama", edit(TOK, additional_special_tokens=["<|tool|>"]), "SPECIAL_TOKEN_NOT_SINGLE", "base",
    ),
    "token beyond the embedding": ("llama", one_more_token, "TOKEN_ID_OUT_OF_RANGE", "base"),
    "added token beyond": (
        "llama", write("added_tokens.json", b'{"<|x|>": 400}'), "TOKEN_ID_OUT_OF_RANGE", "base",
    ),
    # Ids.
    "eos beyond the embedding": ("llama", edit(GEN, eos_token_id=[2, 999]), "TOKEN_ID_OUT_OF_RANGE", "alone"),
    "pad of -1": ("llama", edit(CFG, pad_token_id=-1), "TOKEN_ID_OUT_OF_RANGE", "alone"),
    "bos beyond": ("llama", edit(CFG, bos_token_id=128000), "TOKEN_ID_OUT_OF_RANGE", "alone"),
    "other eos": ("llama", edit(GEN, eos_token_id=0), "EOS_IDS_DISAGREE", "alone"),
    "other eos, config only": ("llama", in_turn(drop(GEN), edit(CFG, eos_token_id=7)), "EOS_IDS_DISAGREE", "alone"),
    "other pad": ("llama", edit(GEN, pad_token_id=5), "PAD_IDS_DISAGREE", "alone"),
    "other pad in config": ("gpt2", edit(CFG, pad_token_id=5), "PAD_IDS_DISAGREE", "alone"),
    "other bos": (
        "llama", in_turn(edit(TOK, bos_token="<|im_start|>"), edit(CFG, bos_token_id=9)), "BOS_IDS_DISAGREE", "alone",
    ),
    # Chat template.
    "no template": ("llama", drop("chat_template.jinja"), "CHAT_TEMPLATE_MISSING", "base"),
    "template that does not parse": ("llama", write("chat_template.jinja", b"{% for"), "CHAT_TEMPLATE_FAILED", "no"),
    "template that reaches out": (
        "llama", write("chat_template.jinja", b"{{ messages.__class__.__mro__ }}"), "CHAT_TEMPLATE_FAILED", "no",
    ),
    "template that is no text": ("llama", write("chat_template.jinja", b"\xff\xfe"), "CHAT_TEMPLATE_FAILED", "no"),
    # What a stranger may write where another type belongs.
    "class that is a list": ("llama", edit(TOK, tokenizer_class=[]), "TOKENIZER_NOT_LOADABLE", "no"),
    "half a character": ("llama", edit(CFG, vocab_size="\ud800"), "FILE_UNREADABLE", "base"),
    "config too deep": ("llama", write(CFG, b'{"a":' * 50_000), "FILE_UNREADABLE", "base"),
    "index without a map": ("sharded", write(INDEX, b'{"weight_map": "\\ud800"}'), "INDEX_UNREADABLE", "no"),
    "header of a gigabyte": ("llama", write(WEIGHTS, (1 << 30).to_bytes(8, "little") + b"{}"), "CORRUPT_WEIGHTS", "no"),
    "template that never ends in one step": (
        "llama",
        write("chat_template.jinja", b"{% set n = namespace(x=10) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}"
              b"{% endfor %}{{ n.x }}"),
        "CHAT_TEMPLATE_TIMEOUT", "no",
    ),
    "template that takes all memory": (
        "llama", write("chat_template.jinja", b"{{ ('x' * 10000000000) | length }}"), "CHAT_TEMPLATE_FAILED", "no",
    ),
}  # fmt: skip
COMBINATIONS = {
    "ids and sizes": ["blank eos", "vocabulary one more", "other pad", "unknown class", "left over quantisation"],
    "copied by hand": ["class of other files", "null for a vocabulary", "blank eos", "layers too many"],
    "the second seed's folder": ["vocabulary one less", "blank eos", "tokenizer file not there", "intermediate"],
    "sizes all at once": ["hidden", "intermediate", "layers too few", "vocabulary one more"],
    "ids all at once": ["eos beyond the embedding", "pad of -1", "bos beyond"],
    "quantised and too deep": ["left over quantisation", "layers too many", "kv heads"],
}


@pytest.fixture
def sound(shared_base, shared_llama2) -> Callable[[str], Path]:
    """Return a function that gives a sound folder, which nobody writes to."""

    def get(architecture: str) -> Path:
        if architecture == "llama2":
            return shared_llama2
        return shared_base("llama", shard="20KB") if architecture == "sharded" else shared_base(architecture)

    return get


@pytest.fixture
def folder(tmp_path: Path, sound) -> Callable[[str], Path]:
    """Return a function that gives a writable copy of a sound folder."""
    return lambda architecture: shutil.copytree(sound(architecture), tmp_path / "copy")


def codes(folder: Path, base: Path | None = None) -> list[str]:
    return [finding.code for finding in check_everything(folder, base)]


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects(folder, sound, defect, monkeypatch):
    """Found, named, mended where that is promised; before and after in transformers as docs/merger-defects.md says."""
    architecture, harm, code, mended = DEFECTS[defect]
    broken, base = folder(architecture), sound(architecture)
    expected = answer(base)
    harm(broken)
    before = outcome(broken, expected)
    monkeypatch.setattr("loraline.merger.engines.rendering.RENDER_SECONDS", 3.0)
    given = base if mended == "base" else None
    found = [finding for finding in check_everything(broken, given) if finding.code == code]
    assert found, codes(broken, given)
    assert all(finding.message and finding.remedy for finding in found)
    repair_folder(broken, given)
    assert (code in codes(broken, given)) == (mended == "no"), check_everything(broken, given)
    after = ""
    if mended != "no":
        assert loadable(check_folder(broken))
        after = outcome(broken, expected)
        assert after == "answers as before"
    assert documented().get(defect) == [code, before, mended, after]


def documented() -> dict[str, list[str]]:
    """Return the rows of the page's table: defect -> code, in transformers, how it is mended, afterwards."""
    rows = [line.strip("| \n").split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines()]
    return {row[0]: [cell.strip("`–") for cell in row[1:]] for row in rows if len(row) == 5 and row[0] in DEFECTS}


def test_the_page_names_every_code_and_defect():
    page = TABLE.read_text(encoding="utf-8")
    assert list(documented()) == list(DEFECTS)
    sources = [path.read_text(encoding="utf-8") for path in SOURCES.rglob("*.py")]
    codes = {code for text in sources for code in re.findall(r'(?:Finding\(|_compare\([^)]*?)\s*"([A-Z_]+)"', text)}
    assert len(codes) > 40
    assert not [code for code in codes | {row[2] for row in DEFECTS.values()} if f"`{code}`" not in page]
    print(f"{len(DEFECTS)} defects and {len(COMBINATIONS)} combinations")
    assert len(DEFECTS) >= 60


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_several_defects_at_once(folder, combination):
    broken = folder(DEFECTS[COMBINATIONS[combination][0]][0])
    for defect in COMBINATIONS[combination]:
        DEFECTS[defect][1](broken)
    repaired = {finding.code for finding in repair_folder(broken)}
    assert {DEFECTS[defect][2] for defect in COMBINATIONS[combination]} <= repaired
    assert check_folder(broken) == []


CONVERSATION = [{"role": "user", "content": "Where is the boat?"}]


class Invented(Exception):
    """transformers filled weights with random numbers."""


def answer(folder: Path) -> torch.Tensor:
    """Render a conversation with the folder's tokenizer and return the model's logits."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(CONVERSATION, tokenize=True, return_dict=False, add_generation_prompt=True)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    if info["missing_keys"]:
        raise Invented
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits


def outcome(folder: Path, expected: torch.Tensor) -> str:
    """Say what transformers makes of a folder, beside the sound folder's logits."""
    template = folder / "chat_template.jinja"
    if template.is_file() and any(mark in template.read_bytes() for mark in (b"range(60)", b"10000000000")):
        return "never answers"  # not tried: it takes for ever, or all memory
    try:
        logits = answer(folder)
    except Invented:
        return "invents weights"
    except Exception as error:  # transformers and tokenizers raise many kinds
        return f"fails: {type(error).__name__}"
    if logits.shape != expected.shape or not torch.allclose(logits, expected, atol=1e-5):
        return "answers otherwise"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if 2 not in stops:
        return "answers without end"
    return "answers as before" if tokenizer.eos_token_id == 2 else "answers, its end unknown to callers"


@pytest.mark.parametrize("defect", ["blank eos", "other eos", "newline eos"])
def test_endless_answers_end_after_repair(folder, defect):
    """A blank or wrong end token leaves generation without its stop: the ids must hold the trained end after repair."""
    broken = folder(DEFECTS[defect][0])
    DEFECTS[defect][1](broken)
    repair_folder(broken)
    tokenizer = transformers.AutoTokenizer.from_pretrained(broken)
    config = transformers.GenerationConfig.from_pretrained(broken)
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id in stops
