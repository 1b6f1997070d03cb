"""What the name of a published CLIP can mean."""

from pathlib import Path

SELF_CONTAINED = ("hf-hub:", "local-dir:")  # architecture and weights come together
_FILE_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def refuse_missing_file(name: str) -> None:
    """Refuse what can only be meant as a file, and is none here; open_clip would look for an architecture of that name.

    Raises:
        ValueError: names the file.
    """
    meant = "://" in name or name.startswith(("/", "./", "../", "~")) or name.endswith(_FILE_ENDINGS)
    if meant and not Path(name).is_file():
        raise ValueError(f"{name}: no such file on this machine; weights must lie where the clip stage runs")
