"""dalle2-pytorch's models and trainers as the other side of a comparison; runs in an environment of its own.

Captions and embeddings are given to it as they are to our models, so that neither needs a CLIP. The sizes of the
layers are chosen so that there are about as many parameters as in our models; the networks are not the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.model_sizes import Task
from tests.benchmarks.timed_worker import Inputs, Work, draw_inputs, serve

GUIDANCE_SCALE = 4.0
LEARNING_RATE, MAX_NORM = 1e-5, 1.0
# Its transformers have keys and values of one head only and a gated MLP: this width gives as many weights as ours.
MLP_FACTOR = 3.125
ATTENTION_HEADS = 4


def build(task: Task) -> Work:
    """Build its side of a task."""
    return _prior(task, draw_inputs(task)) if task.model == "prior" else _decoder(task, draw_inputs(task))


def _prior(task: Task, inputs: Inputs) -> Work:
    from dalle2_pytorch.dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork

    sizes = task.sizes
    network = DiffusionPriorNetwork(
        dim=sizes.embedding_dim,
        depth=sizes.prior_layers,
        heads=sizes.prior_heads,
        dim_head=sizes.head_channels,
        max_text_len=sizes.context_length,
        ff_mult=MLP_FACTOR,
    )
    prior = DiffusionPrior(network, image_embed_dim=sizes.embedding_dim, cond_drop_prob=0.1).to(task.device)
    condition = {"text_embed": inputs.text_embedding, "text_encodings": inputs.text_sequence}

    if task.operation == "loop":
        return Work(prior, _prior_step(task, prior, inputs))

    def sample() -> Tensor:
        # Its DDIM makes one step fewer than it is asked for.
        drawn: Tensor = prior.p_sample_loop(
            inputs.x.shape, text_cond=condition, cond_scale=GUIDANCE_SCALE, timesteps=sizes.steps["prior"] + 1
        )
        return drawn

    calls = {
        "forward": lambda: network(inputs.x, inputs.t, **condition),
        "train": lambda: prior(image_embed=inputs.image_embedding.clone(), **condition),  # which it scales in place
        "sample": sample,
    }
    return Work(prior, calls[task.operation])


def _prior_step(task: Task, prior: nn.Module, inputs: Inputs) -> Callable[[], Tensor]:
    """Make a step of its trainer, which is as it comes but for the clipping that both trainings do."""
    from accelerate import Accelerator
    from dalle2_pytorch import DiffusionPriorTrainer

    accelerator = Accelerator(cpu=task.device == "cpu")
    trainer = DiffusionPriorTrainer(prior, accelerator, lr=LEARNING_RATE, max_grad_norm=MAX_NORM)

    def step() -> Tensor:
        loss = trainer(
            text_embed=inputs.text_embedding,
            text_encodings=inputs.text_sequence,
            image_embed=inputs.image_embedding.clone(),
        )
        trainer.update()
        return torch.tensor(loss)

    return step


def _decoder(task: Task, inputs: Inputs) -> Work:
    from dalle2_pytorch.dalle2_pytorch import Decoder, Unet

    sizes = task.sizes
    sides = [sizes.decoder_px // 2**level for level in range(len(sizes.channel_mult))]
    unet = Unet(
        dim=sizes.channels,
        dim_mults=sizes.channel_mult,
        channels_out=6,
        num_resnet_blocks=sizes.num_res_blocks,
        self_attn=tuple(side in sizes.attention_px for side in sides),
        attn_dim_head=sizes.head_channels,
        attn_heads=ATTENTION_HEADS,
        resnet_groups=min(8, sizes.channels // 2),
        cond_dim=sizes.embedding_dim * 7 // 8,  # were it equal, it would leave the image's tokens out and fail
        image_embed_dim=sizes.embedding_dim,
        text_embed_dim=sizes.embedding_dim,
        cond_on_image_embeds=True,
        cond_on_text_encodings=True,
        max_text_len=sizes.context_length,
    )
    steps = sizes.steps["decoder"]
    decoder = Decoder(unet, image_size=sizes.decoder_px, sample_timesteps=steps).to(task.device)
    condition: dict[str, Any] = {"image_embed": inputs.image_embedding, "text_encodings": inputs.text_sequence}
    image = (inputs.x.clamp(-1, 1) + 1) / 2
    if task.operation == "loop":
        return Work(decoder, _decoder_step(task, decoder, image, condition))
    calls = {
        "forward": lambda: decoder.unets[0](inputs.x, inputs.t, **condition),
        "train": lambda: decoder(image, **condition),
        "sample": lambda: decoder.sample(cond_scale=GUIDANCE_SCALE, one_unet_in_gpu_at_time=False, **condition),
    }
    return Work(decoder, calls[task.operation])


def _decoder_step(
    task: Task, decoder: nn.Module, image: Tensor, condition: Mapping[str, Tensor]
) -> Callable[[], Tensor]:
    """Make a step of its trainer, which is as it comes but for the clipping that both trainings do."""
    from accelerate import Accelerator
    from dalle2_pytorch import DecoderTrainer

    accelerator = Accelerator(cpu=task.device == "cpu")
    trainer = DecoderTrainer(decoder, accelerator, lr=LEARNING_RATE, max_grad_norm=MAX_NORM)

    def step() -> Tensor:
        loss = trainer(image, unet_number=1, **condition)
        trainer.update(unet_number=1)
        return torch.tensor(loss)

    return step


def main() -> None:
    """Import the library once, and serve."""
    import dalle2_pytorch  # noqa: F401

    serve(build)


if __name__ == "__main__":
    main()
