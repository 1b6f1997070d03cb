"""The plain-torch engine against textbook PyTorch, and its state files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages import storage
from stages.engine import MicroBatch, TorchEngine, files_to_load, make_optimizer
from stages.engine_settings import EngineSettings
from stages.errors import ConfigError, IntegrityError
from stages.sharded_state import Fragment, ShardedState, assemble
from stages.state_file import StateFile, rank_file
from stages.step_guard import StepGuard
from stages.training import model_loss
from tests.stages.state_files import state_file
from tests.stages.training_data import TinyModel, VectorStream
from unclip_models.ema import warmed_up_decay
from unclip_models.randomness import SampleRandom

SETTINGS = EngineSettings(num_micro_batches=2, micro_batch_size=4, weight_decay=0.1, gradient_clipping=0.5)


def micro_batches(step: int, num: int = 2, poisoned: bool = False) -> Iterator[MicroBatch]:
    """Cut the batch of a step in ``num`` parts."""
    batch = next(VectorStream(poisoned_steps=frozenset({step} if poisoned else ())).batches(step, 0, 1))
    size = len(batch.indices) // num
    for first in range(0, len(batch.indices), size):
        part = batch.part(first, first + size, torch.device("cpu"))
        yield part, SampleRandom(1, step, batch.indices[first : first + size])


def write(engine: TorchEngine, folder: Path) -> None:
    snapshot = engine.snapshot()
    assert snapshot is not None
    snapshot.write(folder)


def weights_of(engine: TorchEngine, folder: Path, kind: str = "param") -> dict[str, Tensor]:
    folder.mkdir()
    write(engine, folder)
    return assemble([state_file(folder / rank_file(0))], {n: p.shape for n, p in TinyModel().named_parameters()}, kind)


def test_steps_equal_the_formulas(tmp_path: Path) -> None:
    """AdamW as in Loshchilov and Hutter 2019, Algorithm 2, with clipping and the warmed-up average."""
    engine, model = TorchEngine(TinyModel(), model_loss, SETTINGS), TinyModel()
    params = dict(model.named_parameters())
    kept = {kind: {n: torch.zeros_like(p) for n, p in params.items()} for kind in ("exp_avg", "exp_avg_sq")}
    kept["ema"] = {name: param.detach().clone() for name, param in params.items()}
    for step in range(6):
        result = engine.step(micro_batches(step), 1e-2)
        loss, _ = model.loss(*next(micro_batches(step, num=1)))
        gradients = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        for name, param in params.items():
            g = gradients[name] * min(1.0, 0.5 / norm.item())
            m, v = kept["exp_avg"][name], kept["exp_avg_sq"][name]
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).add_(g * g, alpha=0.001)
            update = m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            param.data = param.data - 1e-2 * (update + 0.1 * param.data)
            kept["ema"][name].lerp_(param.detach(), 1 - warmed_up_decay(SETTINGS.ema_decay, step))
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        assert result.applied and len(result.terms["loss"]) == 8
    for kind, wanted in (kept | {"param": {n: p.detach() for n, p in params.items()}}).items():
        for name, tensor in weights_of(engine, tmp_path / kind, kind).items():
            assert torch.allclose(tensor, wanted[name], atol=1e-6), (kind, name)


def test_resuming_is_exact(tmp_path: Path) -> None:
    straight = TorchEngine(TinyModel(), model_loss, SETTINGS)
    for step in range(4):
        straight.step(micro_batches(step), 1e-2)
    write(straight, tmp_path)
    resumed = TorchEngine(TinyModel(seed=7), model_loss, SETTINGS)
    resumed.load([state_file(tmp_path / rank_file(0))])
    for step in range(4, 8):
        a, b = straight.step(micro_batches(step), 1e-2), resumed.step(micro_batches(step), 1e-2)
        assert (a.loss, a.grad_norm) == (b.loss, b.grad_norm)
    first, second = weights_of(straight, tmp_path / "a", "ema"), weights_of(resumed, tmp_path / "b", "ema")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    engine = TorchEngine(TinyModel(), model_loss, SETTINGS)
    engine.step(micro_batches(0), 1e-2)
    before = {kind: weights_of(engine, tmp_path / f"{kind}0", kind) for kind in ("param", "ema", "exp_avg")}
    result = engine.step(micro_batches(1, poisoned=True), 1e-2)
    assert not result.applied and math.isnan(result.loss)
    for kind, wanted in before.items():
        found = weights_of(engine, tmp_path / f"{kind}1", kind)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert engine.step(micro_batches(2), 1e-2).applied


def test_bf16_trains_in_float32_weights() -> None:
    engine = TorchEngine(TinyModel(), model_loss, EngineSettings(micro_batch_size=8, precision="bf16"))
    exact = TorchEngine(TinyModel(), model_loss, EngineSettings(micro_batch_size=8))
    for step in range(3):
        a, b = engine.step(micro_batches(step, 1), 1e-2), exact.step(micro_batches(step, 1), 1e-2)
        assert a.loss == pytest.approx(b.loss, rel=2e-2) and a.loss != b.loss


FP16 = EngineSettings(micro_batch_size=8, precision="fp16", weight_decay=0.1)


def test_fp16_trains_in_float32_weights_with_a_loss_scale() -> None:
    engine = TorchEngine(TinyModel(), model_loss, FP16)
    exact = TorchEngine(TinyModel(), model_loss, EngineSettings(micro_batch_size=8, weight_decay=0.1))
    while engine.step(micro_batches(0, 1), 1e-2).overflowed:  # the first scale is more than this model bears
        pass
    exact.step(micro_batches(0, 1), 1e-2)
    for step in range(1, 6):
        a, b = engine.step(micro_batches(step, 1), 1e-2), exact.step(micro_batches(step, 1), 1e-2)
        assert a.applied and 1 < a.loss_scale < 2.0**16
        assert a.loss == pytest.approx(b.loss, rel=1e-2) and a.loss != b.loss
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=2e-2)


def test_an_overflow_halves_the_scale_and_is_no_bad_step(tmp_path: Path) -> None:
    engine, guard = TorchEngine(TinyModel(), model_loss, FP16), StepGuard(None, 10)
    before = weights_of(engine, tmp_path / "before")
    result = engine.step(micro_batches(0, 1), 1e-2, guard.accepts)
    assert math.isfinite(result.loss) and not math.isfinite(result.grad_norm) and result.loss_scale == 2.0**16
    assert result.overflowed and not result.applied
    guard.add(0, result)
    assert guard.bad_steps == [] and guard.num_spikes == 0
    after = weights_of(engine, tmp_path / "after")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert engine.step(micro_batches(0, 1), 1e-2).loss_scale == 2.0**15


def test_a_loss_that_is_not_finite_is_a_bad_step_in_fp16_too() -> None:
    engine, guard = TorchEngine(TinyModel(), model_loss, FP16), StepGuard(None, 10)
    result = engine.step(micro_batches(0, 1, poisoned=True), 1e-2)
    guard.add(0, result)
    assert not result.overflowed and len(guard.bad_steps) == 1
    assert engine.step(micro_batches(1, 1), 1e-2).loss_scale == 2.0**16


def test_the_loss_scale_is_in_the_checkpoint(tmp_path: Path) -> None:
    straight = TorchEngine(TinyModel(), model_loss, FP16)
    assert [straight.step(micro_batches(step, 1), 1e-2).overflowed for step in range(4)] == [True, False, False, False]
    write(straight, tmp_path)
    resumed = TorchEngine(TinyModel(seed=7), model_loss, FP16)
    resumed.load([state_file(tmp_path / rank_file(0))])
    for step in range(4, 7):
        a, b = straight.step(micro_batches(step, 1), 1e-2), resumed.step(micro_batches(step, 1), 1e-2)
        assert (a.loss, a.grad_norm, a.loss_scale) == (b.loss, b.grad_norm, b.loss_scale) and a.loss_scale < 2.0**16
    TorchEngine(TinyModel(), model_loss, SETTINGS).load(
        [state_file(tmp_path / rank_file(0))]
    )  # another precision reads it


def test_half_precision_weights_and_frozen_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="engines train float32 weights"):
        TorchEngine(TinyModel().half(), model_loss, SETTINGS)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        TorchEngine(TinyModel().requires_grad_(False), model_loss, SETTINGS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(ConfigError, match="gpus_per_rank"):
        TorchEngine(TinyModel(), model_loss, EngineSettings(device="cuda"))


# ---- state files --------------------------------------------------------------------------------------------------


def sharded(cuts: list[int], rank: int, fill: Tensor | None = None) -> ShardedState:
    """Give one rank's state of a single parameter ``w`` of 10 numbers, cut at ``cuts``, with two padding elements."""
    bounds = [0, *cuts, 10]
    first, last = bounds[rank], bounds[rank + 1]
    master = torch.zeros(last - first + 2)
    if fill is not None:
        master[: last - first] = fill[first:last]
    optimizer = make_optimizer([master], SETTINGS)
    return ShardedState([master], [Fragment("w", first, 0, 0, last - first)], optimizer, 0.9)


