"""Laws of training/labels.py: labels mean what was written, and the tool, check and training read the same."""

import json
import unicodedata

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import encode, noise_image, write_folder, write_zip

import dataset_tool
from dnnlib.console import UserError
from training.data import ImageArchive
from training.labels import Labels, label_by_folder, parse_csv, parse_json

IMAGES = ["a.png", "b.png", "c.png"]


def read(content: object, images: list[str] = IMAGES) -> Labels:
    """Match a CSV, given as text or bytes, or a JSON: text that begins with a brace, or a value."""
    if isinstance(content, str | bytes) and content[:1] != "{":
        return parse_csv(content if isinstance(content, bytes) else content.encode(), "l.csv").match(images)
    text = content if isinstance(content, str) else json.dumps(content)
    return parse_json(text.encode(), "dataset.json").match(images)


WRITTEN = "image,label\na.png,10\nb.png,9\nc.png,10.0\n"


@pytest.mark.parametrize(
    "text",
    [
        WRITTEN,
        WRITTEN.partition("\n")[2],
        WRITTEN.replace("image,label", "Datei Nr.,was es ist"),
        WRITTEN.replace(",", ";"),
        WRITTEN.replace(",", "\t"),
        WRITTEN.replace(",", ", "),
        WRITTEN.replace("\n", "\r\n"),
        WRITTEN.replace("\n", "\n\n"),
        WRITTEN.replace("a.png,10", '"a.png","10"'),
        WRITTEN.replace("\n", ",\n"),
        "\ufeff" + WRITTEN,
        WRITTEN.encode("utf-16"),
        "label,image\n10,a.png\n9,b.png\n10,c.png\n",
        ",image,label\n0,a.png,10\n1,b.png,9\n2,c.png,10\n",
        ",image,kind\n0,a.png,10\n1,b.png,9\n2,c.png,10\n",
        "image,width,split,label\na.png,8,train,10\nb.png,8,train,9\nc.png,8,test,10\n",
        WRITTEN + "gone.png,3\n",
        WRITTEN + "./a.png,10\n",
    ],
)
def test_numbers_in_a_csv_are_class_numbers_however_it_is_laid_out(text):
    labels = read(text)
    assert labels.values.tolist() == [10, 9, 10]
    assert (labels.dim, labels.names) == (11, [])


def test_names_are_numbered_in_natural_order_and_kept():
    labels = read("f,l\na.png,class 10\nb.png,class 2\nc.png,class 10\n")
    assert (labels.names, labels.values.tolist()) == (["class 2", "class 10"], [1, 0, 1])
    assert "l" in labels.notes[0]
    mixed = read([["a.png", "10"], ["b.png", "x"], ["c.png", "9"]])
    assert (mixed.names, mixed.values.tolist()) == (["9", "10", "x"], [1, 2, 0])
    given = read({"labels": {"a.png": "x", "b.png": "y", "c.png": "y"}, "class_names": ["y", "x"]})
    assert (given.names, given.values.tolist()) == (["y", "x"], [1, 0, 0])


@pytest.mark.parametrize("above", ["", "photos/train/"])
def test_folders_are_numbered_in_natural_order_below_the_one_that_holds_all(above):
    images = [f"{above}{i}/x.png" for i in sorted(map(str, range(1, 13)))]
    labels = label_by_folder(images, "photos").match(images)
    assert labels.names == [str(i) for i in range(1, 13)]
    assert [labels.names[number] for number in labels.values] == [name.split("/")[-2] for name in images]


def test_several_columns_of_numbers_are_vectors_named_by_the_header():
    for text in (
        "f,age,smile\na.png,0.5,-1\nb.png,2,0\nc.png,0,1e-3\n",
        'f,v\na.png,"[0.5, -1]"\nb.png,"[2,0]"\nc.png,"[0,0.001]"\n',
    ):
        labels = read(text)
        assert labels.values.tolist() == [[0.5, -1], [2, 0], [0, 0.001]]
        assert labels.names == (["age", "smile"] if "age" in text else [])
    assert read("f;x;y\na.png;0,5;-1\nb.png;2;0\nc.png;0;1\n").values.tolist() == [[0.5, -1], [2, 0], [0, 1]]
    assert np.array_equal(labels.vector(0), np.float32([0.5, -1]))


