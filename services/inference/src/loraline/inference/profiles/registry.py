"""Which profiles there are: the built-in ones and those of the operator's folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from loraline.core.errors import LoralineError, invalid_argument, not_found
from loraline.inference.profiles.profile import Profile, read_profile

_BUILT_IN = Path(__file__).parent / "builtin"


class Profiles:
    """The profiles of one server, read once at its start."""

    def __init__(self, profiles: dict[str, Profile]):
        self._profiles = dict(sorted(profiles.items()))

    @classmethod
    def load(cls, folder: Path | None) -> Profiles:
        """Read all profiles. A file of the folder may replace a built-in one by its name.

        INVALID_ARGUMENT PROFILE_INVALID names the file and the field.
        """
        found = _read(_BUILT_IN)
        if folder is not None:
            if not folder.is_dir():
                raise _no_folder(folder)
            found |= _read(folder)
        return cls(found)

    def get(self, name: str) -> Profile:
        """Return a profile. NOT_FOUND PROFILE_NOT_FOUND lists those there are."""
        try:
            return self._profiles[name]
        except KeyError:
            known = ", ".join(self._profiles)
            message = f"There is no response profile {name[:80]!r}. There are {known}."
            raise not_found("PROFILE_NOT_FOUND", message, profile=name[:80]) from None

    def __iter__(self) -> Iterator[Profile]:
        """Yield the profiles by name."""
        return iter(self._profiles.values())


def _read(folder: Path) -> dict[str, Profile]:
    found: dict[str, Profile] = {}
    origin: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix in {".yaml", ".yml"}):
        profile = read_profile(path)
        if profile.name in found:
            taken = origin[profile.name].name
            message = f"The response profile {path.name}: name: {profile.name!r} is taken by {taken}."
            raise invalid_argument("PROFILE_INVALID", message, name=message)
        found[profile.name], origin[profile.name] = profile, path
    return found


def _no_folder(folder: Path) -> LoralineError:
    message = (
        f"LORALINE_INFERENCE_PROFILES_DIR names {folder}, which is no folder. Make it, or leave the setting empty."
    )
    return invalid_argument("PROFILE_INVALID", message, profiles_dir=message)
