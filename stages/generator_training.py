"""What the trainings of the four generators have in common: one shard that a gang of ranks processes together.

The loop, the data order, checkpoints and resuming are those of ``stages/training.py``; how ranks meet is in
``stages/gang.py``.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from stages import storage
from stages.base import Affects, Resources, Shard
from stages.disk_cache import disk_cache
from stages.errors import ConfigError, InputError
from stages.gang import GangStage
from stages.generator_config import TrainingC
from stages.manifest import File, Manifest, digest_of
from stages.open_shard import TrainingShard
from stages.other_datasets import CuratedSets, OtherDatasets
from stages.starting_point import StartingPoint, find_starting_point, keep_starting_point
from stages.training_config import gang_resources
from stages.validation_config import ValidationConfig
from stages.warm_start import SourceWeights, freeze, frozen_names
from stages.weights import checked_copy, weights_of
from unclip_models.settings import UpsamplerConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from stages.dataset import TrainingStream
    from stages.engine import EngineFactory
    from stages.insight import Watch
    from stages.training import Trained
    from unclip_models.clip import ClipModel
    from unclip_models.clip_text import ClipText

logger = logging.getLogger(__name__)


class Training(GangStage[TrainingC]):
    """What the four have in common.

    Attributes:
        needs_images: whether batches hold images.
        needs_embeddings: whether they hold CLIP embeddings and tokens.
        start: where a training that starts from production starts; known once it has its fingerprint.
    """

    uses_seed: ClassVar[bool] = True
    needs_images: ClassVar[bool]
    needs_embeddings: ClassVar[bool]
    start: StartingPoint | None = None

    @property
    def upstream(self) -> tuple[str, ...]:
        """The selected samples, and the CLIP they were embedded with."""
        return ("curate", "clip") if self.needs_embeddings else ("curate",)

    @property
    def resources(self) -> Resources:
        """What one rank needs, and how many there are."""
        return gang_resources(self.config)

    def fingerprint(self, inputs: Mapping[str, str]) -> str:
        """See ``Stage.fingerprint``; where ``init_from`` says production it becomes the version that this means.

        Raises:
            InputError: if what the config names of other runs is not there.
            ConfigError: if parts are to be frozen and there is nothing to start from.
        """
        init = self.config.init_from
        if init is not None and init.version == "production":
            cold = replace(self.config, init_from=None, frozen=())
            named = type(self)(cold, root=self.root, seed=self.seed).fingerprint(inputs)
            registry = self.root if init.root is None else storage.absolute(init.root)
            question = digest_of([self.name, named, list(self.config.frozen)])[:16]
            self.start = find_starting_point(self.root, self.name, question, registry)
            if self.start.number is not None:
                cold = replace(self.config, init_from=replace(init, version=self.start.number))
            elif self.config.frozen:
                raise ConfigError(
                    f"{self.name}.frozen: nothing is in production yet, random weights would stay random; "
                    "train a first version without it"
                )
            self.config = cold
        return super().fingerprint(inputs)

    def settle(self) -> None:
        """Decide where to start, before the first step; see ``keep_starting_point``."""
        if self.start is not None:
            keep_starting_point(self.root, self.start)

    def external(self) -> Any:
        """Identify by content what the config names of other runs.

        Raises:
            InputError: if it is not there.
        """
        return self._from_other_runs() or None

    def _from_other_runs(self) -> dict[str, Any]:
        config = self.config
        found: dict[str, Any] = {}
        if config.datasets:
            found["datasets"] = self._other_datasets.digests()
        if config.init_from is not None:
            found["init_from"] = SourceWeights(config.init_from, root=self.root, stage=self.name).sha256()
        if self._yardstick is not None:
            (found["validation"],) = self._yardstick.digests()
        return found

    def named_results(self) -> Sequence[tuple[str, str]]:
        """See ``Stage.named_results``: further data sets, the one to validate on, the weights to start from."""
        config: Any = self.config

        def is_here(named: Any) -> bool:
            return named.root is None or storage.absolute(named.root) == storage.absolute(self.root)

        sets = [one for one in (*config.datasets, config.validation.dataset) if one is not None]
        found = [("curate", one.fingerprint) for one in sets if is_here(one)]
        init = config.init_from
        if init is not None and init.fingerprint is not None and is_here(init):
            found.append((init.stage or self.name, init.fingerprint))
        return found

    def _work(self, scopes: Sequence[Affects]) -> dict[str, Any]:
        """Leave out what the config does not use of other runs: such a training is what it was without the setting.

        How validation goes counts where it decides when the training ends.
        """
        work, validation = super()._work(scopes), self.config.validation
        unused = [name for name in ("datasets", "init_from", "frozen") if not getattr(self.config, name)]
        work["config"] = {key: value for key, value in work["config"].items() if key not in unused}
        return work if validation.early_stop_patience is None else {**work, "early_stop": _without_place(validation)}

    @property
    def _yardstick(self) -> CuratedSets | None:
        """The set to validate on, if it is not a part of the run's own."""
        dataset = self.config.validation.dataset
        place = f"{self.name}.validation.dataset"
        return None if dataset is None else CuratedSets([dataset], place=place, **self._needs)

    @property
    def _needs(self) -> dict[str, Any]:
        return {"root": self.root, "images": self.needs_images, "embeddings": self.needs_embeddings}

    @property
    def _other_datasets(self) -> OtherDatasets:
        return OtherDatasets(self.config.datasets, place=f"{self.name}.datasets", **self._needs)

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        """Make the one shard: the whole training.

        Raises:
            ConfigError: if the model does not fit the embeddings.
            InputError: if too few samples are selected.
        """
        from stages.held_out import held_out_counts

        self.check_inputs(inputs)
        records = [record for record in inputs["curate"].records if record.num_kept > 0]
        num_kept = [record.num_kept for record in records]
        from_own = 0 if self.config.validation.dataset else self.config.validation.num_samples
        held_out = held_out_counts(num_kept, from_own)
        if sum(num_kept) - sum(held_out) < self.config.num_streams:
            raise InputError(
                f"{self.name}: curate kept {sum(num_kept) - sum(held_out)} samples to train on, fewer than "
                f"{self.name}.num_streams: {self.config.num_streams}; loosen curate and filter, or lower num_streams"
            )
        files: dict[str, File] = {}
        for index, record in enumerate(records):
            files[f"selection#{index}"] = record.files["selection"]
            if self.needs_images:
                files[f"images#{index}"] = record.inputs["images"]
            if self.needs_embeddings:
                files[f"embeddings#{index}"] = record.inputs["embeddings"]
        split = {"num_held_out": held_out} if any(held_out) else {}
        others = self._from_other_runs()
        return [self.shard(0, inputs=files | self.extra_files(inputs), num_kept=num_kept, **split, **others)]

    def check_inputs(self, inputs: Mapping[str, Manifest]) -> None:
        """Refuse a model that does not fit the data.

        Raises:
            ConfigError: names the setting, both values and the remedy.
            InputError: if a further data set is missing, or too small.
        """
        if getattr(self.config.model, "raw_embeddings", False):
            raise ConfigError(
                f"{self.name}.model.raw_embeddings: true, but the embed stage stores embeddings of unit norm; write "
                "false (raw embeddings are for imported models)"
            )
        self._other_datasets.check(self.config.num_streams, "num_streams", inputs.get("clip"))
        if self._yardstick is not None:
            self._yardstick.check(self.config.validation.num_samples, "validation.num_samples", inputs.get("clip"))
        if self.config.frozen:
            import torch

            from unclip_models.checkpoint import build

            with torch.device("meta"):
                names = [name for name, _ in build(self.config.model).named_parameters()]
            frozen_names(names, self.config.frozen, f"{self.name}.frozen")
        if "clip" not in inputs:
            return
        model: Any = self.config.model
        wanted = {}
        if hasattr(model, "embedding_dim"):
            wanted["embedding_dim"] = (
                model.embedding_dim,
                "embedding_dim",
                "the embeddings of this CLIP have {} dimensions",
            )
        if self.reads_clip_text:
            wanted["text.context_length"] = (model.text.context_length, "context_length", "this CLIP reads {} tokens")
            wanted["text.width"] = (model.text.width, "text_width", "the text tower of this CLIP has width {}")
        for key, (value, metric, what) in wanted.items():
            found = inputs["clip"].metrics.get(metric)
            if found is not None and value != int(found):
                raise ConfigError(
                    f"{self.name}.model.{key}: {value}, but {what.format(int(found))}; write {int(found)}"
                )

    @property
    def reads_clip_text(self) -> bool:
        """Whether the model reads the frozen CLIP's text instead of encoding captions itself."""
        return reads_clip_text(self.config.model)

    def extra_files(self, inputs: Mapping[str, Manifest]) -> dict[str, File]:
        """Return further input files, by role: the CLIP, where its text is read."""
        return {"clip": weights_of(inputs["clip"])} if self.reads_clip_text else {}

    def work_on_rank(
        self,
        shard: Shard,
        output: str,
        make_engine: EngineFactory,
        should_stop: Callable[[], bool],
        started_at: float,
    ) -> None:
        """Train, and export the averaged weights; see ``GangStage``."""
        from stages.clip_text_batches import LossWithClipText
        from stages.training import model_loss, train
        from unclip_models.efficiency import make_efficient

        clip = self._clip(shard)
        model = self.build_model(shard, clip)
        freeze(model, self.config.frozen, f"{self.name}.frozen")
        loss = model_loss if clip is None else LossWithClipText(clip)
        watch = self._watch(shard, clip, model)
        make_efficient(model, compile=self.config.compile, channels_last=self.config.channels_last)
        trained = train(
            model,
            self._stream(shard, clip),
            self.config,
            make_engine=make_engine,
            seed=self.seed,
            folder=storage.join(output, shard.id),
            place=self.name,
            loss=loss,
            num_timesteps=self._num_timesteps(),
            watch=watch,
            report=self.report,
            should_stop=should_stop,
        )
        if trained.weights is not None:  # on the first rank
            self._export(shard, output, trained, clip, started_at)

    def build_model(self, shard: Shard, clip: ClipModel | None = None) -> nn.Module:
        """Build the model as the training begins, the same on every rank: with fresh weights, or those to start from.

        Args:
            shard: the training.
            clip: the frozen CLIP, where its text is read.
        """
        model = self.fresh_model(shard, clip)
        if self.config.init_from is not None:
            source = SourceWeights(self.config.init_from, root=self.root, stage=self.name)
            source.load_into(model, shard.params["init_from"])
        return model

    def fresh_model(self, shard: Shard, clip: ClipModel | None = None) -> nn.Module:
        """Build the model with fresh weights and what it carries of the data; see ``build_model``."""
        import torch

        from unclip_models.checkpoint import build

        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.seed)
            model = build(self.config.model)
        if clip is not None:
            text: ClipText = cast(Any, model).text_encoder
            tokens = clip.tokenize([""])
            sequence, embedding = clip.encode_text_sequence(tokens)
            text.set_null_caption(tokens[0], sequence[0], embedding[0])
        return model

    def complete(self, model: nn.Module, shard: Shard, clip: ClipModel | None) -> None:
        """Measure what a trained model carries beside its weights; called on the first rank before the export."""

    def _clip(self, shard: Shard) -> ClipModel | None:
        if not self.reads_clip_text:
            return None
        from unclip_models.clip import ClipModel

        with checked_copy(self.root, shard.inputs["clip"]) as path:
            return ClipModel.load(path).keep_text().to(self._device)

    @property
    def _device(self) -> torch.device:
        import torch

        # Without a GPU a model is put together all the same; a rank without one is refused by its engine.
        if self.config.gpus_per_rank and torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def _watch(self, shard: Shard, clip: ClipModel | None, model: nn.Module) -> Watch:
        """Give what the training is looked at with; on the first rank, which writes the metrics, with the model's
        arithmetic (the model is not compiled yet)."""
        from stages.clip_text_batches import with_clip_text
        from stages.engine import position
        from stages.held_out import HeldOutSamples
        from stages.insight import Watch
        from stages.sample_grids import Painter

        flops = self._flops_per_sample(model) if position()[0] == 0 else None
        shards, root = self._held_out(shard)
        if not any(one.num_held_out for one in shards):
            return Watch(flops_per_sample=flops)
        seed = self.config.validation.seed
        held_out = HeldOutSamples(shards, seed=seed, **{**self._sample_options(clip), "root": root})
        complete = (lambda batch: batch) if clip is None else partial(with_clip_text, clip=clip)
        draw = Painter(self.config.samples, held_out, seed, complete)
        return Watch(held_out=held_out, draw=draw, flops_per_sample=flops)

    def _held_out(self, shard: Shard) -> tuple[Sequence[TrainingShard], str]:
        """Return the shards with the samples to validate on, and the store they are in."""
        if self._yardstick is None:
            return self._shards(shard), self.root
        from stages.held_out import held_out_counts

        (found,) = self._yardstick.read([shard.params["validation"]])
        sizes = [one.num_kept for one in found.shards]
        counts = held_out_counts(sizes, self.config.validation.num_samples, share=1)
        return [replace(one, num_held_out=n) for one, n in zip(found.shards, counts, strict=True)], found.root

    def _flops_per_sample(self, model: nn.Module) -> float | None:
        from stages.example_batch import example_batch
        from stages.flops import flops_per_sample
        from stages.training import model_loss

        try:
            return flops_per_sample(model, model_loss, example_batch(self.config.model))
        except RuntimeError as error:  # an operation without shapes alone; no reason not to train
            logger.warning("%s: the arithmetic of a sample cannot be counted, so there is no mfu: %s", self.name, error)
            return None

    def _shards(self, shard: Shard) -> list[TrainingShard]:
        inputs, num_kept = shard.inputs, shard.params["num_kept"]
        held_out = shard.params.get("num_held_out") or [0] * len(num_kept)
        return [
            TrainingShard(
                selection=inputs[f"selection#{index}"],
                num_kept=num_kept[index],
                images=inputs.get(f"images#{index}"),
                embeddings=inputs.get(f"embeddings#{index}"),
                num_held_out=held_out[index],
            )
            for index in range(len(num_kept))
        ]

    def _sample_options(self, clip: ClipModel | None) -> dict[str, Any]:
        """Say what is wanted of every sample, to train on or to validate with."""
        from unclip_models.upsampler import training_sample

        model = self.config.model
        return {
            "root": self.root,
            "image_size_px": getattr(model, "image_size", None) if self.needs_images else None,
            "tokenize": self._tokenizer(clip) if self.needs_embeddings else None,
            "embeddings": self.needs_embeddings,
            "prepare": partial(training_sample, model) if isinstance(model, UpsamplerConfig) else None,
        }

    def _stream(self, shard: Shard, clip: ClipModel | None) -> TrainingStream:
        from stages.dataset import TrainingStream

        config = self.config
        return TrainingStream(
            self._shards(shard),
            mixed_in=self._other_datasets.read(shard.params.get("datasets", ())),
            shares=self._other_datasets.shares,
            **self._sample_options(clip),
            num_streams=config.num_streams,
            global_batch_size=config.global_batch_size,
            seed=self.seed,
            num_decode_threads=config.num_decode_threads,
            prefetch_batches=config.prefetch_batches,
            cache_gib=config.cache_gib,
            disk_cache=disk_cache(config.shard_cache_dir, config.shard_cache_gib),
        )

    def _tokenizer(self, clip: ClipModel | None) -> Callable[[Sequence[str]], Tensor]:
        from unclip_models.clip_input import tokenize

        if clip is not None:
            return clip.tokenize
        model: Any = self.config.model  # those that need embeddings have a text encoder
        return partial(tokenize, context_length=model.text.context_length)

    def _num_timesteps(self) -> int | None:
        diffusion = getattr(self.config.model, "diffusion", None)
        return diffusion.num_timesteps if diffusion is not None else None

    def model_so_far(
        self, inputs: Mapping[str, Manifest], output: str, step: int | None = None
    ) -> tuple[nn.Module, dict[str, str]]:
        """Put a model together from a checkpoint of its training, finished or not; needs neither GPU nor engine.

        Args:
            inputs: the finished stages that the training reads.
            output: URI of the folder of the stage's shards.
            step: which checkpoint; None for the newest.

        Returns:
            The model with the averaged weights, on the CPU, and where they are from: stage, shard, steps and seed.

        Raises:
            InputError: if there is no such checkpoint.
            IntegrityError: if it is damaged.
        """
        from stages.checkpoints import CheckpointFolder
        from stages.engine import trainable

        (shard,) = self.plan(inputs)
        checkpoints = CheckpointFolder(storage.join(output, shard.id), keep_last=1)
        steps = checkpoints.steps()
        if not steps:
            raise InputError(f"{self.name}: this training has no checkpoint yet; `unclip run` makes the first one")
        if step is not None and step not in steps:
            found = ", ".join(f"{known:,}" for known in sorted(steps))
            raise InputError(f"{self.name}: there is no checkpoint of step {step:,}; there are those of {found}")
        chosen = steps[0] if step is None else step
        clip = self._clip(shard)
        model = self.build_model(shard, clip)
        freeze(model, self.config.frozen, f"{self.name}.frozen")
        shapes = {name: param.shape for name, param in trainable(model).items()}
        self._finish(model, shard, clip, checkpoints.weights(chosen, shapes))
        return model.cpu().eval(), self._origin(shard, chosen)

    def _finish(self, model: nn.Module, shard: Shard, clip: ClipModel | None, weights: Mapping[str, Tensor]) -> None:
        """Give a model, as it was when the training began, what it learned and what it carries beside that."""
        model.load_state_dict({**model.state_dict(), **weights})
        self.complete(model, shard, clip)

    def _origin(self, shard: Shard, step: int) -> dict[str, str]:
        return {"stage": self.name, "shard": shard.id, "steps": str(step), "seed": str(self.seed)}

    def _export(self, shard: Shard, output: str, trained: Trained, clip: ClipModel | None, started_at: float) -> None:
        from unclip_models.checkpoint import save_model

        assert trained.weights is not None
        model = self.build_model(shard, clip)
        self._finish(model, shard, clip, trained.weights)
        metadata = self._origin(shard, trained.step)
        num_samples = sum(shard.params["num_kept"])
        num_held_out = sum(shard.params.get("num_held_out", ()))
        with tempfile.TemporaryDirectory(prefix="unclip-export-") as scratch:
            path = Path(scratch) / "weights.safetensors"
            save_model(model, path, metadata=metadata)
            self.commit(
                shard,
                output,
                {"weights": ("safetensors", path), "metrics": ("jsonl", trained.metrics_log)},
                started_at=started_at,
                num_in=num_samples,
                num_kept=num_samples - num_held_out,
                dropped={"held_out": num_held_out} if num_held_out else {},
                metrics={
                    **trained.metrics,
                    **self._other_datasets.cards(),
                    "exported_step": float(trained.step),
                    "num_parameters": float(sum(param.numel() for param in model.parameters())),
                },
            )


def reads_clip_text(model: Any) -> bool:
    """Tell whether a model, by its config, reads the frozen CLIP's text instead of encoding captions itself."""
    return getattr(getattr(model, "text", None), "kind", "own") == "clip"


def _without_place(validation: ValidationConfig) -> dict[str, Any]:
    """Return the settings of validation without the set it names, which counts by content (``external``)."""
    return {name: value for name, value in asdict(validation).items() if name != "dataset"}
