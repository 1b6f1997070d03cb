"""The four trainings: prior, decoder and the two upsamplers. They differ by their model and by what a batch holds."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, cast

from stages.base import Shard
from stages.errors import ConfigError, IntegrityError
from stages.generator_config import DecoderTraining, PriorTraining, UpsamplerTraining
from stages.generator_training import Training
from stages.manifest import File, Manifest
from unclip_models.settings import ARPriorConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from unclip_models.clip import ClipModel
    from unclip_models.prior import DiffusionPrior

_GAMMA_SAMPLES = 512


class Prior(Training[PriorTraining]):
    """Train the prior, diffusion or autoregressive."""

    name = "prior"
    version: ClassVar[int] = 2
    needs_images = False
    needs_embeddings = True

    @property
    def upstream(self) -> tuple[str, ...]:
        """The principal axes too, for the codes of an autoregressive prior or measured scaling."""
        return (*super().upstream, "pca") if self._reads_pca else super().upstream

    @property
    def _reads_pca(self) -> bool:
        model = self.config.model
        return isinstance(model, ARPriorConfig) or model.embedding_scaling == "mean_std"

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
        """Add the principal axes and the statistics that come with them."""
        files = super().extra_files(inputs)
        return files | {"pca": inputs["pca"].files["pca"]} if self._reads_pca else files

    def fresh_model(self, shard: Shard, clip: ClipModel | None = None) -> nn.Module:
        """Build the prior; the autoregressive one gets its quantiser, the other its measured scaling."""
        model = super().fresh_model(shard, clip)
        if not self._reads_pca:
            return model
        import safetensors.torch

        from unclip_models.ar_prior import ARPrior

        file = shard.inputs["pca"]
        tensors = safetensors.torch.load(file.read(self.root))
        try:
            if isinstance(model, ARPrior):
                k = model.config.num_codes
                edges, dot_edges = tensors["edges"][:k], tensors["dot_edges"]
                model.set_pca(mean=tensors["mean"], axes=tensors["axes"][:k], edges=edges, dot_edges=dot_edges)
            else:
                cast("DiffusionPrior", model).scaling.set_statistics(tensors["mean"], tensors["std"])
        except (KeyError, ValueError) as error:
            raise IntegrityError(
                f"{file.path}: does not fit prior.model ({error}); make prior.model.num_codes, num_buckets and "
                "num_dot_buckets agree with the pca section"
            ) from error
        return model

    def complete(self, model: nn.Module, shard: Shard, clip: ClipModel | None) -> None:
        """Measure what the analytic sampler needs, on the samples that would have come next."""
        import torch

        from stages.clip_text_batches import with_clip_text
        from unclip_models.prior import DiffusionPrior
        from unclip_models.randomness import SampleRandom

        if not isinstance(model, DiffusionPrior):
            return
        model.to(self._device).eval()
        batches: list[dict[str, Tensor]] = []
        indices: list[int] = []
        with contextlib.closing(self._stream(shard, clip).batches(self.config.num_steps)) as stream:
            while len(indices) < _GAMMA_SAMPLES:
                batch = next(stream)
                indices += batch.indices
                batches.append(batch.part(0, len(batch.indices), self._device))
        whole = {name: torch.cat([batch[name] for batch in batches])[:_GAMMA_SAMPLES] for name in batches[0]}
        random = SampleRandom(self.seed, self.config.num_steps, indices[:_GAMMA_SAMPLES], self._device)
        model.measure_gamma(whole if clip is None else with_clip_text(whole, clip), random)


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
