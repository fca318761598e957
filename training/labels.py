"""Read labels from a dataset.json, a CSV or the names of folders, for dataset_tool, training and metrics alike.

A Table holds labels as someone wrote them. Matched with the names of images it gives Labels: a class number or a vector
for each image.
"""

import contextlib
import csv
import functools
import io
import json
import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from dnnlib.console import UserError, count, shorten

MAX_CLASSES = 100_000  # a one-hot vector of this length is 0.4 MB per image; more is a mistake in the labels
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
ENDING = re.compile(r"\.[a-z][a-z0-9]{1,4}$", re.IGNORECASE)
LABEL_COLUMNS = ("label", "labels", "class", "category", "target")
ROW_NUMBERS = ("", "id", "index", "unnamed: 0")  # columns that spreadsheets and pandas add
FORM = '{"labels": [["00000/img00000000.png", 3], ...]}'


@dataclass(frozen=True)
class Labels:
    """The labels of images, in their order.

    values  int64 [n] class numbers, or float64 [n,L] vectors
    names   of the classes, or of the numbers in a vector; [] if they have none
    notes   lines on how they were read
    lost    a sentence on labels of files that are not there, or ""
    """

    values: np.ndarray
    names: list[str]
    notes: list[str]
    lost: str

    @functools.cached_property
    def dim(self) -> int:
        """Return the length of a label: L, or the largest class number + 1."""
        return self.values.shape[1] if self.values.ndim == 2 else int(self.values.max()) + 1

    def vector(self, i: int) -> np.ndarray:
        """Return float32 [dim]: label number i, one-hot if it is a class."""
        if self.values.ndim == 2:
            return self.values[i].astype(np.float32)
        return (np.arange(self.dim) == self.values[i]).astype(np.float32)

    def kind(self) -> str:
        """Return `3 classes` or `vectors of 2 numbers`."""
        if self.values.ndim == 2:
            return f"vectors of {count(self.dim, 'number')}"
        empty = self.dim - len(np.unique(self.values))
        without = f", {empty:,} of them without images" if empty else ""
        return f"{count(self.dim, 'class', 'classes')}{without}"

    def detail(self) -> str:
        """Return `cat 120, dog 80`: the classes with their images; of vectors, the names or ranges of the numbers."""
        names = self.names or [str(number) for number in range(self.dim)]
        if self.values.ndim == 2:
            ranges = zip(names, self.values.min(0), self.values.max(0), strict=True)
            return shorten([f"{name} {least:g} to {most:g}" for name, least, most in ranges])
        found, times = np.unique(self.values, return_counts=True)
        return shorten([f"{names[number]} {n:,}" for number, n in zip(found, times, strict=True)])


