"""Our side of the embedding benchmark, and a bare loop of open_clip's own calls; each in a process of its own.

The first argument is ``ours`` or ``bare``, the second a ``Task`` as JSON. Every line of standard input asks for one
repetition, and is the folder to write to; each answer is a line of JSON. See ``bench_embed.py``.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.benchmarks.embed_task import Task, answer_every_line


def ours(task: Task) -> Callable[[Path], None]:
    """Prepare the stage; a repetition processes every shard into a folder of its own."""
    from stages.base import Shard
    from stages.embed import Embed, EmbedConfig
    from stages.manifest import File

    stage = Embed(
        EmbedConfig(
            batch_size=task.batch_size,
            num_cpus=task.num_threads,
            num_decode_threads=task.num_threads,
            num_gpus=float(task.on_gpu),
            precision=task.precision,
        ),
        root=task.root,
    )
    plan = [
        Shard(id=f"{i:016x}", index=i, inputs={role: File(**file) for role, file in inputs.items()})
        for i, inputs in enumerate(json.loads((Path(task.root) / "plan.json").read_text()))
    ]

    def repeat(output: Path) -> None:
        for shard in plan:
            stage.process(shard, str(output))

    return repeat


def bare(task: Task) -> Callable[[Path], None]:
    """Prepare the loop that one would write: decode, preprocess, batch, encode both sides, save."""
    import open_clip

    open_clip.add_model_config(Path(task.root) / "clip.json")
    device = torch.device("cuda" if task.on_gpu else "cpu")
    model, _, preprocess = open_clip.create_model_and_transforms(
        "clip", pretrained=str(Path(task.root) / "clip.pt"), device=device
    )
    model.eval()
    tokenizer = open_clip.get_tokenizer("clip")
    half = torch.bfloat16 if task.precision == "bf16" else torch.float16

    @torch.inference_mode()
    def encode(pictures: list[torch.Tensor], captions: list[str]) -> list[np.ndarray]:
        with torch.autocast(device.type, dtype=half, enabled=task.on_gpu and task.precision != "fp32"):
            image = model.encode_image(torch.stack(pictures).to(device), normalize=True)
            text = model.encode_text(tokenizer(captions).to(device), normalize=True)
        return [found.float().cpu().numpy().astype(np.float16) for found in (image, text)]

    def repeat(output: Path) -> None:
        output.mkdir()
        for path in task.tars:
            keys: list[str] = []
            found: list[list[np.ndarray]] = []
            pictures: list[torch.Tensor] = []
            captions: list[str] = []
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, extension = member.name.partition(".")
                    file = tar.extractfile(member)
                    assert file is not None
                    if extension == "jpg":
                        pictures.append(preprocess(Image.open(io.BytesIO(file.read()))))
                        keys.append(key)
                    elif extension == "txt":
                        captions.append(file.read().decode())
                        if len(captions) == task.batch_size:
                            found.append(encode(pictures, captions))
                            pictures, captions = [], []
            if captions:
                found.append(encode(pictures, captions))
            for name, parts in zip(("image", "text"), zip(*found, strict=True), strict=True):
                np.save(output / f"{Path(path).stem}.{name}.npy", np.concatenate(parts))
            (output / f"{Path(path).stem}.keys.json").write_text(json.dumps(keys))

    return repeat


if __name__ == "__main__":
    given = Task.from_json(sys.argv[2])
    os.sched_setaffinity(0, given.cores)
    torch.set_num_threads(given.num_threads)
    answer_every_line({"ours": ours, "bare": bare}[sys.argv[1]](given))
