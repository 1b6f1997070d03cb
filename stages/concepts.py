"""Scores of unwanted concepts, such as nudity or watermarks, from image embeddings alone.

A concept is described by prompts, of what it is and of what it is not, and scored zero-shot by the CLIP that made the
embeddings; or it is a linear head on the embeddings, trained elsewhere and given as a file.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load

from stages import storage
from stages.base import setting
from stages.errors import InputError, IntegrityError, StorageError
from stages.golden import check_golden
from stages.manifest import File
from stages.weights import checked_copy

Array = npt.NDArray[np.float32]
NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class Concept:
    """What is looked for in images, and how much of it is too much."""

    prompts: tuple[str, ...] = setting((), "captions of the concept, such as 'a photo with a watermark'")
    against: tuple[str, ...] = setting((), "captions of what it is to be told from, such as 'a photo'")
    # The file is identified by its content (`head_sums`).
    head: str | None = setting(
        None, "instead of prompts: safetensors file with weight (D,) and bias (), local or s3://", affects="nothing"
    )
    max: float = setting(help="highest score that is kept, 0 to 1", affects="stage")

    def __post_init__(self) -> None:
        if (self.head is None) != bool(self.prompts and self.against) or (self.head and (self.prompts or self.against)):
            raise ValueError("prompts: give prompts and against, or head alone; a concept is scored one way")
        if not 0 <= self.max <= 1:
            raise ValueError(f"max: {self.max} is no score; write a number from 0 to 1")


@dataclass(frozen=True)
class Head:
    """A linear classifier of embeddings: ``sigmoid(x . weight + bias)``, weight ``(D,)``."""

    weight: Array
    bias: float

    def scores(self, images: Array) -> Array:
        """Score image embeddings ``(n, D)``: float32 ``(n,)``, 0 to 1."""
        logits = images.astype(np.float64) @ self.weight.astype(np.float64) + self.bias
        return (0.5 * (1 + np.tanh(0.5 * logits))).astype(np.float32)  # the sigmoid, without overflow


@dataclass(frozen=True)
class ZeroShot:
    """Captions of a concept and of what it is told from, as CLIP sees them.

    Attributes:
        texts: text embeddings ``(p + a, D)``, unit norm, those of the concept first.
        num_prompts: p.
        logit_scale: what CLIP multiplies cosines by.
    """

    texts: Array
    num_prompts: int
    logit_scale: float

    def scores(self, images: Array) -> Array:
        """Score image embeddings ``(n, D)``: the concept's share of the softmax over all captions, float32 ``(n,)``."""
        unit = images.astype(np.float64)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        logits = self.logit_scale * (unit @ self.texts.astype(np.float64).T)
        shares = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-math.inf))
        scores: Array = (shares[:, : self.num_prompts].sum(axis=1) / shares.sum(axis=1)).astype(np.float32)
        return scores


def head_sums(concepts: Mapping[str, Concept]) -> dict[str, str]:
    """Identify the heads by content: concept -> sha256.

    Raises:
        InputError: if a file is missing.
    """
    heads = {name: concept.head for name, concept in concepts.items() if concept.head is not None}
    return {name: hashlib.sha256(_head_bytes(name, uri)).hexdigest() for name, uri in heads.items()}


def load_heads(concepts: Mapping[str, Concept], sums: Mapping[str, str], dim: int) -> dict[str, Head]:
    """Load the heads of all concepts that have one.

    Args:
        concepts: all concepts.
        sums: sha256 of each file when the work was planned.
        dim: D, of the embeddings.

    Raises:
        InputError: if a file has changed, is no safetensors file, or does not fit the embeddings.
    """
    heads = {}
    for name, concept in concepts.items():
        if concept.head is None:
            continue
        place, data = f"curate.concepts.{name}.head", _head_bytes(name, concept.head)
        if hashlib.sha256(data).hexdigest() != sums[name]:
            raise InputError(f"{place}: {concept.head} has changed since this run was planned; run again")
        try:
            tensors = load(data)
        except (SafetensorError, ValueError) as error:
            raise InputError(f"{place}: {concept.head} is not a safetensors file: {error}") from error
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        if shapes != {"weight": (dim,), "bias": ()}:
            raise InputError(f"{place}: {concept.head} holds {shapes}; needs weight ({dim},) and bias ()")
        heads[name] = Head(tensors["weight"].astype(np.float32), float(tensors["bias"]))
    return heads


def load_zero_shot(concepts: Mapping[str, Concept], root: str, weights: File) -> dict[str, ZeroShot]:
    """Embed the prompts of all concepts that have them, with the CLIP that made the embeddings.

    Args:
        concepts: all concepts.
        root: the store.
        weights: of the CLIP.

    Raises:
        IntegrityError: if the model does not reproduce its golden embeddings here.
    """
    import torch

    from unclip_models.checkpoint import read_metadata
    from unclip_models.clip import MAX_LOGIT_SCALE, ClipModel

    with checked_copy(root, weights) as path:
        clip = ClipModel.load(path)
        check_golden(clip, read_metadata(path), place=str(path))
    scale = float(cast(torch.Tensor, clip.model.logit_scale).detach().float().exp().clamp(max=MAX_LOGIT_SCALE).max())
    found = {}
    for name, concept in concepts.items():
        if concept.head is None:
            tokens = clip.tokenize([*concept.prompts, *concept.against])
            found[name] = ZeroShot(clip.encode_text(tokens).float().numpy(), len(concept.prompts), scale)
    return found


def score_concepts(scorers: Mapping[str, Head | ZeroShot], order: Sequence[str], images: Array) -> dict[str, Array]:
    """Score image embeddings ``(n, D)`` for every concept: name -> float32 ``(n,)``, in the given order.

    Raises:
        IntegrityError: if a score is not a number.
    """
    scores = {name: scorers[name].scores(images) for name in order}
    wrong = next((name for name, values in scores.items() if not np.isfinite(values).all()), None)
    if wrong is not None:
        raise IntegrityError(f"curate.concepts.{wrong}: a score is not finite; look at its head for nan")
    return scores


def _head_bytes(name: str, uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except StorageError as error:
        raise InputError(f"curate.concepts.{name}.head: {error}") from error
