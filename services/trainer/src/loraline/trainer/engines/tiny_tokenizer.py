"""The toy base's tokenizer: a byte-level BPE, so that no character is unknown."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# The splitting pattern of the Qwen2 family, so that programs that know tokenizers by architecture split alike.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_ALPHABET = frozenset(pre_tokenizers.ByteLevel.alphabet())
_PRIVATE_PLANE = 0xF0000


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a tokenizer with at most `vocab_size` entries; the same texts give the same tokenizer.

    The texts' characters become tokens first, the most frequent ones before the others, then what stands together
    often. Plain byte-level BPE would spend a vocabulary this small on words and leave most Han characters as three
    bytes each, which a model of this size fails to put together again.
    """
    words = [word for text in texts for word, _ in _splitter().pre_tokenize_str(unicodedata.normalize("NFC", text))]
    characters = _whole_characters(words, vocab_size)
    merges = _character_merges(characters)
    learned = _learn_merges(words, characters, vocab_size - len(merges) + len(characters))
    merges = list(dict.fromkeys([*merges, *learned]))
    tokens = [PAD, START, END, *sorted(_ALPHABET), *dict.fromkeys(left + right for left, right in merges)]
    tokenizer = Tokenizer(BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (PAD, START, END)])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([_splitter(), _BYTE_LEVEL])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    template = (resources.files("loraline.trainer.tiny") / "chat_template.jinja").read_text(encoding="utf-8")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    fast.chat_template = template
    return fast


def _splitter() -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated")


def _letters(text: str) -> str:
    """Return a text's UTF-8 bytes as byte-level BPE writes them, one letter a byte."""
    return "".join(word for word, _ in _BYTE_LEVEL.pre_tokenize_str(text))


def _whole_characters(words: Sequence[str], vocab_size: int) -> dict[str, str]:
    """Return the characters of more than a byte that get a token of their own, each with its letters."""
    counts = Counter(character for word in words for character in word if not character.isascii())
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    # A third of the room is kept for what stands together; a character takes a token, and its beginning often another.
    room = (vocab_size - len(_ALPHABET) - 3) * 2 // 3
    characters: dict[str, str] = {}
    made: set[str] = set()
    for character in ranked:
        letters = _letters(character)
        made |= {letters[:end] for end in range(2, len(letters) + 1)}
        if len(made) > room:
            break
        characters[character] = letters
    return characters


def _character_merges(characters: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the merges that put each character together from its bytes, each once."""
    steps = ((letters[:end], letters[end]) for letters in characters.values() for end in range(1, len(letters)))
    return list(dict.fromkeys(steps))


def _learn_merges(words: Iterable[str], characters: Mapping[str, str], vocab_size: int) -> list[tuple[str, str]]:
    """Learn merges over words whose whole characters are one symbol already."""
    # While learning, each such character is stood for by one of a private-use plane, which no byte's letter is.
    stand_ins = {character: chr(_PRIVATE_PLANE + number) for number, character in enumerate(characters)}
    letters = {stand_in: characters[character] for character, stand_in in stand_ins.items()}
    learner = Tokenizer(BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size - 3, 1), initial_alphabet=sorted(_ALPHABET), show_progress=False
    )
    translated = ("".join(stand_ins[one] if one in stand_ins else _letters(one) for one in word) for word in words)
    learner.train_from_iterator(translated, trainer)
    learned = json.loads(learner.to_str())["model"]["merges"]

    def spelled(symbols: str) -> str:
        return "".join(letters.get(one, one) for one in symbols)

    return [(spelled(left), spelled(right)) for left, right in learned]


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer so that vLLM and older transformers load it too.

    transformers 5 names its class `TokenizersBackend`, which nothing else knows.
    """
    tokenizer.save_pretrained(str(folder))
    make_loadable(folder)
    specials = {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
    content = {name: text for name, text in specials.items() if text}
    (folder / "special_tokens_map.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make_loadable(folder: Path) -> None:
    """Replace the class name that only transformers 5 knows in the folder's tokenizer_config.json, if it is there."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.pop("backend", None)
        config.pop("is_local", None)
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
