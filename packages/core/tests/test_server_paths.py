"""What a request may name on the server's disk."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from loraline.core.errors import LoralineError
from loraline.core.server_paths import allowed_path, model_folder


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    (folder / "one").mkdir(parents=True)
    (tmp_path / "models-of-others").mkdir()
    return folder


def test_real_paths_below_an_allowed_folder_are_let_through(inside: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(inside)
    for path in (inside, inside / "one", inside / "new.jsonl", tmp_path / "link" / "one"):
        assert allowed_path(str(path), [inside], "path") == Path(str(path).replace("link", "models"))
    assert model_folder(str(inside / "one"), [tmp_path / "link"], "path") == inside / "one"


def test_everything_else_is_refused_in_the_same_words(
    inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (inside / "out").symlink_to(tmp_path / "models-of-others")
    monkeypatch.chdir(inside)
    outside = (tmp_path, tmp_path / "models-of-others", tmp_path / "nowhere", inside / ".." / "x", inside / "out" / "y")
    for path in (*map(str, outside), "one", "/etc/passwd", "a\x00b", "~nobody-of-that-name/x"):
        for check in (allowed_path, model_folder):
            with pytest.raises(LoralineError) as caught:
                check(path, [inside], "source.path")
            assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PATH_NOT_ALLOWED")
            assert "LORALINE_ALLOWED_PATHS" in caught.value.message
            assert list(caught.value.fields) == ["source.path"]


def test_a_missing_model_is_not_found_whoever_named_it(inside: Path) -> None:
    for allowed in ([inside], None):
        with pytest.raises(LoralineError) as caught:
            model_folder(str(inside / "none"), allowed, "path")
        assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_PATH_MISSING")
