"""The embed stage against a bare open_clip loop, and against clip-retrieval's inference: same weights, same webdataset.

``python -m tests.benchmarks.bench_embed`` makes a CLIP of random weights and shards of synthetic JPEGs, and prints
ratios, theirs over ours. clip-retrieval lives in an environment of its own::

    uv venv --python 3.11 /tmp/clip-retrieval-venv
    uv pip install --python /tmp/clip-retrieval-venv/bin/python clip-retrieval "setuptools<81" torch==2.14.1 torchvision
    python -m tests.benchmarks.bench_embed --clip-retrieval-python /tmp/clip-retrieval-venv/bin/python

Each side is a process that has loaded its model; a repetition reads all shards, embeds images and captions and writes
the results. The sides take turns, and all stay on the same cores with as many threads. What each wrote is compared.
The embed stage also verifies checksums, names dropped samples and commits records; the others do not.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from stages.golden import golden_metadata
from stages.samples import Sample, embeddings_of, selection_table, table_to_bytes, write_tar
from tests.benchmarks.bench_degradation import picture
from tests.benchmarks.bench_models import REPOSITORY, cpu_model
from tests.benchmarks.embed_task import Task
from tests.stages.training_data import put
from unclip_models.clip import ClipModel

SIDES_PX = ((256, 256), (384, 256), (256, 340), (512, 384), (320, 480))
DISTINCT_PICTURES = 100
WORDS = (
    *("a", "the", "of", "on", "with", "near", "photo", "picture", "poster", "portrait", "design", "red", "blue", "old"),
    *("new", "small", "large", "wooden", "vintage", "dog", "cat", "house", "street", "woman", "man", "child", "tree"),
    *("car", "morning", "light", "river", "table", "chair", "market", "crowd", "mountain", "snow", "beach", "sunset"),
)
# What the mean cosine between two sides' embeddings of a sample must reach: half precision and resize differ a little.
SAME_EMBEDDING_COSINE = 0.999
CAPTIONS = ("usual", "full")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """A CLIP of open_clip's own classes: ViT with patches of 32 px at 224 px, text of 77 tokens."""

    width: int
    layers: int
    text_width: int
    text_layers: int
    embedding_dim: int = 512

    def open_clip_config(self) -> dict[str, object]:
        """Return the model config in open_clip's own JSON form."""
        return {
            "embed_dim": self.embedding_dim,
            "vision_cfg": {"image_size": 224, "patch_size": 32, "width": self.width, "layers": self.layers},
            "text_cfg": {
                "context_length": 77,
                "vocab_size": 49408,
                "width": self.text_width,
                "heads": self.text_width // 64,
                "layers": self.text_layers,
            },
        }


SIZES = {
    "small": Sizes(width=384, layers=4, text_width=256, text_layers=4),
    "vit_b_32": Sizes(width=768, layers=12, text_width=512, text_layers=12),
    "vit_l_32": Sizes(width=1024, layers=24, text_width=768, text_layers=12, embedding_dim=768),
}


def captions_of(kind: str, count: int) -> list[str]:
    """Make captions: ``usual`` ones of 3 to 40 words, half of them below 11, or ones that fill all 77 tokens."""
    rng = np.random.default_rng(5)
    lengths = np.clip(np.round(np.exp(rng.normal(2.35, 0.5, count))), 3, 40).astype(int)
    if kind == "full":
        lengths = np.full(count, 80)
    return [f"{' '.join(rng.choice(WORDS, length))} {i}" for i, length in enumerate(lengths)]


