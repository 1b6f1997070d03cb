"""The commands that exchange weights and embeddings with other software: export, export-embeddings, import."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flows.project import Project, open_project
from stages.errors import ConfigError, InputError

if TYPE_CHECKING:
    from torch import nn

FORMATS = ("diffusers", "safetensors")
TRAINED = ("prior", "decoder", "upsampler_256", "upsampler_1024")
KINDS = ("prior", "decoder", "upsampler")


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip export``."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="K=V", help="change a setting")
    parser.add_argument("--format", choices=FORMATS, required=True, help="diffusers' own, or this project's files")
    parser.add_argument("--only", action="append", choices=TRAINED, metavar="MODEL", help="this model; repeatable")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="gets one entry per model")
    parser.add_argument(
        "--step", type=_step, metavar="N", help="from the checkpoint of step N or `last`, also of unfinished trainings"
    )


def export_embeddings_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip export-embeddings``."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("folder", metavar="DIR", help="new or empty folder to write, in clip-retrieval's layout")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="K=V", help="change a setting")
    parser.add_argument("--all", action="store_true", help="all embedded samples, not only those that curate keeps")


def import_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip import``."""
    parser.add_argument(
        "source", metavar="SOURCE", help="folder of diffusers weights, or a .safetensors, .ckpt, .pt or .pth file"
    )
    parser.add_argument("--kind", choices=KINDS, required=True, help="what it is")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help=".safetensors file to write")
    parser.add_argument("--clip", metavar="FILE", help="file of the clip stage: adds the empty caption, to guide with")
    parser.add_argument("--stats", metavar="FILE", help="a prior's mean and standard deviation, as Karlo keeps them")
    parser.add_argument("--image-size", type=int, metavar="PX", help="of a file: side of the image (64 or 256)")
    parser.add_argument("--input-size", type=int, default=64, metavar="PX", help="of a file: an upsampler's input (64)")
    parser.add_argument("--head-channels", type=int, default=64, metavar="N", help="of a file: per head (64)")
    parser.add_argument("--schedule", choices=("cosine", "linear"), default="cosine", help="of a file: noise schedule")


def _step(text: str) -> int | Literal["last"]:
    if text == "last":
        return "last"
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a number of steps nor `last`") from None


def export(args: argparse.Namespace) -> int:
    """Write the trained models for other software."""
    from unclip_models.checkpoint import save_model
    from unclip_models.diffusers_format import export_diffusers

    project = open_project(args.config, args.set)
    folder = Path(args.output)
    for name, read in _trained_models(project, args.only or TRAINED, args.step):
        model, origin = read()
        target = folder / name if args.format == "diffusers" else folder / f"{name}.safetensors"
        try:
            if args.format == "diffusers":
                export_diffusers(model, target)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                save_model(model, target, metadata=origin)
        except ValueError as error:
            raise ConfigError(f"export {name}: {error}") from None
        except OSError as error:
            raise InputError(f"-o {target}: cannot be written ({error.strerror}); choose another place") from None
        print(target)
    return 0


def _trained_models(
    project: Project, names: Sequence[str], step: int | Literal["last"] | None
) -> list[tuple[str, Callable[[], tuple[nn.Module, dict[str, str]]]]]:
    """Tell how to read each model and where its weights are from; what is missing is said before anything is read."""
    from stages.generator_training import Training
    from stages.runner import output_uri
    from stages.weights import checked_copy, weights_of
    from unclip_models.checkpoint import load_model

    found = project.manifests

    def finished(name: str) -> tuple[nn.Module, dict[str, str]]:
        with checked_copy(project.config.root, weights_of(found[name])) as path:
            model, metadata = load_model(path)
        return model, {key: metadata[key] for key in ("stage", "shard", "steps", "seed")}

    def so_far(name: str) -> tuple[nn.Module, dict[str, str]]:
        stage = project.stages[name]
        assert isinstance(stage, Training)
        inputs = {upstream: found[upstream] for upstream in stage.upstream}
        return stage.model_so_far(inputs, output_uri(stage), None if step == "last" else step)

    needed = names if step is None else [upstream for name in names for upstream in project.stages[name].upstream]
    if missing := [name for name in dict.fromkeys(needed) if name not in found]:
        raise InputError(
            f"export: {', '.join(missing)} not finished; `unclip run` makes what is missing"
            + ("; --step last exports what a training has reached" if step is None else "")
        )
    return [(name, partial(finished if step is None else so_far, name)) for name in names]


