"""The caller's texts that a recipe reads facts out of: where they come from, and which call reads which."""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from loraline.api.artifact.v1 import artifact_pb2
from loraline.api.datagen.v1 import datagen_pb2
from loraline.core.errors import LoralineError, failed_precondition, invalid_argument
from loraline.core.server_paths import allowed_path
from loraline.datagen.convert.files import READABLE, SourceFile, find_files
from loraline.datagen.convert.problems import bad_record
from loraline.datagen.convert.readers import READERS
from loraline.datagen.convert.text import open_text
from loraline.datagen.digest_set import DigestSet

WHOLE_FILES = frozenset({".txt", ".md", ".html", ".htm", ".xml"})
TEXT_FILES = WHOLE_FILES | READABLE
DEFAULT_FIELD = "text"
MOST_TEXTS = 10_000_000
SHOWN = 5

Named = tuple[str, str]
Fetch = Callable[[artifact_pb2.ArtifactRef], Path]


def check_texts(source: datagen_pb2.TextSource, field: str) -> None:
    """INVALID_ARGUMENT when the texts do not come from exactly one place, or from an artifact of another kind."""
    places = [bool(source.texts), source.HasField("artifact"), bool(source.path)]
    if sum(places) != 1:
        raise invalid_argument(
            "TEXTS_PLACE", f"{field} needs exactly one of texts, artifact and path.",
            **{field: "needs exactly one of texts, artifact, path"},
        )  # fmt: skip
    if source.HasField("artifact") and source.artifact.kind != artifact_pb2.ARTIFACT_KIND_SOURCE:
        raise invalid_argument(
            "ARTIFACT_KIND_WRONG", f"{field}.artifact must be a source artifact: files uploaded as kind source.",
            **{f"{field}.artifact.kind": "must be ARTIFACT_KIND_SOURCE"},
        )  # fmt: skip


def named_texts(source: datagen_pb2.TextSource, allowed: list[Path], fetch: Fetch) -> Iterator[Named]:
    """Yield each text with its name, such as `pages/a.html` or `notes.jsonl:3`; errors name file and line."""
    if source.texts:
        yield from ((f"texts[{number}]", text) for number, text in enumerate(source.texts))
        return
    if source.HasField("artifact"):
        root, own = fetch(source.artifact), frozenset({"manifest.json"})
    else:
        root, own = allowed_path(source.path, allowed, "texts.path"), frozenset()
    for file in find_files(root, source.subpath, own=own, types=TEXT_FILES).files:
        if file.path.suffix.lower() in WHOLE_FILES:
            with open_text(file, "") as text:
                yield file.name, text.read()
        else:
            yield from _records(file, source.field or DEFAULT_FIELD)


def _records(file: SourceFile, field: str) -> Iterator[Named]:
    for record in READERS[file.path.suffix.lower()](file):
        if isinstance(record, LoralineError):
            raise record
        text = record.data if isinstance(record.data, str) else None
        if isinstance(record.data, dict):
            text = record.data.get(field)
        if not isinstance(text, str):
            raise bad_record(
                "TEXT_MISSING", file.name, record.line, f"the record has no text in its field {field!r}.",
                "Name the field that has it in texts.field",
            )  # fmt: skip
        yield f"{file.name}:{record.line}", text


