"""The door for settings: what is wrong is refused with place, value and remedy; what ships loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from stages.base import identity_of
from stages.config import Config, load_ablation, load_config, load_file, settings, to_values, to_yaml
from stages.errors import ConfigError
from unclip_models.settings import ARPriorConfig, ClipTextConfig

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    if path.name == "ablation.yaml":
        assert len(load_ablation(path)[1]) == 3 * (5 + 2 * 4)
    elif path.name == "prices.yaml":
        from cluster.cost import PriceTable

        assert load_file(PriceTable, path).data.price_per_hour is None  # no price of ours would be right
    else:
        assert isinstance(load_config(path), Config)


def test_written_out_it_is_the_same_config(tmp_path: Path) -> None:
    config = load_config(QUICKSTART)
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config


def test_overrides() -> None:
    overrides = ["decoder.learning_rate=1e-4", "seed=7", "root=s3://b/p", "source.lists=[a.txt, b.txt]"]
    config = load_config(QUICKSTART, overrides)
    assert config.decoder.learning_rate == 1e-4
    assert (config.seed, config.root, config.source.lists) == (7, "s3://b/p", ("a.txt", "b.txt"))


def test_extends_changes_only_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(QUICKSTART.read_text())
    (tmp_path / "child.yaml").write_text("extends: base.yaml\ndecoder: {num_steps: 77}\n")
    base, child = load_config(tmp_path / "base.yaml"), load_config(tmp_path / "child.yaml")
    assert child == dataclasses.replace(base, decoder=dataclasses.replace(base.decoder, num_steps=77))


def test_a_section_of_another_kind_takes_the_place_of_the_one_it_extends(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(QUICKSTART.read_text())
    text = "{kind: clip, context_length: 16, width: 64}"
    (tmp_path / "child.yaml").write_text(f"extends: base.yaml\ndecoder: {{model: {{text: {text}}}}}\n")
    child = load_config(tmp_path / "child.yaml")
    assert child.decoder.model.text == ClipTextConfig(context_length=16, width=64)
    assert child.decoder.model.image_size == load_config(tmp_path / "base.yaml").decoder.model.image_size
    with pytest.raises(ConfigError, match=r"decoder\.model\.text\.layers: unknown key; it does not go with the `kind`"):
        load_config(tmp_path / "child.yaml", ["decoder.model.text.layers=2"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("decoder.learnin_rate=3", "decoder.learnin_rate: unknown key; did you mean 'decoder.learning_rate'"),
        ("prior.model.widht=3", "prior.model.widht: unknown key; did you mean 'prior.model.width'"),
        ("seed=-1", ": seed: -1 is not between 0 and 2**63 - 1"),
        ("learning_rate=1", "learning_rate: unknown key; did you mean 'clip.learning_rate'"),
        ("decoder.learning_rate=fast", 'decoder.learning_rate: "fast": input should be a valid number'),
        ("seed=true", "seed: true: input should be a valid integer"),
        ("seed='3'", 'seed: "3": input should be a valid integer'),
        ("clip=3", "clip: 3: input should be an object"),
        ("decoder.offload_optimizer=nvme", "offload_dir: None with offload_optimizer: nvme; nvme needs a folder"),
        ("prior.model.kind=foo", "prior.model.kind: \"foo\": input should be 'diffusion' or 'autoregressive'"),
        ("prior.num_streams=3", "prior.global_batch_size: 64 is not a multiple of num_streams: 3"),
        ("root=ftp://x", "root: ftp://x: no storage for scheme 'ftp'"),
        ("root=''", "root: '' is empty"),
        ("root=s3:/bucket/x", "root: 's3:/bucket/x' is neither a folder nor an address; write s3://bucket/x"),
        ("root=s3:///x", "root: 's3:///x' names no bucket"),
        ("root=s3://", "root: 's3://' names no bucket"),
        ("root='~nobody-of-this-name/x'", "root: '~nobody-of-this-name/x': "),
        ("cluster.metrics_port=99999", "cluster.metrics_port: 99999 is no port"),
        ("decoder", "write dotted.key=value"),
        ("seed.x=1", "'seed' is a single value, not a section"),
        ("root={", "not valid YAML"),
    ],
)
def test_a_mistake_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, [override])
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.exit_code == 2


def test_a_root_in_the_home_folder_is_one_for_every_command() -> None:
    assert load_config(QUICKSTART, ["root='~/runs/mine'"]).root == str(Path("~/runs/mine").expanduser())


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, ["sed=1", "decoder.num_steps=x"])
    assert "did you mean 'seed'" in str(caught.value) and "decoder.num_steps" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("root: [", "not valid YAML"),
        ("- a\n- b\n", "holds list, not sections"),
        ("seed: 1\nseed: 2\n", "key 'seed' is given twice"),
        ("root: {{ROOT}}\n", "a key is a list or a mapping; is this an unfilled template?"),
        ("extends: nowhere.yaml\n", "cannot read the config file"),
        ("extends: config.yaml\n", "extend each other in a circle"),
        ("extends: [a]\n", "is not a file name"),
        ("seed: !!binary aGk=\n", "only plain YAML values"),
        ("", "root: required, but not given"),
    ],
)
def test_an_unusable_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "config.yaml")
    assert message in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot read the config file"):
        load_config("nowhere.yaml")


def test_the_other_prior_can_be_chosen() -> None:
    values = yaml.safe_load(QUICKSTART.read_text())
    text = "{kind: autoregressive, embedding_dim: 64, num_codes: 8, num_buckets: 64}"
    config = load_config(QUICKSTART, [f"prior.model={text}"])
    assert isinstance(config.prior.model, ARPriorConfig) and values["prior"]["model"]["kind"] == "diffusion"
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, ["prior.model={kind: autoregressive, num_cods: 8}"])
    assert "num_cods: unknown key; did you mean 'prior.model.num_codes'" in str(caught.value)
    assert "diffusion" not in str(caught.value)


def test_every_setting_of_the_pipeline_says_what_it_is() -> None:
    for info in settings():
        section, _, rest = info.path.partition(".")
        if not rest or ("model" not in rest.split(".") and "." not in rest):
            assert info.help, f"{section}: {info.path} has no help"


def test_moving_to_another_cluster_changes_no_identity() -> None:
    base = load_config(QUICKSTART)
    moved = load_config(
        QUICKSTART, ["cluster.address=auto", "cluster.num_cpus=64", "decoder.num_ranks=8", "root=s3://b"]
    )
    assert identity_of(base, ("shard", "stage")) == identity_of(moved, ("shard", "stage"))
    assert to_values(base) != to_values(moved)


ABLATION = """
base: {base}
seeds: [0, 1]
set: {{generate.until: decoder}}
variants: {{full: {{}}, bare: {{generate.use_prior: false}}}}
claims: [{{better: full, worse: bare}}]
guidance: {{scales: [1, 3], variants: [bare], set: {{generate.images_per_caption: 2}}}}
"""


def test_an_ablation_is_written_out_into_trials(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(ABLATION.format(base=QUICKSTART))
    config, trials = load_ablation(tmp_path / "a.yaml", ["root=elsewhere"])
    assert [(t.variant, t.seed, t.guidance_scale) for t in trials] == [
        *[(variant, seed, None) for variant in ("full", "bare") for seed in (0, 1)],
        *[("bare", seed, scale) for scale in (1.0, 3.0) for seed in (0, 1)],
    ]
    last = load_config(QUICKSTART, trials[-1].overrides)
    assert (last.root, last.decoder.seed, last.generate.seed) == ("elsewhere", 1, 1_000_000)
    assert last.generate.decoder.guidance_scale == 3.0 and last.generate.images_per_caption == 2
    assert not last.generate.use_prior and config.guidance is not None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: [0, 1]", "seeds: [0]", "seeds: \\[0\\]; give two different seeds or more"),
        ("worse: bare", "worse: bear", "variants: 'bear' is compared but not among full, bare"),
        (
            "generate.use_prior: false",
            "generate.use_priro: false",
            "variants.bare: .*did you mean 'generate.use_prior'",
        ),
        ("claims:", "claim:", "claim: unknown key; did you mean 'claims'"),
    ],
)
def test_mistakes_in_an_ablation_are_explained(tmp_path: Path, old: str, new: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(ABLATION.format(base=QUICKSTART).replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_ablation(tmp_path / "a.yaml")


def test_a_date_is_a_text(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"extends: {QUICKSTART}\nsource: {{since: 2026-11-01}}\n")
    source = load_config(path, ["source.until=2026-11-08"]).source
    assert (source.since, source.until) == ("2026-11-01", "2026-11-08")
