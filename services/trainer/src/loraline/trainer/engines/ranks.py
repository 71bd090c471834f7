"""What training processes that work together must agree on. Alone, each call answers for this process only."""

from __future__ import annotations

import torch.distributed as dist


def count() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if _together() else 1


def first() -> bool:
    """Whether this process is the one that writes and tells."""
    return not _together() or dist.get_rank() == 0


def from_first(value: str) -> str:
    """Return what the first process passed; all must call it."""
    if not _together():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def wait_for_all() -> None:
    """Return when every process has come here."""
    if _together():
        dist.barrier()


def part() -> None:
    """Leave the group, once there is nothing left to agree on."""
    if _together():
        dist.barrier()
        dist.destroy_process_group()


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
