"""Clip stage: the frozen image-text encoder pair that everything after it is measured in.

It is either published weights, taken over once into the store, or trained here on the filtered samples with open_clip's
own model classes and the training loop of the generators. Either way one file comes out: weights, architecture,
preprocessing, and the golden embeddings by which later stages notice drift (``stages/golden.py``).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stages import storage
from stages.base import Affects, Resources, Result, Shard, setting
from stages.disk_cache import disk_cache
from stages.errors import ConfigError, InputError
from stages.gang import GangStage
from stages.golden import METADATA_KEY, golden_metadata
from stages.manifest import File, Manifest, ShardRecord
from stages.open_shard import TrainingShard
from stages.training_config import TrainingConfig, gang_resources
from stages.weights import content_sum
from unclip_models.clip_names import refuse_missing_file
from unclip_models.settings import ClipModelConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.dataset import TrainingStream
    from stages.engine import EngineFactory
    from unclip_models.clip import ClipModel
    from unclip_models.randomness import SampleRandom

# What says which published weights are meant; all else is about training.
_PRETRAINED_SETTINGS = ("kind", "name", "weights", "quick_gelu")


@dataclass(frozen=True, kw_only=True)
class ClipConfig(TrainingConfig):
    """Which CLIP: published weights, or one trained here (its size, and the settings that every training has).

    The negatives of a pair are the other pairs of its micro batch with another caption, so ``micro_batch_size`` and
    ``num_ranks`` change what is learnt here, unlike in the other trainings.
    """

    kind: Literal["pretrained", "train"] = setting(help="`pretrained`: published weights; `train`: trained here")
    name: str | None = setting(
        None,
        "pretrained: file of an earlier clip stage, `ViT-L-14/openai`, `hf-hub:ORG/NAME` or `local-dir:FOLDER`",
    )
    weights: str | None = setting(None, "pretrained: weights file of the architecture `name`")
    quick_gelu: bool | None = setting(None, "pretrained: activation of a weights file, which does not say it itself")
    cache_dir: str | None = setting(None, "folder for downloaded weights; null: open_clip's own", affects="nothing")
    model: ClipModelConfig = setting(factory=ClipModelConfig, help="train: the size of the model")

    global_batch_size: int = setting(128, "pairs per optimizer step, over all ranks")
    learning_rate: float = setting(1e-3, "AdamW's peak learning rate")
    learning_rate_schedule: Literal["constant", "cosine"] = setting("cosine", "what follows the warm-up")
    beta2: float = setting(0.98, "AdamW's decay of the second moment")
    eps: float = setting(1e-6, "AdamW's epsilon")
    ema_decay: float = setting(0.99, "of the moving average of the weights, which is what is exported")
    micro_batch_size: int | None = setting(None, "pairs that are contrasted at once on a rank; null: all of them")
    num_ranks: int = setting(1, "processes that train together, each contrasting its own pairs")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "pretrained" and not self.name:
            raise ValueError("name: missing for kind: pretrained; write for example ViT-L-14/openai, or a file")
        given = [key for key in ("name", "weights", "quick_gelu") if getattr(self, key) is not None]
        if self.kind == "train" and given:
            raise ValueError(
                f"{given[0]}: {getattr(self, given[0])} is for kind: pretrained; remove it, or change kind"
            )


class Clip(GangStage[ClipConfig]):
    """Publish one frozen CLIP; a training is one shard that a gang of ranks processes together."""

    name = "clip"

    @property
    def version(self) -> int:  # type: ignore[override]
        """Of trainings; published weights are what they are."""
        return 2 if self._trains else 1

    @property
    def uses_seed(self) -> bool:  # type: ignore[override]
        """A training draws; taking over weights does not."""
        return self._trains

    @property
    def upstream(self) -> tuple[str, ...]:
        """A training needs the filtered samples."""
        return ("filter",) if self._trains else ()

    @property
    def resources(self) -> Resources:
        """What one rank needs, and how many there are."""
        c = self.config
        if not self._trains:
            return Resources(num_cpus=1, max_workers=1, num_ranks=1)
        return gang_resources(c)

    @property
    def _trains(self) -> bool:
        return self.config.kind == "train"

    def external(self) -> Any:
        """Identify local weights by content.

        Raises:
            InputError: if a folder of weights is missing.
        """
        if self._trains:
            return None
        places = [place for place in (self.config.name, self.config.weights) if place]
        return {str(i): content for i, place in enumerate(places) if (content := _content_of(place))}

    def _work(self, scopes: Sequence[Affects]) -> dict[str, Any]:
        """Leave the settings of training out of the identity of published weights."""
        work = super()._work(scopes)
        if self._trains:
            return work
        return {**work, "config": {key: work["config"][key] for key in _PRETRAINED_SETTINGS}}

    def plan(self, inputs: Mapping[str, Manifest]) -> Sequence[Shard]:
        """Make the one shard: the whole training, or the whole file.

        Raises:
            InputError: if too few samples passed the filters.
        """
        if not self._trains:
            return [self.shard(0, external=self.external())]
        records = [record for record in inputs["filter"].records if record.num_kept > 0]
        num_kept = [record.num_kept for record in records]
        if sum(num_kept) < self.config.num_streams:
            raise InputError(
                f"clip: {sum(num_kept)} samples passed the filters, fewer than clip.num_streams: "
                f"{self.config.num_streams}; relax the filters, or lower num_streams"
            )
        files: dict[str, File] = {}
        for i, record in enumerate(records):
            files |= {f"images#{i}": record.inputs["images"], f"selection#{i}": record.files["selection"]}
        return [self.shard(0, inputs=files, num_kept=num_kept)]

    def work_on_rank(
        self,
        shard: Shard,
        output: str,
        make_engine: EngineFactory,
        should_stop: Callable[[], bool],
        started_at: float,
    ) -> None:
        """Train or take over the weights; see ``GangStage``."""
        from stages.engine import position

        if self._trains:
            self._train(shard, output, make_engine, should_stop, started_at)
        elif position()[0] == 0:
            self._publish(shard, output, self._pretrained(), {}, {}, started_at)

    def finish(self, records: Sequence[ShardRecord], output: str, inputs: Mapping[str, Manifest]) -> Result:
        """Describe the model in the manifest."""
        card = json.loads(records[0].files["card"].read(self.root))
        return Result(records=records, metrics={**records[0].metrics, **card})

    def _train(
        self,
        shard: Shard,
        output: str,
        make_engine: EngineFactory,
        should_stop: Callable[[], bool],
        started_at: float,
    ) -> None:
        from stages.training import train

        trained = train(
            self._fresh(),
            self._stream(shard),
            self.config,
            make_engine=make_engine,
            seed=self.seed,
            folder=storage.join(output, shard.id),
            place=self.name,
            loss=contrastive,
            report=self.report,
            should_stop=should_stop,
        )
        if trained.weights is not None:  # on the first rank
            model = self._fresh()
            model.load_state_dict({**model.state_dict(), **trained.weights})
            files = {"metrics": ("jsonl", trained.metrics_log)}
            self._publish(shard, output, model.freeze(), files, trained.metrics, started_at)

    def _fresh(self) -> ClipModel:
        """Build the model to train, the same on every rank."""
        import torch

        from unclip_models.clip import ClipModel

        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.seed)
            return ClipModel.from_config(self.config.model)

    def _stream(self, shard: Shard) -> TrainingStream:
        from stages.dataset import TrainingStream

        config, inputs = self.config, shard.inputs
        shards = [
            TrainingShard(selection=inputs[f"selection#{i}"], num_kept=num_kept, images=inputs[f"images#{i}"])
            for i, num_kept in enumerate(shard.params["num_kept"])
        ]
        return TrainingStream(
            shards,
            root=self.root,
            num_streams=config.num_streams,
            global_batch_size=config.global_batch_size,
            seed=self.seed,
            image_size_px=config.model.image_size,
            tokenize=self._fresh().tokenize,
            num_decode_threads=config.num_decode_threads,
            prefetch_batches=config.prefetch_batches,
            cache_gib=config.cache_gib,
            disk_cache=disk_cache(config.shard_cache_dir, config.shard_cache_gib),
        )

    def _pretrained(self) -> ClipModel:
        from unclip_models.clip import ClipModel

        c = self.config
        assert c.name is not None
        try:
            return ClipModel.from_pretrained(c.name, c.weights, quick_gelu=c.quick_gelu, cache_dir=c.cache_dir)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _publish(
        self,
        shard: Shard,
        output: str,
        clip: ClipModel,
        files: Mapping[str, tuple[str, bytes]],
        metrics: Mapping[str, float],
        started_at: float,
    ) -> None:
        """Commit a frozen model with its golden embeddings and a card that says what it is."""
        golden = golden_metadata(clip)
        card = {
            "embedding_dim": clip.embedding_dim,
            "context_length": clip.context_length,
            "text_width": clip.text_width,
            "image_size_px": clip.image_size,
            "quick_gelu": clip.quick_gelu,
            "origin": clip.origin,
            "golden_fingerprint": hashlib.sha256(golden[METADATA_KEY].encode()).hexdigest()[:16],
            "num_parameters": sum(param.numel() for param in clip.parameters()),
        }
        num_samples = sum(shard.params.get("num_kept", ()))
        with tempfile.TemporaryDirectory(prefix="unclip-clip-") as scratch:
            path = Path(scratch) / "weights.safetensors"
            clip.save(path, metadata={"shard": shard.id, **golden})
            self.commit(
                shard,
                output,
                {**files, "weights": ("safetensors", path), "card": ("card.json", json.dumps(card).encode())},
                started_at=started_at,
                num_in=num_samples,
                num_kept=num_samples,
                metrics=metrics,
            )


def contrastive(
    model: nn.Module, batch: Mapping[str, Tensor], random: SampleRandom
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Ask the model for its loss; its terms describe a whole batch, the loop wants them as vectors."""
    import torch

    from stages.training import model_loss

    loss, terms = model_loss(model, batch, random)
    return loss, {name: torch.atleast_1d(term) for name, term in terms.items()}


def _content_of(place: str) -> str | None:
    """Hash local weights, a file or a folder; None for names that are resolved elsewhere.

    Raises:
        InputError: if a file is missing, or a folder missing or empty.
    """
    if Path(place).is_file():
        return content_sum(Path(place))
    if not place.startswith("local-dir:"):
        try:
            refuse_missing_file(place)
        except ValueError as error:
            raise InputError(f"clip: {error}") from error
        return None
    folder = Path(place.removeprefix("local-dir:"))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise InputError(f"clip.name: {place}: there is no such folder, or it is empty; name a folder of open_clip")
    digest = hashlib.sha256()
    for path in files:
        content = content_sum(path)
        digest.update(f"{path.relative_to(folder)}:{content}\n".encode())
    return digest.hexdigest()
