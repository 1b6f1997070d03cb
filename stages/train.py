"""The four trainings: prior, decoder and the two upsamplers.

They differ by their model and by what a batch holds; the loop, the data order, checkpoints and resuming are those of
``stages/training.py``. Each is one shard that a gang of ranks processes together: a plain call trains on one rank in
this process, ``cluster/training.py`` calls the same ``process`` on every rank of a Ray Train group.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import safetensors.torch
import torch
from torch import nn

from stages import storage
from stages.base import Resources, Shard, Stage, record_uri, setting
from stages.dataset import TrainingStream
from stages.engine import EngineFactory, TorchEngine, gather_from_ranks, position
from stages.errors import ConfigError, InputError, IntegrityError
from stages.manifest import File, Manifest, ShardRecord
from stages.open_shard import TrainingShard
from stages.training import Trained, TrainingConfig, train
from unclip_models.ar_prior import ARPrior, ARPriorConfig
from unclip_models.checkpoint import build, save_model
from unclip_models.decoder import DecoderConfig
from unclip_models.prior import DiffusionPriorConfig
from unclip_models.upsampler import UpsamplerConfig


@dataclass(frozen=True, kw_only=True)
class PriorTraining(TrainingConfig):
    """The prior: caption -> image embedding (unCLIP, section 2.2)."""

    model: DiffusionPriorConfig | ARPriorConfig = setting(help="the prior's size; `kind` says which of the two")


@dataclass(frozen=True, kw_only=True)
class DecoderTraining(TrainingConfig):
    """The decoder: image embedding and caption -> small image (unCLIP, section 2.1)."""

    model: DecoderConfig = setting(help="the decoder's size and conditioning")


@dataclass(frozen=True, kw_only=True)
class UpsamplerTraining(TrainingConfig):
    """An upsampler: small image -> larger image (unCLIP, section 2.1)."""

    model: UpsamplerConfig = setting(help="the upsampler's size and degradation")


TrainingC = TypeVar("TrainingC", PriorTraining, DecoderTraining, UpsamplerTraining)


class Training(Stage[TrainingC]):
    """What the four have in common.

    Attributes:
        needs_images: whether batches hold images.
        needs_embeddings: whether they hold CLIP embeddings and tokens.
    """

    uses_seed: ClassVar[bool] = True
    gang: ClassVar[bool] = True
    needs_images: ClassVar[bool]
    needs_embeddings: ClassVar[bool]

    @property
    def upstream(self) -> tuple[str, ...]:
        """The selected samples, and the CLIP they were embedded with."""
        return ("curate", "clip") if self.needs_embeddings else ("curate",)

    @property
    def resources(self) -> Resources:
        """What one rank needs, and how many there are."""
        config = self.config
        return Resources(
            num_cpus=config.cpus_per_rank, num_gpus=config.gpus_per_rank, max_workers=1, num_ranks=config.num_ranks
        )

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        """Make the one shard: the whole training.

        Raises:
            ConfigError: if the model does not fit the embeddings.
            InputError: if too few samples are selected.
        """
        self.check_inputs(inputs)
        records = [record for record in inputs["curate"].records if record.num_kept > 0]
        num_kept = [record.num_kept for record in records]
        if sum(num_kept) < self.config.num_streams:
            raise InputError(
                f"{self.name}: curate kept {sum(num_kept)} samples, fewer than {self.name}.num_streams: "
                f"{self.config.num_streams}; loosen curate and filter, or lower num_streams"
            )
        files: dict[str, File] = {}
        for index, record in enumerate(records):
            files[f"selection#{index}"] = record.files["selection"]
            if self.needs_images:
                files[f"images#{index}"] = record.inputs["images"]
            if self.needs_embeddings:
                files[f"embeddings#{index}"] = record.inputs["embeddings"]
        return [self.shard(0, inputs=files | self.extra_files(inputs), num_kept=num_kept)]

    def check_inputs(self, inputs: Mapping[str, Manifest]) -> None:
        """Refuse a model that does not fit the data.

        Raises:
            ConfigError: names the setting, both values and the remedy.
        """
        wanted = getattr(self.config.model, "embedding_dim", None)
        found = inputs["clip"].metrics.get("embedding_dim") if "clip" in inputs else None
        if wanted is not None and found is not None and wanted != int(found):
            raise ConfigError(
                f"{self.name}.model.embedding_dim: {wanted}, but the embeddings of this CLIP have {int(found)} "
                f"dimensions; write {int(found)}"
            )

    def extra_files(self, inputs: Mapping[str, Manifest]) -> dict[str, File]:
        """Return further input files, by role."""
        return {}

    def process(
        self,
        shard: Shard,
        output: str,
        make_engine: EngineFactory = TorchEngine,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> ShardRecord:
        """Train, export the averaged weights, and commit them; every rank of a group calls this.

        Args:
            shard: the training.
            output: URI of the folder of the stage's shards; checkpoints go to ``<output>/<shard id>/``.
            make_engine: builds the engine on this rank.
            should_stop: see ``stages.training.train``.
        """
        started_at = time.monotonic()
        trained = train(
            self.build_model(shard),
            self._stream(shard),
            self.config,
            make_engine=make_engine,
            seed=self.seed,
            folder=storage.join(output, shard.id),
            place=self.name,
            num_timesteps=self._num_timesteps(),
            report=self.report,
            should_stop=should_stop,
        )
        rank, world_size = position()
        if rank == 0:
            self._export(shard, output, trained, started_at)
        gather_from_ranks(None, world_size)  # the record is there for every rank
        return ShardRecord.from_json(storage.read_json(record_uri(output, shard.id)))

    def build_model(self, shard: Shard) -> nn.Module:
        """Build the model with fresh weights, the same on every rank."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.seed)
            return build(self.config.model)

    def _stream(self, shard: Shard) -> TrainingStream:
        config = self.config
        inputs = shard.inputs
        shards = [
            TrainingShard(
                selection=inputs[f"selection#{index}"],
                num_kept=num_kept,
                images=inputs.get(f"images#{index}"),
                embeddings=inputs.get(f"embeddings#{index}"),
            )
            for index, num_kept in enumerate(shard.params["num_kept"])
        ]
        return TrainingStream(
            shards,
            root=self.root,
            num_streams=config.num_streams,
            global_batch_size=config.global_batch_size,
            seed=self.seed,
            image_size_px=getattr(config.model, "image_size", None) if self.needs_images else None,
            tokenize=self._tokenizer() if self.needs_embeddings else None,
            embeddings=self.needs_embeddings,
            num_decode_threads=config.num_decode_threads,
            prefetch_batches=config.prefetch_batches,
            cache_gib=config.cache_gib,
        )

    def _tokenizer(self) -> Callable[[Sequence[str]], torch.Tensor]:
        from unclip_models.clip import tokenize

        model: Any = self.config.model  # those that need embeddings have a text encoder
        return partial(tokenize, context_length=model.text.context_length)

    def _num_timesteps(self) -> int | None:
        diffusion = getattr(self.config.model, "diffusion", None)
        return diffusion.num_timesteps if diffusion is not None else None

    def _export(self, shard: Shard, output: str, trained: Trained, started_at: float) -> None:
        assert trained.weights is not None
        model = self.build_model(shard)
        model.load_state_dict({**model.state_dict(), **trained.weights})
        metadata = {"stage": self.name, "shard": shard.id, "steps": str(self.config.num_steps), "seed": str(self.seed)}
        num_samples = sum(shard.params["num_kept"])
        with tempfile.TemporaryDirectory(prefix="unclip-export-") as scratch:
            path = Path(scratch) / "weights.safetensors"
            save_model(model, path, metadata=metadata)
            self.commit(
                shard,
                output,
                {"weights": ("safetensors", path), "metrics": ("jsonl", trained.metrics_log)},
                started_at=started_at,
                num_in=num_samples,
                num_kept=num_samples,
                metrics={
                    **trained.metrics,
                    "num_parameters": float(sum(param.numel() for param in model.parameters())),
                },
            )


