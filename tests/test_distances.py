"""Moments and distances of features against closed forms, plain NumPy and torch-fidelity."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from dnnlib.console import UserError
from metrics.distances import frechet_distance, inception_score, kernel_distance, precision_recall
from metrics.moments import FeatureTable, Moments
from torch_utils.distributed import Processes

ALONE = Processes(0, 1, torch.device("cpu"))
SEEDS = st.integers(0, 10**6)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moments(features, batch=7):
    result = Moments(features.shape[1])
    for part in features.split(batch):
        result.update(part)
    return result


def gaussian(mean, covariance, count=11):
    """Moments of `count` pictures with exactly this mean [F] and covariance [F,F]."""
    result = Moments(len(mean))
    result.count = count
    result.mean, result.scatter = (torch.as_tensor(np.array(x, dtype=np.float64)) for x in (mean, covariance))
    result.scatter *= count - 1
    return result


def random_covariance(size, seed):
    root = np.random.default_rng(seed).normal(size=(size, size))
    return root @ root.T + 0.01 * np.eye(size)


def near(a: Moments, b: Moments, scale=1.0):
    assert a.count == b.count
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-12 * scale)
    torch.testing.assert_close(a.scatter, b.scatter, rtol=1e-9, atol=1e-9 * scale)


# --- moments ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=6).filter(lambda n: sum(n) > 1), SEEDS)
def test_any_split_gives_the_moments_of_the_whole(sizes, seed):
    x, result = normal(sum(sizes), 3, seed=seed), Moments(3)
    for part in x.split(sizes):
        result.update(part)
    assert result.count == len(x)
    np.testing.assert_allclose(result.mean, x.double().numpy().mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(result.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)


def test_a_mean_far_above_the_spread_costs_no_digits():
    x = normal(200, 4, dtype=torch.float64)
    far = x + 1e7  # sums of x and xxᵀ would keep two digits of the covariance
    np.testing.assert_allclose(moments(far).covariance, np.cov(far.numpy() - 1e7, rowvar=False), rtol=1e-8, atol=1e-8)


@settings(deadline=None)
@given(SEEDS, st.integers(1, 3))
def test_moments_gathered_alone_are_themselves(seed, count):
    near(moments(normal(count, 3, seed=seed)).gather(ALONE), moments(normal(count, 3, seed=seed)))


def test_moments_come_back_from_their_tensors():
    a = moments(normal(20, 3))
    near(Moments.from_tensors(a.tensors(), 3), a)


@pytest.mark.parametrize(
    "damage",
    [
        {"count": torch.tensor(0)},
        {"count": torch.tensor(3.0)},
        {"mean": torch.zeros(4, dtype=torch.float64)},
        {"mean": torch.full((3,), torch.nan, dtype=torch.float64)},
        {"scatter": torch.zeros(3, 3)},
        {"more": torch.zeros(1)},
    ],
)
def test_broken_tensors_are_no_moments(damage):
    with pytest.raises(ValueError, match="not the moments of 3 features"):
        Moments.from_tensors(moments(normal(5, 3)).tensors() | damage, 3)


def test_a_table_takes_pictures_in_any_order_and_leaves_out_those_beyond_its_end():
    x = normal(20, 3)
    table = FeatureTable(12, 3)
    for numbers in torch.from_numpy(np.random.default_rng(0).permutation(20)).split(6):
        table.update(x[numbers], numbers)
    assert torch.equal(table.gather(ALONE), x[:12])


def test_a_table_with_a_gap_is_an_error():
    table = FeatureTable(12, 3)
    table.update(normal(11, 3), torch.arange(11))
    with pytest.raises(ValueError, match="1 of 12 pictures"):
        table.gather(ALONE)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_end_in_a_sentence(value):
    bad = normal(20, 3)
    bad[7, 1] = value
    good = normal(20, 3)
    for call in (
        lambda: Moments(3).update(bad),
        lambda: FeatureTable(20, 3).update(bad, torch.arange(20)),
        lambda: kernel_distance(good, bad),
        lambda: precision_recall(bad, good),
        lambda: inception_score(bad),
    ):
        with pytest.raises(UserError, match="not finite"):
            call()


def share_the_work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    procs = Processes(rank, 2, torch.device("cpu"))
    x, sums, table = normal(41, 6), Moments(6), FeatureTable(30, 6)
    for numbers in torch.arange(rank, 41, 2).split(4):
        sums.update(x[numbers])
        table.update(x[numbers], numbers)
    torch.save({"moments": sums.gather(procs).tensors(), "table": table.gather(procs)}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(share_the_work, (tmp_path,), nprocs=2)
    x = normal(41, 6)
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        together = Moments.from_tensors(result["moments"], 6)
        near(together, moments(x))
        assert torch.equal(result["table"], x[:30])
        other = moments(normal(50, 6, seed=1) + 0.5)
        one, two = (frechet_distance(m, other).mean for m in (moments(x), together))
        assert two == pytest.approx(one, rel=1e-9)


# --- Fréchet distance ------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.floats(0, 9)] * 4), min_size=1, max_size=5))
def test_independent_gaussians_give_the_closed_form(features):
    mean_a, mean_b, a, b = np.array(features).T
    expected = ((mean_a - mean_b) ** 2 + (np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    result = frechet_distance(gaussian(mean_a, np.diag(a)), gaussian(mean_b, np.diag(b)))
    assert result.mean == pytest.approx(expected, rel=1e-9, abs=1e-5)  # variances below 1e-14 are dropped
    assert result.num == 11
    assert math.isnan(result.standard_error)


@settings(deadline=None)
@given(SEEDS)
def test_two_gaussians_in_the_plane_give_the_closed_form(seed):
    a, b = random_covariance(2, seed), random_covariance(2, seed + 1)
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    expected = 25 + np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(gaussian([3, 0], a), gaussian([0, 4], b)).mean == pytest.approx(expected, rel=1e-9)


def test_the_root_is_the_matrix_square_root():
    a, b = random_covariance(16, 0), random_covariance(16, 1)
    expected = np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance(gaussian(np.zeros(16), a), gaussian(np.zeros(16), b)).mean == pytest.approx(expected, 1e-9)


@pytest.mark.parametrize("count", [2, 20, 300], ids=["two", "fewer than features", "more than features"])
def test_equal_sets_are_at_distance_zero(count):
    x = normal(count, 64)
    a, b = moments(x), moments(x.flip(0), batch=5)
    assert frechet_distance(a, a).mean <= 1e-12 * a.covariance.trace()
    # Half of the digits: directions without variance differ by rounding, and the root of rounding remains.
    assert frechet_distance(a, b).mean <= 1e-7 * a.covariance.trace()


def test_pictures_that_are_all_the_same_have_a_distance():
    same = torch.ones(5, 4)
    assert frechet_distance(moments(same), moments(same + 1)).mean == 4
    assert frechet_distance(moments(same), moments(same)).mean == 0


@pytest.mark.parametrize("count", [20, 300])
def test_the_frechet_distance_equals_torch_fidelity(count):
    x, y = normal(count, 64) * 2, normal(count + 10, 64, seed=1) + 0.3
    expected = fid_statistics_to_metric(*(fid_features_to_statistics(f.double()) for f in (x, y)), False)
    assert frechet_distance(moments(x), moments(y)).mean == pytest.approx(
        expected["frechet_inception_distance"], rel=1e-5
    )
    assert frechet_distance(moments(y), moments(x)).mean == pytest.approx(
        frechet_distance(moments(x), moments(y)).mean, rel=1e-9
    )


@pytest.mark.parametrize("count", [0, 1])
def test_a_covariance_of_fewer_than_two_pictures_is_a_sentence(count):
    with pytest.raises(UserError, match=f"2 pictures or more, and there are {count}"):
        frechet_distance(moments(normal(9, 3)), moments(normal(count, 3)))


# --- kernel distance -------------------------------------------------------------------------------------------------


def test_the_kernel_distance_equals_its_definition():
    x, y = normal(9, 5).double().numpy(), normal(9, 5, seed=1).double().numpy() + 0.5

    def mean(a, b, pairs):
        return np.mean([(a[i] @ b[j] / 5 + 1) ** 3 for i, j in pairs])

    every = [(i, j) for i in range(9) for j in range(9)]
    other = [(i, j) for i, j in every if i != j]
    expected = mean(x, x, other) + mean(y, y, other) - 2 * mean(x, y, every)
    # Subsets as large as the set differ in their order alone.
    result = kernel_distance(torch.from_numpy(x), torch.from_numpy(y), subsets=3)
    assert result.mean == pytest.approx(expected, rel=1e-12)
    assert result.standard_error == pytest.approx(0, abs=1e-12)
    assert result.num == 9


def test_the_kernel_distance_equals_torch_fidelity():
    x, y = normal(90, 16), normal(80, 16, seed=1) * 1.2
    expected = kid_features_to_metric(x, y, kid_subsets=20, kid_subset_size=30, verbose=False)
    result = kernel_distance(x, y, subsets=20, subset_size=30)
    assert result.mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    deviation = expected["kernel_inception_distance_std"]
    assert result.standard_error == pytest.approx(deviation / math.sqrt(19), rel=1e-4)
    elsewhere = kernel_distance(x, y, subsets=200, subset_size=30, seed=1)  # other subsets
    assert abs(elsewhere.mean - result.mean) < 4 * result.standard_error


def test_the_kernel_distance_of_one_distribution_is_zero_within_its_spread():
    values = [kernel_distance(normal(60, 8, seed=2 * i), normal(60, 8, seed=2 * i + 1), subsets=2) for i in range(20)]
    means = np.array([v.mean for v in values])
    assert abs(means.mean()) < 3 * means.std() / math.sqrt(20)
    assert means.min() < 0


# --- Inception score -------------------------------------------------------------------------------------------------


def test_the_inception_score_equals_torch_fidelity():
    logits = normal(83, 12) * 3
    expected = isc_features_to_metric(logits)
    result = inception_score(logits)
    assert result.mean == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert result.standard_error == pytest.approx(expected["inception_score_std"] / 3, rel=1e-9)  # √(10 - 1)
    assert result.num == 83


def test_certain_and_even_classes_score_their_number_and_doubt_scores_one():
    certain = 1e5 * torch.eye(4).repeat(25, 1)  # the probability of the other classes is below any float64
    assert inception_score(certain, splits=1).mean == pytest.approx(4, rel=1e-12)
    assert inception_score(torch.zeros(50, 4)).mean == pytest.approx(1, rel=1e-12)


def test_fewer_pictures_than_parts_are_a_sentence():
    with pytest.raises(UserError, match="10 pictures or more, and there are 9"):
        inception_score(normal(9, 4))


# --- precision and recall --------------------------------------------------------------------------------------------


def naive_part_inside(points, centres, k):
    inside = 0
    for point in points:
        for centre in centres:
            others = np.sort(np.linalg.norm(centres - centre, axis=1))
            if np.linalg.norm(point - centre) <= others[k]:
                inside += 1
                break
    return inside / len(points)


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(4, 30), st.integers(4, 30), st.integers(1, 40), st.integers(1, 3))
def test_precision_and_recall_equal_their_definition_with_any_chunk(seed, num_fake, num_real, chunk, k):
    fake, real = normal(num_fake, 3, seed=seed), normal(num_real, 3, seed=seed + 1) * 1.5
    precision, recall = precision_recall(fake, real, k=k, chunk=chunk)
    a, b = fake.double().numpy(), real.double().numpy()
    assert precision.mean == pytest.approx(naive_part_inside(a, b, k), rel=1e-12)
    assert recall.mean == pytest.approx(naive_part_inside(b, a, k), rel=1e-12)
    assert (precision.num, recall.num) == (num_fake, num_real)


def test_precision_and_recall_equal_torch_fidelity():
    fake, real = normal(150, 8), normal(140, 8, seed=1) * 1.3
    expected = prc_features_to_metric(fake, real, verbose=False)
    precision, recall = precision_recall(fake, real)
    assert precision.mean == pytest.approx(expected["precision"], rel=1e-6)
    assert recall.mean == pytest.approx(expected["recall"], rel=1e-6)
    for p in (precision, recall):
        assert p.standard_error == pytest.approx(math.sqrt(p.mean * (1 - p.mean) / (p.num - 1)), rel=1e-9)


def test_a_narrow_set_is_precise_and_a_wide_one_recalls():
    narrow, wide = normal(200, 4) * 0.1, normal(200, 4, seed=1)
    precision, recall = precision_recall(narrow, wide)
    assert precision.mean == 1
    assert recall.mean < 0.1
    assert [m.mean for m in precision_recall(wide, narrow)] == [recall.mean, precision.mean]


@pytest.mark.parametrize(("num_fake", "num_real", "words"), [(3, 9, "pictures measured"), (9, 3, "real pictures")])
def test_fewer_pictures_than_neighbours_are_a_sentence(num_fake, num_real, words):
    with pytest.raises(UserError, match=f"4 {words} or more, and there are 3"):
        precision_recall(normal(num_fake, 2), normal(num_real, 2))
