"""Read the files that authors released without executing anything in them.

CIPS's are torch files of tensors and plain values (torch_utils.checkpoint). The others, `.pkl`, are pickled objects.
Their reader is Python's own unpickler with three parts replaced: `find_class` knows a score of names and returns inert
stand-ins; `dispatch` holds only the opcodes of released files; the opcodes that fill a dict or a set, or set an
object's state, check their operands. Everything else is refused.

The cost of a hostile file is bounded: `LIMIT` bytes, `STEPS` opcodes, tensors no larger than the file, no storage read
twice, no module visited twice.
"""

import io
import math
import pickle
import pickletools
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dnnlib.console import UserError
from torch_utils import checkpoint
from training.networks.official import discriminator_from_official, generator_from_official

KINDS = "CREPS, StyleGAN2, CIPS or INR-GAN"
LIMIT = 4 << 30  # bytes; the largest released file has less than half of that
STEPS = 1_000_000  # opcodes; networks need about 140 per tensor. A million cost 2 s and 150 MiB at most.
DEPTH = 16  # of nested modules; released ones have 4
MAKERS = {
    "G": generator_from_official,
    "D": discriminator_from_official,
    "G_ema": generator_from_official,
}
CIPS = {"G": "g", "D": "d", "G_ema": "g_ema"}  # the names in its training states; a file may also be a bare G_ema


class Released(NamedTuple):
    """One network of a released file: the arguments of `generator_from_official` or `discriminator_from_official`."""

    tensors: dict[str, Tensor]  # parameters and buffers by the names that state_dict() would give
    config: dict  # its settings, flattened: mapping_kwargs' num_layers is mapping_layers


def is_released(path: Path) -> bool:
    """Check that a file is of the kinds that authors released: a .pkl, or a torch file that is no training state."""
    return path.suffix == ".pkl" or (path.suffix == ".pt" and checkpoint.is_foreign(path))


def read_released(path: str | Path, wanted: tuple[str, ...] = tuple(MAKERS)) -> dict[str, Released]:
    """Read the `wanted` networks of a file, by name. Executes nothing.

    Raises UserError when the file is missing, damaged, too large, or contains anything that released files do not.
    """
    path = Path(path)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; give a file that the authors released")
    size = path.stat().st_size
    if size > LIMIT:
        raise UserError(
            f"{path} has {size / 2**30:.1f} GiB, and no released network has more than {LIMIT >> 30}; "
            "give a file that the authors released"
        )
    try:
        if path.suffix == ".pt":
            return _read_cips(path, wanted)
        return _ReleasedFile(path.read_bytes()).networks(wanted)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); copy or download it again") from error
    except MemoryError as error:
        raise UserError(
            f"{path} needs twice its {size / 2**30:.1f} GiB of memory; use a machine that has it"
        ) from error
    except _Refused as error:
        raise UserError(f"{path} is not a released network file: {error}; give a file of {KINDS}") from error
    # The unpickler raises many kinds of exception for damaged bytes.
    except Exception as error:
        raise UserError(f"{path} is a damaged pickle ({type(error).__name__}); download it again") from error


def load_released(path: str | Path, wanted: tuple[str, ...] = tuple(MAKERS)) -> dict[str, nn.Module]:
    """Load the `wanted` networks of a file as modules in eval mode. G_ema, the average of G, must be among them.

    Raises UserError as `read_released`, when G_ema is missing, and when tensors do not fit the file's settings.
    """
    networks = {}
    for name, network in read_released(path, wanted).items():
        try:
            networks[name] = MAKERS[name](*network)
        except UserError as error:
            raise UserError(f"{name} in {path} cannot be used: {error}; give a file of {KINDS}") from error
    if "G_ema" not in networks:
        raise UserError(
            f"{path} holds no G_ema, the average of the generator; give a file with it, as the authors released"
        )
    return networks


class _Refused(Exception):
    """Raised with a clause that says how the file differs from a released one."""


