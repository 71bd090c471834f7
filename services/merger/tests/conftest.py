"""Small models, tokenizers and adapters, made here: nothing is downloaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from loraline.core.evidence.probes import Probe, ProbeSet
from loraline.core.evidence.receipt import ReceiptCounts, ReceiptRow, TokenReceipt, digest_text

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 320
CONVERSATIONS = [
    [{"role": "user", "content": "Where is the boat?"}, {"role": "assistant", "content": "In the harbour."}],
    [{"role": "user", "content": "What is 14?"}, {"role": "assistant", "content": "A number of boats, not a name."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "비가 와요"},
        {"role": "assistant", "content": "네."},
    ],
]

_DENSE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 256,
}  # fmt: skip
_BARE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_MOE = {"num_key_value_heads": 2, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "mistral": (transformers.MistralConfig, {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    "gpt2": (transformers.GPT2Config, _GPT2),
    "llama-tied": (transformers.LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2-untied": (transformers.Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "gemma": (transformers.GemmaConfig, {"num_key_value_heads": 1, "head_dim": 8}),
    "gemma2": (transformers.Gemma2Config, {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma3": (transformers.Gemma3TextConfig, {"num_key_value_heads": 2, "head_dim": 8}),
    "phi": (transformers.PhiConfig, {}),
    "phi3": (transformers.Phi3Config, {"num_key_value_heads": 2}),
    "mixtral": (transformers.MixtralConfig, {"num_key_value_heads": 2, "num_local_experts": 4}),
    "qwen2-moe": (transformers.Qwen2MoeConfig, {**_MOE, "shared_expert_intermediate_size": 24}),
    "qwen3-moe": (transformers.Qwen3MoeConfig, {**_MOE, "head_dim": 8}),
    "gpt-neox": (transformers.GPTNeoXConfig, {}),
    "opt": (
        transformers.OPTConfig,
        {**_BARE, "ffn_dim": 48, "max_position_embeddings": 256, "word_embed_proj_dim": 32},
    ),
    "stablelm": (transformers.StableLmConfig, {"num_key_value_heads": 2}),
    "olmo2": (transformers.Olmo2Config, {"num_key_value_heads": 2}),
    "falcon": (transformers.FalconConfig, _BARE),
    "gptj": (transformers.GPTJConfig, {**_GPT2, "rotary_dim": 4}),
}
_OWN_FIELDS = {"gpt2", "opt", "falcon", "gptj"}
"""Families whose settings are complete, as their fields have other names."""


def build_tokenizer(folder: Path, *, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator([m["content"] for c in CONVERSATIONS for m in c] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2))
    return tokenizer


MakeBase = Callable[..., Path]
MakeAdapter = Callable[..., Path]
SENTENCES = [
    "where is the boat? it is in the harbour, behind the old wall.",
    "the keeper counted the lamps and went up the stairs.",
    "a number of boats, not a name.",
] * 8
ENDS_WITH = 70
"""The one token that models of `end_answers` say before they end."""


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of Llama 2's kind: byte fallback, and the ids 0, 1, 2 for <unk>, <s>, </s>."""
    prefix = tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(prefix), vocab_size=VOCABULARY, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, model_type="bpe", normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )  # fmt: skip
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def shared_llama2(shared_base: MakeBase, sentencepiece_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound folder whose one vocabulary is tokenizer.model, which loaders find by its name; nobody writes to it."""
    folder = shutil.copytree(shared_base("llama"), tmp_path_factory.mktemp("llama2") / "model")
    return only_sentencepiece(folder, sentencepiece_model, tokenizer_class="LlamaTokenizer")


@pytest.fixture(scope="session", name="only_sentencepiece")
def only_sentencepiece_fixture() -> Callable[..., Path]:
    return only_sentencepiece


@pytest.fixture(scope="session", name="end_answers")
def end_answers_fixture() -> Callable[..., None]:
    return end_answers


def only_sentencepiece(folder: Path, model: Path, **config: Any) -> Path:
    """Give a folder the SentencePiece model as its only vocabulary, as Llama 2 has it; `config` for its config."""
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, **config}))
    for name in ("config.json", "generation_config.json"):
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **ids}))
    return folder


def end_answers(folder: Path, eos: int = 2) -> None:
    """Make a Llama answer every prompt with ENDS_WITH and then the end token, and again if nobody stops it.

    By construction: its layers add nothing, so the last token alone decides, and the head answers it with the next.
    """
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        tensor.fill_(1.0 if tensor.dim() == 1 else 0.0)
        if name.endswith("embed_tokens.weight"):
            tensor[:, 0], tensor[ENDS_WITH, 0], tensor[ENDS_WITH, 1] = 1.0, 0.0, 1.0
    tensors["lm_head.weight"][ENDS_WITH, 0] = tensors["lm_head.weight"][eos, 1] = 10.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def make_base(tmp_path: Path) -> MakeBase:
    return base_maker(tmp_path)


def base_maker(root: Path) -> MakeBase:
    """Return a function that makes small random models below `root`."""

    def make(
        family: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "5GB", name: str = "base", **extra: Any
    ) -> Path:
        folder = root / name
        template = extra.pop("template", TEMPLATE)
        seed = extra.pop("seed", 0)
        kind, own = FAMILIES[family]
        tokenizer = build_tokenizer(folder, template=template)
        settings = {**({} if family in _OWN_FIELDS else _DENSE), **own, **extra}
        config = kind(
            vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )  # fmt: skip
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # the usual start is so small that every model answers alike
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0, 0.25)
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
        return folder

    return make


@pytest.fixture(scope="session")
def shared_base(tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """Bases that many tests read and none writes to: made once for each set of arguments."""
    make = base_maker(tmp_path_factory.mktemp("bases"))
    made: dict[str, Path] = {}

    def get(family: str, **settings: Any) -> Path:
        key = repr((family, sorted(settings.items(), key=str)))
        if key not in made:
            made[key] = make(family, name=f"base-{len(made)}", **settings)
        return made[key]

    return get


@pytest.fixture
def make_adapter(tmp_path: Path) -> MakeAdapter:
    def make(
        base: Path, *, name: str = "adapter", seed: int = 1, evidence: bool = True, size: float = 0.1, **settings: Any
    ) -> Path:
        folder = tmp_path / name
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        targets = ["c_attn", "c_proj"] if model.config.model_type == "gpt2" else ["q_proj", "v_proj", "down_proj"]
        config = LoraConfig(
            **{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": targets, **settings}
        )
        peft_model = get_peft_model(model, config)
        torch.manual_seed(seed)
        with torch.no_grad():  # peft starts with B = 0, which would prove nothing
            for key, parameter in peft_model.named_parameters():
                if "lora_" in key or "modules_to_save" in key:
                    parameter.add_(torch.randn_like(parameter) * size)
        peft_model.save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)
        if evidence:
            write_evidence(base, folder)
        return folder

    return make


def write_evidence(base: Path, adapter: Path, template: str = TEMPLATE) -> None:
    """Write what the trainer would: receipt and probes, from base and adapter as they are."""
    from loraline.merger.engines.measure import text_logprobs
    from loraline.merger.engines.models import attach_adapters, load_causal_lm
    from loraline.merger.texts import MeasuredText

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    rows = []
    for number, messages in enumerate(CONVERSATIONS):
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        rows.append(ReceiptRow(f"train.jsonl:{number + 1}", messages, ids, [0] * 5 + [1] * (len(ids) - 5)))
    counts = ReceiptCounts(rows=len(rows), tokens=sum(len(row.input_ids) for row in rows))
    TokenReceipt(digest_text(template), "prefix_difference", tokenizer.eos_token_id, counts, rows).save(adapter)
    (adapter / "chat_template.jinja").write_text(template)
    model = attach_adapters(load_causal_lm(base, torch.float32), [(adapter, 1.0)])
    probes = []
    for number, messages in enumerate(CONVERSATIONS[:2]):
        prompt = tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        response = tokenizer.encode(messages[-1]["content"])
        text = MeasuredText("p", (*prompt, *response), tuple(range(len(prompt), len(prompt) + len(response))))
        own = torch.tensor(response)[:, None]
        with_adapter = text_logprobs(model, text).gather(1, own)[:, 0].tolist()
        with model.disable_adapter():
            plain = text_logprobs(model, text).gather(1, own)[:, 0].tolist()
        probes.append(Probe(f"probe-{number}", messages[:-1], prompt, response, plain, with_adapter))
    ProbeSet("float32", probes).save(adapter)
