"""Further data sets of a training: curated sets of other stores, or of other runs in the same one, by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from stages import storage
from stages.base import setting
from stages.errors import ConfigError, InputError, IntegrityError
from stages.finished import finished
from stages.manifest import File, Manifest, ShardRecord, manifest_uri
from stages.mixture import shares_of
from stages.open_shard import TrainingShard
from stages.weights import weights_of

if TYPE_CHECKING:
    from stages.dataset import MixedIn


@dataclass(frozen=True, kw_only=True)
class CuratedSet:
    """A curated set of another run.

    What it is made of is part of the training's identity; where it lies is not.
    """

    fingerprint: str = setting(help="of its finished curate stage", affects="nothing")
    root: str | None = setting(None, "the store it is in; null: this run's", affects="nothing")


@dataclass(frozen=True, kw_only=True)
class OtherDataset(CuratedSet):
    """A curated set beside the run's own, which has the share that the others leave."""

    weight: float = setting(help="its share of the samples, between 0 and 1")


class CuratedSets:
    """The curated sets of other runs that one training reads, as its config names them.

    Args:
        settings: from the config.
        root: the run's own store.
        place: the setting, for messages.
        images: whether the training needs images.
        embeddings: whether it needs embeddings.
    """

    def __init__(
        self, settings: Sequence[CuratedSet], *, root: str, place: str, images: bool, embeddings: bool
    ) -> None:
        self._settings = settings
        self._roots = [root if one.root is None else storage.absolute(one.root) for one in settings]
        self._place = place
        self._images = images
        self._embeddings = embeddings
        self._manifests: dict[int, Manifest] = {}

    def digests(self) -> list[str]:
        """Identify what the data sets hold.

        Raises:
            InputError: if one is not there.
        """
        return [self._manifest(i).digest for i in range(len(self._settings))]

    def check(self, least: int, setting_name: str, clip: Manifest | None) -> None:
        """Refuse what cannot be used.

        Args:
            least: samples that each needs.
            setting_name: the setting that says so.
            clip: of the run, where it is known.

        Raises:
            InputError: if one has too few samples.
            ConfigError: if its embeddings are of another CLIP.
        """
        for i, root in enumerate(self._roots):
            manifest = self._manifest(i)
            if manifest.num_kept < least:
                raise InputError(
                    f"{self._place}.{i}: {manifest.uri} has {manifest.num_kept} samples, fewer than {setting_name}: "
                    f"{least}; leave it out"
                )
            if clip is not None and self._embeddings:
                self._check_clip(f"{self._place}.{i}", root, manifest, clip)

    def read(self, digests: Sequence[str]) -> list[MixedIn]:
        """List the shards of every data set.

        Raises:
            IntegrityError: if one has changed since the training was planned.
        """
        return [self._read(i, digest) for i, digest in enumerate(digests)]

    def _manifest(self, i: int) -> Manifest:
        if i not in self._manifests:
            self._manifests[i] = finished(self._roots[i], "curate", self._settings[i].fingerprint, f"{self._place}.{i}")
        return self._manifests[i]

    def _read(self, i: int, digest: str) -> MixedIn:
        from stages.dataset import MixedIn

        manifest = self._manifest(i)
        if manifest.digest != digest:
            raise IntegrityError(f"{manifest.uri}: changed since this training was planned; run again")
        shards = [self._shard(record) for record in manifest.records if record.num_kept > 0]
        return MixedIn(shards, self._roots[i])

    def _shard(self, record: ShardRecord) -> TrainingShard:
        return TrainingShard(
            selection=record.files["selection"],
            num_kept=record.num_kept,
            images=record.inputs["images"] if self._images else None,
            embeddings=record.inputs["embeddings"] if self._embeddings else None,
        )

    def _check_clip(self, place: str, root: str, curate: Manifest, clip: Manifest) -> None:
        """Compare the CLIP of the embeddings: its weights, or what it makes of the golden inputs.

        A pretrained CLIP that another run took over is another file, with the same embeddings.
        """
        embed = storage.read_json(manifest_uri(root, "embed", curate.inputs["embed"]["fingerprint"]))
        other = finished(root, "clip", embed["inputs"]["clip"]["fingerprint"], place)
        own_weights, weights = weights_of(clip), weights_of(other)
        if own_weights.sha256 == weights.sha256:
            return
        own_golden, golden = _golden(clip), _golden(other)
        if golden is None or own_golden != golden:
            raise ConfigError(
                f"{place}: its embeddings are of another CLIP ({_named(root, weights)}) than this run's "
                f"({_named(clip.root, own_weights)}); embed that data set with this run's clip section, then name the "
                "new fingerprint"
            )


class OtherDatasets(CuratedSets):
    """The further data sets of one training, which mixes them into its own by weight; see ``CuratedSets``."""

    def __init__(self, settings: Sequence[OtherDataset], **options: Any) -> None:
        super().__init__(settings, **options)
        self._weighted = settings

    @property
    def shares(self) -> list[Fraction]:
        """Shares of the run's own samples and of all others, in order."""
        return shares_of([one.weight for one in self._weighted], self._place)

    def cards(self) -> Mapping[str, str]:
        """Say in a few words what was mixed in, for the training's record."""
        return {
            f"dataset_{i}": f"{manifest_uri(root, 'curate', one.fingerprint)} with weight {one.weight:g}"
            for i, (one, root) in enumerate(zip(self._weighted, self._roots, strict=True), 1)
        }


def _golden(clip: Manifest) -> str | None:
    cards = [clip.metrics, *(record.metrics for record in clip.records)]
    return next((str(card["golden_fingerprint"]) for card in cards if "golden_fingerprint" in card), None)


def _named(root: str, file: File) -> str:
    return f"{storage.join(root, file.path)}, sha256 {file.sha256[:16]}..."
