"""Principal axes against numpy; sums that add up whatever the shards; edges that mean what they say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from stages import principal_axes, storage
from stages.errors import InputError, IntegrityError, StageError
from stages.manifest import Manifest, ShardRecord
from stages.pca import (
    Pca,
    PcaConfig,
    bucket_edges,
    choose_components,
    num_wanted,
    quantisation_errors,
    spread_rows,
)
from stages.principal_axes import Solution, Sums, project, solve, spectrum_metrics, sums_of
from stages.samples import embedding_array, embeddings_of, selection_table, table_to_bytes
from tests.benchmarks.bench_pca import subspace_error
from tests.stages.small_store import Given, run
from unclip_models.ar_prior import ARPrior
from unclip_models.settings import ARPriorConfig, TextEncoderConfig

torch.set_num_threads(1)
DIM = 12


def low_rank(num: int, seed: int = 0, rank: int = 5) -> np.ndarray:
    """Make unit vectors that mostly vary in a few directions."""
    basis = np.random.default_rng(99).standard_normal((rank, DIM))
    rng = np.random.default_rng(seed)
    x = 2 + rng.standard_normal((num, rank)) * 0.7 ** np.arange(rank) @ basis + 0.02 * rng.standard_normal((num, DIM))
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def power_law(num: int, seed: int, dim: int = 256) -> np.ndarray:
    """Make unit vectors whose variances fall by a power law: far down, neighbours hardly differ."""
    basis = np.linalg.qr(np.random.default_rng(99).standard_normal((dim, dim)))[0]
    x = np.random.default_rng(seed).standard_normal((num, dim)) * np.arange(1, dim + 1) ** -0.75 @ basis + 0.05
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def publish_curate(
    root: str, sizes: Sequence[int], drop_every: int = 3, draw: Callable[[int, int], np.ndarray] = low_rank
) -> tuple[Manifest, np.ndarray, np.ndarray]:
    """Publish embeddings and selections; return the manifest and the kept embeddings as stored."""
    stage, embed = Given("curate", root), Given("embed", root)
    records: list[ShardRecord] = []
    images, texts = [], []
    for i, size in enumerate(sizes):
        keys = pa.array([f"{i:04x}{j:06d}" for j in range(size)], pa.string())
        image, text = draw(size, i), draw(size, 1000 + i)
        table = pa.table(
            {
                "key": keys,
                "image_embedding": embedding_array(image),
                "text_embedding": embedding_array(text),
                "clip_score": pa.array((image * text).sum(axis=1), pa.float32()),
            }
        )
        kept = np.arange(size) % drop_every != drop_every - 1
        images.append(embeddings_of(table, "image_embedding")[kept])
        texts.append(embeddings_of(table, "text_embedding")[kept])
        made = embed.record(i, {"embeddings": ("parquet", table_to_bytes(table))}, {})
        selection = selection_table(keys.to_pylist(), [None if k else "keep_fraction" for k in kept])
        num_kept = int(kept.sum())
        counts: dict[str, Any] = {"num_in": size, "num_kept": num_kept, "dropped": {"keep_fraction": size - num_kept}}
        files = {"selection": ("selection.parquet", table_to_bytes(selection))}
        records.append(stage.record(i, files, made.files, **counts))
    return stage.manifest(records), np.concatenate(images), np.concatenate(texts)


def solved(root: str, curate: Manifest, **values: Any) -> tuple[Manifest, dict[str, np.ndarray]]:
    manifest = run(Pca(PcaConfig(**values), root=root), {"curate": curate})
    return manifest, load(manifest.files["pca"].read(root))


def test_it_is_numpys_pca_of_the_selected_samples(root: str) -> None:
    curate, x, z_t = publish_curate(root, (50, 0, 31, 70))
    manifest, pca = solved(root, curate, num_components=4, num_buckets=8, num_dot_buckets=6, edges="quantile")
    wide = x.astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(wide.T, bias=True))
    np.testing.assert_allclose(pca["mean"], wide.mean(0), atol=1e-6)
    np.testing.assert_allclose(pca["std"], wide.std(0), atol=1e-6)
    np.testing.assert_allclose(pca["eigenvalues"], values[::-1], atol=1e-7)
    np.testing.assert_allclose(np.abs(pca["axes"] @ vectors[:, ::-1][:, :4]), np.eye(4), atol=1e-3)
    assert {name: array.shape for name, array in pca.items()} == {
        "mean": (DIM,),
        "std": (DIM,),
        "axes": (4, DIM),
        "eigenvalues": (DIM,),
        "edges": (4, 9),
        "dot_edges": (7,),
    }
    assert all(array.dtype == np.float32 for array in pca.values())
    components = (wide - wide.mean(0)) @ pca["axes"].T
    np.testing.assert_allclose(pca["edges"], np.quantile(components, np.linspace(0, 1, 9), axis=0).T, atol=1e-5)
    # The stored scores are of the embeddings before they were rounded to half precision.
    np.testing.assert_allclose(pca["dot_edges"], np.quantile((x * z_t).sum(1), np.linspace(0, 1, 7)), atol=1e-3)
    rebuilt = components @ pca["axes"] + wide.mean(0)
    assert manifest.metrics["reconstruction_mse"] == pytest.approx(((wide - rebuilt) ** 2).sum(1).mean(), rel=1e-4)
    assert manifest.metrics["reconstruction_mse_measured"] == pytest.approx(
        manifest.metrics["reconstruction_mse"], rel=1e-4
    )
    assert manifest.metrics["num_samples"] == manifest.num_kept == len(x)
    assert manifest.metrics["num_components"] == 4


def test_the_subspace_is_exact_where_the_spectrum_is_flat(tmp_path: Path) -> None:
    """To 1e-6. Sums in single precision miss that by far: what they round off is not small beside the gap at k."""
    root, k = str(tmp_path), 200
    curate, x, _ = publish_curate(root, (900, 0, 1100), draw=power_law)
    _, pca = solved(root, curate, num_components=k)
    centred = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    assert (values[-k] - values[-k - 1]) / values[-1] < 1e-4
    assert subspace_error(pca["axes"], vectors[:, -k:].T) < 1e-6
    single = Sums(len(x), x.sum(axis=0, dtype=np.float64), (x.T @ x).astype(np.float64))
    assert subspace_error(solve(single).axes[:k], vectors[:, -k:].T) > 1e-5


def test_the_autoregressive_prior_accepts_it(tmp_path: Path) -> None:
    root = str(tmp_path)
    curate, x, z_t = publish_curate(root, (300,))
    manifest, pca = solved(root, curate, variance_target=0.999, num_buckets=64, num_dot_buckets=8, edges="quantile")
    k = manifest.metrics["num_components"]
    text = TextEncoderConfig(context_length=4, width=8, layers=1, heads=2)
    config = ARPriorConfig(
        embedding_dim=DIM, num_codes=k, num_buckets=64, num_dot_buckets=8, text=text, width=8, layers=1, heads=2
    )
    prior = ARPrior(config)
    prior.set_pca(**{name: torch.from_numpy(pca[name]) for name in ("mean", "axes", "edges", "dot_edges")})
    codes = prior.encode(torch.from_numpy(x))
    counts = torch.bincount(codes[:, 0], minlength=64)
    assert counts.min() >= 1 and counts.max() <= 2 * len(x) / 64  # quantile edges fill the buckets evenly
    error = ((prior.decode(codes).numpy() - x) ** 2).sum(1).mean()
    m = manifest.metrics
    assert error == pytest.approx(m["reconstruction_mse"] + m["quantisation_mse"], rel=0.05)
    dots = prior.encode_dot(torch.from_numpy(x), torch.from_numpy(z_t))
    assert set(dots.tolist()) == set(range(8))


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 80), max_size=5), order=st.randoms(use_true_random=False))
def test_sums_do_not_depend_on_shards_or_order(cuts: list[int], order: Any) -> None:
    x = low_rank(80)
    parts = [sums_of(part) for part in np.split(x, sorted(cuts))]
    order.shuffle(parts)
    total = parts[0]
    for part in parts[1:]:
        total = total.merged(part)
    whole = sums_of(x)
    assert total.count == whole.count
    np.testing.assert_allclose(total.outer, whole.outer, rtol=0, atol=1e-12)
    a, b = solve(total), solve(whole)
    np.testing.assert_allclose(a.eigenvalues, b.eigenvalues, atol=1e-13)
    np.testing.assert_allclose(a.axes, b.axes, atol=1e-6)


def test_signs_are_determined() -> None:
    solution = solve(sums_of(low_rank(60)))
    largest = np.abs(solution.axes).argmax(axis=1)
    assert (solution.axes[np.arange(DIM), largest] > 0).all()
    np.testing.assert_allclose(solution.axes @ solution.axes.T, np.eye(DIM), atol=1e-12)
    assert (np.diff(solution.eigenvalues) <= 0).all() and solution.eigenvalues.min() >= 0


def with_eigenvalues(*values: float, known: int | None = None) -> Solution:
    """Make a solution along the coordinate axes."""
    every = np.asarray(values)
    return Solution(np.zeros(len(every)), every, np.eye(len(every))[:known], every[:known])


def test_components_by_variance_or_count() -> None:
    solution = with_eigenvalues(4.0, 3.0, 2.0, 1.0, 0.0)
    for target, expected in ((0.4, 1), (0.41, 2), (0.7, 2), (0.95, 4), (1.0, 4)):
        assert choose_components(solution, PcaConfig(variance_target=target)) == expected
    assert choose_components(solution, PcaConfig(num_components=3)) == 3
    with pytest.raises(InputError, match="all image embeddings are equal"):
        choose_components(with_eigenvalues(0.0, 0.0), PcaConfig())


def test_how_many_eigenvalues_are_solved_for() -> None:
    for solver, num, dim, expected in (
        ("auto", 319, 1024, None),
        ("auto", 319, 8192, 319),
        ("auto", None, 8192, None),
        ("full", 319, 8192, None),
        ("partial", 319, 1024, 319),
    ):
        assert num_wanted(dim, PcaConfig(solver=solver, num_components=num)) == expected  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"pca\.num_components: 319 is more than the 5 dimensions"):
        num_wanted(5, PcaConfig(num_components=319))


def test_the_partial_solver_gives_the_same_axes_and_says_what_it_does_not_know(tmp_path: Path) -> None:
    root = str(tmp_path)
    curate, _, _ = publish_curate(root, (80, 60))
    full, a = solved(root, curate, num_components=4, solver="full")
    partial, b = solved(root, curate, num_components=4, solver="partial")
    assert [r.shard_id for r in full.records] == [r.shard_id for r in partial.records]
    assert b["eigenvalues"].shape == (4,)
    for name in ("mean", "std", "axes", "edges", "dot_edges"):
        np.testing.assert_allclose(b[name], a[name], atol=2e-6)
    np.testing.assert_allclose(b["eigenvalues"], a["eigenvalues"][:4], rtol=1e-6)
    assert partial.metrics["effective_rank"] is None and len(partial.metrics["spectrum"]) == 4
    for name in ("total_variance", "reconstruction_mse", "explained_variance_fraction", "quantisation_mse"):
        assert partial.metrics[name] == pytest.approx(full.metrics[name], rel=1e-5)


def test_held_samples_measure_the_error_that_the_spectrum_predicts(tmp_path: Path) -> None:
    root = str(tmp_path)
    curate = publish_curate(root, (3000, 2000))[0]
    m = solved(root, curate, num_components=3, num_edge_samples=1000)[0].metrics
    assert m["num_edge_samples"] == 1000
    assert m["reconstruction_mse_measured"] == pytest.approx(m["reconstruction_mse"], rel=0.1)
    assert m["reconstruction_mse_measured"] != pytest.approx(m["reconstruction_mse"], rel=1e-6)


@settings(max_examples=10, deadline=None)
@given(num=st.integers(0, 40), block=st.integers(1, 12))
def test_blocks_do_not_show(num: int, block: int) -> None:
    x = low_rank(num)
    wide = x.astype(np.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(principal_axes, "_BLOCK_ROWS", block)
        sums = sums_of(x)
        components, lost = project(x, np.full(DIM, 0.1), np.eye(DIM)[:4])
    assert sums.count == num and sums.outer.flags.c_contiguous
    np.testing.assert_allclose(sums.total, wide.sum(axis=0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(sums.outer, wide.T @ wide, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(sums.outer, sums.outer.T)
    np.testing.assert_allclose(components, (wide - 0.1)[:, :4], rtol=0, atol=1e-7)
    np.testing.assert_allclose(lost, ((wide - 0.1)[:, 4:] ** 2).sum(axis=1), rtol=0, atol=1e-6)


def test_the_spectrum_is_described() -> None:
    flat = spectrum_metrics(with_eigenvalues(*[0.25] * 8), 6)
    assert flat["effective_rank"] == pytest.approx(8)
    assert (flat["explained_variance_fraction"], flat["reconstruction_mse"]) == (0.75, 0.5)
    assert spectrum_metrics(with_eigenvalues(3.0, 0.0, 0.0), 1)["effective_rank"] == pytest.approx(1)
    assert spectrum_metrics(with_eigenvalues(3.0, 1.0), 1)["spectrum"] == [0.75, 0.25]
    first = spectrum_metrics(with_eigenvalues(4.0, 3.0, 2.0, 1.0, known=2), 1)
    assert first["effective_rank"] is None and first["spectrum"] == [0.4, 0.3]
    assert (first["reconstruction_mse"], first["total_variance"], first["embedding_dim"]) == (6.0, 10.0, 4)


def test_uniform_edges_are_even_and_flat_columns_survive() -> None:
    values = np.stack([np.linspace(-1, 3, 50) ** 3, np.full(50, 0.5)], axis=1).astype(np.float32)
    edges = bucket_edges(values, 4, "uniform")
    np.testing.assert_allclose(edges[0], np.linspace(-1, 27, 5), rtol=1e-6)
    for kind in ("uniform", "quantile"):
        flat = bucket_edges(values, 4, kind)[1]  # type: ignore[arg-type]
        assert (np.diff(flat) >= 0).all() and flat[-1] > flat[0] and abs(flat - 0.5).max() < 1e-6
    assert (quantisation_errors(values, bucket_edges(values, 4, "uniform"), "uniform") <= 3.5**2 * 1.001).all()


def test_quantisation_is_measured_alike_for_both_kinds_of_edges() -> None:
    values = np.random.default_rng(0).standard_normal((400, 3)).astype(np.float32) * (1.0, 0.1, 5.0)
    values = values.astype(np.float32)
    edges = bucket_edges(values, 16, "uniform")
    searched, computed = (quantisation_errors(values, edges, kind) for kind in ("quantile", "uniform"))  # type: ignore[arg-type]
    np.testing.assert_allclose(computed, searched, rtol=2e-3)
    widths = (edges[:, -1] - edges[:, 0]) / 16
    assert computed.mean() == pytest.approx((widths**2 / 12).sum(), rel=0.1)  # of an even distribution


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6), limit=st.integers(2, 60))
def test_spread_rows_are_even(sizes: list[int], limit: int) -> None:
    rows = spread_rows(sizes, limit)
    assert [len(r) for r in rows] == [len(set(r.tolist())) for r in rows]
    assert all((r >= 0).all() and (r < size).all() for r, size in zip(rows, sizes, strict=True))
    ends = np.cumsum([0, *sizes])
    chosen = np.concatenate([r + start for r, start in zip(rows, ends, strict=False)])
    assert len(chosen) == min(limit, sum(sizes))
    if len(chosen) > 1:
        assert np.ptp(np.diff(chosen)) <= 1


def test_of_many_shards_some_are_read_again() -> None:
    lengths = [len(rows) for rows in spread_rows([10] * 5000, 2048)]
    assert sum(lengths) == 2048 and set(lengths) == {0, 2} and lengths[0] == 2
    assert max(np.diff(np.flatnonzero(lengths))) <= 5


def test_fewer_edge_samples_give_nearly_the_same_edges(tmp_path: Path) -> None:
    root = str(tmp_path)
    curate, _, _ = publish_curate(root, (900, 900))
    _, every = solved(root, curate, num_components=2, num_buckets=4, edges="quantile")
    manifest, some = solved(root, curate, num_components=2, num_buckets=4, edges="quantile", num_edge_samples=600)
    assert manifest.metrics["num_edge_samples"] == 600
    np.testing.assert_array_equal(every["axes"], some["axes"])
    spread = every["edges"][:, -1] - every["edges"][:, 0]
    assert (np.abs(every["edges"] - some["edges"])[:, 1:-1] < 0.05 * spread[:, None]).all()


def test_appended_shards_reuse_old_sums(tmp_path: Path) -> None:
    root = str(tmp_path)
    first, _, _ = publish_curate(root, (40, 30))
    before, _ = solved(root, first)
    names = storage.list_files(f"{root}/pca/shards")
    both, x, _ = publish_curate(root, (40, 30, 20))
    after, pca = solved(root, both)
    assert [r.shard_id for r in before.records] == [r.shard_id for r in after.records[:2]]
    assert len(storage.list_files(f"{root}/pca/shards").keys() - names.keys()) == 2
    np.testing.assert_allclose(pca["mean"], x.mean(0), atol=1e-6)
    again, _ = solved(root, both, num_components=3)
    assert [r.shard_id for r in again.records] == [r.shard_id for r in after.records]


def test_a_second_run_gives_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        root = str(tmp_path / name)
        digests.append(solved(root, publish_curate(root, (33, 44))[0])[0].digest)
    assert digests[0] == digests[1]


def test_too_few_samples_and_strange_tables_are_refused(tmp_path: Path) -> None:
    root = str(tmp_path)
    with pytest.raises(InputError, match="pca: 1 samples came in"):
        solved(root, publish_curate(root, (1,))[0])
    stage = Pca(PcaConfig(), root=root)
    curate, _, _ = publish_curate(root, (9, 8))
    first, second = stage.plan({"curate": curate})
    mixed = stage.shard(0, inputs={"embeddings": first.inputs["embeddings"], "selection": second.inputs["selection"]})
    with pytest.raises(IntegrityError, match="not about the same samples"):
        stage.process(mixed, f"{root}/pca/shards")
    storage.delete(stage.uri(first.inputs["embeddings"]))
    with pytest.raises(StageError, match="does not exist"):
        solved(root, curate)


def test_settings_are_checked() -> None:
    wrongs: Sequence[dict[str, Any]] = (
        {"num_components": 0},
        {"variance_target": 0.0},
        {"num_buckets": 1},
        {"num_edge_samples": 1},
        {"solver": "partial"},
    )
    for wrong in wrongs:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PcaConfig(**wrong)
