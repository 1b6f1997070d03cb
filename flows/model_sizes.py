"""How large the models of a config are, counted without allocating a weight."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from stages.config import Config
from stages.errors import ConfigError

TRAINED = ("prior", "decoder", "upsampler_256", "upsampler_1024")


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """One model of the stack.

    Attributes:
        model: the stage that makes it.
        kind: its class; or where published weights come from.
        num_parameters: all of them, trained or frozen; ``None`` for weights that have not been fetched.
    """

    model: str
    kind: str
    num_parameters: int | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def model_sizes(config: Config) -> list[ModelSize]:
    """Count the parameters of every model on torch's meta device.

    Raises:
        ConfigError: if a model cannot be built as configured.
    """
    import torch

    from unclip_models.checkpoint import build

    sizes = [_clip_size(config)]
    for name in TRAINED:
        try:
            with torch.device("meta"):
                model = build(getattr(config, name).model)
        except ValueError as error:
            raise ConfigError(f"{name}.model: {error}") from error
        sizes.append(ModelSize(model=name, kind=type(model).__name__, num_parameters=_count(model)))
    return sizes


def _clip_size(config: Config) -> ModelSize:
    import torch

    from unclip_models.clip import ClipModel

    if config.clip.kind == "pretrained":
        place = "/".join(part for part in (config.clip.name, config.clip.weights) if part)
        return ModelSize(model="clip", kind=place, num_parameters=None)
    try:
        with torch.device("meta"):
            model = ClipModel.from_config(config.clip.model)
    except ValueError as error:
        raise ConfigError(f"clip.model: {error}") from error
    return ModelSize(model="clip", kind="ClipModel", num_parameters=_count(model))


def _count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