def write_store(root: Path, sizes: Sizes, captions: Sequence[str], num_shards: int) -> tuple[str, ...]:
    """Write model, shards and their plan; return the paths of the tars."""
    config = sizes.open_clip_config()
    torch.manual_seed(0)
    clip = ClipModel.from_config(config).freeze()
    (root / "clip.json").write_text(json.dumps(config))
    torch.save(clip.model.state_dict(), root / "clip.pt")
    clip.save(root / "own.safetensors", metadata=golden_metadata(clip))
    weights = put(str(root), "clip.safetensors", (root / "own.safetensors").read_bytes())
    pictures = [encoded(i) for i in range(min(DISTINCT_PICTURES, len(captions)))]
    plan, tars = [], []
    for number, rows in enumerate(np.array_split(np.arange(len(captions)), num_shards)):
        keys = [f"{row:010d}" for row in rows]
        tar = write_tar(
            Sample(key=f"{row:010d}", image=pictures[row % len(pictures)], extension="jpg", caption=captions[row])
            for row in rows.tolist()
        )
        images = put(str(root), f"{number:05d}.tar", tar)
        selection = put(str(root), f"{number:05d}.parquet", table_to_bytes(selection_table(keys, [None] * len(keys))))
        files = {"images": images, "selection": selection, "weights": weights}
        plan.append({role: dataclasses.asdict(file) for role, file in files.items()})
        tars.append(str(root / images.path))
    (root / "plan.json").write_text(json.dumps(plan))
    return tuple(tars)


def encoded(seed: int) -> bytes:
    """Draw one picture and encode it."""
    height, width = SIDES_PX[seed % len(SIDES_PX)]
    sink = io.BytesIO()
    Image.fromarray(picture(max(height, width), seed)[:height, :width]).save(sink, "JPEG", quality=90)
    return sink.getvalue()


