"""What an ablation compares: variants of one config, each trained with several seeds, and claims about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from stages.base import setting


@dataclass(frozen=True, kw_only=True)
class Claim:
    """That one variant has a better metric than another, as a paper reports."""

    better: str = setting(help="the variant that should win")
    worse: str = setting(help="the variant that should lose")
    metric: str = setting("frechet_distance", "a metric of the evaluate stage; distances are better when lower")


@dataclass(frozen=True, kw_only=True)
class GuidanceSweep:
    """Variants sampled at rising guidance of the decoder."""

    scales: tuple[float, ...] = setting(help="guidance scales, rising")
    variants: tuple[str, ...] = setting(help="the variants to sample; the first is claimed to lose least diversity")
    set: Mapping[str, Any] = setting(factory=dict, help="further settings of the sweep")


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """The variants of a config and what is claimed of them."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    base: str = setting(help="the config file they are variants of, relative to this one")
    seeds: tuple[int, ...] = setting((0, 1, 2), "seeds of prior, decoder and images; data and CLIP are shared")
    set: Mapping[str, Any] = setting(factory=dict, help="settings of all variants, dotted key -> value")
    variants: Mapping[str, Mapping[str, Any]] = setting(help="name -> the settings in which it differs")
    claims: tuple[Claim, ...] = setting((), "what is expected, and is checked")
    guidance: GuidanceSweep | None = setting(None, "a sweep of the decoder's guidance")

    def __post_init__(self) -> None:
        if len(self.seeds) < 2 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seeds: {list(self.seeds)}; give two different seeds or more, or nothing can be estimated"
            )
        named = [name for claim in self.claims for name in (claim.better, claim.worse)]
        named += list(self.guidance.variants) if self.guidance else []
        if unknown := [name for name in named if name not in self.variants]:
            raise ValueError(f"variants: '{unknown[0]}' is compared but not among {', '.join(self.variants)}")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One pipeline of an ablation.

    Attributes:
        variant: its name.
        seed: of what is trained and sampled.
        guidance_scale: of the decoder in the sweep; None outside of it.
        overrides: ``dotted.key=value`` changes to the base config.
    """

    variant: str
    seed: int
    guidance_scale: float | None
    overrides: tuple[str, ...]