def _read_cips(path: Path, wanted: tuple[str, ...]) -> dict[str, Released]:
    content = _check(checkpoint.read(path, "an intact file of CIPS"), dict, "its content")
    found = {"G_ema": content} if "emb.input" in content else {n: content[x] for n, x in CIPS.items() if x in content}
    if not found:
        raise _Refused("it holds neither a training state of this project nor networks of CIPS")
    room = path.stat().st_size
    for name, tensors in found.items():
        for key, t in _check(tensors, dict, name).items():
            if not (isinstance(key, str) and isinstance(t, Tensor) and t.dtype in (torch.float32, torch.float16)):
                raise _Refused(f"{name} holds other things than names and tensors")
            room -= t.numel() * t.element_size()
            if room < 0 or t.layout is not torch.strided or t.device.type != "cpu":
                raise _Refused("it has tensors that it does not store in full")
    return {name: Released(found[name], {}) for name in wanted if name in found}


# --- stand-ins -------------------------------------------------------------------------------------------------------


class _Module:
    """A network or a layer as data: its `__dict__`."""

    state: dict | None = None


class _Dict(dict):
    """An OrderedDict or EasyDict."""

    def __init__(self):  # without items: they are added one by one, checked
        super().__init__()


class _NumpyType(NamedTuple):
    code: str


class _Storage(NamedTuple):
    data: memoryview
    dtype: torch.dtype

    @property
    def count(self) -> int:
        return len(self.data) // self.dtype.itemsize


class _View(NamedTuple):
    """A tensor before it is made: elements of a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.size)

    @property
    def end(self) -> int:
        """Return the index after the last element in the storage, if there is any."""
        return self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True)) + 1


def _check(value: object, kind: type, what: str):
    if not isinstance(value, kind):
        raise _Refused(f"{what} is not a {kind.__name__}")
    return value


# --- the unpickler ---------------------------------------------------------------------------------------------------

_OPCODES = """
    PROTO STOP FRAME MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS
    BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID
"""


class _Dispatch(dict):
    """Maps every allowed opcode to its method, and counts look-ups as steps."""

    def __init__(self, reader: type["_Unpickler"], steps: Iterator):
        for opcode in _OPCODES.split():
            code = getattr(pickle, opcode)[0]
            self[code] = getattr(reader, pickle._Unpickler.dispatch[code].__name__)
        self.steps = steps

    def __getitem__(self, code: int):
        if next(self.steps, None) is None:
            raise _Refused(f"it has more than {STEPS} opcodes")
        return super().__getitem__(code)

    def __missing__(self, code: int):
        opcode = pickletools.code2op.get(chr(code))
        raise _Refused(f"it uses the opcode {opcode.name if opcode else hex(code)}, which no released file does")


class _Unpickler(pickle._Unpickler):
    """The standard library's unpickler in Python, whose opcodes can be replaced."""

    def __init__(self, file: io.BytesIO, names: dict[tuple[str, str], object], steps: Iterator):
        super().__init__(file)
        self.names = names
        self.dispatch = _Dispatch(type(self), steps)

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.names:
            raise _Refused(f"it names {f'{module}.{name}'[:80]!r}, which no released file does")
        return self.names[module, name]

    def persistent_load(self, pid: object) -> object:
        # ("storage", type, key, device, count, view), in a torch file only.
        kind, dtype, key, _device, count, view = _check(pid, tuple, "a reference to objects outside of the file")
        if kind != "storage" or type(key) is not str or type(count) is not int or view is not None:
            raise _Refused("a torch file in it holds other things than a storage")
        return key, _check(dtype, torch.dtype, "the type of a storage"), count

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        _check_keys(self.stack[-1], [key])[key] = value

    def load_setitems(self):
        items = self.pop_mark()
        _check_keys(self.stack[-1], items[::2]).update(zip(items[::2], items[1::2], strict=True))

    def load_additems(self):
        items = self.pop_mark()
        _check_keys(self.stack[-1], items).update(items)

    def load_build(self):
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is _Module and target.state is None:
            target.state = _check(state, dict, "the state of a layer")
        elif type(target) is _NumpyType:
            # (version, byte order, subarray, names, fields, size, alignment, flags); native numbers leave the rest out.
            if type(state) is not tuple or state[1] not in ("<", "|") or set(map(type, state[2:5])) != {type(None)}:
                raise _Refused("it has a number type other than plain little-endian ones")
        elif type(target) is not _Dict:  # attributes of an OrderedDict or EasyDict hold nothing that we read
            raise _Refused("it sets the state of an object that has none")


