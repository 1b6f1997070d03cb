"""Save and load a model as one safetensors file that describes itself.

The file's header holds the architecture's name and version and the model's config as JSON, beside the caller's own
metadata. Loading executes nothing from the file (no pickle), and refuses what it does not know instead of guessing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unclip_models.ar_prior import ARPrior
from unclip_models.decoder import Decoder
from unclip_models.prior import DiffusionPrior
from unclip_models.settings import ARPriorConfig, DecoderConfig, DiffusionPriorConfig, UpsamplerConfig
from unclip_models.upsampler import Upsampler


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A kind of model a file may hold; ``version`` rises when old weights no longer mean the same."""

    name: str
    version: int
    config: type
    model: type[nn.Module]


ARCHITECTURES = (
    Architecture("diffusion_prior", 1, DiffusionPriorConfig, DiffusionPrior),
    Architecture("ar_prior", 1, ARPriorConfig, ARPrior),
    Architecture("decoder", 1, DecoderConfig, Decoder),
    Architecture("upsampler", 1, UpsamplerConfig, Upsampler),
)
RESERVED_METADATA = ("architecture", "architecture_version", "config")


def build(config: Any) -> nn.Module:
    """Build the model that a config describes, with fresh weights.

    Raises:
        ValueError: if ``config`` is of no known type.
    """
    architecture = _architecture_of(config)
    return architecture.model(config)


