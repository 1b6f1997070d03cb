"""Results of other runs that a config names: a finished stage by store and fingerprint."""

from __future__ import annotations

from stages import storage
from stages.errors import InputError
from stages.manifest import MANIFEST_NAME, Manifest


def finished(root: str, stage: str, fingerprint: str, place: str) -> Manifest:
    """Read the manifest of a finished stage.

    Args:
        root: the store it is in.
        stage: its name.
        fingerprint: which result.
        place: the setting that names it, for messages.

    Raises:
        InputError: if there is no such result; lists those there are.
    """
    manifest = Manifest.read(root, stage, fingerprint)
    if manifest is not None:
        return manifest
    names = storage.list_files(storage.join(root, stage))
    known = sorted(name.split("/")[0] for name in names if name.count("/") == 1 and name.endswith("/" + MANIFEST_NAME))
    there = f"it has {', '.join(known)}" if known else "it has none"
    raise InputError(f"{place}: {root} has no finished {stage} stage {fingerprint!r}; {there}")
