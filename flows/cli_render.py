"""The command ``unclip render``: files for clusters, made from the config and written to a folder of this machine."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from stages import storage
from stages.errors import ConfigError


def render_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``unclip render``."""
    parser.add_argument("target", choices=("kubernetes", "aws"), help="KubeRay and Kueue, or Ray's cluster launcher")
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="K=V", help="change a setting")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder for the files")


def render(args: argparse.Namespace) -> int:
    """Write the files and say what to do with them."""
    from stages.config import dump_yaml, load_config, to_values, to_yaml

    config = load_config(args.config, args.set)
    has_claim = args.target == "kubernetes" and config.kubernetes.store_claim is not None
    _refuse_local_lists(args.config, getattr(config.source, "lists", ()), config.root if has_claim else None)
    # What runs on the cluster joins the Ray that is there, and hands nothing on to another one; which machines are
    # rendered for is no matter to it.
    on_cluster = replace(config, cluster=replace(config.cluster, submit=None, executor="ray", address="auto"))
    if args.target == "kubernetes":
        from cluster import kubernetes

        values = to_values(on_cluster)
        del values["kubernetes"], values["aws"]
        manifests = kubernetes.render(config.kubernetes, root=config.root, settings=dump_yaml(values))
        files = {name: dump_yaml(*objects) for name, objects in manifests.items()}
        then = (
            f"kubectl apply {' '.join(f'-f {args.output}/{name}' for name in files if name != 'raycluster.yaml')} "
            f"(a job that has ended is deleted before: kubectl delete rayjob -n {config.kubernetes.namespace} "
            f"{config.kubernetes.name})"
        )
    else:
        from cluster import aws

        settings_path = str(Path(args.output).absolute() / "config.yaml")
        launcher = aws.render(config.aws, root=config.root, settings_path=settings_path)
        files = {"config.yaml": to_yaml(on_cluster), "cluster.yaml": dump_yaml(launcher)}
        job = f"unclip run {aws.CONFIG_PATH} -s cluster.submit=http://127.0.0.1:8265 --detach"
        then = f"ray up {args.output}/cluster.yaml && ray exec {args.output}/cluster.yaml '{job}'"
    for name, text in files.items():
        storage.write_bytes(storage.join(args.output, name), text.encode())
    print(f"wrote {', '.join(files)} to {args.output}; then: {then}")
    return 0


def _refuse_local_lists(place: str, lists: tuple[str, ...], claimed: str | None) -> None:
    """Refuse URL lists that lie on this machine; those below the root are on the claim that holds the store, if any."""
    for uri in lists:
        if storage.is_local(uri) and (claimed is None or not f"{uri}/".startswith(f"{claimed.rstrip('/')}/")):
            raise ConfigError(f"{place}: source.lists: '{uri}' is on this machine, not on the cluster; write s3://...")
