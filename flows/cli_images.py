"""The commands that make pictures with the trained models: generate, vary, interpolate, edit, invert, probe."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.project import open_project
from stages.errors import ConfigError, InputError, UnclipError

if TYPE_CHECKING:
    from torch import Tensor

    from stages.generate import Generate
    from stages.manifest import Manifest
    from stages.pictures import Pixels
    from unclip_models.generate import GeneratedImages, UnCLIP
    from unclip_models.sampling_settings import SamplingConfig

SUFFIXES = (".png", ".gif")


# ---- arguments ------------------------------------------------------------------------------------------------------


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip generate``."""
    _common_arguments(parser)
    parser.add_argument("caption", metavar="CAPTION", help="what to show")
    parser.add_argument("-n", dest="num_images", type=_positive, default=1, metavar="N", help="how many images")


def vary_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip vary``."""
    _common_arguments(parser)
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument("-n", dest="num_images", type=_positive, default=4, metavar="N", help="how many variations")
    parser.add_argument("--eta", type=float, default=1.0, metavar="E", help="noise of DDIM, 0 to 1: how far they vary")


def interpolate_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip interpolate``."""
    _common_arguments(parser)
    parser.add_argument("first", metavar="FIRST", help="picture file")
    parser.add_argument("second", metavar="SECOND", help="picture file")
    parser.add_argument(
        "-n", dest="num_images", type=_positive, default=7, metavar="N", help="frames, both ends included"
    )
    parser.add_argument(
        "--noise",
        choices=("inverted", "seeded"),
        default="inverted",
        help="inverted: the ends reconstruct both pictures; seeded: one random noise for all frames",
    )


def edit_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip edit``."""
    _common_arguments(parser)
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument("--to", dest="caption", metavar="CAPTION", help="what it should show")
    parser.add_argument(
        "--from", dest="baseline", default="a photo", metavar="CAPTION", help="what it shows now (default: a photo)"
    )
    parser.add_argument("--theta", type=float, default=0.5, metavar="T", help="how far to go, 0 to 1 (default: 0.5)")
    parser.add_argument("-n", dest="num_images", type=_positive, default=1, metavar="N", help="frames on the way")
    parser.add_argument("--mask", metavar="PNG", help="inpaint: repaint where this picture is black")
    parser.add_argument(
        "--zoom", type=float, metavar="Z", help="outpaint: paint around it, on a canvas Z times its side"
    )


def invert_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip invert``."""
    _common_arguments(parser)
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument("--latents", metavar="FILE", help="also write z_i and x_T to this .safetensors file")
    parser.add_argument("--json", action="store_true", help="print JSON to standard output")