@dataclass(frozen=True)
class Table:
    """Rows of cells, all of one length: a column of file names, and columns of labels.

    A cell is a text, a number, a vector, or empty (None, ""). The first row may be a header.

    where        names the file in errors
    class_names  of class 0, 1, …; if none are given, names in the labels are numbered in natural order
    """

    where: str | os.PathLike
    rows: list[list]
    class_names: list[str] = field(default_factory=list)

    def match(self, images: list[str]) -> Labels:
        """Return the labels of `images`, which are names with forward slashes.

        Names match if they differ in slashes, `./`, Unicode form (NFC, NFD) or the case of the ending only. If no name
        matches so, folders above and then endings are left out of the comparison, as far as names stay distinct.
        Raises UserError if not every image has one label, or labels are not of one kind.
        """
        column, normalise, place = self._match_names(images)
        header = self.rows[0] if self._begins_with_header(column, normalise, place) else None
        rows, absent = [], []
        for row in self.rows[header is not None :]:
            i = place.get(normalise(row[column])) if isinstance(row[column], str) else None
            if i is None:
                absent.append(row[column])
            else:
                rows.append((i, row))
        chosen = self._label_columns(column, header, [row for _, row in rows])
        cells = [None] * len(images)
        for i, row in rows:
            cell = tidy(row[chosen[0]]) if len(chosen) == 1 else vector_of(row, chosen)
            if cells[i] is not None and cells[i] != cell:
                raise UserError(f"{self.where} labels {images[i]} as both {cells[i]} and {cell}; keep one of the two")
            cells[i] = cell
        missing = [images[i] for i, cell in enumerate(cells) if cell is None]
        if missing:
            example = f"; it labels e.g. {absent[0]}, which is not there" if absent else ""
            raise UserError(
                f"{self.where} has no label for {missing[0]} ({count(len(missing), 'image')} without a label, of "
                f"{len(images):,}{example}); label every image, or work without labels"
            )
        values, names = self._values(cells, images)
        if values.ndim == 2 and not names and header and len(chosen) > 1:
            names = [header[c] for c in chosen]
        notes = []
        if header:
            taken = shorten([header[c] for c in chosen])
            notes.append(f"columns of {self.where}: file names in {header[column]}, labels in {taken}")
        i, row = rows[0]
        if clean(row[column]) != clean(images[i]):
            notes.append(f"names in {self.where}: {row[column]} is taken for {images[i]}, and so on")
        lost = ""
        if absent:
            files = count(len(absent), "file that is", "files that are")
            lost = f"{self.where} labels {files} not there, e.g. {absent[0]}"
        return Labels(values, names, notes, lost)

    def _match_names(self, images: list[str]) -> tuple[int, Callable[[str], str], dict[str, int]]:
        """Return the column of file names, how to normalise them, and the image of each normalised name."""
        texts = [{cell for cell in column if isinstance(cell, str)} for column in zip(*self.rows, strict=True)]
        exact = {name: i for i, name in enumerate(images)}
        for c, column in enumerate(texts):
            if exact.keys() <= column:  # in a tenth of the time
                return c, str, exact
        for normalise in ways(images):
            place = {normalise(name): i for i, name in enumerate(images)}
            if len(place) == len(images):
                times = [len({normalise(cell) for cell in column} & place.keys()) for column in texts]
                if any(times):
                    return times.index(max(times)), normalise, place
        rows = self.rows[bool(self.rows) and not any(map(is_file_name, self.rows[0])) :]
        if not rows:
            header = f", only the header {', '.join(map(str, self.rows[0]))}" if self.rows else ""
            raise UserError(f"{self.where} holds no labels{header}; add a row per image, or work without labels")
        name = next(filter(is_file_name, rows[0]), rows[0][0])
        raise UserError(
            f"{self.where} labels {count(len(rows), 'file')}, e.g. {name}, and none of the "
            f"{count(len(images), 'image')}, e.g. {images[0]}; bring the names into agreement, or work without labels"
        )

    def _begins_with_header(self, column: int, normalise: Callable[[str], str], place: dict[str, int]) -> bool:
        cells = self.rows[0]
        return all(isinstance(cell, str) and not is_number(cell) for cell in cells) and not (
            normalise(cells[column]) in place or is_file_name(cells[column])
        )

    def _label_columns(self, column: int, header: list[str] | None, rows: list[list]) -> list[int]:
        """Return which columns hold the labels of `rows`: one, or several with the numbers of vectors."""
        filled = {c: [row[c] for row in rows if row[c] not in (None, "")] for c in range(len(rows[0])) if c != column}
        columns = [c for c in filled if filled[c]]
        if header:
            named = [c for c in columns if header[c].casefold() in LABEL_COLUMNS]
            if len(named) == 1:
                return named
            counted = [c for c in columns if header[c].casefold() in ROW_NUMBERS and distinct(filled[c])]
            columns = [c for c in columns if c not in counted] or columns
        if not columns:
            raise UserError(f"{self.where} has file names and no labels; add a column with a label for each")
        if len(columns) > 1 and not all(is_number(cell) for c in columns for cell in filled[c]):
            found = ", ".join(f"{header[c] if header else f'column {c + 1}'} ({filled[c][0]}, …)" for c in columns)
            raise UserError(
                f"{self.where} has several columns that may be labels: {found}; name one of them label, or keep only "
                "columns of numbers, which make vectors"
            )
        return columns

    def _values(self, cells: list, images: list[str]) -> tuple[np.ndarray, list[str]]:
        """Return the values of complete labels, and their names."""
        names, what = self.class_names, ("class", "classes")
        if all(isinstance(cell, list) for cell in cells):
            values, what = self._vectors(cells, images), ("number", "numbers")
            dim = values.shape[1]
        elif all(map(is_number, cells)):
            values = self._class_numbers(np.array(cells, dtype=np.float64), images)
            dim = int(values.max()) + 1
        elif all(isinstance(cell, str) for cell in cells):
            names = names or sorted(set(cells), key=natural)
            dim, number = len(names), {name: i for i, name in enumerate(names)}
            if unknown := sorted(set(cells) - number.keys()):
                raise UserError(f"{self.where} uses the class {unknown[0]}, which its class_names lack; add it there")
            if dim > MAX_CLASSES:
                raise UserError(f"{self.where} has {dim:,} names of classes; at most {MAX_CLASSES:,} are possible")
            values = np.array([number[cell] for cell in cells])
        else:
            kinds = {kind_of(cell): f"{name} {cell}" for name, cell in zip(images, cells, strict=True)}
            raise UserError(
                f"{self.where} has {' and '.join(sorted(kinds))} ({'; '.join(kinds.values())}); labels must be class "
                "numbers, names, or vectors of one length, the same for all images"
            )
        if names and (len(names) < dim or (values.ndim == 2 and len(names) > dim)):
            raise UserError(f"{self.where} names {count(len(names), *what)} and uses {dim}; name each, or none")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{self.where} names two classes {twice}; give each a name of its own")
        return values, names

    def _vectors(self, cells: list[list], images: list[str]) -> np.ndarray:
        first = cells[0]
        for name, cell in zip(images, cells, strict=True):
            if len(cell) != len(first) or not cell:
                raise UserError(
                    f"{self.where} labels {images[0]} with {len(first)} numbers and {name} with {len(cell)}; "
                    "vectors of one length are needed"
                )
            if not all(isinstance(x, int | float) and abs(x) < 1e38 for x in cell):  # finite in float32
                raise UserError(f"{self.where} labels {name} as {cell}; vectors must hold finite numbers")
        return np.array(cells, dtype=np.float64)

    def _class_numbers(self, numbers: np.ndarray, images: list[str]) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            wrong = ~((numbers == np.floor(numbers)) & (numbers >= 0) & (numbers < MAX_CLASSES))
        if wrong.any():
            first = int(np.argmax(wrong))
            raise UserError(
                f"{self.where} labels {images[first]} as {numbers[first]:g}; classes are whole numbers from 0 to "
                f"{MAX_CLASSES - 1}, or names; other numbers make vectors of one length, such as [0.5]"
            )
        return numbers.astype(np.int64)


