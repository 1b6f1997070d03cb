"""Generate images from captions with the trained stack; every image is a function of (caption, seed, weights).

The captions come from the curated data set, drawn by the seed, or from a text file. A shard is a run of images: its
inputs are the weights of every model and the tables that hold its captions. The PNGs carry their caption, their seed
and the checksums of the weights that made them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages import storage
from stages.base import Progress, Resources, Shard, Stage, refuse_below, setting
from stages.errors import ConfigError, InputError, NotFoundError
from stages.manifest import File, Manifest, ShardRecord
from stages.pictures import encode_png
from stages.samples import Sample, embedding_array, kept_keys, table_from_bytes, table_to_bytes, write_tar
from stages.weights import checked_copy, weights_of
from unclip_models.sampling_settings import DecoderSampling, PriorSampling, SamplingConfig, UpsamplerSampling

if TYPE_CHECKING:
    from unclip_models.generate import UnCLIP

UPSAMPLERS = ("upsampler_256", "upsampler_1024")
Until = Literal["decoder", "upsampler_256", "upsampler_1024"]


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What is generated, and how each model is sampled."""

    num_samples: int = setting(64, "images to generate", affects="stage")
    # The content of the file identifies it (`external`), not its place.
    captions_uri: str | None = setting(
        None, "text file, one caption per line, used in turn; null: captions of the curated data", affects="nothing"
    )
    images_per_caption: int = setting(1, "images made of every caption, one after another", affects="stage")
    seed: int | None = setting(None, "seed of the first image; null: the run's", affects="nothing")  # identity has it
    until: Until = setting("upsampler_1024", "the last model to run; its images are published")
    use_prior: bool = setting(
        True, "false: the decoder is fed the text embedding (a text-embedding decoder, or the no-prior baseline)"
    )
    prior: PriorSampling = setting(
        factory=PriorSampling, help="sampling of the prior: steps, guidance_scale, sampler, num_candidates"
    )
    decoder: DecoderSampling = setting(
        factory=DecoderSampling, help="sampling of the decoder: steps, guidance_scale, sampler, eta"
    )
    upsampler_256: UpsamplerSampling = setting(
        factory=UpsamplerSampling,
        help="sampling of the first upsampler: steps, sampler, eta, noise_temperature, tile_px",
    )
    upsampler_1024: UpsamplerSampling = setting(
        factory=lambda: UpsamplerSampling(steps=15), help="sampling of the second upsampler, as of the first"
    )
    precision: Literal["fp32", "bf16"] = setting("fp32", "arithmetic of the networks; `bf16` is faster on GPUs")
    compile: bool = setting(False, "compile the networks with torch.compile; pays over many batches", affects="nothing")
    channels_last: bool = setting(False, "NHWC activations in U-Nets, for GPUs with `compile`", affects="nothing")
    samples_per_shard: int = setting(64, "images in one unit of work", affects="stage")
    batch_size: int = setting(32, "images sampled at once; memory, not result", affects="nothing")
    num_cpus: float = setting(1.0, "CPU cores per worker", affects="nothing")
    num_gpus: float = setting(0.0, "GPUs per worker; fractions share one", affects="nothing")

    def __post_init__(self) -> None:
        refuse_below(self, 1, "num_samples", "images_per_caption", "samples_per_shard", "batch_size")
        if self.prior.num_candidates < 1:
            raise ValueError(f"prior.num_candidates: {self.prior.num_candidates} is below 1; write 1 or more")
        for name in ("prior", "decoder", *UPSAMPLERS):
            steps, eta = getattr(self, name).steps, getattr(getattr(self, name), "eta", 0.0)
            if isinstance(steps, int) and steps < 1:
                raise ValueError(f"{name}.steps: {steps} is below 1; write how many timesteps the sampler visits")
            if not 0 <= eta <= 1:
                raise ValueError(f"{name}.eta: {eta} is not between 0 (deterministic) and 1 (as noisy as DDPM)")

    @property
    def models(self) -> tuple[str, ...]:
        """The stages whose weights are used, in order of use."""
        upsamplers = () if self.until == "decoder" else UPSAMPLERS[: UPSAMPLERS.index(self.until) + 1]
        prior = ("prior",) if self.use_prior else ()
        return ("clip", *prior, "decoder", *upsamplers)

    @property
    def sampling(self) -> SamplingConfig:
        """The settings in the form ``UnCLIP`` takes."""
        names = [name for name in self.models if name in UPSAMPLERS]
        upsamplers = tuple(cast(UpsamplerSampling, getattr(self, name)) for name in names)
        return SamplingConfig(prior=self.prior, decoder=self.decoder, upsamplers=upsamplers)