class Prior(Training[PriorTraining]):
    """Train the prior, diffusion or autoregressive."""

    name = "prior"
    needs_images = False
    needs_embeddings = True

    @property
    def upstream(self) -> tuple[str, ...]:
        """The autoregressive prior needs the principal axes too."""
        return (*super().upstream, "pca") if self._autoregressive else super().upstream

    @property
    def _autoregressive(self) -> bool:
        return isinstance(self.config.model, ARPriorConfig)

    def check_inputs(self, inputs: Mapping[str, Manifest]) -> None:
        """Check the number of codes against the principal axes too."""
        super().check_inputs(inputs)
        model = self.config.model
        found = inputs["pca"].metrics.get("num_components") if "pca" in inputs else None
        if isinstance(model, ARPriorConfig) and found is not None and model.num_codes > int(found):
            raise ConfigError(
                f"prior.model.num_codes: {model.num_codes}, but the pca stage kept {int(found)} components; "
                f"write {int(found)}, or set pca.num_components: {model.num_codes}"
            )

    def extra_files(self, inputs: Mapping[str, Manifest]) -> dict[str, File]:
        """Add the principal axes and bucket edges."""
        return {"pca": inputs["pca"].files["pca"]} if self._autoregressive else {}

    def build_model(self, shard: Shard) -> nn.Module:
        """Build the prior; the autoregressive one gets its quantiser."""
        model = super().build_model(shard)
        if isinstance(model, ARPrior):
            self._set_pca(model, shard.inputs["pca"])
        return model

    def _set_pca(self, model: ARPrior, file: File) -> None:
        tensors = safetensors.torch.load(file.read(self.root))
        k = model.config.num_codes
        try:
            model.set_pca(
                mean=tensors["mean"],
                axes=tensors["axes"][:k],
                edges=tensors["edges"][:k],
                dot_edges=tensors["dot_edges"],
            )
        except (KeyError, ValueError) as error:
            raise IntegrityError(
                f"{file.path}: does not fit prior.model ({error}); make prior.model.num_codes, num_buckets and "
                "num_dot_buckets agree with the pca section"
            ) from error


class Decoder(Training[DecoderTraining]):
    """Train the decoder."""

    name = "decoder"
    needs_images = True
    needs_embeddings = True


class Upsampler256(Training[UpsamplerTraining]):
    """Train the first upsampler."""

    name = "upsampler_256"
    needs_images = True
    needs_embeddings = False


class Upsampler1024(Training[UpsamplerTraining]):
    """Train the second upsampler."""

    name = "upsampler_1024"
    needs_images = True
    needs_embeddings = False