def check_class_names(of_network: list[str], found: list[str], where: str | os.PathLike) -> None:
    """Raise UserError when images have names of classes, in `where`, that are not those of a network."""
    if of_network and found and of_network != found:
        old, new = next(pair for pair in zip(of_network, found, strict=True) if pair[0] != pair[1])
        raise UserError(
            f"the classes of {where} are others than the network's, e.g. {new} instead of {old}; number them as in the "
            "archive that it was trained on"
        )


# --- cells ------------------------------------------------------------------------------------------------------------


def tidy(cell: object) -> object:
    """Return a label: a vector as a list, a number, a name in NFC, or None if the cell is empty."""
    if isinstance(cell, bool):
        return json.dumps(cell)
    if not isinstance(cell, str):
        return cell
    text = unicodedata.normalize("NFC", cell.strip())
    if text.startswith("["):
        with contextlib.suppress(ValueError):
            return load_json(text)
    return text or None


def vector_of(row: list, columns: list[int]) -> list[float] | None:
    """Return the numbers in these columns, or None if a cell is empty."""
    cells = [row[c] for c in columns]
    return None if any(cell in (None, "") for cell in cells) else [float(cell) for cell in cells]


def is_number(cell: object) -> bool:
    """Tell whether a cell is a number, or a text that is one. Unlike float(), refuses 1_000 and other scripts."""
    if isinstance(cell, str):
        return NUMBER.fullmatch(cell) is not None
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def kind_of(cell: object) -> str:
    return {list: "vectors", str: "names"}.get(type(cell), "numbers" if is_number(cell) else "other values")


def distinct(cells: list) -> bool:
    return all(map(is_number, cells)) and len(set(cells)) == len(cells)


def natural(name: str) -> tuple:
    """Return a key that sorts `class 2` before `class 10`."""
    pieces = re.split(r"([0-9]+)", name)
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], name


# --- file names -------------------------------------------------------------------------------------------------------


def clean(name: str) -> str:
    """Return a name in NFC, with forward slashes, without `./`, with its ending in lower case."""
    path = posixpath.normpath(unicodedata.normalize("NFC", name.replace("\\", "/")))
    return ENDING.sub(lambda match: match[0].lower(), path)


def last_parts(name: str, parts: int, ending: bool) -> str:
    """Return the last `parts` of a path, with or without the file's ending."""
    path = "/".join(clean(name).split("/")[-parts:])
    return path if ending else ENDING.sub("", path)


def ways(images: list[str]) -> Iterator[Callable[[str], str]]:
    """Yield functions that normalise names for a comparison, the strictest first."""
    yield clean
    yield str
    deepest = max(name.count("/") for name in images) + 1
    for ending in (True, False):
        for parts in range(deepest, 0, -1):
            yield functools.partial(last_parts, parts=parts, ending=ending)