def _check_keys(target: object, keys: list):
    """Return `target`. Keys other than text and small numbers may all have one hash, and a dict of them takes hours."""
    if type(target) not in (dict, _Dict, set):
        raise _Refused(f"it puts items into a {type(target).__name__}")
    if not all(type(key) is str or (type(key) is int and 0 <= key < 1 << 20) for key in keys):
        raise _Refused(f"it has a {type(target).__name__} of other things than names")
    return target


class _ReleasedFile:
    """The content of a file: networks by name, as nested layers."""

    def __init__(self, data: bytes):
        self.steps = iter(range(STEPS))
        self.room = self.stored = len(data)  # bytes that may still become tensors, and be read as torch files
        names = {
            ("training.networks_creps", "SynthesisInput"): _Module,
            ("torch.nn.modules.container", "Sequential"): _Module,
            ("torch.nn.modules.container", "ModuleList"): _Module,
            # Settings that layers of INR-GAN keep beside those of the network; nothing in them is read.
            ("omegaconf.dictconfig", "DictConfig"): _Module,
            ("omegaconf.nodes", "AnyNode"): _Module,
            ("omegaconf.base", "Metadata"): _Module,
            ("omegaconf.base", "ContainerMetadata"): _Module,
            ("collections", "defaultdict"): lambda _factory: _Dict(),
            ("typing", "Any"): "Any",
            ("builtins", "dict"): "dict",
            ("collections", "OrderedDict"): _Dict,
            ("dnnlib.util", "EasyDict"): _Dict,
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): self.layer,
            ("torch._utils", "_rebuild_tensor_v2"): self.view,
            ("torch._utils", "_rebuild_parameter"): self.parameter,
            ("torch.storage", "_load_from_bytes"): self.storage,
            ("numpy", "dtype"): self.numpy_type,
            ("numpy.core.multiarray", "scalar"): self.numpy_number,
            ("numpy._core.multiarray", "scalar"): self.numpy_number,
        }
        file = io.BytesIO(data)
        self.content = _Unpickler(file, names, self.steps).load()
        if file.read(1):
            raise _Refused("something follows the pickle")

    # --- functions that a file may call ------------------------------------------------------------------------------

    def layer(self, meta) -> _Module:
        # Keys: type, version, module_src, class_name, state. The source of the class is not used.
        if _check(meta, dict, "a layer").get("type") != "class":
            raise _Refused("it has a layer of unknown type")
        layer = _Module()
        layer.state = _check(meta.get("state"), dict, "the state of a layer")
        return layer

    def numpy_type(self, code, *_align_and_copy) -> _NumpyType:
        if not re.fullmatch(r"[iu][1248]|f[248]|b1", _check(code, str, "a number type")):
            raise _Refused(f"it has the number type {code[:80]!r}")
        return _NumpyType(code)

    def numpy_number(self, kind, data) -> bool | int | float:
        code = _check(kind, _NumpyType, "the type of a number").code
        return np.frombuffer(data, "<" + code, count=1)[0].item()

    def storage(self, data) -> _Storage:
        # One byte string in the memo could be read a million times.
        self.stored -= len(_check(data, bytes, "a storage"))
        if self.stored < 0:
            raise _Refused("it reads the same storage again and again")
        return _torch_file(data, self.steps)

    def view(self, storage, offset, size, stride, _requires_grad, _hooks, _metadata=None) -> _View:
        view = _View(_check(storage, _Storage, "the storage of a tensor"), offset, size, stride)
        for sizes in (size, stride):
            _check(sizes, tuple, "the shape of a tensor")
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in (offset, *size, *stride)) or len(size) != len(stride):
            raise _Refused("it has a tensor with an impossible shape")
        # An expanded tensor could claim any size with one number stored; released ones are all stored in full.
        if len(size) > 8 or view.count > storage.count or (view.count and view.end > storage.count):
            raise _Refused("it has a tensor larger than its storage")
        return view

    def parameter(self, view, _requires_grad, _hooks) -> _View:
        return _check(view, _View, "a parameter")

    # --- networks ----------------------------------------------------------------------------------------------------

    def networks(self, wanted: tuple[str, ...]) -> dict[str, Released]:
        content = _check(self.content, dict, "its content")
        found = [name for name in wanted if content.get(name) is not None]
        return {name: Released(self.tensors(content[name]), _settings(content[name])) for name in found}

    def tensors(self, network: _Module) -> dict[str, Tensor]:
        return {name: self.tensor(view) for name, view in _flatten(network, "", set())}

    def tensor(self, view: _View) -> Tensor:
        if not view.count:
            return torch.empty(view.size, dtype=view.storage.dtype)
        width = view.storage.dtype.itemsize
        self.room -= max(view.end - view.offset, view.count) * width
        if self.room < 0:
            raise _Refused("its tensors are larger than the file")
        # A copy, so that the tensor is aligned, may be written to, and does not keep the whole file in memory.
        stored = bytearray(view.storage.data[view.offset * width : view.end * width])
        return torch.frombuffer(stored, dtype=view.storage.dtype).as_strided(view.size, view.stride).contiguous()


