"""Laws of the per-sample randomness."""

import numpy as np
import pytest
import torch

from unclip_models.randomness import SampleRandom


def test_numbers_do_not_depend_on_the_rest_of_the_batch() -> None:
    whole = SampleRandom(7, 3, [10, 11, 12, 13])
    parts = [SampleRandom(7, 3, [12, 10]), SampleRandom(7, 3, [13, 11])]
    order = [2, 0, 3, 1]
    for draw in (
        lambda r: r.normal("noise", (3, 4, 4)),
        lambda r: r.uniform("u"),
        lambda r: r.integers("t", 0, 1000),
        lambda r: r.bernoulli("drop", 0.5),
    ):
        assert torch.equal(torch.cat([draw(part) for part in parts]), draw(whole)[order])
    assert [g.random() for g in whole.generator("crop")][2] == parts[0].generator("crop")[0].random()


def test_asking_twice_repeats_and_every_coordinate_matters() -> None:
    base = SampleRandom(0, 0, [0]).normal("a", (8,))
    assert torch.equal(base, SampleRandom(0, 0, [0]).normal("a", (8,)))
    others = [
        SampleRandom(1, 0, [0]).normal("a", (8,)),
        SampleRandom(0, 1, [0]).normal("a", (8,)),
        SampleRandom(0, 0, [1]).normal("a", (8,)),
        SampleRandom(0, 0, [0]).normal("b", (8,)),
    ]
    assert all(not torch.equal(base, other) for other in others)
    assert len({tuple(other.flatten().tolist()) for other in others}) == 4


def test_golden_numbers_never_change() -> None:
    """A resumed run must meet the numbers of the version that started it."""
    random = SampleRandom(1, 2, [3])
    assert random.integers("t", 0, 1000).tolist() == [245]
    assert random.normal("noise", (3,))[0].tolist() == pytest.approx([0.5501939, 0.3598760, -0.0052225], abs=1e-6)


def test_moments_and_ranges() -> None:
    random = SampleRandom(0, 0, range(4000))
    normal = random.normal("n", (4,))
    assert normal.dtype == torch.float32 and abs(float(normal.mean())) < 0.03 and abs(float(normal.std()) - 1) < 0.03
    # Neighbouring samples have neighbouring keys; they must still be independent.
    assert abs(float((normal[1:] * normal[:-1]).mean())) < 0.03
    uniform = random.uniform("u")
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1 and abs(float(uniform.mean()) - 0.5) < 0.02
    assert set(random.integers("i", 2, 5).tolist()) == {2, 3, 4}
    assert abs(float(random.bernoulli("b", 0.1).float().mean()) - 0.1) < 0.02
    assert not random.bernoulli("b", 0.0).any() and random.bernoulli("b", 1.0).all()


def test_generator_is_numpys_philox_with_the_documented_key() -> None:
    random = SampleRandom(5, 6, [2**40])
    state = random.generator("x")[0].bit_generator.state["state"]
    assert state["counter"].tolist() == [0, 0, 0, 0] and int(state["key"][1]) == 2**40
    reference = np.random.Generator(np.random.Philox(key=state["key"]))
    assert random.generator("x")[0].random() == reference.random()


def test_an_empty_batch_is_allowed_and_bad_input_is_refused() -> None:
    assert SampleRandom(0, 0, []).normal("n", (3,)).shape == (0, 3)
    with pytest.raises(ValueError, match="step is -1"):
        SampleRandom(0, -1, [0])
    with pytest.raises(ValueError, match="indices hold -4"):
        SampleRandom(0, 0, [2, -4])
    with pytest.raises(ValueError, match="empty"):
        SampleRandom(0, 0, [0]).integers("t", 5, 5)
    with pytest.raises(ValueError, match="probability"):
        SampleRandom(0, 0, [0]).bernoulli("t", 1.5)