def is_file_name(cell: object) -> bool:
    return isinstance(cell, str) and ENDING.search(cell) is not None and not is_number(cell)


def common_folder(names: list[str]) -> str:
    """Return the folder, such as `a/b/`, that all of these files are below; "" if there is none."""
    folder = posixpath.commonpath([posixpath.dirname(min(names)), posixpath.dirname(max(names))])
    return f"{folder}/" if folder else ""


# --- sources of labels ------------------------------------------------------------------------------------------------


def parse_json(data: bytes, where: str | os.PathLike) -> Table | None:
    """Parse a dataset.json; None if its labels are null.

    Reads {"labels": …}, or the labels alone: [name, label] each, {"file": name, "label": label} each, or a mapping from
    names to labels. Raises UserError for anything else.
    """
    try:
        content = load_json(data, object_pairs_hook=unique)
        labels, names = content, []
        if content in ([], {}):
            raise ValueError("it is empty")
        if isinstance(content, dict):
            if (names := content.pop("class_names", None)) is None:
                names = []
            labels = content.get("labels", content)
        if labels is None:
            return None
        if isinstance(labels, dict):
            labels = [list(item) for item in labels.items()]
        elif isinstance(labels, list) and labels and all(isinstance(entry, dict) for entry in labels):
            keys = list(dict.fromkeys(key for entry in labels for key in entry))
            labels = [keys, *([entry.get(key) for key in keys] for entry in labels)]
        if not isinstance(labels, list) or not all(isinstance(row, list) for row in labels):
            raise ValueError("labels are neither a list of pairs nor a mapping")
        if labels and {len(row) for row in labels} != {max(2, len(labels[0]))}:
            raise ValueError("its rows are of several lengths")
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("class_names is not a list of texts")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not of the form {FORM} ({error}); fix it, or remove it to work without labels"
        ) from error
    return Table(where, labels, [unicodedata.normalize("NFC", name) for name in names])


def load_json(text: str | bytes, **options) -> object:
    """Parse JSON; whole numbers of more than 15 digits become floats. Raises ValueError."""
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 16 else float(digits), **options)


def unique(pairs: list[tuple[str, object]]) -> dict:
    """Return a dict of pairs. Raises ValueError when a key is given twice, with different values."""
    content = {}
    for key, value in pairs:
        if content.setdefault(key, value) != value:
            raise ValueError(f"{key} is given twice")
    return content


def parse_csv(data: bytes, where: str | os.PathLike) -> Table:
    """Parse a CSV with commas, semicolons or tabs. Raises UserError."""
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds zero bytes")
        tables = [split_rows(text, delimiter) for delimiter in "\t;,"]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{where} is not a CSV in UTF-8 ({error}); save it as one, or give a .json file") from error
    widths = [{len(row) for _, row in rows} for rows in tables]
    best = max(range(3), key=lambda i: (len(widths[i]) == 1 and widths[i] != {1}, max(widths[i], default=0)))
    rows = tables[best]
    for line, row in rows:
        if len(row) != len(rows[0][1]) or len(row) == 1:
            raise UserError(
                f"{where}, line {line}: {count(len(row), 'column')}, and {len(rows[0][1])} in the first line; each "
                "line needs a file name and a label, with a comma, semicolon or tab between them"
            )
    return Table(where, [row for _, row in rows])


def split_rows(text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Return (line, cells) of each row that is not empty. Without commas in between, 0,5 is 0.5."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    if delimiter == ",":
        return rows
    return [(line, [re.sub(r"^([+-]?\d+),(\d+)$", r"\1.\2", cell) for cell in row]) for line, row in rows]


def label_by_folder(images: list[str], where: str | os.PathLike) -> Table:
    """Number the folders below the common folder of all images, in natural order. Raises UserError."""
    above = common_folder(images)
    folders = [name.removeprefix(above).rpartition("/")[0].split("/")[0] for name in images]
    if not all(folders):
        if not any(folders) and above:
            raise UserError(f"all images of {where} are in {above[:-1]}; give the folder above the classes")
        loose = images[folders.index("")]
        raise UserError(f"{loose} is in no folder of {where}; put each image into the folder of its class")
    names = sorted(set(folders), key=natural)
    number = {name: i for i, name in enumerate(names)}
    rows = [[image, number[folder]] for image, folder in zip(images, folders, strict=True)]
    return Table(where, rows, [unicodedata.normalize("NFC", name) for name in names])
