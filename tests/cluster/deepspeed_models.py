"""What the ranks of ``deepspeed_rank.py`` do with models that can compute their activations twice."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cluster.deepspeed_engine import DeepSpeedEngine
from stages.engine import Engine, TorchEngine
from stages.engine_settings import EngineSettings, Precision
from stages.sample_grids import draw
from stages.training import model_loss
from stages.validation_config import SamplesConfig
from tests.unclip_models.golden_curves import BATCH, CONFIGS, images_for, make_batch
from unclip_models.checkpoint import build
from unclip_models.randomness import SampleRandom

# A transformer, and a U-Net with attention and dropout.
MODELS: dict[str, Precision] = {"prior": "fp32", "decoder": "bf16"}
ZERO_STAGES = (1, 2, 3)
_MICRO_BATCH_SIZE = 4
_NUM_STEPS = 2


def compute_twice(name: str, world_size: int) -> dict[str, Any]:
    """Train a model under every ZeRO stage with activations kept and computed twice, and in plain torch with them kept.

    Returns:
        ``plain``, and for every stage ``kept <stage>`` and ``twice <stage>``: ``rows``, loss and norm of every step;
        ``calls``, how often a module was called; ``drawn``, numbers of samples drawn with the averaged weights, twice.
    """
    settings = EngineSettings(
        micro_batch_size=_MICRO_BATCH_SIZE,
        num_micro_batches=BATCH // world_size // _MICRO_BATCH_SIZE,
        precision=MODELS[name],
    )
    found = {"plain": _train(TorchEngine(_model(name, twice=False), model_loss, settings), name)}
    for stage, twice in itertools.product(ZERO_STAGES, (False, True)):
        engine = DeepSpeedEngine(_model(name, twice=twice), model_loss, replace(settings, zero_stage=stage))
        found[f"{'twice' if twice else 'kept'} {stage}"] = _train(engine, name)
    return found


def _model(name: str, *, twice: bool) -> nn.Module:
    config = CONFIGS[name]
    if name == "decoder":
        config = replace(config, unet=replace(config.unet, checkpoint_activations=twice))
    else:
        config = replace(config, checkpoint_activations=twice)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return build(config)


def _train(engine: Engine, name: str) -> dict[str, Any]:
    batch = make_batch() | images_for(CONFIGS[name])
    share = BATCH // engine.world_size
    first = engine.rank * share
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = nn.modules.module.register_module_forward_pre_hook(count)
    rows = []
    for step in range(_NUM_STEPS):
        parts = []
        for start in range(first, first + share, _MICRO_BATCH_SIZE):
            indices = range(start, start + _MICRO_BATCH_SIZE)
            part = {key: values[start : start + _MICRO_BATCH_SIZE] for key, values in batch.items()}
            parts.append((part, SampleRandom(1, step, indices)))
        result = engine.step(parts, 2e-3)
        rows.append([result.loss, result.grad_norm])
    handle.remove()
    drawn = [_drawn(engine, {key: values[:2] for key, values in batch.items()}) for _ in range(2)]
    engine.close()
    return {"rows": rows, "calls": calls, "drawn": drawn}


def _drawn(engine: Engine, batch: dict[str, Any]) -> list[float]:
    """Draw two samples, as a training does that looks at them, and return some of their numbers."""
    samples = SamplesConfig(steps=3, guidance_scale=2.0)
    with engine.evaluating(averaged=True, whole=True) as model:
        if engine.rank and not engine.partitioned:
            return []
        drawn = draw(
            model, batch, samples, [torch.Generator().manual_seed(seed) for seed in range(len(batch["tokens"]))]
        )
    return [float(number) for number in drawn.flatten()[:: max(drawn.numel() // 16, 1)]]
