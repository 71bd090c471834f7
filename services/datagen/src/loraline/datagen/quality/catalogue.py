"""The catalogue of findings: what each code says, why it matters and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["info", "warning", "error"]


@dataclass(frozen=True)
class Code:
    """A kind of finding.

    `says` follows "3 rows of 500: " in messages of codes that only count rows. `structural` ones make a dataset
    unusable: no gate can allow them.
    """

    severity: Severity
    why: str
    remedy: str
    says: str = ""
    fixable: bool = False
    structural: bool = False


CODES: dict[str, Code] = {
    # Rows that cannot be used.
    "EMPTY_DATASET": Code(
        "error", "A model cannot learn from nothing.",
        "Check the source: its card counts what was left out, and why.", structural=True,
    ),
    "ROW_INVALID": Code(
        "error", "The trainer reads `messages` of role and content; such a row stops it.",
        "Mend the rows, or convert the file anew.", "not a list of messages with role and text.", structural=True,
    ),
    "ROW_WITHOUT_ASSISTANT": Code(
        "error", "Only the assistant's turns are learnt; such a row trains nothing and may end at loss 0.0.",
        "Add the answers, or remove the rows.", "without an assistant turn.", structural=True,
    ),
    "EMPTY_CONTENT": Code(
        "error", "An empty turn teaches the model to say nothing.",
        "Write the turn, or remove the row; `fix` removes them.", "with an empty turn.", fixable=True, structural=True,
    ),
    "CONTROL_TOKEN": Code(
        "error", "A chat template puts turns between such tokens: in a text they would end a turn or change its role, "
        "and the trainer refuses the rows (SPECIAL_TOKEN_IN_TEXT).",
        "Remove them from the text, or write them otherwise, such as with a space inside. Where the base model reads "
        "them as text, name it in gate.base_model.", "control tokens of chat templates in the text.", structural=True,
    ),
    # Answers that are not what their recipe promises.
    "NOT_JSON": Code(
        "error", "The rows promise one JSON object and nothing else; a model that learns otherwise breaks its parser.",
        "Write the answers as one JSON object, or remove the rows.", "answers that are not one JSON object.",
    ),
    "FENCED_JSON": Code(
        "error", "A model that learns to wrap JSON in a code fence answers with something that no parser takes.",
        "Let `fix` strip the fences.", "JSON inside a code fence.", fixable=True,
    ),
    "WRONG_FORMAT": Code(
        "error", "Lines of text are promised; a JSON answer teaches the model to choose by itself.",
        "Write the answers as text, or set gate.answer_format to JSON.", "JSON where text is promised.",
    ),
    "SCHEMA_MISMATCH": Code(
        "error", "What reads the answers relies on their fields; a model learns a missing one as missing.",
        "Add or correct the fields named, or set gate.answer_schema to what is meant.",
    ),
    "EMPTY_FIELD": Code(
        "error", "A field that is there and says nothing is shown to people as an empty line.",
        "Write the text, or remove the rows.",
    ),
    "ANSWER_TOO_LONG": Code(
        "error", "A model writes as long as it was taught; what shows its answers has room for no more.",
        "Shorten the answers, or raise gate.max_response_characters.",
    ),
    # Repetition.
    "LEAKAGE": Code(
        "error", "Prompts that stand in both files make the validation loss look better than it is.",
        "Make the dataset anew with its split; `fix` removes such rows from validation.jsonl.",
        "validation rows whose prompt also stands in train.jsonl.", fixable=True,
    ),
    "NEAR_LEAKAGE": Code(
        "warning", "Validation rows that nearly repeat training rows make the validation loss look better than it is.",
        "Remove them from validation.jsonl, or split by topic.", "validation rows that nearly repeat a training row.",
    ),
    "EXACT_DUPLICATES": Code(
        "warning", "A row that stands twice is learnt twice as strongly, and hides how few rows there are.",
        "Set gate.drop_duplicates, or let `fix` remove them.", "exact duplicates of an earlier row.", fixable=True,
    ),
    "NEAR_DUPLICATES": Code(
        "warning", "Rows that differ in a word or two teach little more than one of them, and are learnt by heart.",
        "Keep one of each, or write them apart.", "near duplicates of an earlier row.",
    ),
    "FEW_ROWS": Code(
        "info", "Below some 500 rows a model learns the style of the answers, and little else.",
        "Add rows, or weight this dataset among others.",
    ),
    # Monotony.
    "FIXED_INSTRUCTION": Code(
        "warning",
        "When most prompts begin with the same line, the model learns to answer that line, beside the question.",
        "Vary the instruction, or leave it out and keep the input.",
    ),
    "MISSING_INPUT": Code(
        "warning",
        "One prompt with many different answers tells the model nothing about which to give: the loss falls and the "
        "answers stand beside the question.",
        "Give each row the input that its answer answers, or mix in rows with real questions.",
    ),
    "REPEATED_SYSTEM_PROMPT": Code(
        "info",
        "With one system prompt in every row, the behaviour is bound to it: without it, the model may not show it.",
        "Send the same system prompt when serving, or leave it out of a share of the rows.",
    ),
    "SAME_OPENING": Code(
        "warning", "A model that sees one opening again and again begins every answer with it.",
        "Vary how answers begin; with templates, add openings to the pools.",
    ),
    "SAME_TEMPLATE": Code(
        "warning", "Answers that begin and end alike were cut from one template, and the model learns the template.",
        "Add templates or variations, and draw from larger pools.",
    ),
    "SMALL_ANSWER_POOL": Code(
        "warning", "With few different answers, the model learns to choose among them and not to write.",
        "Enlarge the pools of answers. Where choosing is what you want, allow this finding.",
    ),
    "LOW_DISTINCT_N": Code(
        "warning", "When the answers use the same few word pairs over and over, the loss falls early and stops there.",
        "Add answers with other words and sentences.",
    ),
    "LOW_SENTENCE_VARIETY": Code(
        "warning", "Sentences that stand in many answers are learnt by heart and come out everywhere.",
        "Rewrite the repeated sentences in several ways.",
    ),
    "LOW_EMOJI_VARIETY": Code(
        "info", "With one or two emoji in use, the model puts them everywhere.",
        "Use more kinds of emoji, or leave them out.",
    ),
    # Text that is damaged or in the wrong language.
    "BROKEN_TEXT": Code(
        "error", "Replacement characters and wrongly decoded text are learnt like words, and come back as rubbish.",
        "Convert the source with its right encoding, and mend the rows.",
    ),
    "BROKEN_TOKENS": Code(
        "warning", "Latin letters glued to Hangul, and letters that are no whole syllable, teach the model to break "
        "off in the middle of words.",
        "Mend the rows; often they are the output of a badly tuned model.",
    ),
    "SPACING_ERRORS": Code(
        "warning", "A model that learns text without spaces, or with spaces within words, writes so.",
        "Correct the spaces as proposed, and look at the sentences in between.",
    ),
    "SPACING_NOT_CHECKED": Code(
        "info", "Errors of spacing in Hangul are found by kiwipiepy, which is not installed.",
        "Install loraline-datagen[korean] where datagen runs.",
    ),
    "WRONG_LANGUAGE": Code(
        "error", "A model that is to answer in one language learns another from such rows.",
        "Translate the answers, remove the rows, or correct gate.language.",
    ),
    "FOREIGN_LETTERS": Code(
        "warning", "Stray letters of another script make the model switch language in the middle of an answer.",
        "Write the words in the language of the dataset, where they have such a form.",
    ),
    "FORBIDDEN_LATIN": Code(
        "error", "The gate or the rows' recipe forbids Latin letters in answers; a model learns them from such rows.",
        "Write the words in the dataset's own script; where they are meant, allow this finding.",
    ),
    "FORBIDDEN_DIGITS": Code(
        "error", "The gate or the rows' recipe forbids digits in answers; a model learns them from such rows.",
        "Write numbers as words; where they are meant, allow this finding.",
    ),
    "FORBIDDEN_EMOJI": Code(
        "error", "The gate or the rows' recipe forbids emoji in answers; a model learns them from such rows.",
        "Remove them from the answers; where they are meant, allow this finding.",
    ),
    "FORBIDDEN_MARKDOWN": Code(
        "error", "The gate or the rows' recipe forbids markdown in answers; not rendered, its marks are seen.",
        "Write plain text; where markdown is meant, allow this finding.",
    ),
    # Form.
    "MIXED_FORMATS": Code(
        "info", "With JSON and plain answers mixed, the model chooses by itself unless the prompts say which.",
        "Say the format in the prompt, or keep to one.",
    ),
    "UNTRIMMED_CONTENT": Code(
        "info", "White space at the ends of an answer is learnt like its words.",
        "Let `fix` trim it.", "with white space at the ends of a turn.", fixable=True,
    ),
    "NOT_NORMALISED": Code(
        "info", "The same letter in two encodings is two words to the tokenizer: decomposed letters (NFD), zero-width "
        "marks and line ends of other systems.",
        "Let `fix` normalise the text to NFC and remove the marks.", "text that is not normalised.", fixable=True,
    ),
    "NO_VALIDATION_ROWS": Code(
        "info", "Without validation rows, over-fitting shows only in use.",
        "Set split.validation_fraction, and bring rows with different prompts.",
    ),
    # Against a tokenizer.
    "ANSWER_CUT_AWAY": Code(
        "error", "Where the prompt alone fills max_length, no token of an answer is left to learn: loss 0.0.",
        "Raise max_length, or shorten or remove the prompts.",
    ),
    "ROW_TRUNCATED": Code(
        "warning", "Truncation cuts off the end of the answer and its end mark: the model learns not to stop.",
        "Raise max_length to the longest row, or shorten the rows.",
    ),
    "UNKNOWN_CHARACTERS": Code(
        "error", "Characters that the tokenizer does not know are one and the same to the model; it can never write "
        "them.",
        "Replace the characters, or choose a base model that knows them.",
    ),
    "BYTE_SOUP": Code(
        "warning", "Letters that the tokenizer can write only byte by byte cost several tokens each, and a model that "
        "misses one byte writes rubbish.",
        "Choose a base model made for this script.",
    ),
}  # fmt: skip
