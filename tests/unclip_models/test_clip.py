"""The CLIP wrapper: same numbers as open_clip, nothing lost in a file, the activation never guessed."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from unclip_models.clip import ClipModel, contrastive_loss, golden_embeddings
from unclip_models.clip_input import ClipPreprocess, preprocess_images, resize_and_crop, tokenize
from unclip_models.randomness import SampleRandom
from unclip_models.settings import ClipModelConfig

torch.set_num_threads(1)
CONFIG = ClipModelConfig(
    embedding_dim=16,
    image_size=16,
    patch_size=8,
    vision_width=32,
    vision_layers=1,
    vision_heads=2,
    text_width=32,
    text_layers=1,
    text_heads=2,
)


def tiny_clip(**changes: object) -> ClipModel:
    torch.manual_seed(0)
    return ClipModel.from_config(ClipModelConfig(**{**CONFIG.__dict__, **changes}))


def test_tokens_are_start_caption_end_zeros() -> None:
    tokens = tokenize(["", "a red circle", "word " * 40], 8)
    assert tokens.shape == (3, 8) and tokens.dtype == torch.int64
    assert tokens[0].tolist() == [49406, 49407, 0, 0, 0, 0, 0, 0]
    assert tokens[1, 0] == 49406 and tokens[1, 4] == 49407 and tokens[1, 5:].tolist() == [0, 0, 0]
    assert tokens[2, 0] == 49406 and tokens[2, -1] == 49407
    assert tokenize([], 8).shape == (0, 8)
    with pytest.raises(ValueError, match="one string"):
        tokenize("a red circle", 8)


def test_properties_and_unit_norm_embeddings() -> None:
    clip = tiny_clip().freeze()
    assert (clip.image_size, clip.embedding_dim, clip.context_length, clip.text_width) == (16, 16, 16, 32)
    images = torch.randint(0, 256, (3, 3, 20, 30), dtype=torch.uint8)
    z_i, z_t = clip.encode_image(images), clip.encode_text(clip.tokenize(["a", "b", "c"]))
    for z in (z_i, z_t):
        assert z.shape == (3, 16) and z.dtype == torch.float32
        torch.testing.assert_close(z.norm(dim=-1), torch.ones(3))


def test_preprocessing_is_open_clips() -> None:
    from open_clip.transform import image_transform
    from PIL import Image

    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:61, 0:83]
    picture = np.stack([127 + 100 * np.sin(x / 9), 127 + 100 * np.cos(y / 7), (x + y) % 255], axis=-1)
    picture = np.clip(picture + rng.normal(0, 5, picture.shape), 0, 255).astype(np.uint8)
    config = ClipPreprocess(image_size=24)
    theirs = image_transform(24, is_train=False, mean=config.mean, std=config.std)(Image.fromarray(picture))
    ours = preprocess_images(torch.from_numpy(picture).permute(2, 0, 1)[None], config)[0]
    one_level = 1 / 255 / min(config.std)
    assert (ours - theirs).abs().max() <= 1.01 * one_level
    assert (ours - theirs).abs().mean() < 0.2 * one_level


def test_resizing_in_8_bit_is_nearer_to_pillow() -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    config = ClipPreprocess(image_size=48)
    for height, width in ((120, 97), (97, 120), (64, 60), (30, 40)):
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        short = min(height, width)
        size = (int(48 * width / short), int(48 * height / short))
        left, top = round((size[0] - 48) / 2), round((size[1] - 48) / 2)
        pillow = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 48, top + 48))
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None]
        ours, rough = resize_and_crop(pixels, config), resize_and_crop(pixels.float(), config)
        assert ours.dtype == torch.uint8 and ours.shape == (1, 3, 48, 48)
        theirs = torch.from_numpy(np.array(pillow)).permute(2, 0, 1)[None].int()
        off, off_rough = (ours.int() - theirs).abs(), (rough.int() - theirs).abs()
        assert off.max() <= 2 and off.float().mean() < 0.05 and off.float().mean() < off_rough.float().mean()


def test_uint8_and_float_images_of_any_side_agree() -> None:
    config = ClipPreprocess(image_size=8)
    pixels = [
        torch.randint(0, 256, (3, 8, 12), dtype=torch.uint8),
        torch.randint(0, 256, (3, 16, 8), dtype=torch.uint8),
    ]
    ours = preprocess_images(pixels, config)
    floats = preprocess_images([image.float() / 127.5 - 1 for image in pixels], config)
    assert ours.shape == (2, 3, 8, 8)
    torch.testing.assert_close(ours, floats, atol=1e-5, rtol=0)
    assert preprocess_images(pixels[0][None], ClipPreprocess(image_size=8, resize_mode="squash")).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="RGB"):
        preprocess_images(torch.zeros(1, 1, 8, 8), config)
    with pytest.raises(ValueError, match="dtype"):
        preprocess_images(torch.zeros(1, 3, 8, 8, dtype=torch.int64), config)


@pytest.mark.parametrize("custom_text", [False, True])
def test_trimmed_captions_have_the_same_embeddings(custom_text: bool) -> None:
    torch.manual_seed(0)
    clip = ClipModel.from_config(CONFIG.open_clip_config() | {"custom_text": custom_text}).freeze()
    tokens = clip.tokenize(["", "a red circle", "a blue square on a white background", "word " * 40])
    widths: list[int] = []
    (block,) = (
        module
        for name, module in clip.named_modules()
        if name.endswith("transformer.resblocks.0") and "visual" not in name
    )
    block.register_forward_hook(lambda _module, inputs, _output: widths.append(inputs[0].shape[1]))
    for rows in ([0], [0, 1], [1, 2], [0, 1, 2, 3]):
        full, trimmed = clip.encode_text(tokens[rows]), clip.encode_text(tokens[rows], trim=True)
        torch.testing.assert_close(trimmed, full, atol=1e-6, rtol=0)
    assert widths == [16, 2, 16, 5, 16, 9, 16, 16]
    assert clip.encode_text(tokens[:0], trim=True).shape == (0, 16)


def test_text_sequence_ends_in_the_embedding() -> None:
    clip = tiny_clip().freeze()
    tokens = clip.tokenize(["a red circle", "blue"])
    sequence, embedding = clip.encode_text_sequence(tokens)
    assert sequence.shape == (2, 16, 32)
    torch.testing.assert_close(embedding, clip.encode_text(tokens))
    at_end = sequence[torch.arange(2), tokens.argmax(dim=1)] @ clip.model.text_projection
    torch.testing.assert_close(torch.nn.functional.normalize(at_end, dim=-1), embedding)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_a_file_restores_everything(quick_gelu: bool, tmp_path: Path) -> None:
    clip = tiny_clip(quick_gelu=quick_gelu).freeze()
    clip.preprocess_config = ClipPreprocess(image_size=16, mean=(0.5, 0.4, 0.3), resize_mode="squash")
    clip.save(tmp_path / "clip.safetensors", metadata={"step": "7"})
    loaded = ClipModel.from_pretrained(str(tmp_path / "clip.safetensors"))
    assert loaded.quick_gelu is quick_gelu and loaded.preprocess_config == clip.preprocess_config
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    for ours, theirs in zip(golden_embeddings(loaded), golden_embeddings(clip), strict=True):
        assert torch.equal(ours, theirs)


def test_the_golden_embeddings_show_every_drift() -> None:
    clip = tiny_clip().freeze()
    images, texts = golden_embeddings(clip)
    other = tiny_clip(quick_gelu=True).freeze()
    other.load_state_dict(clip.state_dict())
    drifted_images, drifted_texts = golden_embeddings(other)
    assert (images - drifted_images).abs().max() > 1e-4 and (texts - drifted_texts).abs().max() > 1e-4
    for change in ({"mean": (0.5, 0.5, 0.5)}, {"resize_mode": "squash"}):
        clip.preprocess_config = ClipPreprocess(image_size=16, **change)
        assert (images - golden_embeddings(clip)[0]).abs().max() > 1e-4


def test_a_weights_file_without_its_activation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="quick_gelu: undecided"):
        ClipModel.from_pretrained("ViT-B-32", str(tmp_path / "weights.safetensors"))


@pytest.mark.parametrize(
    ("name", "weights", "quick_gelu", "match"),
    [
        ("ViT-Z-99", "openai", None, "no architecture"),
        ("ViT-B-32", None, None, "weights: missing"),
        ("ViT-B-32", "nowhere", None, "neither a file nor a tag"),
        ("ViT-B-32/openai", None, False, "trained with True"),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", None, "neither a file nor a tag"),
        ("local-dir:/nowhere", None, None, "no open_clip model at"),
        ("/models/clip.safetensors", None, None, r"/models/clip.safetensors: no such file on this machine"),
        ("models/clip.pt", None, None, r"models/clip.pt: no such file"),
        ("s3://bucket/clip", None, None, r"s3://bucket/clip: no such file"),
        ("ViT-B-32", "weights.bin", None, r"weights.bin: no such file"),
    ],
)
def test_unknown_or_contradictory_models_are_refused_before_any_download(
    name: str, weights: str | None, quick_gelu: bool | None, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        ClipModel.from_pretrained(name, weights, quick_gelu=quick_gelu)


def test_a_local_folder_loads_or_is_refused_without_weights(tmp_path: Path) -> None:
    """A local-dir in open_clip's own layout is how published models arrive without a network."""
    import json

    from safetensors.torch import save_file

    clip = tiny_clip(quick_gelu=True).freeze()
    save_file(clip.model.state_dict(), tmp_path / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": CONFIG.open_clip_config() | {"quick_gelu": True}, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    loaded = ClipModel.from_pretrained(f"local-dir:{tmp_path}")
    assert loaded.quick_gelu
    assert loaded.preprocess_config == ClipPreprocess(
        image_size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize_mode="squash"
    )
    tokens = clip.tokenize(["a red circle"])
    torch.testing.assert_close(loaded.encode_text(tokens), clip.encode_text(tokens))
    with pytest.raises(ValueError, match="would be ignored"):
        ClipModel.from_pretrained(f"local-dir:{tmp_path}", "openai")
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="could not load its weights"):
        ClipModel.from_pretrained(f"local-dir:{tmp_path}")


