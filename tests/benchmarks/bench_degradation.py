"""How fast the upsamplers' training pairs are made: alone, in the data loader, and as a burden on the training step.

``python -m tests.benchmarks.bench_degradation`` prints three tables for the second upsampler of the paper (crops of
256 px out of 1024, degraded to 64 px). To compare with another version of the module, name its file::

    git show HEAD~1:unclip_models/degradation.py > /tmp/before.py
    python -m tests.benchmarks.bench_degradation --reference /tmp/before.py

Times of the first table are CPU time of one thread, the best of several rounds, in which the versions take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stages.dataset import TrainingStream
from stages.open_shard import TrainingShard
from stages.samples import Sample, selection_table, table_to_bytes, write_tar
from tests.stages.training_data import put
from unclip_models import degradation
from unclip_models.randomness import SampleRandom
from unclip_models.settings import Degradation, UNetConfig, UpsamplerConfig
from unclip_models.upsampler import Upsampler, training_sample

KINDS: tuple[Degradation, ...] = ("none", "blur", "bsr_light", "bsr")
CROP_PX, SMALL_PX, BATCH, SIDE_PX = 256, 64, 8, 1024


def picture(side_px: int, seed: int) -> np.ndarray:
    """Draw smooth shapes with some grain; uint8 ``(side_px, side_px, 3)``."""
    rng = np.random.default_rng(seed)
    shapes = cv2.GaussianBlur(rng.random((side_px, side_px, 3)).astype(np.float32), (0, 0), 3)
    shapes = 0.5 + (shapes - 0.5) * 4 + 0.01 * rng.standard_normal(shapes.shape)
    return (np.clip(shapes, 0, 1) * 255).astype(np.uint8)


def load(path: str) -> ModuleType:
    """Import a module from a file."""
    spec = importlib.util.spec_from_file_location("reference_degradation", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def cpu_ms_per_image(module: ModuleType, kind: Degradation, images: Tensor, num_batches: int) -> float:
    """Degrade the same images with the randomness of several steps."""
    started = time.thread_time()
    for step in range(num_batches):
        module.degrade(kind, images, SMALL_PX, SampleRandom(0, step, range(BATCH)).generator("degradation"))
    return (time.thread_time() - started) / num_batches / BATCH * 1e3


def bench_alone(reference: ModuleType | None, num_rounds: int, num_batches: int) -> None:
    """Print the CPU time of one image, for every degradation."""
    images = torch.from_numpy(np.stack([picture(CROP_PX, seed) for seed in range(BATCH)])).permute(0, 3, 1, 2)
    images = images.float().div(127.5).sub(1).contiguous()
    modules = [degradation] if reference is None else [degradation, reference]
    print(f"one thread, {CROP_PX} -> {SMALL_PX} px")
    for kind in KINDS:
        times: list[list[float]] = [[] for _ in modules]
        for _ in range(num_rounds + 1):  # the first round warms up
            for module, measured in zip(modules, times, strict=True):
                measured.append(cpu_ms_per_image(module, kind, images, num_batches))
        best = [min(measured[1:]) for measured in times]
        ratio = f"  {best[1]:6.2f} ms before, {best[1] / best[0]:.2f} times as fast" if reference else ""
        print(f"  {kind:10} {best[0]:6.2f} ms/image  {1e3 / best[0]:7.0f} images/s{ratio}")


def write_pictures(root: str, count: int) -> list[TrainingShard]:
    """Write one shard of JPEG images."""

    def encoded(seed: int) -> bytes:
        sink = io.BytesIO()
        Image.fromarray(picture(SIDE_PX, seed)).save(sink, "JPEG", quality=90)
        return sink.getvalue()

    keys = [f"{i:010d}" for i in range(count)]
    tar = write_tar(Sample(key=k, image=encoded(i), extension="jpg", caption=k) for i, k in enumerate(keys))
    selection = put(root, "selection.parquet", table_to_bytes(selection_table(keys, [None] * count)))
    return [TrainingShard(selection=selection, num_kept=count, images=put(root, "images.tar", tar))]


def config_of(kind: Degradation) -> UpsamplerConfig:
    """Return the second upsampler's config, with a network of no consequence."""
    unet = UNetConfig(model_channels=8, channel_mult=(1,), num_res_blocks=1)
    return UpsamplerConfig(image_size=SIDE_PX, input_size=SIDE_PX // 4, degradation=kind, unet=unet)


def seconds_per_image(work: Callable[[], object], num_images: int) -> float:
    """Time one call."""
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) / num_images


def bench_loader(shards: Sequence[TrainingShard], root: str, num_threads: int, num_batches: int) -> None:
    """Print the images a stream delivers, with and without preparing pairs; nothing is cached."""
    print(f"loader, JPEG of {SIDE_PX} px, {num_threads} decode threads")
    plain = 0.0
    for kind in (None, *KINDS):
        stream = TrainingStream(
            shards,
            root=root,
            num_streams=1,
            global_batch_size=BATCH,
            seed=0,
            image_size_px=SIDE_PX,
            prepare=None if kind is None else partial(training_sample, config_of(kind)),
            num_decode_threads=num_threads,
            prefetch_batches=1,
            cache_gib=0.0,
        )
        with contextlib.closing(stream.batches(0)) as batches:
            next(batches)
            rate = 1 / seconds_per_image(lambda: [next(batches) for _ in range(num_batches)], num_batches * BATCH)
        plain = plain or rate
        print(f"  {kind or 'whole images':12} {rate:7.1f} images/s  {rate / plain:.2f} of whole images")


def bench_step(shards: Sequence[TrainingShard], root: str, num_batches: int) -> None:
    """Print what a step does before the network runs: make the pairs itself, or take up those made ahead."""
    print("in the training step, before the network")
    for kind in KINDS:
        config, times = config_of(kind), []
        model = Upsampler(config)
        for prepare in (None, partial(training_sample, config)):
            stream = TrainingStream(
                shards,
                root=root,
                num_streams=1,
                global_batch_size=BATCH,
                seed=0,
                image_size_px=SIDE_PX,
                prepare=prepare,
                cache_gib=0.0,
            )
            with contextlib.closing(stream.batches(0)) as batches:
                made = [next(batches) for _ in range(num_batches)]

            def take_up(made: list = made, prepared: bool = prepare is not None, model: Upsampler = model) -> None:
                for batch in made:
                    part = batch.part(0, BATCH, torch.device("cpu"))
                    if not prepared:
                        model.training_pair(part["image"], SampleRandom(0, batch.step, batch.indices))

            times.append(min(seconds_per_image(take_up, num_batches * BATCH) * 1e3 for _ in range(3)))
        print(f"  {kind:10} {times[0]:6.2f} ms/image in the step, {times[1]:5.2f} made ahead")


def main() -> None:
    """Run all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", help="file with another version of unclip_models/degradation.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--threads", type=int, nargs="*", default=[0, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench_alone(load(args.reference) if args.reference else None, args.rounds, args.batches)
    with tempfile.TemporaryDirectory(prefix="unclip-bench-") as root:
        shards = write_pictures(str(Path(root)), 32)
        for num_threads in args.threads:
            bench_loader(shards, root, num_threads, args.batches)
        bench_step(shards, root, 4)


if __name__ == "__main__":
    main()
