"""Laws of training at several scales: combinations that are refused, and the arithmetic of its terms."""

import pytest
from conftest import RECIPE

from dnnlib.config import merge
from dnnlib.console import UserError
from training.config import resolve
from training.runs import open_images

NATIVE = {"data": {"resolution": 8}, "G": {"coords": "centers"}, "scales": {"max": 2}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scales": {"max": 2}}, r"scales.max needs images that are larger .*--transform=native"),
        (merge(NATIVE, {"G": {"coords": "endpoints"}}), "scales.max needs G.coords=centers"),
        ({"scales": {"consistency": 1}}, "scales.teacher and scales.larger need windows; set scales.max"),
        ({"scales": {"teacher": 1}}, "scales.teacher and scales.larger need windows; set scales.max"),
        ({"scales": {"larger": 1.5}}, "scales.teacher and scales.larger need windows; set scales.max"),
        (merge(NATIVE, {"scales": {"larger": 1.4}}), "images of 11x11, whose sides must be"),
        (merge(NATIVE, {"scales": {"larger": 1.5, "teacher": 1}}), "set scales.larger to 1"),
        (merge(NATIVE, {"scales": {"larger": 1.5}, "augment": {"mode": "ada"}}), "set augment.mode to none"),
        (merge(NATIVE, {"scales": {"pairs": 0.2}}), "scales.pairs needs images of two sizes; set scales.larger"),
        (merge(NATIVE, {"scales": {"sampling": "log"}}), "scales.sampling='log': .*'log-uniform' or 'uniform'"),
        ({"D": {"scale_aware": True}}, "D.scale_aware needs several scales; set scales.max or loss.pyramid"),
        ({"loss": {"pyramid": 4}}, "loss.pyramid=4: .*less than or equal to 3"),
        (
            {"loss": {"pyramid": 3}, "data": {"resolution": [8, 10]}},
            "halves images 2 times, .*10x8, .* do not divide by 4",
        ),
    ],
    ids=str,
)
def test_a_combination_without_meaning_is_a_sentence(tiny, settings, words):
    settings = merge(merge(RECIPE, {"data": {"path": str(tiny.images("large", size=(24, 20)))}}), settings)
    with pytest.raises(UserError, match=words) as refusal:
        resolve(settings, open_images(settings), "mine")
    assert "\n" not in str(refusal.value)
