"""The authors' released `.pkl` files, read without running anything in them.

A pickle is a program for a stack machine that can import any name, call it, and set any attribute. Below is such a
machine that can do none of it. Its opcodes build plain values; a name is looked up in a table and stays a name; a
"call" of one of a dozen names is answered by a function of this file that checks what it is given and keeps it.
Whatever is not written here is refused. Filtering Python's own unpickler would leave its registry of extensions,
`__setstate__`, setattr and allocations of whatever size a file claims, each to be closed by hand.

What a hostile file can cost is bounded too: by `LIMIT` bytes and `STEPS` opcodes, tensors no larger than the file, no
byte string read twice, no module met twice. Nothing here recurses deeper than a network does.
"""

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
from training.networks.official import discriminator_from_official, generator_from_official

LIMIT = 4 << 30  # bytes; the largest released file has less than half
STEPS = 1_000_000  # opcodes; networks need about 140 per tensor. A million cost 2 s and 150 MiB at most.
DEPTH = 16  # of modules in modules, and the released ones go to 4
MAKERS = {
    "G": generator_from_official,
    "D": discriminator_from_official,
    "G_ema": generator_from_official,
}


class Released(NamedTuple):
    """One network of a released file, as `generator_from_official` and its twin take it."""

    tensors: dict[str, Tensor]  # parameters and buffers by the names that state_dict() would give
    config: dict  # the settings it was made with, flat: mapping_kwargs' num_layers is mapping_layers


def read_released(path: str | Path, wanted: tuple[str, ...] = tuple(MAKERS)) -> dict[str, Released]:
    """The `wanted` networks that the file holds, by name. Executes nothing.

    Raises UserError when the file is missing, damaged, too large, or has anything in it that released files do not.
    """
    path = Path(path)
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; give a .pkl that the authors released")
    size = path.stat().st_size
    if size > LIMIT:
        raise UserError(
            f"{path} has {size / 2**30:.1f} GiB, and no released network has more than {LIMIT >> 30}; "
            "give a .pkl that the authors released"
        )
    try:
        return _ReleasedFile(memoryview(path.read_bytes())).networks(wanted)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); copy or download it again") from error
    except MemoryError as error:
        raise UserError(
            f"{path} needs twice its {size / 2**30:.1f} GiB of memory; use a machine that has it"
        ) from error
    except _Refused as error:
        raise UserError(f"{path} is no released network file: {error}; download it from the authors again") from error
    # The checks that keep us safe have sentences of their own. What other wrong bytes raise (an empty stack, an empty
    # memo, text that is no UTF-8) means one thing.
    except Exception as error:
        raise UserError(f"{path} is a damaged pickle ({type(error).__name__}); download it again") from error


def load_released(path: str | Path, wanted: tuple[str, ...] = tuple(MAKERS)) -> dict[str, nn.Module]:
    """The `wanted` networks that the file holds as our modules, in eval mode. G_ema, the average of G, is among them.

    Raises UserError as `read_released`, when G_ema is missing, and when tensors do not fit the settings they came with.
    """
    networks = {}
    for name, network in read_released(path, wanted).items():
        try:
            networks[name] = MAKERS[name](*network)
        except UserError as error:
            raise UserError(f"{name} in {path} cannot be used: {error.message}; give a .pkl of CREPS") from error
    if "G_ema" not in networks:
        raise UserError(
            f"{path} holds no G_ema, the average of the generator; give a .pkl with it, as the authors released"
        )
    return networks


class _Refused(Exception):
    """A clause: what the file has that a released one has not."""


# --- what stands on the stack besides None, bool, int, float, str, memoryview, tuple, list, dict and set -------------


class _Name(NamedTuple):
    """A name that the file imports. It is never looked up outside this file."""

    module: str
    name: str

    def __str__(self):
        return f"{self.module}.{self.name}"


class _Module:
    """A network or a layer: its `__dict__`, as data."""

    def __init__(self, state: dict | None = None):
        self.state = state


class _NumpyType(NamedTuple):
    code: str


class _Storage(NamedTuple):
    data: memoryview
    dtype: torch.dtype

    @property
    def count(self) -> int:
        return len(self.data) // self.dtype.itemsize


