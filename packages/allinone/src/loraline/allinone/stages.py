"""Which stages there are: the only table of the platform that names all of them."""

from __future__ import annotations

from collections.abc import Sequence

from loraline.core.serving.component import Component, ComponentBuilder, Platform


def _datagen(platform: Platform) -> Component:
    from loraline.datagen.component import build

    return build(platform)


def _trainer(platform: Platform) -> Component:
    from loraline.trainer.component import build

    return build(platform)


def _merger(platform: Platform) -> Component:
    from loraline.merger.component import build

    return build(platform)


def _inference(platform: Platform) -> Component:
    from loraline.inference.component import build

    return build(platform)


STAGES: dict[str, ComponentBuilder] = {
    "datagen": _datagen,
    "trainer": _trainer,
    "merger": _merger,
    "inference": _inference,
}


def builders(names: Sequence[str] = ()) -> list[ComponentBuilder]:
    """Return the builders of the named stages, of all when none is named. KeyError names an unknown stage."""
    return [STAGES[name] for name in names or STAGES]
