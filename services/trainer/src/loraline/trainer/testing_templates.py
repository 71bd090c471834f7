"""Chat formats of ten model families: small tokenizers with their control tokens, templates in our own words.

`%A% … %Z%` stands around what the assistant says; with marks they become `{% generation %}` and `{% endgeneration %}`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import normalizers as norms
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """How a family writes a conversation."""

    template: str
    specials: tuple[str, ...]
    eos: str
    """The tokenizer's end-of-sequence token."""
    ends: str = ""
    """What ends an answer, where it is not `eos`; generation_config.json names it then."""
    pad: str = ""
    """Empty where the family has none."""
    system: bool = True
    """Whether the template takes a system message."""
    pieces: bool = False
    """A SentencePiece-like tokenizer, with byte fallback, in place of a byte-level one."""

    @property
    def end(self) -> str:
        """What ends an answer."""
        return self.ends or self.eos


_STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
)
FAMILIES = {
    "chatml": Family(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}%A%{{ m.content }}"
        "{{ '<|im_end|>' }}%Z%{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        "<|im_end|>",
        pad="<|endoftext|>",
    ),
    "inst with sys": Family(
        "{% set sys = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}{% if loop.index0 <= 1 and sys %}"
        "{{ '<<SYS>>\n' + sys + '\n<</SYS>>\n\n' }}{% endif %}{{ m.content | trim + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}%A%{{ ' ' + m.content | trim + ' ' + eos_token }}%Z%{% endif %}{% endfor %}",
        ("<s>", "</s>", "<unk>"),
        "</s>",
        pieces=True,
    ),
    "header ids": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{% if m.role == 'assistant' %}%A%{{ m.content | trim + '<|eot_id|>' }}%Z%{% else %}"
        "{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|end_of_text|>",
        ends="<|eot_id|>",
    ),
    "turns of a model": Family(
        _STRICT + "{{ bos_token }}{% for m in messages %}{% set who = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + who + '\n' }}{% if who == 'model' %}%A%{{ m.content | trim + '<end_of_turn>' }}%Z%"
        "{% else %}{{ m.content | trim + '<end_of_turn>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<bos>", "<eos>", "<pad>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        ends="<end_of_turn>",
        pad="<pad>",
        system=False,
        pieces=True,
    ),
    "inst tokens": Family(
        _STRICT + "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('turns must alternate') }}{% endif %}{% if m.role == 'user' %}"
        "{{ '[INST]' + m.content + '[/INST]' }}{% else %}%A%{{ m.content + eos_token }}%Z%{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "</s>",
        system=False,
    ),
    "role and end": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
        "%A%{{ m.content + '<|end|>' }}%Z%{% else %}{{ m.content + '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|endoftext|>",
        ends="<|end|>",
        pad="<|endoftext|>",
    ),
    "role and eos": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
        "%A%{{ m.content + eos_token }}%Z%{% else %}{{ m.content + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        ("<s>", "</s>"),
        "</s>",
    ),
    "wide bars": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "{{ '<｜User｜>' + m.content }}{% else %}{{ '<｜Assistant｜>' }}%A%{{ m.content + eos_token }}%Z%{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜end▁of▁sentence｜>",
    ),
    "turn tokens": Family(
        "{{ bos_token }}{% for m in messages %}{% set who = 'CHATBOT' if m.role == 'assistant' else m.role | upper %}"
        "{{ '<|START_OF_TURN_TOKEN|><|' + who + '_TOKEN|>' }}{% if who == 'CHATBOT' %}%A%{{ m.content | trim "
        "+ '<|END_OF_TURN_TOKEN|>' }}%Z%{% else %}{{ m.content | trim + '<|END_OF_TURN_TOKEN|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        "<|END_OF_TURN_TOKEN|>",
    ),
    "plain words": Family(
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n\n' }}{% elif m.role == 'user' %}"
        "{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT:' }}%A%{{ ' ' + m.content + eos_token }}%Z%{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        ("<s>", "</s>", "<unk>"),
        "</s>",
        pieces=True,
    ),
    "square turns": Family(
        "{% for m in messages %}{{ '[|' + m.role + '|]' }}{% if m.role == 'assistant' %}%A%{{ m.content }}"
        "{{ '[|endofturn|]' }}%Z%{% else %}{{ m.content + ('[|endofturn|]' if m.role == 'system' else '') }}{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}",
        ("[BOS]", "[|endofturn|]", "[|system|]", "[|user|]", "[|assistant|]"),
        "[|endofturn|]",
    ),
}
"""By a name that says what is particular about it."""


def tokenizer(family: Family, *, marks: bool, pad: str | None = None) -> PreTrainedTokenizerFast:
    """Return a small tokenizer of a family, its template with or without generation marks; `pad` overrides its own."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=_pieces(family.specials) if family.pieces else _byte_level(family.specials),
        eos_token=family.eos,
        bos_token=family.specials[0],
        clean_up_tokenization_spaces=False,
    )
    chosen = family.pad if pad is None else pad
    if chosen:
        made.pad_token = chosen
    begin, end = ("{% generation %}", "{% endgeneration %}") if marks else ("", "")
    made.chat_template = family.template.replace("%A%", begin).replace("%Z%", end)
    return made


def _byte_level(specials: tuple[str, ...]) -> Tokenizer:
    """No merges: every byte is a token, so that any character is several."""
    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def _pieces(specials: tuple[str, ...]) -> Tokenizer:
    """Letters are tokens, blanks are `▁`, and whatever else there is falls back to bytes."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))  # noqa: S106
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    made.normalizer = norms.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made
