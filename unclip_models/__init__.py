"""The models of unCLIP (Ramesh et al. 2022): diffusion, samplers, priors, decoder, upsamplers, CLIP, checkpoints.

The package imports nothing of this project outside itself, so it can be copied out and used alone. Import from its
modules (``from unclip_models.diffusion import GaussianDiffusion``); nothing heavy happens when the package is imported.
"""