PAIRS = [["a.png", 2], ["b.png", 0], ["c.png", 7]]


@pytest.mark.parametrize(
    "content",
    [
        {"labels": PAIRS},
        {"labels": dict(PAIRS)},
        dict(PAIRS),
        PAIRS,
        [{"file": name, "label": label} for name, label in PAIRS],
        {"labels": [{"class": str(label), "id": i, "file_name": name} for i, (name, label) in enumerate(PAIRS)]},
        {"labels": [[name, float(label)] for name, label in PAIRS]},
    ],
)
def test_forms_of_a_json_have_one_meaning(content):
    labels = read(content)
    assert (labels.values.tolist(), labels.dim) == ([2, 0, 7], 8)
    assert labels.kind() == "8 classes, 5 of them without images"


NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("labelled", "image"),
    [
        ("./x/{}.png", "x/{}.png"),
        ("x\\{}.png", "x/{}.png"),
        (f"x/{NFD}{{}}.png", f"x/{NFC}{{}}.png"),
        ("x/{}.PNG", "x/{}.png"),
        ("x/{}.jpg", "x/{}.png"),
        ("x/{}", "x/{}.png"),
        ("x/{}.png", "faces/x/{}.png"),
        ("/home/me/train/x/{}.png", "x/{}.png"),
        ("{}.png", "x/{}.png"),
        ("{}", "{}.png"),
    ],
)
def test_names_match_in_spite_of_how_they_are_spelled(labelled, image):
    rows = [[labelled.format(i), i] for i in range(2)]
    assert read(rows, [image.format(i) for i in (1, 0)]).values.tolist() == [1, 0]


def test_the_strictest_comparison_that_matches_decides():
    images = ["cat/1.png", "dog/1.png"]
    assert read([["dog/1.png", 5], ["cat/1.png", 3]], images).values.tolist() == [3, 5]
    with pytest.raises(UserError, match="no label for dog/1"):
        read([["bird/1.png", 5], ["cat/1.png", 3]], images)
    both = ["a.png", "a.PNG"]
    assert read([["a.PNG", 1], ["a.png", 0]], both).values.tolist() == [0, 1]


WRONG = [  # (labels, words of the sentence)
    ("image,label\n", "only the header image, label"),
    ("", "no labels"),
    ({"labels": []}, "no labels"),
    ({}, "is empty"),
    ("x/q.png,1\nx/r.png,1\n", "2 files, e.g. x/q.png, and none of the 3 images, e.g. a.png"),
    ({"labels": {"q.png": 1}}, "q.png, and none"),
    ("a.png,1\nb.png,2\n", "no label for c.png"),
    ("a.png,1\nb.png,2\nc.png,\n", "no label for c.png"),
    ([["a.png", 1], ["b.png", None], ["d.png", 1]], "no label for b.png .2 images .*d.png"),
    ("a.png,1\nb.png,2\na.png,3\nc.png,1\n", "a.png as both 1 and 3"),
    ('{"labels": {"a.png": 1, "a.png": 2}}', "given twice"),
    ("a.png,1\nb.png,2\nc.png,3,4\n", "line 3: 3 columns"),
    ("a.png\nb.png\nc.png\n", "1 columns?"),
    ("a.png,0.5\nb.png,1\nc.png,1\n", "a.png as 0.5"),
    ("a.png,1\nb.png,-1\nc.png,1\n", "b.png as -1"),
    ("a.png,1\nb.png,nan\nc.png,1\n", "b.png as nan"),
    ([["a.png", 1], ["b.png", 10**400], ["c.png", 1]], "b.png as inf"),
    ([["a.png", 1], ["b.png", 10**9], ["c.png", 1]], "b.png as 1e"),
    ([["a.png", 1], ["b.png", "x"], ["c.png", 1]], "names and numbers"),
    ([["a.png", 1], ["b.png", True], ["c.png", 1]], "names and numbers"),
    ([["a.png", 1], ["b.png", {}], ["c.png", 1]], "other values"),
    ([["a.png", [1]], ["b.png", [1, 2]], ["c.png", [1]]], "a.png with 1 numbers? and b.png with 2"),
    ([["a.png", [1]], ["b.png", [float("nan")]], ["c.png", [1]]], "b.png as .nan."),
    ([["a.png", [1]], ["b.png", ["1"]], ["c.png", [1]]], "b.png as"),
    ([["a.png", [1]], ["b.png", [1e39]], ["c.png", [1]]], "b.png as .1e.39"),
    ("f,kind,size\na.png,cat,1\nb.png,cat,2\nc.png,dog,3\n", "kind .cat, ….*size"),
    ({"labels": PAIRS, "class_names": ["x"]}, "names 1 class and uses 8"),
    ({"labels": [[name, [1]] for name, _ in PAIRS], "class_names": ["x", "y"]}, "names 2 numbers and uses 1"),
    ({"labels": PAIRS, "class_names": ["x"] * 8}, "two classes x"),
    ({"labels": PAIRS, "class_names": {"x": 0}}, "not a list of texts"),
    ({"labels": PAIRS, "class_names": ""}, "not a list of texts"),
    ({"labels": [[name, "x"] for name, _ in PAIRS], "class_names": ["y"]}, "uses the class x"),
    ({"labels": "x"}, "is not of the form"),
    ({"labels": 5}, "is not of the form"),
    (True, "is not of the form"),
]