def _flatten(module: object, prefix: str, seen: set[int]) -> Iterator[tuple[str, _View]]:
    """Yield (name, view) of the parameters and buffers of a module and its parts, as state_dict() names them."""
    state = _check(_check(module, _Module, "a network").state, dict, "the state of a layer")
    if id(module) in seen or prefix.count(".") > DEPTH:
        raise _Refused("one of its layers holds itself or is nested too deep")
    seen.add(id(module))
    parameters, buffers, parts = (
        _check(state.get(kind, {}), dict, f"the {kind} of a layer") for kind in ("_parameters", "_buffers", "_modules")
    )
    for name in (*parameters, *buffers, *parts):
        if not re.fullmatch(r"\w{1,64}", _check(name, str, "the name of a layer"), re.ASCII):
            raise _Refused(f"it has a layer or tensor named {name[:80]!r}")
    unsaved = _check(state.get("_non_persistent_buffers_set", set()), set, "names of buffers")
    for name, view in (*parameters.items(), *((n, v) for n, v in buffers.items() if n not in unsaved)):
        if view is not None:
            yield prefix + name, _check(view, _View, "a parameter or buffer")
    for name, part in parts.items():
        if part is not None:
            yield from _flatten(part, f"{prefix}{name}.", seen)


def _settings(network: _Module) -> dict:
    """Return a network's arguments, with those of its parts (`synthesis_kwargs`, …) merged in."""
    given = _check(network.state.get("_init_kwargs", {}), dict, "the settings of a network")
    parts = {name: value for name, value in given.items() if isinstance(value, dict)}
    settings = {}
    for name, part in parts.items():
        settings |= {"mapping_layers": part.get("num_layers")} if name == "mapping_kwargs" else part
    settings |= given
    # Only what official.py may use: error messages would print a huge text.
    return {
        name: value
        for name, value in settings.items()
        if type(value) in (bool, int, float) or (type(value) is str and len(value) <= 64)
    }


_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _torch_file(data: bytes, steps: Iterator) -> _Storage:
    """Read a storage in torch's format from before its zip files: five pickles, a count, and the bytes.

    torch.load(weights_only=True) would execute nothing either, but allocate as much memory as the bytes claim.
    """
    file = io.BytesIO(data)
    names = {("torch", name): dtype for name, dtype in _DTYPES.items()}
    magic, version, _sizes, stored, keys = (_Unpickler(file, names, steps).load() for _ in range(5))
    if magic != 0x1950A86A20F9469CFC6C or version != 1001:
        raise _Refused("a storage in it is not a torch file of the old format")
    key, dtype, count = _check(stored, tuple, "the content of a torch file in it")
    (number,) = struct.unpack("<q", file.read(8))
    if keys != [key] or count != number or count * dtype.itemsize != len(data) - file.tell():
        raise _Refused("a storage in it is not as long as it says")
    return _Storage(memoryview(data)[file.tell() :], dtype)
