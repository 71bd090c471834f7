"""Writes what Python packages each image holds, as CycloneDX 1.6: `make sbom`, or tools/sbom.py FOLDER.

The images install hash-pinned requirements and nothing beyond them, so the requirements are the truth; a line without
a hash, or without an exact version, is an error. The same requirements give the same file, byte for byte.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
IMAGES = {
    "datagen": ("datagen.txt",),
    "trainer-cpu": ("torch-cpu.txt", "trainer.txt"),
    "trainer-gpu": ("torch.txt", "trainer.txt"),
    "merger-cpu": ("torch-cpu.txt", "merger.txt"),
    "merger-gpu": ("torch.txt", "merger.txt"),
    "inference-cpu": ("torch-cpu.txt", "inference-cpu.txt"),
    "inference-gpu": ("inference-gpu.txt",),
    # Built without CPU_WHEELS: requirements/torch.sh then takes the torch that brings CUDA.
    "trainer-cpu-with-cuda": ("torch.txt", "trainer.txt"),
    "merger-cpu-with-cuda": ("torch.txt", "merger.txt"),
    "inference-cpu-with-cuda": ("torch.txt", "inference-cpu.txt"),
}
"""Image and flavour -> the files below requirements/ that its Dockerfile installs."""
PLATFORM = {
    "python_version": "3.11",
    "python_full_version": "3.11.0",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "os_name": "posix",
    "platform_system": "Linux",
    "sys_platform": "linux",
    "platform_machine": "x86_64",
    "platform_release": "",
    "platform_version": "",
    "implementation_version": "3.11.0",
    "extra": "",
}
"""What the images run on; packages for other systems are left out."""


@dataclass(frozen=True)
class Pin:
    """One package of an image: exact version, and the digests of the files that may be installed for it."""

    name: str
    version: str
    sha256: tuple[str, ...] = ()

    @property
    def purl(self) -> str:
        """Return the package URL."""
        return f"pkg:pypi/{self.name}@{self.version.replace('+', '%2B')}"


def read_pins(text: str, file: str) -> Iterator[Pin]:
    """Return the packages of a requirements file that the images' platform installs; ValueError names a loose line."""
    joined = re.sub(r"\\\n", " ", text)
    for line in joined.splitlines():
        content = line.split(" #")[0].strip()
        if not content or content.startswith("#"):
            continue
        wanted, *options = re.split(r"\s+--", content)
        hashes = tuple(option.removeprefix("hash=sha256:") for option in options)
        try:
            requirement = Requirement(wanted)
        except InvalidRequirement as error:
            raise ValueError(f"{file}: {wanted!r} cannot be read: {error}") from error
        exact = re.fullmatch(r"==([^,*]+)", str(requirement.specifier))
        if not exact or not hashes or not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes):
            raise ValueError(
                f"{file}: {requirement.name} is not pinned to one version with sha256 digests; run: make lock"
            )
        if requirement.marker is None or requirement.marker.evaluate(dict(PLATFORM)):
            yield Pin(canonicalize_name(requirement.name), exact.group(1), hashes)


def own_packages(stage: str) -> list[Pin]:
    """Return our packages in a stage's image."""
    folders = [ROOT / "packages" / "api", ROOT / "packages" / "core", ROOT / "services" / stage]
    projects = [tomllib.loads((folder / "pyproject.toml").read_text())["project"] for folder in folders]
    return [Pin(project["name"], project["version"]) for project in projects]


def bill(image: str, pins: Sequence[Pin], own: Sequence[Pin]) -> dict[str, Any]:
    """Return the bill of materials of an image."""
    components = [_component(pin) for pin in sorted({*pins, *own}, key=lambda pin: (pin.name, pin.version))]
    identity = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([image, components]))
    container = {"type": "container", "bom-ref": f"loraline-{image}", "name": f"loraline-{image}"}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{identity}",
        "version": 1,
        "metadata": {
            "component": {**container, "version": own[-1].version},
            "tools": {"components": [{"type": "application", "name": "tools/sbom.py", "version": own[-1].version}]},
        },
        "components": components,
        "dependencies": [{"ref": container["bom-ref"], "dependsOn": [entry["bom-ref"] for entry in components]}],
    }


def _component(pin: Pin) -> dict[str, Any]:
    component: dict[str, Any] = {
        "type": "library",
        "bom-ref": pin.purl,
        "name": pin.name,
        "version": pin.version,
        "purl": pin.purl,
    }
    if pin.sha256:
        # One of these is installed, by platform; `hashes` of CycloneDX would say that one file has all of them.
        component["properties"] = [{"name": "loraline:accepted-sha256", "value": digest} for digest in pin.sha256]
    else:
        component["licenses"] = [{"license": {"id": "Apache-2.0"}}]
    return component


def image_pins(image: str) -> list[Pin]:
    """Return the packages that an image installs; ValueError when two files pin one package differently.

    What torch.txt brings besides torch gives way to the stage's own file, which the Dockerfile installs after it.
    """
    found: dict[str, Pin] = {}
    gives_way: set[str] = set()
    for file in IMAGES[image]:
        for pin in read_pins((ROOT / "requirements" / file).read_text("utf-8"), file):
            if file == "torch.txt" and pin.name != "torch":
                gives_way.add(pin.name)
            elif pin.name in gives_way:
                found[pin.name] = pin
            if found.setdefault(pin.name, pin).version != pin.version:
                raise ValueError(
                    f"{image}: {pin.name} is {found[pin.name].version} in one file and {pin.version} in {file}"
                )
    return list(found.values())


def main(folder: Path) -> int:
    """Write all bills and return the exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    for image in IMAGES:
        try:
            pins = image_pins(image)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        made = bill(image, pins, own_packages(image.partition("-")[0]))
        file = folder / f"loraline-{image}.cdx.json"
        file.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        print(f"{file}: {len(made['components'])} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist" / "sbom"))
