"""The data stages over procedural shapes, in ten shards each; the CLIP is given."""

from __future__ import annotations

from typing import Any

from stages.base import Stage
from stages.clip import Clip, ClipConfig
from stages.curate import Curate, CurateConfig
from stages.download import Download, DownloadConfig
from stages.embed import Embed, EmbedConfig
from stages.filter import Filter, FilterConfig
from stages.ledger import Ledger, LedgerConfig
from stages.pca import Pca, PcaConfig
from stages.shapes import ShapesConfig
from stages.source import Source, SourceConfig


def data_stages(root: str, weights: str, port: int) -> list[Stage[Any]]:
    """Build them, in order."""
    pictures = ShapesConfig(num_images=80, image_size_px=32, port=port)
    return [
        Clip(ClipConfig(kind="pretrained", name=weights), root=root),
        Source(SourceConfig(kind="shapes", rows_per_shard=8, shapes=pictures), root=root),
        Download(DownloadConfig(image_size_px=32, num_threads=4, backoff_s=0.0), root=root),
        Filter(FilterConfig(), root=root),
        Embed(EmbedConfig(), root=root),
        Curate(CurateConfig(), root=root),
        Ledger(LedgerConfig(), root=root),
        Pca(PcaConfig(num_components=4, num_buckets=8, num_dot_buckets=8), root=root),
    ]
