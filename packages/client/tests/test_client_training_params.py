"""Names of settings that other trainers have: what the answer says follows the value they were given."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraline.client.pipeline.document import SpecError
from loraline.client.pipeline.reading import read_pipeline


@pytest.mark.parametrize(
    ("setting", "said", "unsaid"),
    [
        ("load_in_4bit: true", "`quantization: nf4`", "none"),
        ("load_in_4bit: false", "`quantization: none`", "nf4"),
        ("use_4bit: true", "`quantization: nf4`", "none"),
        ("use_4bit: 'no'", "`quantization: none`", "nf4"),
        ("no_4bit: true", "`quantization: none`", "nf4"),
        ("no-4bit: true", "`quantization: none`", "nf4"),
        ("no_4bit: false", "Leave it out", "`"),
        ("load_in_8bit: true", "`quantization: int8`", "none"),
        ("load_in_8bit: false", "`quantization: none`", "int8"),
        ("bf16: true", "`dtype: bf16`", "Leave"),
        ("bf16: false", "`dtype: fp32`", "bf16"),
        ("fp16: false", "Leave it out", "dtype: fp16"),
        ("use_dora: true", "`method: dora`", "Leave"),
        ("use_dora: false", "Leave it out", "dora"),
        ("warmup_steps: 10", "`warmup_ratio`", "Leave"),
    ],
)
def test_the_remedy_is_what_the_value_meant(pipeline: Path, setting: str, said: str, unsaid: str) -> None:
    text = pipeline.read_text()
    assert "lora_r: 16" in text
    pipeline.write_text(text.replace("lora_r: 16", setting))
    with pytest.raises(SpecError) as caught:
        read_pipeline(pipeline)
    key = setting.partition(":")[0]
    told = next(text for path, text in caught.value.fields.items() if path.endswith(f"training_params.{key}"))
    assert said in told and unsaid not in told.removeprefix("is not known here.")
