"""One rank of a DeepSpeed group that trains with frozen parts, under every ZeRO stage; writes down losses and files.

Usage: python -m tests.cluster.deepspeed_frozen RANK WORLD_SIZE FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from cluster.deepspeed_engine import DeepSpeedEngine
from stages.training import model_loss
from stages.warm_start import freeze
from tests.cluster.deepspeed_rank import ZERO_STAGES, load, save, settings, steps
from tests.cluster.ranks import joined
from tests.stages.state_files import parameters_of
from tests.stages.training_data import TinyModel

FROZEN = ("body.0.*", "body.4.bias")


def frozen_model(seed: int = 0) -> TinyModel:
    """Build the tiny model with its first layer, and a bias further on, left out."""
    model = TinyModel(seed=seed)
    freeze(model, FROZEN, "tiny.frozen")
    return model


def main(rank: int, world_size: int, folder: Path) -> None:
    """Be one rank."""
    with joined(rank, world_size, folder / "meeting"):
        found = {}
        for zero_stage in ZERO_STAGES:
            engine = DeepSpeedEngine(frozen_model(), model_loss, settings(world_size, zero_stage))
            first = steps(engine, 0, 4)
            state = folder / f"zero{zero_stage}"
            save(engine, state)
            names = set().union(*(parameters_of(path) for path in state.iterdir()))
            on = steps(engine, 4, 8)
            load(engine, state, engine.layout)
            found[zero_stage] = {"rows": first + on, "again": steps(engine, 4, 8), "names": sorted(names)}
            engine.close()
        if rank == 0:
            (folder / "found.json").write_text(json.dumps(found))
        dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
