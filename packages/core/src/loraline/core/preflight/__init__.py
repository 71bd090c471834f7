"""Looks at a machine before anything is built on it: ports, disk, hub, package manager; stages add their own checks."""

from loraline.core.preflight.finding import CHECKS_GROUP, Check, Finding, Place, recognised

__all__ = ["CHECKS_GROUP", "Check", "Finding", "Place", "recognised"]