class TextStore:
    """Different texts in their order, on disk; memory grows with some 30 bytes a text. Blank ones are left out."""

    def __init__(self, path: Path, texts: Iterable[Named]):
        self._ends = array("Q", [0])
        self._names = array("L")
        self.left_out = 0
        """Blank texts, and those that stood there before."""
        digest, seen = hashlib.sha256(), DigestSet()
        with path.open("wb") as out:
            for name, text in texts:
                body = text.strip().encode("utf-8", "replace")
                key = hashlib.sha256(body).digest()
                if not body or not seen.add(key[:16]):
                    self.left_out += 1
                    continue
                label = name.encode("utf-8", "replace")
                out.write(label + body)
                self._names.append(len(label))
                self._ends.append(self._ends[-1] + len(label) + len(body))
                digest.update(key)
        self.digest = digest.hexdigest()
        """Of all texts in their order."""
        self._file: BinaryIO = path.open("rb")

    def __len__(self) -> int:
        return len(self._names)

    def text(self, number: int) -> str:
        """Return a text by its number, counted from 0."""
        return self._read(number)[self._names[number] :].decode()

    def name(self, number: int) -> str:
        """Return where a text comes from."""
        return self._read(number)[: self._names[number]].decode()

    def _read(self, number: int) -> bytes:
        self._file.seek(self._ends[number])
        return self._file.read(self._ends[number + 1] - self._ends[number])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_texts(recipe: datagen_pb2.LlmRecipe, path: Path, allowed: list[Path], fetch: Fetch) -> TextStore:
    """Read the recipe's texts into a store at `path` and set recipe.rows when it is 0.

    FAILED_PRECONDITION when there are fewer different texts than rows wanted.
    """
    store = TextStore(path, named_texts(recipe.texts, allowed, fetch))
    recipe.rows = recipe.rows or len(store)
    if len(store) < max(1, recipe.rows):
        store.close()
        raise failed_precondition(
            "TEXTS_TOO_FEW", f"{recipe.rows} rows are wanted, one for each text, and there are {len(store)} different "
            f"texts ({store.left_out} are blank or stand there twice). Bring more texts, or ask for fewer rows.",
            wanted=str(recipe.rows), texts=str(len(store)),
        )  # fmt: skip
    return store


class TextPlan:
    """Which call reads which text: call n reads text n modulo their number, its (n div number)th time from 0.

    A text whose item was turned down is read again, after the others, up to `tries` times.
    """

    def __init__(self, texts: TextStore, tries: int):
        self._texts, self._most = texts, tries
        self._tries = array("B", bytes(len(texts)))
        self._done = bytearray(len(texts))
        self._fresh = 0
        self._again: deque[int] = deque()
        self._given: set[int] = set()

    def question(self, call: int) -> list[str]:
        """Return the text of a call, and a word that tells a repeated call from the one before."""
        again = call // len(self._texts)
        return [self._texts.text(call % len(self._texts)), *([f"attempt {again + 1}"] if again else [])]

    def took(self, call: int, *, accepted: bool, final: bool) -> None:
        """Note what a recorded call came to; `final` when another try cannot help."""
        text = call % len(self._texts)
        self._given.discard(text)
        self._tries[text] = self._most if final else max(self._tries[text], min(255, call // len(self._texts) + 1))
        self._done[text] |= accepted
        if not self._done[text] and self._tries[text] < self._most:
            self._again.append(text)

    def next_call(self) -> int | None:
        """Return the number of a call that is neither made nor under way; None when every text was read or given up."""
        while self._fresh < len(self._texts):
            text, self._fresh = self._fresh, self._fresh + 1
            if not self._tries[text] and not self._done[text]:
                return self._give(text)
        while self._again:
            text = self._again.popleft()
            if not self._done[text] and text not in self._given and self._tries[text] < self._most:
                return self._give(text)
        return None

    def _give(self, text: int) -> int:
        self._given.add(text)
        return text + self._tries[text] * len(self._texts)

    def exhausted(self, source: str, accepted: int, rows: int) -> LoralineError:
        """Return the end of a run that has read every text as often as it may."""
        given_up = [number for number, done in enumerate(self._done) if not done]
        names = ", ".join(self._texts.name(number) for number in given_up[:SHOWN])
        return failed_precondition(
            "TEXTS_UNREADABLE",
            f"{source}: {accepted} of {rows} rows came out of the texts; {len(given_up)} were read up to {self._most} "
            f"times in vain, such as {names}. Look at them, give a clearer brief or a looser item_schema, raise "
            "max_candidates_ratio, or ask for fewer rows.",
            source=source, accepted=str(accepted), texts=names,
        )  # fmt: skip