def probe_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip probe``."""
    _common_arguments(parser)
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument(
        "--components",
        metavar="N,N,...",
        help="how many principal components to keep in each frame (default: powers of 2)",
    )


def _common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "-s",
        "--set",
        action="append",
        default=[],
        metavar="K=V",
        help="change a setting, e.g. generate.decoder.steps=50",
    )
    parser.add_argument(
        "--version", type=_version, metavar="N", help="a registered version, or `production`; without, this config's"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the first image; others follow")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help=".png: numbered if there are several; .gif: animated"
    )
    parser.add_argument("--grid", action="store_true", help="several images in one PNG")


def _version(text: str) -> int | str:
    return text if text == "production" else _positive(text)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


# ---- commands -------------------------------------------------------------------------------------------------------


def generate(args: argparse.Namespace) -> int:
    """Make images from a caption."""
    if not args.caption.strip():
        raise ConfigError("CAPTION: is empty; say what the image shows")
    from stages.generate import generate_images

    studio = Studio.open(args)
    seeds = range(args.seed, args.seed + args.num_images)
    made = generate_images(studio.stage, studio.manifests, [args.caption] * len(seeds), seeds)
    entries = [{"caption": image.caption, "seed": str(image.seed)} for image in made]
    studio.write_pixels([image.pixels for image in made], entries)
    return 0


def vary(args: argparse.Namespace) -> int:
    """Make variations of a picture."""
    from dataclasses import replace

    from unclip_models.manipulate import vary as make

    if not 0 <= args.eta <= 1:
        raise ConfigError(f"--eta {args.eta:g}: is not between 0 and 1")
    image = _tensor(args.image)
    studio = Studio.open(args)
    seeds = [args.seed + i for i in range(args.num_images)]

    sampling = studio.stage.config.sampling
    noisy = replace(sampling, decoder=replace(sampling.decoder, sampler="ddim", eta=args.eta))
    made = studio.run(lambda model, _: make(model, image.expand(len(seeds), -1, -1, -1), seeds, noisy))
    studio.write(made, [{"variation_of": args.image, "seed": str(seed)} for seed in seeds], noisy)
    return 0


def interpolate(args: argparse.Namespace) -> int:
    """Blend two pictures."""
    from unclip_models.manipulate import deterministic, inverse
    from unclip_models.manipulate import interpolate as make

    if args.num_images < 2:
        raise ConfigError("-n 1: an interpolation has two ends; write 2 or more")
    first, second = _tensor(args.first), _tensor(args.second)
    studio = Studio.open(args)
    fractions = [i / (args.num_images - 1) for i in range(args.num_images)]
    made = studio.run(
        lambda model, sampling: make(model, first, second, fractions, sampling, noise=args.noise, seed=args.seed)
    )
    ends = {"first": args.first, "second": args.second, "noise": args.noise, "seed": str(args.seed)}
    used = (inverse if args.noise == "inverted" else deterministic)(studio.stage.config.sampling)
    studio.write(made, [{**ends, "fraction": f"{fraction:.4f}"} for fraction in fractions], used)
    return 0


def edit(args: argparse.Namespace) -> int:
    """Change a picture by a difference of captions, or paint a part of it."""
    if args.mask and args.zoom is not None:
        raise ConfigError("--mask and --zoom: give one of them")
    if args.mask or args.zoom is not None:
        return _paint(args)
    from unclip_models.manipulate import edit as make
    from unclip_models.manipulate import inverse

    if not args.caption:
        raise ConfigError("--to: missing; say what the picture should become")
    if not 0 <= args.theta <= 1:
        raise ConfigError(f"--theta {args.theta:g}: is not between 0 and 1; the paper uses 0.25 to 0.5")
    image = _tensor(args.image)
    studio = Studio.open(args)
    thetas = [args.theta * (i + 1) / args.num_images for i in range(args.num_images)]
    made = studio.run(
        lambda model, sampling: make(model, image, args.caption, args.baseline, thetas, sampling, seed=args.seed)
    )
    about = {"edit_of": args.image, "to": args.caption, "from": args.baseline, "seed": str(args.seed)}
    used = inverse(studio.stage.config.sampling)
    studio.write(made, [{**about, "theta": f"{theta:.4f}"} for theta in thetas], used)
    return 0


def _paint(args: argparse.Namespace) -> int:
    import torch

    from stages.pictures import read_mask
    from unclip_models.manipulate import inpaint, outpaint_canvas

    image = _tensor(args.image)
    if args.zoom is not None:
        try:
            image, mask = outpaint_canvas(image, args.zoom)
        except ValueError as error:
            raise ConfigError(f"--zoom: {error}") from None
    else:
        mask = torch.from_numpy(read_mask(args.mask))[None, None]
        if mask.shape[2:] != image.shape[2:]:
            raise InputError(
                f"--mask {args.mask}: {mask.shape[3]} x {mask.shape[2]} px, the picture has {image.shape[3]} x "
                f"{image.shape[2]}; give a mask of the same size"
            )
    studio = Studio.open(args)
    seeds = [args.seed + i for i in range(args.num_images)]
    captions = [args.caption] * len(seeds) if args.caption else None
    made = studio.run(
        lambda model, sampling: inpaint(
            model,
            image.expand(len(seeds), -1, -1, -1),
            mask.expand(len(seeds), -1, -1, -1),
            seeds,
            sampling,
            captions=captions,
        )
    )
    about = {"painted": args.image, "caption": args.caption or ""}
    studio.write(made, [{**about, "seed": str(seed)} for seed in seeds])
    return 0


def invert(args: argparse.Namespace) -> int:
    """Find a picture's latents and decode them back."""
    from stages.pictures import contact_sheet
    from unclip_models import manipulate

    image = _tensor(args.image)
    studio = Studio.open(args)
    found: dict[str, Any] = {}

    def work(model: UnCLIP, sampling: SamplingConfig) -> GeneratedImages:
        inversion = manipulate.invert(model, image, sampling)
        found["error"] = float(manipulate.reconstruction_error(model, inversion, sampling)[0])
        found["latents"] = {"image_embedding": inversion.image_embedding, "noise": inversion.noise}
        found["given"] = model.enlarge(inversion.image, [args.seed], sampling)
        return manipulate.decode_latents(model, inversion.image_embedding, inversion.noise, sampling, seed=args.seed)

    made = studio.run(work)
    if args.latents:
        _write_latents(Path(args.latents), found["latents"])
    side = max(made.images)
    sheet = contact_sheet([found["given"][side][0].numpy(), made.final[0].numpy()], columns=2)
    entries = [{"inversion_of": args.image, "reconstruction_error": f"{found['error']:.6f}"}]
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
        studio.write_pixels([sheet], entries, manipulate.inverse(studio.stage.config.sampling))
    if args.json:
        print(json.dumps({"reconstruction_error": found["error"], "output": args.output, "latents": args.latents}))
    else:
        levels = found["error"] * 127.5
        print(f"reconstruction error: {found['error']:.4f} of [-1, 1] ({levels:.1f} levels of 8 bits)")
    return 0