@pytest.mark.parametrize(("saved", "loaded"), [([], [4]), ([4], []), ([3, 6], [5]), ([5], [2, 4, 9]), ([5], [5])])
def test_another_number_of_ranks_reads_the_same_files(tmp_path: Path, saved: list[int], loaded: list[int]) -> None:
    values = torch.arange(10.0)
    for rank in range(len(saved) + 1):
        state = sharded(saved, rank, values)
        state.num_updates = 3
        state.snapshot(rank).write(tmp_path)
    files = {path.name: state_file(path) for path in sorted(tmp_path.iterdir())}
    heads = {name: file.stretches() for name, file in files.items()}
    for rank in range(len(loaded) + 1):
        state = sharded(loaded, rank)
        fragment = state.fragments[0]
        needed = state.needed(heads)
        bounds = list(pairwise([0, *saved, 10]))
        assert needed == [
            rank_file(number)
            for number, (first, last) in enumerate(bounds)
            if first < fragment.start + fragment.length and last > fragment.start
        ]
        state.load(files[name] for name in needed)
        stretch = slice(fragment.start, fragment.start + fragment.length)
        assert torch.equal(state.masters[0][: fragment.length], values[stretch])
        assert torch.equal(state.averages[0][: fragment.length], values[stretch])
        assert state.num_updates == 3 and float(state.optimizer.state[state.masters[0]]["step"]) == 3
    assert torch.equal(assemble(files.values(), {"w": torch.Size([2, 5])}, "param")["w"], values.view(2, 5))


