"""diffusers' models as the other side of a comparison, with the weights that ours were exported to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from diffusers.schedulers.scheduling_unclip import UnCLIPScheduler
from torch import Tensor

from tests.benchmarks.model_sizes import Task
from tests.benchmarks.our_worker import GUIDANCE_SCALE, module_work, unet_condition
from tests.benchmarks.timed_worker import Inputs, Work, draw_inputs, serve


def build(task: Task) -> Work:
    """Build its side of a task."""
    folder, inputs = Path(task.folder) / task.model, draw_inputs(task)
    if task.model == "prior":
        prior = PriorTransformer.from_pretrained(folder / "prior").to(task.device)
        return _prior(task, prior, inputs)
    if task.model == "upsampler":
        unet = UNet2DModel.from_pretrained(folder / "super_res_first").to(task.device)
        return module_work(task, unet, lambda: cast(Tensor, unet(inputs.x, inputs.t).sample))
    unet = UNet2DConditionModel.from_pretrained(folder / "decoder").to(task.device)
    embedding, context = unet_condition(task)

    def predict() -> Tensor:
        return cast(Tensor, unet(inputs.x, inputs.t, encoder_hidden_states=context, class_labels=embedding).sample)

    return module_work(task, unet, predict)


def _prior(task: Task, prior: Any, inputs: Inputs) -> Work:
    embedding, sequence, mask = inputs.text_embedding, inputs.text_sequence, inputs.tokens != 0

    def predict() -> Tensor:
        output = prior(
            inputs.x, inputs.t, proj_embedding=embedding, encoder_hidden_states=sequence, attention_mask=mask
        )
        return cast(Tensor, output.predicted_image_embedding)

    def sample() -> Tensor:
        """Do as UnCLIPPipeline does."""
        scheduler = UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample_range=5.0
        )
        scheduler.set_timesteps(task.sizes.steps["prior"], device=task.device)
        latents = torch.randn(inputs.x.shape, generator=torch.Generator().manual_seed(0)).to(task.device)
        both = (torch.cat([embedding] * 2), torch.cat([sequence] * 2), torch.cat([mask] * 2))
        for index, t in enumerate(scheduler.timesteps):
            output = prior(
                torch.cat([latents] * 2),
                timestep=t,
                proj_embedding=both[0],
                encoder_hidden_states=both[1],
                attention_mask=both[2],
            )
            without, given = output.predicted_image_embedding.chunk(2)
            guided = without + GUIDANCE_SCALE * (given - without)
            following = None if index + 1 == len(scheduler.timesteps) else scheduler.timesteps[index + 1]
            latents = scheduler.step(guided, timestep=t, sample=latents, prev_timestep=following).prev_sample
        return cast(Tensor, prior.post_process_latents(latents))

    return Work(prior, sample) if task.operation == "sample" else module_work(task, prior, predict)


if __name__ == "__main__":
    serve(build)
