"""The entries are complete, say something in each language, and fit the messages that people really see."""

import re
from pathlib import Path

import pytest

from loraline.core.diagnostics import entries, explain, find, match
from loraline.core.diagnostics.catalog import LANGUAGES, anchor
from loraline.core.diagnostics.page import render

PAGE = Path(__file__).parents[4] / "docs" / "troubleshooting.md"
CHINESE, KOREAN = re.compile(r"[\u4e00-\u9fff]"), re.compile(r"[\uac00-\ud7a3]")

# Messages as libraries, providers and users print them, and the reason that each belongs to.
MESSAGES = [
    ("QUOTA_EXHAUSTED", '{"error":{"status":"RESOURCE_EXHAUSTED","message":"QUOTA_EXHAUSTED"}}'),
    (
        "QUOTA_EXHAUSTED",
        "Error code: 429 - {'error': {'code': 'insufficient_quota', 'message': 'exceeded your current quota'}}",
    ),
    ("QUOTA_EXHAUSTED", '"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"'),
    ("RATE_LIMITED", "HTTP 429 Too Many Requests"),
    ("RATE_LIMITED", "Please retry in 36.429760048s."),
    ("MODEL_COOLDOWN", '{"error":{"code":"model_cooldown","reset_seconds":459202}}'),
    ("LLM_TIMEOUT", "requests.exceptions.ReadTimeout: HTTPConnectionPool(host='x', port=80): Read timed out."),
    ("LLM_TIMEOUT", "openai.APITimeoutError: Request timed out."),
    ("MODEL_OUTPUT_NOT_PARSED", "JSON 解析失败"),
    ("MODEL_OUTPUT_NOT_PARSED", "json.decoder.JSONDecodeError: Expecting ',' delimiter: line 3 column 5 (char 91)"),
    (
        "BITSANDBYTES_UNUSABLE",
        "ImportError: Using `bitsandbytes` 4-bit quantization requires bitsandbytes",
    ),
    ("BITSANDBYTES_UNUSABLE", "OSError: libbitsandbytes_cpu.so: cannot open shared object file"),
    ("CUDA_OUT_OF_MEMORY", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"),
    ("TOKENIZER_MODEL_UNNAMED", "TypeError: expected str, bytes or os.PathLike object, not NoneType"),
    ("EOS_NOT_LEARNED", '  "eos_token": " ",'),
    ("DEVICE_SIDE_ASSERT", "torch.AcceleratorError: CUDA error: device-side assert triggered"),
    ("DEVICE_SIDE_ASSERT", "IndexError: index out of range in self"),
    ("MISSING_KEY", "openai.AuthenticationError: Error code: 401 - {'error': {'message': 'no'}}"),
    (
        "GPU_MEMORY_TOO_SMALL",
        "ValueError: Free memory on device (3.1/23.5 GiB) on startup is less than desired GPU memory utilization",
    ),
    (
        "CUDA_LIBRARY_MISSING",
        "ImportError: libcudart.so.11.0: cannot open shared object file: No such file or directory",
    ),
    ("C_COMPILER_MISSING", "RuntimeError: Failed to find C compiler. Please specify via CC environment variable."),
    (
        "HUB_UNREACHABLE",
        "requests.exceptions.ConnectionError: Failed to establish a new connection: [Errno 101] Network is unreachable",
    ),
    ("HUB_UNREACHABLE", "OSError: We couldn't connect to 'https://huggingface.co' to load the files"),
    ("HUB_NOT_CACHED", "huggingface_hub.errors.OfflineModeIsEnabled: Cannot reach https://x: offline mode is enabled."),
    ("HUB_MODEL_MISSING", "huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error"),
    (
        "PACKAGE_MANAGER_LOCKED",
        "Waiting for cache lock: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 2194 (apt-get)",
    ),
    ("DISK_FULL", "OSError: [Errno 28] No space left on device"),
    ("NOT_SERVABLE", "ValueError: LoRA rank 64 is greater than max_lora_rank 16."),
    (
        "CHAT_TEMPLATE_MISSING",
        "ValueError: Cannot use chat template functions because tokenizer.chat_template is not set",
    ),
    ("JOB_CRASHED", "Out of memory: Killed process 4711 (python)"),
    ("DATABASE_UNREACHABLE", "sqlite3.OperationalError: database is locked"),
    ("PORT_TAKEN", "OSError: [Errno 98] Address already in use"),
    ("GPU_NOT_USED", "AssertionError: Torch not compiled with CUDA enabled"),
    ("ENGINE_DEAD", "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue."),
]

# What the field's five systems ran into; every one has a place here.
FIELD = {
    "marl": {
        "QUOTA_EXHAUSTED",
        "RATE_LIMITED",
        "MODEL_COOLDOWN",
        "LLM_TIMEOUT",
        "MODEL_OUTPUT_NOT_PARSED",
        "BITSANDBYTES_UNUSABLE",
        "CUDA_OUT_OF_MEMORY",
        "OUTPUT_NOT_JSON",
        "LANGUAGE_MISMATCH",
    },
    "leafresh": {
        "FEW_ROWS",
        "LOSS_NOT_FALLING",
        "OUTPUT_FIELDS_MISSING",
        "SPECIAL_CHARACTERS_LOST",
        "ROWS_TRUNCATED",
        "OVERFIT",
        "ANSWERS_UNLIKE_TRAINING",
        "TOKENIZER_MODEL_UNNAMED",
        "EOS_NOT_LEARNED",
        "DEVICE_SIDE_ASSERT",
        "MERGE_FILES_MISSING",
        "KOREAN_SPACING",
        "MIXED_FORMATS",
    },
    "webis": {
        "MISSING_KEY",
        "GPU_MEMORY_TOO_SMALL",
        "CUDA_LIBRARY_MISSING",
        "C_COMPILER_MISSING",
        "HUB_UNREACHABLE",
        "EMPTY_OUTPUT",
        "PACKAGE_MANAGER_LOCKED",
    },
    "cy_llm": {"HUB_UNREACHABLE", "HUB_NOT_CACHED", "FIXED_INSTRUCTION", "SETTINGS_UNDERWEIGHTED", "LOSS_ON_PROMPT"},
    "linzhi": {
        "LOSS_RESTARTED",
        "UNDERTRAINED",
        "OVERFIT",
        "FEW_ROWS",
        "MERGE_CHANGED_MODEL",
        "GPU_NOT_USED",
        "FIXED_INSTRUCTION",
        "RUN_EXISTS",
    },
}


@pytest.mark.parametrize(("reason", "message"), MESSAGES)
def test_real_messages_find_their_entry(reason, message):
    found = match(message)
    assert found, f"nothing matches {message!r}"
    assert reason in found[0].reasons, [entry.reason for entry in found]


def test_healthy_lines_match_nothing():
    for line in (
        "step 50 of 200: loss 0.48, token accuracy 0.91",
        "Loraline listens on 127.0.0.1:7600 (gRPC)",
        "published adapter/mareva:v3 (sha256:ab12) in 2.1 s",
        "INFO: 127.0.0.1 - GET /v1/models 200 OK",
    ):
        assert match(line) == [], line


@pytest.mark.parametrize("system", FIELD)
def test_every_failure_of_the_field_is_covered(system):
    for reason in FIELD[system]:
        entry = find(reason)
        assert entry is not None, reason
        assert system in entry.seeds, f"{reason} does not name {system}"


def test_every_entry_speaks_all_languages():
    for entry in entries():
        for language in LANGUAGES:
            text = entry.text(language)
            joined = f"{text.title} {text.what} {text.do}"
            assert len(text.what) > 15 and len(text.do) > 10, (entry.reason, language)
            if language == "zh":
                assert CHINESE.search(text.title) and CHINESE.search(text.do), entry.reason
            elif language == "ko":
                assert KOREAN.search(text.title) and KOREAN.search(text.do), entry.reason
            else:
                assert not CHINESE.search(joined) and not KOREAN.search(joined), entry.reason


def test_explain_gives_the_asked_language():
    assert explain("PORT_TAKEN").startswith("The server cannot listen")
    assert KOREAN.search(explain("PORT_TAKEN", "ko"))
    assert explain("NO_SUCH_REASON") == ""


def test_the_page_has_an_anchor_for_every_reason_and_no_dead_link():
    page = render()
    anchors = set(re.findall(r'<a id="([^"]+)">', page))
    assert anchors == {anchor(reason) for entry in entries() for reason in entry.reasons}
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= anchors


def test_the_page_in_the_repository_is_the_one_that_the_entries_make():
    text = "docs/troubleshooting.md is stale: run `python -m loraline.core.diagnostics.page docs/troubleshooting.md`"
    assert PAGE.read_text("utf-8") == render(), text