def probe(args: argparse.Namespace) -> int:
    """Decode a picture's embedding rebuilt from its first principal components."""
    from unclip_models.manipulate import deterministic
    from unclip_models.manipulate import probe as make

    image = _tensor(args.image)
    studio = Studio.open(args)
    axes = studio.axes()
    counts = _component_counts(args.components, len(axes.axes))
    made = studio.run(lambda model, sampling: make(model, image, axes, counts, sampling, seed=args.seed))
    about = {"probe_of": args.image, "seed": str(args.seed)}
    used = deterministic(studio.stage.config.sampling)
    studio.write(made, [{**about, "num_components": str(count)} for count in counts], used)
    return 0


def _component_counts(text: str | None, available: int) -> list[int]:
    if text is None:
        powers = [2**i for i in range(available.bit_length()) if 2**i < available]
        return [*powers, available]
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--components {text}: write numbers like 1,4,16") from None
    if wrong := [count for count in counts if not 0 <= count <= available]:
        raise ConfigError(f"--components {wrong[0]}: the pca stage kept {available}; ask for 0 to {available}")
    return counts


# ---- what they share ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Studio:
    """Trained models, and where the pictures go.

    Attributes:
        stage: knows how to load and sample them.
        manifests: of the stages that made them.
        about: further text entries for every picture: the version, if they are one's.
        output: file to write.
        grid: whether several images go into one PNG.
    """

    stage: Generate
    manifests: Mapping[str, Manifest]
    about: Mapping[str, str]
    output: Path
    grid: bool

    @classmethod
    def open(cls, args: argparse.Namespace) -> Studio:
        """Check the output's name and read the project.

        Raises:
            ConfigError: if the output cannot be written as asked.
            InputError: if the version that is asked for cannot be used.
        """
        from stages.config import load_config
        from stages.generate import Generate
        from stages.graph import build_stages
        from stages.registry import open_version

        path = Path(args.output)
        if path.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"-o {path}: pictures are written as PNG or GIF; give a name that ends in .png or .gif")
        if not path.parent.is_dir():
            raise ConfigError(f"-o {path}: there is no folder {path.parent}; create it")
        about: dict[str, str] = {}
        if args.version is None:
            project = open_project(args.config, args.set)
            stages, manifests = project.stages, project.manifests
        else:  # without a look at the lists and results of this config: where models are served there may be none
            config = load_config(args.config, args.set)
            version, manifests = open_version(config.root, args.version)
            stages, about = build_stages(config), {"model_version": str(version.number)}
        stage = stages["generate"]
        assert isinstance(stage, Generate)
        return cls(stage=stage, manifests=manifests, about=about, output=path, grid=args.grid)

    def run(self, work: Callable[[UnCLIP, SamplingConfig], GeneratedImages]) -> GeneratedImages:
        """Load the models and let ``work`` use them.

        Raises:
            InputError: if a model has not been trained yet.
            ConfigError: if the models cannot do what is asked.
        """
        with self.stage.stack(self.manifests) as model:
            try:
                return work(model, self.stage.config.sampling)
            except UnclipError:
                raise
            except ValueError as error:
                raise ConfigError(str(error)) from error

    def axes(self) -> Any:
        """Read the principal axes.

        Raises:
            InputError: if the pca stage has not finished.
        """
        import safetensors.torch

        from unclip_models.manipulate import PrincipalAxes

        manifest = self.manifests.get("pca")
        if manifest is None:
            raise InputError("probe: pca not finished; `unclip run --until pca` makes it")
        tensors = safetensors.torch.load(manifest.files["pca"].read(self.stage.root))
        return PrincipalAxes(tensors["mean"], tensors["axes"])

    def write(
        self, made: GeneratedImages, entries: Sequence[Mapping[str, str]], sampling: SamplingConfig | None = None
    ) -> None:
        """Write the largest images, each with its text entries; print the names of the files."""
        self.write_pixels(list(made.final.numpy()), entries, sampling)

    def write_pixels(
        self,
        pictures: Sequence[Pixels],
        entries: Sequence[Mapping[str, str]],
        sampling: SamplingConfig | None = None,
    ) -> None:
        """Write pictures as the output's name and ``--grid`` ask.

        Args:
            pictures: uint8 ``(H, W, 3)`` each.
            entries: what each of them is.
            sampling: how they were made, if not as the config says.
        """
        from stages.pictures import contact_sheet, encode_gif, encode_png

        provenance = {**self.stage.provenance(self.manifests, sampling), **self.about}
        # Names of files need not be text.
        entries = [{key: value.encode(errors="replace").decode() for key, value in own.items()} for own in entries]
        whole = [{**own, **provenance} for own in entries]
        path = self.output
        if path.suffix.lower() == ".gif":
            self._write_file(path, encode_gif(pictures, json.dumps(whole)))
        elif len(pictures) == 1:
            self._write_file(path, encode_png(pictures[0], whole[0]))
        elif self.grid:
            about = {"images": json.dumps(entries, ensure_ascii=False), **provenance}
            self._write_file(path, encode_png(contact_sheet(pictures), about))
        else:
            for number, (pixels, own) in enumerate(zip(pictures, whole, strict=True), start=1):
                self._write_file(path.with_stem(f"{path.stem}-{number}"), encode_png(pixels, own))

    @staticmethod
    def _write_file(path: Path, content: bytes) -> None:
        try:
            path.write_bytes(content)
        except OSError as error:
            raise InputError(f"-o {path}: cannot be written ({error.strerror}); choose another place") from None
        print(path)


def _tensor(path: str) -> Tensor:
    """Read a picture: uint8 ``(1, 3, H, W)``."""
    import torch

    from stages.pictures import read_picture

    return torch.from_numpy(read_picture(path).copy()).permute(2, 0, 1)[None]


def _write_latents(path: Path, latents: Mapping[str, Tensor]) -> None:
    from unclip_models.checkpoint import save_tensors

    try:
        save_tensors({name: tensor.cpu().contiguous() for name, tensor in latents.items()}, path, {})
    except OSError as error:
        raise InputError(f"--latents {path}: cannot be written ({error.strerror}); choose another place") from None