@dataclass(frozen=True, kw_only=True)
class GeneratedImage:
    """One image and where it comes from.

    Attributes:
        caption: what was asked for.
        seed: of all its noise.
        pixels: uint8 ``(S, S, 3)``.
        image_embedding: the prior's z_i, unit-norm float32 ``(D,)``.
        provenance: further PNG text entries: software, checksums of the weights, sampling settings.
    """

    caption: str
    seed: int
    pixels: npt.NDArray[np.uint8]
    image_embedding: npt.NDArray[np.float32]
    provenance: Mapping[str, str]

    def entries(self) -> dict[str, str]:
        """Return the PNG text entries: caption, seed and provenance."""
        return {"caption": self.caption, "seed": str(self.seed), **self.provenance}

    def png(self) -> bytes:
        """Encode the picture as PNG with its text entries; equal images give equal bytes."""
        return encode_png(self.pixels, self.entries())


class Generate(Stage[GenerateConfig]):
    """Captions -> images; see the module's docstring."""

    name: ClassVar[str] = "generate"
    repeatable: ClassVar[bool] = False
    uses_seed: ClassVar[bool] = True

    def __init__(self, config: GenerateConfig, *, root: str, seed: int = 0) -> None:
        super().__init__(config, root=root, seed=seed)
        self._loaded: tuple[Mapping[str, str], UnCLIP] | None = None

    @property
    def upstream(self) -> tuple[str, ...]:
        """Every model in use, and ``curate`` where the captions come from it."""
        return self.config.models + (() if self.config.captions_uri else ("curate",))

    @property
    def resources(self) -> Resources:
        """See ``GenerateConfig``."""
        return Resources(num_cpus=self.config.num_cpus, num_gpus=self.config.num_gpus)

    def external(self) -> Any:
        """Identify the file of captions, if there is one, by its content."""
        return self._captions_in_file() if self.config.captions_uri else None

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        """Cut the images to generate into runs of ``samples_per_shard``; image i has the seed ``seed + i``."""
        weights = collect_weights(inputs, self.config.models)
        total, step = self.config.num_samples, self.config.samples_per_shard
        runs = [range(start, min(start + step, total)) for start in range(0, total, step)]
        if self.config.captions_uri:
            lines, times = self._captions_in_file(), self.config.images_per_caption
            chosen = [[lines[i // times % len(lines)] for i in run] for run in runs]
            return [
                self.shard(index, inputs=weights, first=run.start, captions=captions)
                for index, (run, captions) in enumerate(zip(runs, chosen, strict=True))
            ]
        records = inputs["curate"].records
        times = self.config.images_per_caption
        rows = draw_rows([record.num_kept for record in records], -(-total // times), self.seed)
        rows = np.repeat(rows, times, axis=0)[:total]
        return [self._shard_of_rows(index, run.start, rows[run], records, weights) for index, run in enumerate(runs)]

    def _shard_of_rows(
        self,
        index: int,
        first: int,
        rows: npt.NDArray[np.int64],
        records: Sequence[ShardRecord],
        weights: Mapping[str, File],
    ) -> Shard:
        """Plan the images whose captions are the given (record, kept row) pairs ``(n, 2)``."""
        used = sorted({int(record) for record in rows[:, 0]})
        inputs = dict(weights)
        for number, record in enumerate(used):
            inputs[f"embeddings#{number}"] = records[record].inputs["embeddings"]
            inputs[f"selection#{number}"] = records[record].files["selection"]
        picks = [[used.index(int(record)), int(row)] for record, row in rows]
        return self.shard(index, inputs=inputs, first=first, picks=picks)

    def process(self, shard: Shard, output: str) -> ShardRecord:
        """Generate the images of one run."""
        started_at = time.monotonic()
        captions = shard.params.get("captions") or self._captions_of(shard)
        first = int(shard.params["first"])
        weights = {name: shard.inputs[name] for name in self.config.models}
        images: list[GeneratedImage] = []
        for image in self.generate(weights, captions, range(self.seed + first, self.seed + first + len(captions))):
            images.append(image)
            self.report(Progress(done=len(images), total=len(captions), unit="images"))
        keys = [f"{first + i:08d}" for i in range(len(images))]
        samples = [
            Sample(key=key, image=image.png(), extension="png", caption=image.caption, metadata={"seed": image.seed})
            for key, image in zip(keys, images, strict=True)
        ]
        files = {"images": ("tar", write_tar(samples)), "table": ("parquet", table_to_bytes(_table(keys, images)))}
        return self.commit(shard, output, files, started_at=started_at, num_in=len(captions), num_kept=len(images))

    def generate(
        self, weights: Mapping[str, File], captions: Sequence[str], seeds: Sequence[int]
    ) -> Iterator[GeneratedImage]:
        """Generate images in batches, with the weights loaded at the first use and kept.

        Args:
            weights: model -> its file in this store.
            captions: what to show.
            seeds: one per caption.

        Raises:
            ConfigError: if the models do not fit together or cannot be sampled as configured.
            IntegrityError: if a file of weights is damaged.
        """
        import torch

        model = self._model(weights)
        provenance = self._provenance(weights)
        size = self.config.batch_size
        for start in range(0, len(captions), size):
            part, part_seeds = captions[start : start + size], list(seeds[start : start + size])
            try:
                with self._autocast(model.device.type):
                    made = model.text_to_image(part, part_seeds, self.config.sampling)
            except ValueError as error:
                raise ConfigError(f"generate: {error}") from error
            embeddings = made.image_embeddings.to(torch.float32).numpy()
            for i, pixels in enumerate(made.final.numpy()):
                yield GeneratedImage(
                    caption=part[i],
                    seed=part_seeds[i],
                    pixels=pixels,
                    image_embedding=embeddings[i],
                    provenance=provenance,
                )

    @contextmanager
    def stack(self, inputs: Mapping[str, Manifest]) -> Iterator[UnCLIP]:
        """Give the trained models to work with, in the precision of the config.

        Raises:
            InputError: if a model has not been trained yet.
            ConfigError: if the models do not fit together.
        """
        model = self._model(collect_weights(inputs, self.config.models))
        with self._autocast(model.device.type):
            yield model

    def provenance(self, inputs: Mapping[str, Manifest], sampling: SamplingConfig | None = None) -> dict[str, str]:
        """Return what every picture of these models should carry: software, checksums of the weights, sampling.

        Args:
            inputs: of the models.
            sampling: if it is not the config's.
        """
        return self._provenance(collect_weights(inputs, self.config.models), sampling)

    def _autocast(self, device_type: str) -> AbstractContextManager[object]:
        import torch

        return torch.autocast(device_type, torch.bfloat16) if self.config.precision == "bf16" else nullcontext()

    def _provenance(self, weights: Mapping[str, File], sampling: SamplingConfig | None = None) -> dict[str, str]:
        checksums = {name: file.sha256 for name, file in weights.items()}
        return {
            "Software": f"unclip-pipeline {version('unclip-pipeline')}",
            "weights_sha256": json.dumps(checksums, sort_keys=True),
            "sampling": json.dumps(asdict(sampling or self.config.sampling), sort_keys=True),
        }

    def _model(self, weights: Mapping[str, File]) -> UnCLIP:
        """Load the stack, or give the one in memory if it is made of the same files."""
        checksums = {name: file.sha256 for name, file in weights.items()}
        if self._loaded is None or self._loaded[0] != checksums:
            self._loaded = None  # the old models go before the new ones come
            self._loaded = (checksums, self._load(weights))
        return self._loaded[1]

    def _load(self, weights: Mapping[str, File]) -> UnCLIP:
        import torch

        from unclip_models.checkpoint import load_model
        from unclip_models.clip import ClipModel
        from unclip_models.efficiency import make_efficient
        from unclip_models.generate import UnCLIP

        device = "cuda" if torch.cuda.is_available() else "cpu"
        models: dict[str, Any] = {}
        try:
            for name, file in weights.items():
                with checked_copy(self.root, file) as path:
                    models[name] = ClipModel.load(path, device) if name == "clip" else load_model(path, device)[0]
            for model in models.values():
                make_efficient(model, compile=self.config.compile, channels_last=self.config.channels_last)
            return UnCLIP(
                models["clip"],
                models.get("prior"),
                models["decoder"],
                [models[name] for name in UPSAMPLERS if name in models],
            )
        except ValueError as error:
            raise ConfigError(f"generate: {error}") from error

    def _captions_of(self, shard: Shard) -> list[str]:
        """Read the captions of a shard planned by rows."""
        captions: dict[int, list[str]] = {}
        for number in {pick[0] for pick in shard.params["picks"]}:
            table = table_from_bytes(shard.inputs[f"embeddings#{number}"].read(self.root), ["key", "caption"])
            by_key = dict(zip(table["key"].to_pylist(), table["caption"].to_pylist(), strict=True))
            selection = table_from_bytes(shard.inputs[f"selection#{number}"].read(self.root))
            captions[number] = [by_key[key] for key in kept_keys(selection)]
        return [captions[number][row] for number, row in shard.params["picks"]]

    def _captions_in_file(self) -> list[str]:
        uri = str(self.config.captions_uri)
        try:
            text = storage.read_bytes(uri).decode("utf-8-sig")
        except NotFoundError as error:
            raise InputError(f"generate.captions_uri: {uri} does not exist; name a text file, or null") from error
        except UnicodeDecodeError as error:
            raise InputError(f"generate.captions_uri: {uri} is not UTF-8 text ({error}); convert it") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise InputError(f"generate.captions_uri: {uri} holds no caption; write one per line")
        return lines


def generate_images(
    stage: Generate, inputs: Mapping[str, Manifest], captions: Sequence[str], seeds: Sequence[int]
) -> list[GeneratedImage]:
    """Generate images outside the pipeline, as ``unclip generate`` does: nothing is planned or published.

    Args:
        stage: built from the config; its sampling settings apply.
        inputs: the finished manifests, at least of ``stage.config.models``.
        captions: what to show.
        seeds: one per caption; the same caption, seed and weights give the same image as in the pipeline.

    Returns:
        One image per caption; ``image.png()`` is a PNG file with its provenance.

    Raises:
        InputError: if a model has not been trained yet, or seeds and captions differ in number.
        ConfigError: if the models do not fit together or cannot be sampled as configured.
    """
    if len(captions) != len(seeds):
        raise InputError(f"{len(captions)} captions but {len(seeds)} seeds; give one seed per caption")
    return list(stage.generate(collect_weights(inputs, stage.config.models), captions, seeds))


def collect_weights(inputs: Mapping[str, Manifest], models: Sequence[str]) -> dict[str, File]:
    """Find the weights that each model's stage published.

    Raises:
        InputError: if a stage has not finished, or published no weights.
    """
    if missing := [name for name in models if name not in inputs]:
        raise InputError(f"generate: {', '.join(missing)} not finished; `unclip run` trains what is missing")
    return {name: weights_of(inputs[name]) for name in models}


def draw_rows(sizes: Sequence[int], num_rows: int, seed: int) -> npt.NDArray[np.int64]:
    """Draw rows of a data set that is cut into parts, each row once before any is drawn again.

    Args:
        sizes: rows in each part.
        num_rows: how many to draw.
        seed: of the draw.

    Returns:
        ``(num_rows, 2)`` of (part, row in it) in data set order, so that neighbours share their tables.

    Raises:
        InputError: if all parts are empty.
    """
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
    total = int(ends[-1]) if len(ends) else 0
    if total == 0:
        raise InputError("generate: curate kept no sample to take captions from; loosen its thresholds, or give a file")
    rng = np.random.default_rng([seed, num_rows])
    whole, rest = divmod(num_rows, total)
    rounds = np.tile(np.arange(total), whole) if whole else np.empty(0, np.int64)  # of billions of rows, no list
    drawn = np.concatenate([rounds, rng.choice(total, rest, replace=False)])
    drawn = np.sort(drawn)
    parts = np.searchsorted(ends, drawn, side="right")
    return np.stack([parts, drawn - (ends[parts] - np.asarray(sizes)[parts])], axis=1)


def _table(keys: Sequence[str], images: Sequence[GeneratedImage]) -> pa.Table:
    return pa.table(
        {
            "key": pa.array(keys, pa.string()),
            "caption": pa.array([image.caption for image in images], pa.string()),
            "seed": pa.array([image.seed for image in images], pa.int64()),
            "image_embedding": embedding_array(np.stack([image.image_embedding for image in images])),
        }
    )