def export_embeddings(args: argparse.Namespace) -> int:
    """Write the embeddings of the dataset for clip-retrieval and what reads its files."""
    from stages import clip_retrieval_layout

    project = open_project(args.config, args.set)
    stage = "embed" if args.all else "curate"
    if stage not in project.manifests:
        raise InputError(f"export-embeddings: {stage} not finished; `unclip run --until {stage}` makes it")
    count = clip_retrieval_layout.export_embeddings(project.manifests[stage], Path(args.folder))
    print(f"{args.folder}: embeddings of {count:,} samples")
    return 0


def import_(args: argparse.Namespace) -> int:
    """Take over weights of other software."""
    from unclip_models.checkpoint import save_model

    output = Path(args.output)
    if output.suffix != ".safetensors":
        raise ConfigError(f"-o {output}: give a name that ends in .safetensors")
    if not output.parent.is_dir():
        raise ConfigError(f"-o {output}: there is no folder {output.parent}; create it")
    try:
        model = _read(args)
        if args.clip:
            _add_empty_caption(model, args.clip)
    except ValueError as error:
        raise InputError(f"import: {error}") from None
    try:
        save_model(model, output, metadata={"imported_from": str(args.source)})
    except OSError as error:
        raise InputError(f"-o {output}: cannot be written ({error.strerror}); choose another place") from None
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{output}: {type(model).__name__} of {count:,} parameters")
    return 0


def _read(args: argparse.Namespace) -> nn.Module:
    from unclip_models.diffusers_format import import_diffusers
    from unclip_models.karlo_format import ImportOptions, import_karlo, read_checkpoint

    source = Path(args.source)
    if source.is_dir():
        return import_diffusers(source, args.kind)
    options = ImportOptions(
        image_size=args.image_size,
        input_size=args.input_size,
        head_channels=args.head_channels,
        schedule=args.schedule,
    )
    statistics = _statistics(args.stats) if args.stats else None
    return import_karlo(read_checkpoint(source), args.kind, options, statistics=statistics, where=str(source))


def _statistics(path: str) -> tuple[Any, Any]:
    """Read a pair (mean, standard deviation) that torch saved, or tensors of those names."""
    import torch

    from unclip_models.checkpoint import read_weights

    if path.endswith(".safetensors"):
        tensors = read_weights(path)[1]
        found: Any = (tensors.get("mean"), tensors.get("std"))
    else:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path}: cannot be read as plain tensors ({error})") from None
    pair = tuple(found) if isinstance(found, list | tuple) else ()
    if len(pair) != 2 or not all(isinstance(part, torch.Tensor) for part in pair):
        raise ValueError(f"{path}: does not hold mean and standard deviation; give a pair of tensors")
    return pair[0].float().flatten(), pair[1].float().flatten()


def _add_empty_caption(model: nn.Module, path: str) -> None:
    from unclip_models.clip import ClipModel
    from unclip_models.clip_text import ClipText

    text = getattr(model, "text_encoder", None)
    if not isinstance(text, ClipText):
        raise ValueError("--clip: this model does not read CLIP's text; leave it out")
    clip = ClipModel.load(path)
    tokens = clip.tokenize([""])
    raw = bool(getattr(model.config, "raw_embeddings", False))
    sequence, embedding = clip.encode_text_sequence(tokens, normalize=not raw)
    text.set_null_caption(tokens[0], sequence[0], embedding[0])