class _View(NamedTuple):
    """A tensor, not made yet: elements of a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.size)

    @property
    def end(self) -> int:
        """One behind the last element in the storage, when there is any."""
        return self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True)) + 1


# --- the machine -----------------------------------------------------------------------------------------------------

_NEW = {
    pickle.NONE: lambda: None,
    pickle.NEWTRUE: lambda: True,
    pickle.NEWFALSE: lambda: False,
    pickle.EMPTY_TUPLE: tuple,
    pickle.EMPTY_LIST: list,
    pickle.EMPTY_DICT: dict,
    pickle.EMPTY_SET: set,
}
_NUMBER = {pickle.BININT: "<i", pickle.BININT1: "<B", pickle.BININT2: "<H", pickle.BINFLOAT: ">d"}
# The formats of the lengths and places that follow the opcode.
_TEXT = {pickle.SHORT_BINUNICODE: "<B", pickle.BINUNICODE: "<I", pickle.BINUNICODE8: "<Q"}
_BYTES = {pickle.SHORT_BINBYTES: "<B", pickle.BINBYTES: "<I", pickle.BINBYTES8: "<Q"}
_PUT = {pickle.BINPUT: "<B", pickle.LONG_BINPUT: "<I"}
_GET = {pickle.BINGET: "<B", pickle.LONG_BINGET: "<I"}
_TUPLE = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}


class _Machine:
    """Runs pickles that lie one after the other in `data`. Subclasses say which names they know and what those do."""

    names: frozenset[tuple[str, str]] = frozenset()

    def __init__(self, data: memoryview, steps: Iterator):
        self.data, self.steps, self.at = data, steps, 0

    def call(self, name: _Name, arguments: tuple) -> object:
        raise _Refused(f"it calls {name}")

    def new(self, name: _Name) -> object:
        raise _Refused(f"it makes a {name}")

    def persistent(self, pid: object) -> object:
        raise _Refused("it refers to objects outside of the file")

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise _Refused("it ends in the middle")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, layout: str):
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        line, newline, _ = bytes(self.data[self.at : self.at + 256]).partition(b"\n")
        if not newline:
            raise _Refused("a name in it has no end")
        self.at += len(line) + 1
        return line.decode()

    def name(self, module: object, name: object) -> _Name:
        if (_check(module, str, "a name"), _check(name, str, "a name")) not in self.names:
            raise _Refused(f"it names {f'{module}.{name}'[:80]!r}, which no released file does")
        return _Name(module, name)

    def load(self) -> object:
        """The value of the pickle at the current place, which moves behind it."""
        if self.take(1) != pickle.PROTO or self.number("<B") not in (2, 3, 4, 5):
            raise _Refused("it does not begin like a pickle")
        self.stack, self.marks, self.memo = [], [], []
        while (code := bytes(self.take(1))) != pickle.STOP:
            if next(self.steps, None) is None:
                raise _Refused(f"it has more than {STEPS} opcodes")
            self.step(code)
        (value,) = self.stack
        return value

    def step(self, code: bytes) -> None:
        stack = self.stack
        # Plain values.
        if code in _NEW:
            stack.append(_NEW[code]())
        elif code in _NUMBER:
            stack.append(self.number(_NUMBER[code]))
        elif code == pickle.LONG1:
            number = int.from_bytes(self.take(self.number("<B")), "little", signed=True)
            if number.bit_length() > 80:  # the magic number of a torch file has 77; Python cannot print vast ones
                raise _Refused("it holds a vast number")
            stack.append(number)
        elif code in _TEXT:
            stack.append(str(self.take(self.number(_TEXT[code])), "utf-8", "surrogatepass"))
        elif code in _BYTES:
            stack.append(self.take(self.number(_BYTES[code])))
        elif code in _TUPLE:
            stack.append(tuple(self.pop() for _ in range(_TUPLE[code]))[::-1])
        elif code == pickle.TUPLE:
            items = tuple(self.pop_mark())
            self.stack.append(items)
        # Containers.
        elif code == pickle.MARK:
            self.marks.append(stack)
            self.stack = []
        elif code in (pickle.APPEND, pickle.APPENDS):
            self.fill(list, [self.pop()] if code == pickle.APPEND else self.pop_mark())
        elif code in (pickle.SETITEM, pickle.SETITEMS):
            self.fill(dict, [self.pop(), self.pop()][::-1] if code == pickle.SETITEM else self.pop_mark())
        elif code == pickle.ADDITEMS:
            self.fill(set, self.pop_mark())
        # Memory. Picklers number their entries one by one, so no place can be claimed far beyond the end.
        elif code in _PUT or code == pickle.MEMOIZE:
            place = self.number(_PUT[code]) if code in _PUT else len(self.memo)
            if place > len(self.memo):
                raise _Refused("its memo has a hole")
            self.memo[place : place + 1] = [stack[-1]]
        elif code in _GET:
            stack.append(self.memo[self.number(_GET[code])])
        # What could do harm elsewhere.
        elif code == pickle.GLOBAL:
            stack.append(self.name(self.line(), self.line()))
        elif code == pickle.STACK_GLOBAL:
            name, module = self.pop(), self.pop()
            stack.append(self.name(module, name))
        elif code in (pickle.REDUCE, pickle.NEWOBJ):
            arguments, name = self.pop(), self.pop()
            if type(name) is not _Name or type(arguments) is not tuple:
                raise _Refused("it calls what is no name")
            if code == pickle.NEWOBJ and arguments:
                raise _Refused(f"it makes a {name} of something")
            stack.append(self.call(name, arguments) if code == pickle.REDUCE else self.new(name))
        elif code == pickle.BUILD:
            state = self.pop()
            self.build(stack[-1], state)
        elif code == pickle.BINPERSID:
            stack.append(self.persistent(self.pop()))
        elif code == pickle.FRAME:
            self.number("<Q")  # a hint for readers of streams
        else:
            opcode = pickletools.code2op.get(code.decode("latin-1"))
            raise _Refused(f"it uses the opcode {opcode.name if opcode else code.hex()}, which no released file does")

    def pop(self) -> object:
        return self.stack.pop()

    def pop_mark(self) -> list:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def fill(self, kind: type, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not kind:
            raise _Refused(f"it puts items into what is no {kind.__name__}")
        if kind is list:
            target.extend(items)
            return
        # Texts and small numbers: others could be chosen so that all have one hash, and a dict of them takes hours.
        if not all(type(k) is str or (type(k) is int and 0 <= k < 1 << 20) for k in items[:: 2 if kind is dict else 1]):
            raise _Refused(f"it has a {kind.__name__} of other things than names")
        target.update(zip(items[::2], items[1::2], strict=True) if kind is dict else items)

    def build(self, target: object, state: object) -> None:
        if type(target) is _Module and target.state is None:
            target.state = _check(state, dict, "the state of a layer")
        elif type(target) is _NumpyType:
            # (version, byte order, subarray, names, fields, size, alignment, flags); native numbers leave the rest out.
            if type(state) is not tuple or state[1] not in ("<", "|") or set(map(type, state[2:5])) != {type(None)}:
                raise _Refused("it has a number type other than plain little-endian ones")
        elif type(target) is not dict:  # attributes of an OrderedDict or EasyDict hold nothing that we read
            raise _Refused("it sets the state of what has none")


def _check(value: object, kind: type, what: str):
    if type(value) is not kind:
        raise _Refused(f"what should be {what} is something else")
    return value


class _ReleasedFile(_Machine):
    """The outer pickle: {G, D, G_ema, …} of layers in layers."""

    def __init__(self, data: memoryview):
        super().__init__(data, iter(range(STEPS)))
        self.objects = {
            ("training.networks_creps", "SynthesisInput"): _Module,
            ("torch.nn.modules.container", "Sequential"): _Module,
            ("collections", "OrderedDict"): dict,
            ("dnnlib.util", "EasyDict"): dict,
        }
        self.functions = {
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): self.layer,
            ("torch._utils", "_rebuild_tensor_v2"): self.view,
            ("torch._utils", "_rebuild_parameter"): self.parameter,
            ("torch.storage", "_load_from_bytes"): self.storage,
            ("collections", "OrderedDict"): self.ordered_dict,
            ("numpy", "dtype"): self.numpy_type,
            ("numpy.core.multiarray", "scalar"): self.numpy_number,
            ("numpy._core.multiarray", "scalar"): self.numpy_number,
        }
        self.names = frozenset(self.objects) | frozenset(self.functions)
        self.room = self.stored = len(data)  # bytes that may still become tensors, and be read as torch files

    def call(self, name: _Name, arguments: tuple) -> object:
        if name not in self.functions:
            return super().call(name, arguments)
        try:
            return self.functions[name](*arguments)
        except TypeError as error:
            raise _Refused(f"it calls {name} with other arguments than a released file") from error

    def new(self, name: _Name) -> object:
        return self.objects[name]() if name in self.objects else super().new(name)

    # --- the names it may call ---------------------------------------------------------------------------------------

    def layer(self, meta) -> _Module:
        # type, version, module_src, class_name, state. The source of the class is text like any other.
        if _check(meta, dict, "a layer").get("type") != "class":
            raise _Refused("it has a layer of unknown type")
        return _Module(_check(meta.get("state"), dict, "the state of a layer"))

    def ordered_dict(self) -> dict:
        return {}

    def numpy_type(self, code, *_align_and_copy) -> _NumpyType:
        if not re.fullmatch(r"[iu][1248]|f[248]|b1", _check(code, str, "a number type")):
            raise _Refused(f"it has the number type {code[:80]!r}, which is no plain number")
        return _NumpyType(code)

    def numpy_number(self, kind, data) -> bool | int | float:
        code = _check(kind, _NumpyType, "the type of a number").code
        return np.frombuffer(data, "<" + code, count=1)[0].item()

    def storage(self, data) -> _Storage:
        # One byte string on the stack could be handed over a million times.
        self.stored -= len(_check(data, memoryview, "a storage"))
        if self.stored < 0:
            raise _Refused("it reads the same storage again and again")
        return _TorchFile(data, self.steps).storage()

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

    # --- what it holds -----------------------------------------------------------------------------------------------

    def networks(self, wanted: tuple[str, ...]) -> dict[str, Released]:
        content = _check(self.load(), dict, "a dict of networks")
        if self.at != len(self.data):
            raise _Refused("something follows the pickle")
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
    """(name, view) of the parameters and buffers of a module and its parts, as state_dict() names them."""
    state = _check(_check(module, _Module, "a network").state, dict, "the state of a layer")
    if id(module) in seen or prefix.count(".") > DEPTH:
        raise _Refused("one of its layers holds itself or lies too deep")
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
    """The arguments that the network was made with; those for its parts (`synthesis_kwargs`, …) beside its own."""
    given = _check(network.state.get("_init_kwargs", {}), dict, "the settings of a network")
    parts = {name: value for name, value in given.items() if type(value) is dict}
    settings = {}
    for name, part in parts.items():
        settings |= {"mapping_layers": part.get("num_layers")} if name == "mapping_kwargs" else part
    settings |= given
    # Only what official.py could use: a vast text would come back to the screen in a sentence about it.
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


class _TorchFile(_Machine):
    """A storage as `torch.save` wrote it before its zip format: five pickles, then a count and the bytes.

    torch.load(weights_only=True) would execute nothing either, but allocate whatever the bytes claim.
    """

    names = frozenset(("torch", name) for name in _DTYPES)

    def storage(self) -> _Storage:
        if self.load() != 0x1950A86A20F9469CFC6C or self.load() != 1001:
            raise _Refused("a storage in it is no torch file of the old format")
        self.load()  # the sizes of C's integers, which torch does not look at either
        key, dtype, count = _check(self.load(), _Pending, "the content of a torch file in it")
        if self.load() != [key] or count != self.number("<q") or count * dtype.itemsize != len(self.data) - self.at:
            raise _Refused("a storage in it is not as long as it says")
        return _Storage(self.data[self.at :], dtype)

    def persistent(self, pid: object) -> object:
        # ("storage", type, key, device, count, the view that it is)
        kind, name, key, _device, count, view = _check(pid, tuple, "a reference in a torch file")
        if (
            kind != "storage"
            or type(name) is not _Name
            or type(key) is not str
            or type(count) is not int
            or view is not None
        ):
            raise _Refused("a torch file in it holds other things than a storage")
        return _Pending(key, _DTYPES[name.name], count)


class _Pending(NamedTuple):
    key: str
    dtype: torch.dtype
    count: int
