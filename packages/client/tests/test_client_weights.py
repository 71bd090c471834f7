"""How much of which dataset: weights by name, or `dataset`, `settings` and `settings_weight` as people have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraline.client.pipeline.document import SpecError
from loraline.client.pipeline.reading import read_pipeline

LONG = "datasets: {dialogue: 1, settings: 5}"


def edited(pipeline: Path, new: str) -> Path:
    text = pipeline.read_text()
    assert LONG in text
    pipeline.write_text(text.replace(LONG, new))
    return pipeline


@pytest.mark.parametrize(
    ("said", "weights"),
    [
        ("dataset: dialogue\n  settings: settings", {"dialogue": 1, "settings": 5}),
        ("dataset: dialogue\n  settings: settings\n  settings_weight: 2.5", {"dialogue": 1, "settings": 2.5}),
        ("dataset: dialogue", {"dialogue": 1}),
        ("datasets: [settings, dialogue]", {"settings": 1, "dialogue": 1}),
        (LONG, {"dialogue": 1, "settings": 5}),
    ],
)
def test_settings_are_shown_five_times_unless_told_otherwise(
    pipeline: Path, said: str, weights: dict[str, float]
) -> None:
    train = read_pipeline(edited(pipeline, said)).train
    assert train is not None and train.weights == weights


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ("datasets: {dialogue: 1}\n  settings: settings", "cannot stand beside `datasets`"),
        ("settings: settings", "needs `dataset` beside it"),
        ("dataset: dialogue\n  settings_weight: 5", "names, which is missing"),
        ("dataset: dialogue\n  settings: setings", "there is no dataset 'setings'"),
        ("dataset: dialogue\n  settings: settings\n  settings_weight: 0", "a number above 0"),
        ("dataset: dialogue\n  settings: settings\n  setting_weight: 3", "Did you mean `settings_weight`?"),
    ],
)
def test_mistakes_are_told_with_their_line(pipeline: Path, said: str, what: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_pipeline(edited(pipeline, said))
    assert what in str(caught.value) and "pipeline.yaml" in str(caught.value)
