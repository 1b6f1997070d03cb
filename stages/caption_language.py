"""The language of captions, by py3langid's model that comes with the package: offline, the same answer everywhere."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

UNKNOWN = ("und", 0.0)


@functools.lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def known_languages() -> frozenset[str]:
    """Return the ISO 639 codes that can be told apart."""
    return frozenset(str(label) for label in _identifier().labels)


def languages_of(captions: Sequence[str]) -> list[tuple[str, float]]:
    """Tell the language of captions, each distinct one once.

    Args:
        captions: n texts.

    Returns:
        n pairs of an ISO 639 code and its probability among all known languages; ``UNKNOWN`` for an empty caption.
    """
    identifier = _identifier()
    found: dict[str, tuple[str, float]] = {}
    for caption in captions:
        if caption not in found:
            text = caption.strip()
            language, probability = identifier.classify(text) if text else UNKNOWN
            found[caption] = (str(language), float(probability))
    return [found[caption] for caption in captions]
