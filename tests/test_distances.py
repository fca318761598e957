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
from metrics.estimate import mean
from metrics.moments import Moments, Table
from torch_utils.distributed import Processes

ALONE = Processes(0, 1, torch.device("cpu"))
SEEDS = st.integers(0, 10**6)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(features, batch=7):
    result = Moments(features.shape[1])
    for part in features.split(batch):
        result.update(part)
    return result


def gaussian(mean, covariance, count=11):
    """Moments of `count` images with exactly this mean [F] and covariance [F,F]."""
    result = Moments(len(mean))
    result.count = count
    result.mean, result.scatter = (torch.as_tensor(np.array(x, dtype=np.float64)) for x in (mean, covariance))
    result.scatter *= count - 1
    return result


def random_covariance(size, seed):
    root = np.random.default_rng(seed).normal(size=(size, size))
    return root @ root.T + 0.01 * np.eye(size)


def near(a: Moments, b: Moments):
    assert a.count == b.count
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.scatter, b.scatter, rtol=1e-9, atol=1e-9)


# --- moments and tables ----------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=6).filter(lambda n: sum(n) > 1), SEEDS)
def test_any_split_gives_the_moments_of_the_whole_and_files_keep_them(sizes, seed):
    x, result = normal(sum(sizes), 3, seed=seed), Moments(3)
    for part in x.split(sizes):
        result.update(part)
    assert result.count == len(x)
    np.testing.assert_allclose(result.mean, x.double().numpy().mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(result.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)
    near(result.gather(ALONE), result)
    near(Moments.from_tensors(result.tensors()), result)


def test_a_mean_far_above_the_spread_costs_no_digits():
    far = normal(200, 4).double() + 1e7  # sums of x and xxᵀ would keep two digits of the covariance
    np.testing.assert_allclose(moments(far).covariance, np.cov(far.numpy() - 1e7, rowvar=False), rtol=1e-8, atol=1e-8)


def test_a_table_takes_images_in_any_order_each_once():
    x, table = normal(20, 3), Table(20, 3)
    parts = torch.from_numpy(np.random.default_rng(0).permutation(20)).split(6)
    for numbers in parts[1:]:
        table.update(x[numbers], numbers)
    with pytest.raises(ValueError, match="6 of 20 images"):
        table.gather(ALONE)
    table.update(x[parts[0]], parts[0])
    assert torch.equal(table.gather(ALONE), x)
    table.update(x[:2], torch.arange(2))
    with pytest.raises(ValueError, match="2 of 20 images"):
        table.gather(ALONE)


def share_the_work(rank, folder):
    torch.set_num_threads(1)  # a forked process has none of the threads that PyTorch started
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    procs = Processes(rank, 2, torch.device("cpu"))
    x, sums, table = normal(41, 6), Moments(6), Table(41, 6)
    for numbers in torch.arange(rank, 41, 2).split(4):
        sums.update(x[numbers])
        table.update(x[numbers], numbers)
    torch.save({"moments": sums.gather(procs).tensors(), "table": table.gather(procs)}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.start_processes(share_the_work, (tmp_path,), nprocs=2, start_method="fork")
    x = normal(41, 6)
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        near(Moments.from_tensors(result["moments"]), moments(x))
        assert torch.equal(result["table"], x)


def test_a_mean_has_the_standard_error_of_its_values():
    values = torch.tensor([1.0, 2, 4])
    assert mean(values).value == pytest.approx(7 / 3)
    assert mean(values).standard_error == pytest.approx(np.std(values.numpy(), ddof=1) / math.sqrt(3))
    assert math.isnan(mean(values[:1]).standard_error)


# --- Fréchet distance ------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(*[st.floats(0, 9)] * 4), min_size=1, max_size=5))
def test_independent_gaussians_give_the_closed_form(features):
    mean_a, mean_b, a, b = np.array(features).T
    expected = ((mean_a - mean_b) ** 2 + (np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = frechet_distance(gaussian(mean_a, np.diag(a)), gaussian(mean_b, np.diag(b))).value
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-5)  # variances below 1e-14 are dropped


@settings(max_examples=20)
@given(SEEDS, st.sampled_from([2, 16]))
def test_any_two_gaussians_give_the_closed_form(seed, size):
    a, b = random_covariance(size, seed), random_covariance(size, seed + 1)
    gap = np.arange(size)
    expected = np.square(gap).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert frechet_distance(gaussian(gap, a), gaussian(0 * gap, b)).value == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("count", [2, 20, 300], ids=["two", "fewer than features", "more than features"])
def test_equal_sets_are_at_distance_zero(count):
    x = normal(count, 64)
    a, b = moments(x), moments(x.flip(0), batch=5)
    assert frechet_distance(a, a).value <= 1e-12 * a.covariance.trace()
    # Half of the digits: directions without variance differ by rounding, and the root of rounding remains.
    assert frechet_distance(a, b).value <= 1e-7 * a.covariance.trace()
    same = torch.ones(count, 4)
    assert frechet_distance(moments(same), moments(same + 1)).value == 4


@pytest.mark.parametrize("count", [20, 300])
def test_the_frechet_distance_is_symmetric_and_equals_torch_fidelity(count):
    x, y = normal(count, 64) * 2, normal(count + 10, 64, seed=1) + 0.3
    expected = fid_statistics_to_metric(*(fid_features_to_statistics(f.double()) for f in (x, y)), False)
    found = frechet_distance(moments(x), moments(y)).value
    assert found == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)
    assert frechet_distance(moments(y), moments(x)).value == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("count", [0, 1])
def test_a_covariance_of_fewer_than_two_images_is_a_sentence(count):
    with pytest.raises(UserError, match=f"2 images or more, and there are {count}"):
        frechet_distance(moments(normal(9, 3)), moments(normal(count, 3)))


# --- kernel distance -------------------------------------------------------------------------------------------------


def test_the_kernel_distance_equals_its_definition():
    x, y = normal(9, 5).double().numpy(), normal(9, 5, seed=1).double().numpy() + 0.5

    def average(a, b, pairs):
        return np.mean([(a[i] @ b[j] / 5 + 1) ** 3 for i, j in pairs])

    every = [(i, j) for i in range(9) for j in range(9)]
    other = [(i, j) for i, j in every if i != j]
    expected = average(x, x, other) + average(y, y, other) - 2 * average(x, y, every)
    # Subsets as large as the set differ in their order alone.
    found = kernel_distance(torch.from_numpy(x), torch.from_numpy(y), subsets=3)
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert found.standard_error == pytest.approx(0, abs=1e-12)


def test_the_kernel_distance_equals_torch_fidelity():
    x, y = normal(90, 16), normal(80, 16, seed=1) * 1.2
    expected = kid_features_to_metric(x, y, kid_subsets=20, kid_subset_size=30, verbose=False)
    found = kernel_distance(x, y, subsets=20, subset_size=30)
    assert found.value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-4)
    deviation = expected["kernel_inception_distance_std"]
    assert found.standard_error == pytest.approx(deviation / math.sqrt(19), rel=1e-4)
    elsewhere = kernel_distance(x, y, subsets=200, subset_size=30, seed=1)  # other subsets
    assert abs(elsewhere.value - found.value) < 4 * found.standard_error


def test_the_kernel_distance_of_one_distribution_is_zero_within_its_spread():
    pairs = [(normal(60, 8, seed=2 * i), normal(60, 8, seed=2 * i + 1)) for i in range(20)]
    values = np.array([kernel_distance(*pair, subsets=2).value for pair in pairs])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(20)
    assert values.min() < 0


# --- Inception score -------------------------------------------------------------------------------------------------


def test_the_inception_score_equals_torch_fidelity():
    logits = normal(83, 12) * 3
    expected, found = isc_features_to_metric(logits), inception_score(logits)
    assert found["_mean"].value == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert found["_std"].value == pytest.approx(expected["inception_score_std"], rel=1e-9)
    assert found["_mean"].standard_error == pytest.approx(expected["inception_score_std"] / 3, rel=1e-9)  # √(10 - 1)


def test_certain_and_even_classes_score_their_number_and_doubt_scores_one():
    certain = 1e5 * torch.eye(4).repeat(25, 1)  # the probability of the other classes is below any float64
    assert inception_score(certain, splits=1)["_mean"].value == pytest.approx(4, rel=1e-12)
    assert inception_score(torch.zeros(50, 4))["_mean"].value == pytest.approx(1, rel=1e-12)


# --- precision and recall --------------------------------------------------------------------------------------------


def naive_part_inside(points, centres, k):
    radii = [np.sort(np.linalg.norm(centres - centre, axis=1))[k] for centre in centres]
    return np.mean([(np.linalg.norm(centres - point, axis=1) <= radii).any() for point in points])


@settings(max_examples=30)
@given(SEEDS, st.integers(4, 30), st.integers(4, 30), st.integers(1, 40), st.integers(1, 3))
def test_precision_and_recall_equal_their_definition_with_any_chunk(seed, num_fake, num_real, chunk, k):
    fake, real = normal(num_fake, 3, seed=seed), normal(num_real, 3, seed=seed + 1) * 1.5
    found = precision_recall(fake, real, k=k, chunk=chunk)
    a, b = fake.double().numpy(), real.double().numpy()
    assert found["_precision"].value == pytest.approx(naive_part_inside(a, b, k), rel=1e-12)
    assert found["_recall"].value == pytest.approx(naive_part_inside(b, a, k), rel=1e-12)


def test_precision_and_recall_equal_torch_fidelity():
    fake, real = normal(150, 8), normal(140, 8, seed=1) * 1.3
    expected = prc_features_to_metric(fake, real, verbose=False)
    for (name, found), num in zip(precision_recall(fake, real).items(), (150, 140), strict=True):
        assert found.value == pytest.approx(expected[name[1:]], rel=1e-6)
        assert found.standard_error == pytest.approx(math.sqrt(found.value * (1 - found.value) / (num - 1)), rel=1e-9)
