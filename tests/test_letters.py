"""Laws of training/letters.py and of dataset_tool.py --source letters."""

import json
import string
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import ImageFont

import dataset_tool
from training.data import ImageArchive
from training.letters import FLATTENED_AT, Letters, contrast, has_outline, is_text_face, outline

# Judged by eye. matplotlib has cmti10 from 3.11 on.
TEXT_FACES = {
    f"{family}{style}"
    for family, styles in {
        "DejaVuSans": ("", "-Bold", "-BoldOblique", "-Oblique"),
        "DejaVuSansMono": ("", "-Bold", "-BoldOblique", "-Oblique"),
        "DejaVuSerif": ("", "-Bold", "-BoldItalic", "-Italic"),
        "STIXGeneral": ("", "Bol", "BolIta", "Italic"),
        "cm": ("b10", "r10", "ss10", "ti10", "tt10"),
    }.items()
    for style in styles
}
FONTS = sorted(Letters("A", (8, 8), 1).path.glob("*.ttf"))
FACES = [path for path in FONTS if path.stem in TEXT_FACES]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(dataset_tool.main, ["--source", "letters", *map(str, arguments)])


def pixels(letters: Letters, name: str) -> np.ndarray:
    """Return [H,W,3] in 0..255."""
    return np.asarray(letters.image(name, 3)).astype(float)