def save_model(model: nn.Module, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write weights, buffers and config of ``model`` to one local .safetensors file, atomically.

    Args:
        model: any model :func:`build` can make; floating tensors keep their dtype.
        path: local file, replaced if it exists.
        metadata: further strings for the header, e.g. the CLIP's fingerprint.

    Raises:
        ValueError: if metadata uses a reserved key or holds something else than strings.
    """
    path = Path(path)
    extra = dict(metadata or {})
    if reserved := sorted(set(RESERVED_METADATA) & extra.keys()):
        raise ValueError(f"save_model {path}: metadata keys {reserved} are written by save_model; rename yours")
    if wrong := sorted(key for key, value in extra.items() if not isinstance(value, str)):
        raise ValueError(f"save_model {path}: metadata {wrong} is not a string; encode it, e.g. as JSON")
    write_weights(path, model.state_dict(), {**extra, **architecture_header(model)})


def architecture_header(model: nn.Module) -> dict[str, str]:
    """Return what a file says of its model: architecture, its version, and the config as JSON."""
    architecture = _architecture_of(model.config)
    return {
        "architecture": architecture.name,
        "architecture_version": str(architecture.version),
        "config": json.dumps(dataclasses.asdict(cast(Any, model.config)), sort_keys=True),
    }


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, str]]:
    """Rebuild a model from its file, in eval mode.

    Args:
        path: local file written by :func:`save_model`.
        device: where the weights go; they are read there directly, with no second copy.

    Returns:
        The model, and the caller's metadata with the three reserved keys.

    Raises:
        ValueError: for a damaged file, an unknown architecture, version or config field, or weights that do not fit.
    """
    path = Path(path)
    metadata, tensors = read_weights(path, device)
    config = config_from_header(metadata, path)
    with torch.device("meta"):
        model = build(config)
    return finish_loading(model, tensors, path), metadata


def finish_loading(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    may_lack: Callable[[str], bool] = lambda name: False,
) -> nn.Module:
    """Give a model that was built on the meta device its tensors; return it in eval mode.

    Args:
        model: on the meta device.
        tensors: by name; they are taken over, not copied.
        path: where they come from, for messages.
        may_lack: says of a missing buffer whether it may keep the value of a new model.

    Raises:
        ValueError: if the tensors do not fit.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    lacking = [name for name in wanted if name not in tensors and may_lack(name)]
    if lacking:
        fresh = build(model.config).state_dict()
        tensors = {**tensors, **{name: fresh[name] for name in lacking}}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wanted != found:
        raise ValueError(f"{path}: weights do not fit their config: {_mismatch(wanted, found)}; export the model again")
    model.load_state_dict(tensors, assign=True)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"models must not hold non-persistent buffers, which no file restores: {left}"
    return model.eval()


def write_weights(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors and a header to a safetensors file, first beside its place, then renamed into it."""
    # Clones: safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    aside = path.with_name(path.name + ".tmp")
    save_tensors(copies, aside, header)
    _sort_metadata(aside)
    aside.replace(path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str]) -> None:
    """Write a safetensors file that others may read as they may read other files of this process.

    Args:
        tensors: on the CPU, contiguous, none sharing memory with another.
        path: a local file.
        header: text entries.

    Raises:
        OSError: if it cannot be written.
    """
    try:
        save_file(dict(tensors), path, metadata=dict(header))
    except SafetensorError as error:  # what the system said is in its words only
        raise OSError(errno.EIO, f"{error}") from error
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # the library makes it the owner's alone


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order: the library writes it in a random one, and equal models must be
    equal files.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(ordered) <= length, "the order of keys does not change the length of JSON"
        file.seek(8)
        file.write(ordered.ljust(length))


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the header of a safetensors file without its weights; empty if it has none.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    with _opened(Path(path), "cpu") as file:
        return dict(file.metadata() or {})


def read_weights(path: str | Path, device: torch.device | str = "cpu") -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read header and tensors of a safetensors file, the tensors straight to ``device``.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    with _opened(Path(path), str(torch.device(device))) as file:
        return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: Path, device: str) -> Iterator[Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a .safetensors file written by this project")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error}); fetch or export it again") from error


def config_from_dict(config_type: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """Rebuild a config dataclass from what ``dataclasses.asdict`` and JSON left of it (nested, lists for tuples).

    Raises:
        ValueError: for an unknown or missing field, with its dotted path.
    """
    hints = typing.get_type_hints(config_type)
    fields = {field.name: field for field in dataclasses.fields(config_type) if field.init}
    if unknown := sorted(values.keys() - fields.keys()):
        raise ValueError(f"{where}.{unknown[0]}: no such field of {config_type.__name__}; known: {sorted(fields)}")
    for name, field in fields.items():
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in values and not has_default:
            raise ValueError(f"{where}.{name}: missing, and {config_type.__name__} has no default for it")
    return config_type(**{name: _revive(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _revive(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return config_from_dict(cast(type, hint), value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType) and value is not None:
        others = [argument for argument in arguments if argument is not type(None)]
        if isinstance(value, Mapping):  # one of several configs, told apart by their `kind`
            others = [other for other in others if value.get("kind", other.kind) == other.kind] or others
        return _revive(others[0], value, where) if len(others) == 1 else value
    if origin is tuple and isinstance(value, list):
        return tuple(_revive(arguments[0], item, where) for item in value)
    return value


def _architecture_of(config: Any) -> Architecture:
    for architecture in ARCHITECTURES:
        if type(config) is architecture.config:
            return architecture
    known = [architecture.config.__name__ for architecture in ARCHITECTURES]
    raise ValueError(f"{type(config).__name__} is no model config; known are {known}")


def config_from_header(metadata: Mapping[str, str], path: Path) -> Any:
    """Read the config out of a file's header.

    Raises:
        ValueError: if the header lacks it, or is of an unknown architecture or version.
    """
    if missing := [key for key in RESERVED_METADATA if key not in metadata]:
        raise ValueError(f"{path}: header lacks {missing}; it was not written by save_model, convert it first")
    by_name = {architecture.name: architecture for architecture in ARCHITECTURES}
    architecture = by_name.get(metadata["architecture"])
    if architecture is None:
        raise ValueError(f"{path}: unknown architecture {metadata['architecture']!r}; known are {sorted(by_name)}")
    if metadata["architecture_version"] != str(architecture.version):
        raise ValueError(
            f"{path}: {architecture.name} of version {metadata['architecture_version']}, this code reads version "
            f"{architecture.version}; use the code that wrote it, or export the model again"
        )
    try:
        values = json.loads(metadata["config"])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the config in the header is not JSON ({error}); export the model again") from error
    return config_from_dict(architecture.config, values, f"{path}: config")


def _mismatch(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    shapes = [
        f"{name} is {found[name]}, needed {wanted[name]}"
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name] != found[name]
    ]
    return f"missing {missing[:3]} ({len(missing)}), unexpected {extra[:3]} ({len(extra)}), other shapes {shapes[:3]}"