class Worker:
    """A process that embeds all shards whenever it is asked to."""

    def __init__(self, command: Sequence[str], task: Task, log: Path) -> None:
        self._log = log
        settings = {"OMP_NUM_THREADS": str(task.num_threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [*command, task.to_json()],
                cwd=REPOSITORY,
                env={**os.environ, **settings},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def embed(self, output: Path) -> dict[str, float]:
        """Ask for one repetition and wait for it.

        Raises:
            RuntimeError: if the process has ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{output}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries too print there
                return dict(json.loads(line))
        raise RuntimeError(f"a worker of the benchmark failed; its last words:\n{self._log.read_text()[-2000:]}")

    def close(self) -> None:
        """Let the process end."""
        self._process.communicate()


def measure(
    workers: Mapping[str, Worker], folder: Path, num_repetitions: int
) -> tuple[dict[str, list[dict[str, float]]], float]:
    """Let the sides take turns; the first round warms up, is compared, and does not count.

    Returns:
        Times of every side, and the lowest mean cosine between ours and another side's embeddings.
    """
    times: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    cosine = 1.0
    for repetition in range(num_repetitions + 1):
        names = list(workers)
        for name in names if repetition % 2 else reversed(names):
            output = folder / f"{name}-{repetition}"
            found = workers[name].embed(output)
            if repetition:
                times[name].append(found)
        if not repetition:
            own = embeddings_in(folder / "ours-0")
            cosine = min([1.0, *(mean_cosine(own, embeddings_in(folder / f"{name}-0")) for name in names)])
    return times, cosine


def embeddings_in(folder: Path) -> dict[str, np.ndarray]:
    """Read what a side wrote: key -> image and text embedding, one after the other, float32 ``(2D,)``."""
    found: dict[str, np.ndarray] = {}

    def take(keys: Sequence[str], image: np.ndarray, text: np.ndarray) -> None:
        found.update(zip(keys, np.concatenate([image, text], axis=1).astype(np.float32), strict=True))

    if (folder / "img_emb").is_dir():  # clip-retrieval's layout
        keys = pq.read_table(folder / "metadata" / "metadata_0.parquet")["image_path"].to_pylist()
        take(keys, *(np.load(folder / f"{side}_emb" / f"{side}_emb_0.npy") for side in ("img", "text")))
    for path in folder.glob("*.keys.json"):
        stem = path.name.removesuffix(".keys.json")
        take(json.loads(path.read_text()), *(np.load(folder / f"{stem}.{side}.npy") for side in ("image", "text")))
    for path in folder.glob("*.parquet"):
        table: pa.Table = pq.read_table(path)
        if "image_embedding" in table.column_names:
            sides = ("image_embedding", "text_embedding")
            take(table["key"].to_pylist(), *(embeddings_of(table, side) for side in sides))
    return found


def mean_cosine(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """Compare two sides sample by sample.

    Raises:
        RuntimeError: if they embedded different samples, or made different embeddings of them.
    """
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"{len(ours)} samples here, {len(theirs)} there, {len(ours.keys() & theirs.keys())} in both")
    # Both halves have norm 1.
    cosine = float(np.mean([(ours[key] @ theirs[key]) / 2 for key in ours]))
    if cosine < SAME_EMBEDDING_COSINE:
        raise RuntimeError(f"the sides' embeddings differ: mean cosine {cosine:.6f}")
    return cosine


def report(kind: str, times: Mapping[str, Sequence[Mapping[str, float]]], num_samples: int) -> list[str]:
    """Write one row per rival."""
    rows = []
    for name in times:
        if name == "ours":
            continue
        cells = [name, kind]
        for side in ("ours", name):
            wall = [t["wall_s"] for t in times[side]]
            cells.append(f"{num_samples / statistics.median(wall):.1f} ({min(wall):.1f}-{max(wall):.1f} s)")
        for clock in ("wall_s", "cpu_s"):
            ratios = [theirs[clock] / ours[clock] for ours, theirs in zip(times["ours"], times[name], strict=True)]
            cells.append(f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f}-{max(ratios):.2f})")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> None:
    """Measure, print the table and the conditions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip-retrieval-python", help="interpreter of an environment with clip-retrieval")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of the model and of decoding; as many cores are used")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--captions", choices=CAPTIONS, nargs="+", default=list(CAPTIONS))
    parser.add_argument("--sizes", choices=sorted(SIZES), default="small")
    parser.add_argument("--gpu", action="store_true", help="measure on CUDA; all but decoding is the GPU's")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="on a GPU")
    args = parser.parse_args()
    cores = tuple(sorted(os.sched_getaffinity(0))[: args.threads])
    rows = []
    cosines = []
    for kind in args.captions:
        with tempfile.TemporaryDirectory(prefix="unclip-bench-") as name, contextlib.ExitStack() as stack:
            root = Path(name)
            captions = captions_of(kind, args.images)
            task = Task(
                root=name,
                tars=write_store(root, SIZES[args.sizes], captions, args.shards),
                batch_size=args.batch_size,
                num_threads=args.threads,
                cores=cores,
                on_gpu=args.gpu,
                precision=args.precision,
            )
            own = [sys.executable, "-m", "tests.benchmarks.embed_worker"]
            commands = {
                "ours": [*own, "ours"],
                "bare open_clip loop": [*own, "bare"],
                "control: itself": [*own, "ours"],
            }
            if args.clip_retrieval_python is not None:
                theirs = [args.clip_retrieval_python, "-m", "tests.benchmarks.clip_retrieval_worker", "theirs"]
                commands["clip-retrieval"] = theirs
            workers = {side: Worker(command, task, root / f"{side}.log") for side, command in commands.items()}
            for worker in workers.values():
                stack.callback(worker.close)
            times, cosine = measure(workers, root, args.repetitions)
            cosines.append(cosine)
            rows += report(kind, times, args.images)
            print(f"captions {kind}: done", file=sys.stderr)
    print("| rival | captions | ours, samples/s | theirs, samples/s | time ratio | CPU time ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))
    print(
        f"\nRatios are theirs over ours: above 1, ours is faster. Median (least-most) of {args.repetitions} "
        f"alternating repetitions of {args.images} samples in {args.shards} shards, batches of {args.batch_size}, "
        f"{DISTINCT_PICTURES} distinct JPEGs of {min(min(s) for s in SIDES_PX)} to {max(max(s) for s in SIDES_PX)} px. "
        f"Captions: usual, half of them below 11 words, or full, 77 tokens each. Model {args.sizes}: "
        f"{SIZES[args.sizes]}. {'CUDA, ' + args.precision if args.gpu else 'CPU, fp32'}; {cpu_model()}, "
        f"{args.threads} core(s) and thread(s) for each side; torch {torch.__version__}. Embeddings agree to a mean "
        f"cosine of {min(cosines):.6f}."
    )


if __name__ == "__main__":
    main()