def box_filtered(image: np.ndarray, factor: int) -> np.ndarray:
    height, width, channels = image.shape
    return image.reshape(height // factor, factor, width // factor, factor, channels).mean(axis=(1, 3))


@pytest.mark.parametrize(("width", "height", "factor"), [(64, 64, 4), (48, 32, 8), (15, 40, 3)])
def test_the_box_filtered_drawing_of_a_larger_size_is_the_drawing_of_the_smaller(width, height, factor):
    small = Letters(string.ascii_uppercase, (width, height), 2, seed=3)
    large = Letters(string.ascii_uppercase, (width * factor, height * factor), 2, seed=3)
    errors = [np.abs(pixels(small, name) - box_filtered(pixels(large, name), factor)) for name in small.names()]
    assert np.mean(errors) < 0.15
    assert np.max(errors) < 5


def test_a_drawing_is_a_function_of_seed_character_and_number():
    alone, among = Letters("Q", (32, 32), 30), Letters("BQX", (32, 32), 50)
    assert all(np.array_equal(pixels(alone, name), pixels(among, name)) for name in alone.names())
    other = Letters("Q", (32, 32), 30, seed=1)
    assert not any(np.array_equal(pixels(alone, name), pixels(other, name)) for name in alone.names())
    assert len({pixels(alone, name).tobytes() for name in alone.names()}) == 30


@pytest.mark.parametrize("size", [(200, 200), (300, 200), (200, 260)])
def test_letters_fill_65_to_85_percent_keep_off_the_edge_and_stand_out(size):
    letters, lengths = Letters("AIWgj&", size, 21), []
    for name in letters.names():
        image = pixels(letters, name)
        ground = image[0, 0]
        rows, columns = np.nonzero((image != ground).any(axis=2))
        lengths.append(max(np.ptp(rows), np.ptp(columns)) + 1)
        distance = min(rows.min(), columns.min(), size[1] - 1 - rows.max(), size[0] - 1 - columns.max())
        assert distance >= 11  # 6 % of 200, less a pixel that is covered in part
        colours, times = np.unique(image[rows, columns], axis=0, return_counts=True)
        assert contrast(colours[times.argmax()], ground) >= 4.5
    assert 129 <= min(lengths) < 135
    assert 165 < max(lengths) <= 172


@pytest.mark.parametrize(("colour", "ratio"), [((0, 0, 0), 21), ((119, 119, 119), 4.478), ((255, 0, 0), 3.998)])
def test_contrast_is_that_of_wcag(colour, ratio):
    assert contrast(colour, (255, 255, 255)) == pytest.approx(ratio, abs=0.001)
    assert contrast((255, 255, 255), colour) == pytest.approx(ratio, abs=0.001)


def test_the_rule_finds_the_text_faces():
    assert [path for path in FONTS if is_text_face(path)] == FACES
    assert len(FACES) >= 20


@pytest.mark.parametrize("character", [*"AMgq5&", "Ö", "Ω", "Ж"])
def test_outlines_are_the_glyphs_that_freetype_draws(character):
    """Compare width, height and area with Pillow's rendering at 512 pixels per em."""
    faces = [face for face in FACES if has_outline(face, character)]
    assert [face for face in FACES if face.stem[:2] != "cm" or character.isascii()] == faces
    for face in faces:
        mask = ImageFont.truetype(face, 512).getmask(character)
        inked = np.asarray(mask, dtype=float).reshape(mask.size[::-1]) / 255
        rows, columns = np.nonzero(inked)
        extents = outline(face, character).get_extents()
        scale = 512 / FLATTENED_AT
        assert abs(extents.width * scale - (np.ptp(columns) + 1)) < 3
        assert abs(extents.height * scale - (np.ptp(rows) + 1)) < 3
        corners = [np.stack([polygon[:-1], polygon[1:]], axis=1) for polygon in outline(face, character).to_polygons()]
        area = abs(np.linalg.det(np.concatenate(corners)).sum()) / 2 * scale**2
        assert area == pytest.approx(inked.sum(), rel=0.02)


# --- dataset_tool.py --source letters ---------------------------------------------------------------------------------


def make(dest: Path, *options: object) -> dict:
    """Run the tool, which must succeed; return dataset.json."""
    result = run("--dest", dest, "--resolution", "16x16", *options)
    assert result.exit_code == 0, result.output
    with zipfile.ZipFile(dest) as archive:
        return json.loads(archive.read("dataset.json"))


@pytest.mark.parametrize(
    ("options", "class_names"),
    [
        ([], [*string.ascii_uppercase]),
        (["--characters", "ca/"], ["c", "a", "/"]),
        (["--characters", "äßΩЖ"], ["ä", "ß", "Ω", "Ж"]),
        (["--characters", "U\u0308O\u0308"], ["Ü", "Ö"]),
    ],
)
def test_classes_are_the_characters_in_the_order_given(tmp_path, options, class_names):
    content = make(tmp_path / "a.zip", "--drawings", 2, *options)
    assert content["class_names"] == class_names
    assert [label for _, label in content["labels"]] == [*range(len(class_names))] * 2
    images = ImageArchive(tmp_path / "a.zip", use_labels=True)
    assert (images.shape, images.label_dim) == ((3, 16, 16), len(class_names))


def test_equal_options_give_equal_bytes_and_one_channel_holds_grey(tmp_path):
    for name, seed in (("a.zip", 5), ("b.zip", 5), ("c.zip", 6)):
        make(tmp_path / name, "--channels", 1, "--max-images", 7, "--seed", seed)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert (tmp_path / "a.zip").read_bytes() != (tmp_path / "c.zip").read_bytes()
    images = ImageArchive(tmp_path / "a.zip")
    assert (images.shape, len(images)) == ((1, 16, 16), 7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--resolution", "8x8", "--characters", ""], "characters is empty"),
        (["--resolution", "8x8", "--characters", "ABA"], "holds 'A' twice"),
        (["--resolution", "8x8", "--characters", "AO\u0308Ö"], "holds 'Ö' twice"),
        (["--resolution", "8x8", "--characters", "A漢B"], "leave out '漢'"),
        (["--resolution", "8x8", "--characters", "A B"], "leave out ' '"),
        (["--resolution", "8x8", "--characters", "A\udc80"], "leave out '\\udc80'"),
        (["--resolution", "8x8", "--drawings", 0], "--drawings"),
        (["--resolution", "8x8", "--transform", "center-crop"], "no --transform"),
        ([], "give --resolution"),
        (["--resolution", "8x8", "--source", "folder", "--characters", "A"], "--source letters"),
        (["--resolution", "8x8", "--source", "folder", "--drawings", 5], "--source letters"),
    ],
)
def test_a_wrong_call_ends_in_one_sentence_and_writes_nothing(tmp_path, options, words):
    result = run("--dest", tmp_path / "a.zip", *options)
    assert result.exit_code == 2
    assert words in result.output
    assert result.output.count("Error:") == 1
    assert not any(tmp_path.iterdir())


def test_a_missing_matplotlib_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "training.letters")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("--dest", tmp_path / "a.zip", "--resolution", "8x8")
    assert result.exit_code == 2
    assert "pip install matplotlib" in result.output