def test_equal_captions_are_not_negatives() -> None:
    z = torch.nn.functional.normalize(torch.randn(2, 8), dim=-1)[[0, 0, 1]]
    tokens = torch.tensor([[1, 2], [1, 2], [3, 4]])
    loss, metrics = contrastive_loss(z, z, torch.tensor(100.0), tokens)
    assert loss.item() == pytest.approx(2 / 3 * np.log(2), abs=1e-3)
    assert metrics["accuracy"] == 1


def test_it_learns_to_match_colours_and_words() -> None:
    clip = tiny_clip()
    words = ["red", "green", "blue", "white"]
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=torch.uint8)
    batch = {"image": colours[:, :, None, None].expand(-1, -1, 16, 16), "tokens": clip.tokenize(words)}
    optimizer = torch.optim.Adam(clip.parameters(), lr=2e-3)
    for step in range(30):
        optimizer.zero_grad()
        loss, metrics = clip.loss(batch, SampleRandom(0, step, range(4)))
        loss.backward()
        optimizer.step()
    assert metrics["accuracy"] == 1 and loss < 0.5


def test_wrong_token_length_and_configs_are_refused() -> None:
    clip = tiny_clip()
    with pytest.raises(ValueError, match=r"\(B, 16\)"):
        clip.encode_text(tokenize(["a"], 8))
    with pytest.raises(ValueError, match="vision_width"):
        tiny_clip(vision_heads=3)
    with pytest.raises(ValueError, match="patch_size"):
        tiny_clip(patch_size=5)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    from unclip_models.checkpoint import write_weights

    write_weights(tmp_path / "m.safetensors", {"x": torch.zeros(1)}, {"architecture": "decoder"})
    with pytest.raises(ValueError, match="holds decoder"):
        ClipModel.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("logarithm", [2.0, 4.6, 4.7, 9.0])
def test_the_logit_scale_is_capped_and_can_come_down_again(logarithm: float) -> None:
    """Radford et al. 2021, section 2.5: at most 100. A step beyond must not keep it there for good."""
    clip = ClipModel.from_config(CONFIG)
    with torch.no_grad():
        clip.model.logit_scale.fill_(logarithm)  # type: ignore[operator, union-attr]
    images = torch.zeros(2, 3, clip.image_size, clip.image_size, dtype=torch.uint8)
    for sign in (1, -1):
        clip.zero_grad()
        *_, scale = clip(images, clip.tokenize(["a", "b"]))
        assert float(scale.detach()) == pytest.approx(min(math.exp(logarithm), 100))
        (sign * scale).backward()
        gradient = float(clip.model.logit_scale.grad)  # type: ignore[arg-type, union-attr]
        free = sign * min(math.exp(logarithm), 100)
        assert gradient == pytest.approx(0 if sign < 0 and logarithm > math.log(100) else free)