@pytest.mark.parametrize(("content", "words"), WRONG)
def test_labels_that_could_mean_something_else_are_refused_in_one_sentence(content, words):
    with pytest.raises(UserError, match=words) as caught:
        read(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "kind", "dim", "names"),
    [
        ({"labels": [["a.png", 0], ["./b.png", 2]]}, "3 classes, 1 of them without images: 0 1, 2 1", 3, []),
        ({"a.png": "tom", "b.png": "rex"}, "2 classes: rex 1, tom 1", 2, ["rex", "tom"]),
        ({"labels": {"a.png": True, "b.png": False}}, "2 classes: false 1, true 1", 2, ["false", "true"]),
        (
            {"labels": {"a.png": [1, 0], "b.png": [0, -2.5]}, "class_names": ["x", "y"]},
            "2 numbers: x 0 to 1",
            2,
            ["x", "y"],
        ),
    ],
)
@pytest.mark.parametrize("folder", ["", "faces/", "./"])
def test_the_tool_check_and_training_agree_and_conversions_keep_the_labels(tmp_path, content, kind, dim, names, folder):
    shadows = {"__MACOSX/faces/._a.png": b"x", "__MACOSX/._dataset.json": b"x"} if folder else {}
    files = {
        "a.png": encode(noise_image(0, 8, 8)),
        "b.png": encode(noise_image(1, 8, 8)),
        "dataset.json": json.dumps(content).encode(),
    }
    source = write_zip(tmp_path / "in.zip", {f"{folder}{name}": data for name, data in files.items()} | shadows)
    result = CliRunner().invoke(dataset_tool.main, ["--source", str(source), "--dest", str(tmp_path / "out.zip")])
    assert kind.partition(":")[0] in result.output
    read = []
    for path in (source, tmp_path / "out.zip"):
        assert kind in CliRunner().invoke(dataset_tool.main, ["check", str(path)]).output
        images = ImageArchive(path, use_labels=True)
        assert (images.label_dim, images.class_names) == (dim, names)
        read.append([images.label(i).tolist() for i in range(2)])
    assert read[0] == read[1]


def test_labels_of_a_part_of_the_images_are_not_passed_over_in_silence(tmp_path):
    files = {f"{part}/a.png": encode(noise_image(0)) for part in "xy"} | {"x/dataset.json": b'{"a.png": 1}'}
    options = ["--source", write_folder(tmp_path / "in", files), "--dest", tmp_path / "out.zip"]
    assert "labels: x/dataset.json is not" in CliRunner().invoke(dataset_tool.main, list(map(str, options))).output


def test_a_labels_file_is_read_for_a_folder_of_images(tmp_path):
    write_folder(tmp_path / "in", {f"x/{name}": encode(noise_image(0)) for name in IMAGES})
    (tmp_path / "l.csv").write_bytes(WRITTEN.encode())
    options = ["--source", tmp_path / "in", "--dest", tmp_path / "out.zip", "--labels", tmp_path / "l.csv"]
    result = CliRunner().invoke(dataset_tool.main, list(map(str, options)))
    assert "file names in image, labels in label" in result.output
    assert "a.png is taken for x/a.png" in result.output
    assert ImageArchive(tmp_path / "out.zip", use_labels=True).label_dim == 11