def test_missing_parts_are_noticed(tmp_path: Path) -> None:
    sharded([4], 0, torch.ones(10)).snapshot(0).write(tmp_path)
    heads = {name: state_file(tmp_path / rank_file(0)).stretches() for name in ("first", "second")}
    assert sharded([4], 1).needed(heads) == ["first", "second"], "neither holds it: loading says so"
    with pytest.raises(IntegrityError, match="hold 0 of the 24 numbers"):
        sharded([4], 1).load([state_file(tmp_path / rank_file(0))])
    with pytest.raises(IntegrityError, match="hold 16 of the 40 numbers"):
        sharded([], 0).load([state_file(tmp_path / rank_file(0))])
    with pytest.raises(IntegrityError, match="holds 4 of the 10 weights"):
        assemble([state_file(tmp_path / rank_file(0))], {"w": torch.Size([10])})
    for content in (b"not a file of tensors", b"", b"\x02\0\0\0\0\0\0\0[]", b'\x09\0\0\0\0\0\0\0{"a": {}}'):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(IntegrityError, match="not the head of a state file"):
            state_file(tmp_path / "x").stretches()


def test_a_damaged_head_is_damage_whatever_it_says(tmp_path: Path) -> None:
    sharded([], 0, torch.ones(10)).snapshot(0).write(tmp_path)
    path = tmp_path / rank_file(0)
    whole, written = path.read_bytes(), storage.checksum(str(path))
    for old, new in ((b"ema/w/0", b"ema/w/9"), (b"ema/w/0", b"ema/w/-"), (b"[0,40]", b"[9,40]")):
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(IntegrityError, match="differs from its record"):
            assemble([StateFile(str(path), written)], {"w": torch.Size([10])})


def test_a_rank_of_the_same_layout_reads_its_own_file_only() -> None:
    engine = TorchEngine(TinyModel(), model_loss, SETTINGS)
    names = ["metrics.jsonl", rank_file(1), rank_file(0)]
    assert files_to_load(names, "replicated", engine) == [rank_file(0)]
    assert files_to_load(names, "zero1/2", engine) == [rank_file(0), rank_file(1)]
