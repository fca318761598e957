"""Laws of the authors' `.pkl` files: their weights give their images, and nothing in any file is executed.

The pickles are made here without the authors' code: `Writer` is Python's own pickler, which also writes names that do
not exist (`Name`), calls of them (`Call`), objects of them (`New`), and opcodes as they are (`Raw`).
"""

import copyreg
import io
import itertools
import os
import pickle
import re
import struct
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error as difference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_inr_gan import INR_GAN, released_tensors
from test_official import REFERENCES, STYLEGAN2, Reference, label

from dnnlib.console import UserError
from torch_utils import checkpoint
from training.networks import Discriminator, Generator, released
from training.networks.released import load_released, read_released
from training.snapshot import load_generator


class Name:
    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Call:
    """A call name(*arguments), then its state."""

    def __init__(self, name, *arguments, state=None):
        self.name, self.arguments, self.state = name, arguments, state


class New:
    """An object made without arguments, then its items or state."""

    def __init__(self, name, state=None, items=None):
        self.name, self.state, self.items = name, state, items


class Raw(bytes):
    pass


class Key:
    """A key of a dict that cannot be one in Python."""

    def __init__(self, value):
        self.value = value


class Writer(pickle._Pickler):
    def save(self, value, *_):
        if id(value) in self.memo:
            super().save(value)
        elif type(value) is Raw:
            self.write(value)
        elif type(value) is Key:
            self.save(value.value)
        elif type(value) is Name:
            if self.proto < 4:
                self.write(b"c" + f"{value.module}\n{value.name}\n".encode())
            else:
                super().save(value.module)
                super().save(value.name)
                self.write(pickle.STACK_GLOBAL)
            self.memoize(value)
        elif type(value) in (Call, New):
            self.save(value.name)
            self.save(value.arguments if type(value) is Call else ())
            self.write(pickle.REDUCE if type(value) is Call else pickle.NEWOBJ)
            self.memoize(value)
            if type(value) is New and value.items is not None:
                self._batch_setitems(value.items.items())
            if value.state is not None:
                self.save(value.state)
                self.write(pickle.BUILD)
        elif type(value) is bytes and self.proto == 2:  # Python would name _codecs.encode
            self.write(pickle.BINBYTES + struct.pack("<I", len(value)) + value)
            self.memoize(value)
        elif type(value) is set:  # and below protocol 4 builtins.set
            self.write(pickle.EMPTY_SET + pickle.MARK)
            for item in value:
                self.save(item)
            self.write(pickle.ADDITEMS)
        else:
            super().save(value)


def dumps(value, protocol: int = 4) -> bytes:
    file = io.BytesIO()
    Writer(file, protocol).dump(value)
    return file.getvalue()


# --- files like the released ones ------------------------------------------------------------------------------------

PERSISTENT = Name("torch_utils.persistence", "_reconstruct_persistent_obj")
LOAD = Name("torch.storage", "_load_from_bytes")
TENSOR = Name("torch._utils", "_rebuild_tensor_v2")
PARAMETER = Name("torch._utils", "_rebuild_parameter")
EASY_DICT = Name("dnnlib.util", "EasyDict")
SEQUENTIAL = Name("torch.nn.modules.container", "Sequential")
INPUT = Name("training.networks_creps", "SynthesisInput")
MODULE_LIST = Name("torch.nn.modules.container", "ModuleList")
DTYPE = Name("numpy", "dtype")
DEFAULTDICT = Name("collections", "defaultdict")
ANY, DICT = Name("typing", "Any"), Name("builtins", "dict")


def storage(tensor: torch.Tensor) -> Call:
    """Return the storage of a tensor, in the bytes that torch writes when it is pickled."""
    function, (data,) = tensor._typed_storage().__reduce__()
    assert function is torch.storage._load_from_bytes
    return Call(LOAD, data)


def view(tensor: torch.Tensor, below: Call | None = None) -> Call:
    place = (tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))
    return Call(TENSOR, below or storage(tensor), *place, False, OrderedDict())


def parameter(tensor: Call) -> Call:
    return Call(PARAMETER, tensor, False, OrderedDict())


def number(value: float, core: str = "numpy.core.multiarray") -> Call:
    kind = Call(DTYPE, "f8", False, True, state=(3, "<", None, None, None, -1, -1, 0))
    return Call(Name(core, "scalar"), kind, np.float64(value).tobytes())


def layer_state(parameters=None, buffers=None, parts=None, **others) -> dict:
    """Return the __dict__ of a module."""
    hooks = ("_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_hooks")
    state = {"training": False, "_parameters": OrderedDict(parameters or {}), "_buffers": buffers or {}}
    state |= {"_non_persistent_buffers_set": set(), **{name: OrderedDict() for name in hooks}}
    state["_modules"] = OrderedDict(parts or {})
    return state | others


def persistent(state: dict, name: str = "Layer", kind: object = "class") -> Call:
    source = "import os\nos.system('never')\n"
    return Call(PERSISTENT, {"type": kind, "version": 6, "module_src": source, "class_name": name, "state": state})


BUFFERS = ("freqs", "coords", "w_avg", "resample_filter", "noise_const", "log_basis")


def network(tensors: dict[str, torch.Tensor], init_kwargs: dict, **attributes) -> Call:
    """Return nested layers, as the names of the tensors say."""

    def layer(inside: dict[str, torch.Tensor], prefix: str, **others) -> object:
        own = {n: view(t) for n, t in inside.items() if "." not in n}
        parameters = {n: parameter(v) for n, v in own.items() if n not in BUFFERS}
        if parameters and "bias" not in parameters:
            parameters["bias"] = None  # as of layers without one
        names = dict.fromkeys(n.partition(".")[0] for n in inside if "." in n)
        parts = {
            part: layer(
                {n[len(part) + 1 :]: t for n, t in inside.items() if n.startswith(part + ".")}, f"{prefix}{part}."
            )
            for part in names
        }
        state = layer_state(
            parameters, {n: v for n, v in own.items() if n in BUFFERS}, parts, gain=number(0.5), **others
        )
        if prefix.endswith(".input."):
            return New(INPUT, state)
        if re.search(r"\.decoder_\w+\.$", prefix) and "img" not in prefix:
            return New(SEQUENTIAL, state)
        return persistent(state, "Net" if others else "Layer")

    attributes |= {"_init_args": (), "_init_kwargs": init_kwargs, "img_resolution": init_kwargs["img_resolution"]}
    return layer(tensors, "", **attributes)


def dict_config(values: dict) -> New:
    """Return settings as omegaconf 2.1 pickles them."""
    of_node = {"ref_type": ANY, "object_type": None, "optional": True, "key": "x", "flags": None, "flags_root": False}
    own = of_node | {"object_type": DICT, "resolver_cache": Call(DEFAULTDICT, DICT), "key_type": ANY}
    config = New(Name("omegaconf.dictconfig", "DictConfig"))
    config.state = {"_metadata": New(Name("omegaconf.base", "ContainerMetadata"), own), "_parent": None, "_content": {}}
    for key, value in values.items():
        node = {"_metadata": New(Name("omegaconf.base", "Metadata"), of_node), "_parent": config, "_val": value}
        config.state["_content"][key] = New(Name("omegaconf.nodes", "AnyNode"), node)
    return config


def easy(**items) -> New:
    return New(EASY_DICT, items=items)


def kwargs_of(config: dict, kind: str) -> dict:
    """Return the settings of a reference as the arguments of the authors' network."""
    own = {name: config[name] for name in ("c_dim", "img_resolution", "img_channels")}
    widths = {name: config[name] for name in ("channel_base", "channel_max")}
    if kind == "D":
        return own | {
            **widths,
            "num_fp16_res": 4,
            "conv_clamp": 256,
            "block_kwargs": easy(),
            "mapping_kwargs": easy(),
            "epilogue_kwargs": easy(mbstd_group_size=config["mbstd_group_size"]),
        }
    line = {name: config[name] for name in ("biline_channels", "rank", "bandwidth", "architecture")}
    return own | {
        "z_dim": config["z_dim"],
        "w_dim": config["w_dim"],
        "mapping_kwargs": easy(num_layers=config["mapping_layers"]),
        "synthesis_kwargs": easy(**widths, **line, num_fp16_res=4, conv_clamp=256, use_noise=False),
    }


def content(ref: Reference, kinds=("G", "D", "G_ema")) -> dict:
    networks = {kind: network(ref.under(f"{kind[0]}/"), kwargs_of(ref.config, kind)) for kind in kinds}
    pipe = persistent(layer_state(buffers={"p": view(torch.ones([])), "none": view(torch.ones(0))}), "AugmentPipe")
    data = easy(class_name="training.dataset.ImageFolderDataset", xflip=True, max_size=70000, path="ffhq.zip")
    return networks | {"training_set_kwargs": data, "augment_pipe": pipe}


@pytest.fixture(scope="module", params=REFERENCES, ids=lambda path: path.stem)
def ref(request):
    return Reference(request.param)


@pytest.fixture(scope="module")
def small():
    return Reference(REFERENCES[0])


@pytest.fixture(scope="module")
def whole(small) -> bytes:
    return dumps(content(small, kinds=("G_ema",)))


def write(folder: Path, data: bytes, name: str = "network.pkl") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


# --- what a file holds is what is read --------------------------------------------------------------------------------


def read_tensor(folder: Path, x: object, **state) -> torch.Tensor:
    """Read a network whose only buffer is x."""
    file = write(folder, dumps({"G": persistent(layer_state(buffers={"x": x}, **state))}))
    return read_released(file)["G"].tensors["x"]


@pytest.mark.parametrize("protocol", [2, 5])
def test_the_tensors_and_settings_are_those_that_were_pickled(tmp_path, ref, protocol):
    path = write(tmp_path, dumps(content(ref), protocol))
    networks = read_released(path)
    assert list(networks) == ["G", "D", "G_ema"]
    for name, (tensors, config) in networks.items():
        expected = ref.under(f"{name[0]}/")
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[n], t) and tensors[n].dtype == t.dtype for n, t in expected.items())
        keys = ["img_resolution", "channel_max", "c_dim"]
        keys += (
            ["mbstd_group_size"] if name == "D" else ["z_dim", "mapping_layers", "rank", "bandwidth", "architecture"]
        )
        assert {key: config[key] for key in keys} == {key: ref.config[key] for key in keys}
    assert read_released(path, ("D",)).keys() == {"D"}


def test_the_networks_give_the_released_images_and_logits(tmp_path, ref):
    path = write(tmp_path, dumps(content(ref)))
    networks = load_released(path)
    for G in (networks["G"], networks["G_ema"], load_generator(path)):
        assert type(G) is Generator
        assert not G.training
        assert not any(p.requires_grad for p in G.parameters())
        assert difference(G(ref.all["in/z"], label(ref)), ref.all["out/img_x1"]) <= 1e-4
    assert type(networks["D"]) is Discriminator
    assert difference(networks["D"](ref.all["in/real"], label(ref)), ref.all["out/D_real"]) <= 1e-4


def test_a_file_of_stylegan2_gives_its_images(tmp_path):
    ref = Reference(STYLEGAN2[0])
    widths = {name: ref.config[name] for name in ("channel_base", "channel_max")}
    given = {name: ref.config[name] for name in ("z_dim", "w_dim", "c_dim", "img_resolution", "img_channels")}
    given["mapping_kwargs"] = easy(num_layers=ref.config["mapping_layers"])
    given["synthesis_kwargs"] = easy(**widths, num_fp16_res=4, conv_clamp=256)
    G = load_generator(write(tmp_path, dumps({"G_ema": network(ref.under("G/"), given)})))
    assert difference(G(ref.all["in/z"], label(ref)), ref.all["out/img_noise_const"]) <= 1e-4


def inr_gan(**cfg) -> tuple[Reference, dict]:
    """Return the reference of INR-GAN, and the content of a file of it with more settings."""
    ref = Reference(INR_GAN)
    given = {name: ref.config[name] for name in ("z_dim", "w_dim", "img_resolution")} | {"c_dim": 0, "img_channels": 3}
    given |= {"mapping_kwargs": easy(num_layers=2), "cfg": {"fmaps": 1, "fmm": {"rank": 10}} | cfg}
    given["synthesis_kwargs"] = easy(channel_base=ref.config["channel_base"], channel_max=ref.config["channel_max"])
    return ref, {"G_ema": network(released_tensors(ref), given, cfg=dict_config(cfg | {"fmm": dict_config({})}))}


def test_a_file_of_inr_gan_gives_its_images(tmp_path):
    ref, content = inr_gan(upsampling_mode="nearest")
    G = load_generator(write(tmp_path, dumps(content)))
    assert difference(G(ref.all["in/z"])[:, :, :16, :16], ref.all["out/img"]) <= 1e-5


def test_a_file_of_bilinear_inr_gan_is_refused(tmp_path):
    path = write(tmp_path, dumps(inr_gan(upsampling_mode="bilinear")[1]))
    with pytest.raises(UserError, match=r"G_ema in .*network\.pkl cannot be used: .*upsampling_mode=bilinear"):
        load_generator(path)


def test_a_list_of_layers_names_them_by_numbers(tmp_path):
    layers = {str(i): persistent(layer_state({"weight": parameter(view(torch.full((2,), i)))})) for i in range(2)}
    content = {"G": New(INPUT, layer_state(parts={"extra_convs": New(MODULE_LIST, layer_state(parts=layers))}))}
    tensors = read_released(write(tmp_path, dumps(content)))["G"].tensors
    assert {name: t.tolist() for name, t in tensors.items()} == {
        "extra_convs.0.weight": [0, 0],
        "extra_convs.1.weight": [1, 1],
    }


@pytest.mark.parametrize(
    "lay_out",
    {
        "transposed": lambda x: x.mT.contiguous().mT,
        "offset": lambda x: torch.cat([x.new_full((3,), torch.nan), x.flatten(), x.new_full((2,), torch.nan)])[
            3:-2
        ].view(x.shape),
        "every second": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0],
    }.values(),
)
def test_tensors_may_be_views(tmp_path, lay_out):
    expected = torch.arange(12.0).reshape(3, 4)
    got = read_tensor(tmp_path, view(lay_out(expected)))
    assert torch.equal(got, expected)
    assert got.is_contiguous()


def test_tensors_may_share_a_storage(tmp_path):
    flat = torch.arange(7.0)
    below = storage(flat)
    buffers = {"a": view(flat[:3], below), "b": view(flat[2:], below)}
    tensors = read_released(write(tmp_path, dumps({"G": persistent(layer_state(buffers=buffers))})))["G"].tensors
    tensors["a"].fill_(7)  # they share nothing once they are read
    assert torch.equal(tensors["b"], flat[2:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_every_number_type_is_read_as_torch_reads_it(tmp_path, dtype):
    tensor = (torch.arange(12).reshape(3, 4) % 2).to(dtype)
    got = read_tensor(tmp_path, view(tensor))
    assert got.dtype == dtype
    assert torch.equal(got, tensor)


@pytest.mark.parametrize("core", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_settings_may_be_numbers_of_numpy(tmp_path, core):
    given = {"bandwidth": number(2.5, core), "none": None, "synthesis_kwargs": {"rank": 3}}
    G = persistent(layer_state(_init_kwargs=given))
    assert read_released(write(tmp_path, dumps({"G": G})))["G"].config == {"bandwidth": 2.5, "rank": 3}


def test_what_is_not_saved_or_not_there_is_left_out(tmp_path):
    state = layer_state(buffers={"x": view(torch.ones(2)), "y": view(torch.ones(3)), "z": None}, parts={"part": None})
    state["_non_persistent_buffers_set"] = {"y"}
    networks = read_released(write(tmp_path, dumps({"G": persistent(state), "D": None, "augment_pipe": None}, 3)))
    assert networks.keys() == {"G"}
    assert networks["G"].tensors.keys() == {"x"}


def test_names_given_to_layers_are_only_data(tmp_path):
    """What Python's unpickler would write over an object is an entry that nobody reads."""
    names = ("__class__", "__setstate__", "__dict__", "__reduce__", "state", "tensors")
    assert torch.equal(read_tensor(tmp_path, view(torch.ones(3)), **dict.fromkeys(names, EASY_DICT)), torch.ones(3))


# --- nothing is executed ----------------------------------------------------------------------------------------------


def refused(path: Path, words: str = "") -> str:
    """Return the one sentence that says why `path` is not read."""
    with pytest.raises(UserError) as error:
        read_released(path)
    message = str(error.value)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    assert len(message) < 400
    assert re.search(r"; \w[^;]+ again$|; give a [^;]+$", message), message
    assert re.search(words, message), message
    return message


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


def by_name(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def by_stack(module: str, name: str) -> bytes:
    return text(module) + text(name) + pickle.STACK_GLOBAL


FORMS = {
    "GLOBAL, REDUCE": lambda m, n, argument: by_name(m, n) + argument + pickle.TUPLE1 + pickle.REDUCE,
    "STACK_GLOBAL, REDUCE": lambda m, n, argument: by_stack(m, n) + argument + pickle.TUPLE1 + pickle.REDUCE,
    "INST": lambda m, n, argument: b"(" + argument + b"i" + f"{m}\n{n}\n".encode(),
    "OBJ": lambda m, n, argument: b"(" + by_name(m, n) + argument + b"o",
    "NEWOBJ": lambda m, n, argument: by_name(m, n) + argument + pickle.TUPLE1 + pickle.NEWOBJ,
    "NEWOBJ_EX": lambda m, n, argument: by_stack(m, n) + argument + pickle.TUPLE1 + b"}" + pickle.NEWOBJ_EX,
    "a name alone": lambda m, n, argument: by_stack(m, n),
    "BUILD": lambda m, n, argument: (
        by_name(INPUT.module, INPUT.name) + b")\x81}" + text("__setstate__") + by_name(m, n) + b"sb" + argument + b"b"
    ),
}
NAMES = """
    os:system posix:system nt:system subprocess:Popen builtins:eval builtins:getattr builtins:set __builtin__:eval
    operator:attrgetter codecs:decode _codecs:encode collections:namedtuple torch:load torch:FloatStorage
    torch.storage:_load_from_bytes.__globals__ torch._utils:_rebuild_tensor_v3 numpy.core.multiarray:_reconstruct
    torch_utils.persistence:_reconstruct_persistent_obj.__globals__ torch_utils.persistence:_src_to_module
    torch_utils:persistence._reconstruct_persistent_obj training.networks_creps:SynthesisInput.__init__
    dnnlib.util:EasyDict.__setattr__ :
"""


@pytest.fixture
def marker(tmp_path):
    """Path of a file that appears when an attack succeeds."""
    path = tmp_path / "pwned"
    yield path
    assert not path.exists()


def touch(marker: Path) -> bytes:
    return text(f"touch {marker}")


@pytest.mark.parametrize("form", ["GLOBAL, REDUCE", "STACK_GLOBAL, REDUCE", "INST", "OBJ"])
def test_pythons_own_unpickler_would_run_these_attacks(tmp_path, form):
    marker = tmp_path / "pwned"
    attack = FORMS[form]("os", "system", touch(marker))
    pickle.loads(dumps({"G": Raw(attack)}))
    assert marker.exists()


def test_a_name_that_no_released_file_has_is_refused_whatever_opcode_names_it(tmp_path, marker):
    for form, entry in itertools.product(FORMS, NAMES.split()):
        module, name = entry.split(":")
        attack = FORMS[form](module, name, touch(marker))
        words = re.escape(f"{module}.{name}") if form not in ("INST",) else "INST"
        refused(write(tmp_path, dumps({"G": Raw(attack)})), words)


def legacy(parts: dict[int, bytes], count: int = 3, data: bytes = bytes(12), length: int | None = None) -> bytes:
    """A torch file of one storage. `parts` replaces some of its five pickles."""
    pid = ("storage", Name("torch", "FloatStorage"), "0", "cpu", count, None)
    pickles = [
        dumps(0x1950A86A20F9469CFC6C, 2),
        dumps(1001, 2),
        dumps({"little_endian": True}, 2),
        dumps(Raw(dumps(pid, 2)[2:-1] + pickle.BINPERSID), 2),
        dumps(["0"], 2),
    ]
    for place, other in parts.items():
        pickles[place] = other
    return b"".join(pickles) + struct.pack("<q", count if length is None else length) + data


def with_file(blob: bytes) -> dict:
    return {"G": persistent(layer_state(buffers={"x": Call(TENSOR, Call(LOAD, blob), 0, (3,), (1,), False, {})}))}


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_torch_file_inside_is_one_storage_in_the_old_format_and_executes_nothing(tmp_path, marker):
    def blob(value, zipped):
        file = io.BytesIO()
        torch.save(value, file, _use_new_zipfile_serialization=zipped)
        return file.getvalue()

    tensors = read_released(write(tmp_path, dumps(with_file(legacy({})))))["G"].tensors
    assert torch.equal(tensors["x"], torch.zeros(3))
    for place, form in itertools.product(range(5), FORMS):
        attack = dumps(Raw(FORMS[form]("os", "system", touch(marker))), 2)
        refused(write(tmp_path, dumps(with_file(legacy({place: attack})))))
        refused(write(tmp_path, dumps(with_file(attack))))
    values = [torch.ones(3), {}, [torch.ones(3)._typed_storage()], bytearray(9), torch.nn.Linear(1, 1), Attack(marker)]
    for value, zipped in itertools.product(values, (False, True)):
        refused(write(tmp_path, dumps(with_file(blob(value, zipped)))))
    for other in ("module", 3, None):
        pid = dumps((other, Name("torch", "FloatStorage"), "0", "cpu", 3, None), 2)[2:-1]
        refused(write(tmp_path, dumps(with_file(legacy({3: dumps(Raw(pid + pickle.BINPERSID), 2)})))))


def test_the_registry_of_extensions_is_out_of_reach(tmp_path, marker):
    copyreg.add_extension("os", "system", 240)
    try:
        for opcode, layout in ((b"\x82", "<B"), (b"\x83", "<H"), (b"\x84", "<i")):
            attack = opcode + struct.pack(layout, 240) + touch(marker) + pickle.TUPLE1 + pickle.REDUCE
            refused(write(tmp_path, dumps({"G": Raw(attack)})), "EXT")
    finally:
        copyreg.remove_extension("os", "system", 240)


def in_every_place(bad: object) -> dict[str, object]:
    """Return files that have `bad` where something else belongs."""
    net = lambda **others: {"G": persistent(layer_state() | others)}  # noqa: E731
    tensor = lambda *arguments: net(_buffers={"x": Call(TENSOR, *arguments)})  # noqa: E731
    scalar = Name("numpy.core.multiarray", "scalar")
    shape = (0, (3,), (1,), False, {})
    return {
        "the file": bad,
        "a network": {"G": bad},
        "an ignored entry": {"G": persistent(layer_state()), "augment_pipe": bad},
        "the type of a layer": {"G": persistent(layer_state(), kind=bad)},
        "the state of a layer": {"G": persistent(bad)},
        "the state of a plain layer": {"G": New(INPUT, bad)},
        "what makes a layer": {"G": Call(PERSISTENT, bad)},
        "an attribute": net(gain=bad),
        "parameters": net(_parameters=bad),
        "a parameter": net(_parameters={"x": bad}),
        "what is in a parameter": net(_parameters={"x": Call(PARAMETER, bad, False, {})}),
        "buffers": net(_buffers=bad),
        "a buffer": net(_buffers={"x": bad}),
        "unsaved buffers": net(_non_persistent_buffers_set=bad),
        "layers": net(_modules=bad),
        "a layer": net(_modules={"x": bad}),
        "settings": net(_init_kwargs=bad),
        "a storage": tensor(bad, *shape),
        "the bytes of a storage": tensor(Call(LOAD, bad), *shape),
        "the offset": tensor(storage(torch.ones(3)), bad, (3,), (1,), False, {}),
        "the size": tensor(storage(torch.ones(3)), 0, bad, (1,), False, {}),
        "a size": tensor(storage(torch.ones(3)), 0, (bad,), (1,), False, {}),
        "a stride": tensor(storage(torch.ones(3)), 0, (3,), (bad,), False, {}),
        "hooks": tensor(storage(torch.ones(3)), 0, (3,), (1,), False, bad),
        "the type of a number": net(gain=Call(scalar, bad, b"12345678")),
        "what names the type": net(gain=Call(scalar, Call(DTYPE, bad, False, True), b"12345678")),
        "the state of the type": net(gain=Call(DTYPE, "f8", False, True, state=bad)),
        "the bytes of a number": net(gain=Call(scalar, Call(DTYPE, "f8", False, True), bad)),
        "an entry of settings": net(cfg=dict_config({"x": bad})),
        "the state of settings": net(cfg=New(Name("omegaconf.dictconfig", "DictConfig"), bad)),
        "the maker of default values": net(cfg=Call(DEFAULTDICT, bad)),
        "the key of a dict": {"G": New(EASY_DICT, items={Key(bad): view(torch.ones(3))})},
        "the state of a number": {"G": Call(PERSISTENT, {"type": "class", "state": {}}, state=bad)},
    }


def test_an_attack_is_refused_in_every_place(tmp_path, marker):
    for form in ("GLOBAL, REDUCE", "STACK_GLOBAL, REDUCE", "a name alone", "BUILD"):
        attack = Raw(FORMS[form]("os", "system", touch(marker)))
        for place, content in in_every_place(attack).items():
            refused(write(tmp_path, dumps(content), f"{place}.pkl"), r"os\.system")


def test_what_does_not_belong_in_a_place_is_passed_over_or_refused(tmp_path):
    wrong = [None, True, -1, 1 << 62, 1.5, "x", b"x", (), [], {"x": 1}, {"a"}, view(torch.ones(3)), INPUT, New(INPUT)]
    for bad in wrong:
        for place, content in in_every_place(bad).items():
            read_or_refuse(write(tmp_path, dumps(content), f"{place}.pkl"))


# --- hostile files are refused and cost little ------------------------------------------------------------------------


def net(*opcodes: bytes) -> bytes:
    return b"\x80\x04}" + text("G") + b"".join(opcodes) + b"s."


def nested(depth: int, names: str) -> New:
    """Return layers in layers; each holds the one inside it once per name."""
    layer = New(INPUT, layer_state())
    for _ in range(depth):
        layer = New(INPUT, layer_state(parts=dict.fromkeys(names, layer)))
    return layer


RING = New(INPUT, layer_state())
RING.state["_modules"]["a"] = RING
LAUGHS: list = []
for _ in range(50):
    LAUGHS = [LAUGHS, LAUGHS]


def claims(opcode: bytes, layout: str, number: int) -> bytes:
    return net(opcode + struct.pack(layout, number) + b"x" * 99)


def tensor_of(*place: object) -> dict:
    """Return a file with a tensor of three stored elements that claims (offset, size, stride)."""
    tensor = Call(TENSOR, storage(torch.ones(3)), *place, False, OrderedDict())
    return {"augment_pipe": persistent(layer_state(buffers={"x": tensor}))}


def numbered(code: str, state: tuple | None = None) -> dict:
    """Return a file with a number of a type of NumPy."""
    scalar = Call(Name("numpy.core.multiarray", "scalar"), Call(DTYPE, code, False, True, state=state), bytes(16))
    return {"G": persistent(layer_state(gain=scalar))}


PLACES = [  # offset, size, stride
    (0, (4,), (1,)),
    (1, (3,), (1,)),
    (0, (3,), (2,)),
    (0, (2,), (2**61,)),
    (0, (10**12,), (0,)),
    (0, (2, 2), (1, 1)),
    (0, (-1,), (1,)),
    (2, (3,), (-1,)),
    (-1, (3,), (1,)),
    (0, (2**70,), (1,)),
    (0, (0, 2**70), (1, 1)),
    (0, (2**61,) * 8, (0,) * 8),
    (0, (1, 1), (1,)),
    (0, [3], (1,)),
    (0, (3.0,), (1,)),
    (0, (True,), (1,)),
    (0, (1,) * 9, (1,) * 9),
    (0, (1,) * 1000, (1,) * 1000),
]
LENGTHS = [{"count": 4}, {"count": 2}, {"count": 2**61, "length": 2**61}, {"count": -3}, {"length": 2**62}]
LENGTHS += [{"data": bytes(11)}, {"data": bytes(13)}]
BLOB = legacy({}, count=1 << 18, data=bytes(1 << 20))
MADE = (PERSISTENT, LOAD, TENSOR, PARAMETER, DTYPE, Name("numpy.core.multiarray", "scalar"), DEFAULTDICT, ANY, DICT)
HOSTILE: dict[str, bytes] = {
    # opcodes that claim more than there is, or that released files lack
    "bytes": claims(pickle.BINBYTES, "<I", 2**32 - 1),
    "more bytes": claims(pickle.BINBYTES8, "<Q", 2**63 - 1),
    "negative bytes": claims(pickle.BINBYTES8, "<q", -1),
    "text": claims(pickle.BINUNICODE, "<I", 2**32 - 1),
    "more text": claims(pickle.BINUNICODE8, "<Q", 2**62),
    "a bytearray": claims(pickle.BYTEARRAY8, "<Q", 2**40),
    "a buffer": net(pickle.NEXT_BUFFER),
    "a long number": claims(pickle.LONG4, "<I", 2**31 - 1),
    "digits": net(b"I" + b"9" * 100000 + b"\n"),
    "a memo's end": net(pickle.LONG_BINGET + b"\xff" * 4),
    "a frame": b"\x80\x04\x95" + b"\xff" * 8,
    "an object outside of the file": dumps({"G": Raw(b"Pos.system\n")}),
    "another object outside of the file": dumps({"G": Raw(text("x") + pickle.BINPERSID)}),
    "a state set twice": dumps({"G": Raw(dumps(New(INPUT, layer_state()), 2)[2:-1] + b"}b")}, 2),
    # names and nesting
    "an endless name": net(b"c" + b"a" * 100000),
    "a name of huge texts": net(text("x" * 100000) * 2 + pickle.STACK_GLOBAL),
    "a name of nested lists": net(b"(]q\0" + b"](h\0h\0eq\0" * 200 + b"h\0h\0\x93"),
    "deep lists": net(b"]" * 29999 + b"a" * 29998),
    "deep tuples": net(b")" + b"\x85" * 29999),
    "deep marks": net(b"(" * 29999),
    "deep layers": dumps({"G": nested(40, "a")}),
    "layers that double": dumps({"G": nested(15, "ab")}),
    "a layer in itself": dumps({"G": RING}),
    "a billion laughs": dumps({"G": LAUGHS}),
    "equal hashes": dumps({"G": {i * (2**61 - 1): None for i in range(999)}}),
    "a tuple as a key": dumps({"G": {(): None}}),
    "a set of tuples": dumps({"G": {()}}),
    "one storage again and again": dumps({"G": [Call(LOAD, BLOB) for _ in range(99)]}),
    "one storage as many tensors": dumps(
        {"G": persistent(layer_state(buffers=dict.fromkeys(map(str, range(9)), view(torch.ones(99999)))))}
    ),
    # not a pickle of a dict
    "nothing on the stack": b"\x80\x04.",
    "an empty stack": b"\x80\x040.",
    "no mark": b"\x80\x04t.",
    "no UTF-8": net(b"X\x01\0\0\0\xff"),
    "empty": b"",
    "no pickle": b"\x89PNG\r\n\x1a\n" + bytes(99),
    "protocol 0": pickle.dumps({"G": None}, 0),
    "protocol 6": b"\x80\x06}.",
    "a second pickle": dumps({}) + dumps({}),
    "something behind it": dumps({}) + b"\0",
    "a list": dumps([]),
    "a text": dumps("G"),
    "a line break in a name": dumps({"G": persistent(layer_state(parts={"a\nb": New(INPUT)}))}),
    # what may be named may not be called otherwise
    **{
        f"{i} called": dumps({"G": Call(call, "touch x")})
        for i, call in enumerate((EASY_DICT, SEQUENTIAL, Call(EASY_DICT), 7, {}, "os.system"))
    },
    **{f"{name.name} of {call!r}": dumps({"G": Call(name, call)}) for name in MADE for call in (7, "os.system")},
    **{f"new {name.name}": dumps({"G": New(name)}) for name in MADE},
    # tensors that their storage does not hold
    **{f"tensor {place}"[:60]: dumps(tensor_of(*place)) for place in PLACES},
    # storages that are not as long as they say, and other torch files
    **{f"storage {wrong}": dumps(with_file(legacy({}, **wrong))) for wrong in LENGTHS},
    **{
        f"torch file {i} {x}": dumps(with_file(legacy({i: dumps(x, 2)})))
        for i, x in ((0, 7), (1, 1002), (3, None), (4, []), (4, ["0", "1"]))
    },
    "an empty torch file": dumps(with_file(b"")),
    # other number types of NumPy
    **{f"number {code!r}": dumps(numbered(code)) for code in ("O8", "V8", "S8", "M8", "f16", "f8\n", "f8,f8")},
    "big-endian numbers": dumps(numbered("f8", (3, ">", None, None, None, -1, -1, 0))),
    "numbers with fields": dumps(numbered("f8", (3, "<", None, ("a",), {}, 8, 1, 0))),
    "numbers without a state": dumps(numbered("f8", ())),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_and_costs_little(tmp_path, data):
    path = write(tmp_path, data)
    tracemalloc.start()
    try:
        refused(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


def test_files_too_large_or_too_long_or_missing_are_refused(tmp_path, monkeypatch):
    path = write(tmp_path, dumps({}))
    os.truncate(path, released.LIMIT + 1)  # a file with a hole takes no place on the disk
    refused(path, r"has 4\.0 GiB")
    monkeypatch.setattr(released, "STEPS", 100)
    refused(write(tmp_path, net(b"]" * 101)), "more than 100 opcodes")
    refused(tmp_path / "none.pkl", "does not exist")
    refused(tmp_path, "is not a file")


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_file_cut_anywhere_is_refused(tmp_path, whole):
    for end in [*range(300), *range(300, len(whole), len(whole) // 60), len(whole) - 1]:
        refused(write(tmp_path, whole[:end]), "damaged")


@pytest.fixture(scope="module")
def toy() -> bytes:
    x = lambda: view(torch.arange(6.0).reshape(2, 3))  # noqa: E731
    parts = {"fc": persistent(layer_state({"weight": parameter(x())}, gain=number(2)))}
    return dumps({"G": persistent(layer_state(buffers={"x": x()}, parts=parts, _init_kwargs=easy(rank=3)))})


def read_or_refuse(path: Path) -> None:
    try:
        for network in read_released(path).values():
            assert all(type(t) is torch.Tensor and t.numel() <= 99 for t in network.tensors.values())
    except UserError:
        refused(path)


quick = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(data=st.data())
def test_wrong_bytes_are_read_or_refused(tmp_path, toy, data):
    changed = bytearray(toy)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(toy) - 1))] = data.draw(st.integers(0, 255))
    read_or_refuse(write(tmp_path, bytes(changed)))


OPCODES = [bytes([i]) for i in range(256)]
WORDS = [by_name(n.module, n.name) for n in (PERSISTENT, LOAD, TENSOR, PARAMETER, INPUT, DTYPE, SEQUENTIAL)]
WORDS += [text("G"), b"K\x01", b"C\x01a", b"\x8f(", b"h\0", b"q\0", b"\x94", b")R", b")\x81", b"}b", b"\x85R"]


@quick
@given(words=st.lists(st.sampled_from(OPCODES + WORDS * 4), max_size=40))
def test_any_sequence_of_opcodes_is_read_or_refused(tmp_path, words):
    read_or_refuse(write(tmp_path, b"\x80\x04" + b"".join(words) + b"."))


# --- networks that cannot be made ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"img_resolution": 2**70},
        {"img_resolution": 40},
        {"mapping_kwargs": easy(num_layers=10**9)},
        {"z_dim": 10**12},
        {"z_dim": 2**70},
        {"w_dim": -1},
        {"c_dim": "x"},
        {"synthesis_kwargs": easy(channel_base=2**79, channel_max=2**79)},
        {"synthesis_kwargs": easy(architecture="resnet")},
        {"synthesis_kwargs": easy(rank=float("nan"))},
        {"synthesis_kwargs": easy(bandwidth=1e999)},
    ],
    ids=lambda change: str(next(iter(change))),
)
def test_settings_that_the_tensors_do_not_fit_are_one_sentence(tmp_path, small, change):
    G = network(small.under("G/"), kwargs_of(small.config, "G") | change)
    path = write(tmp_path, dumps({"G_ema": G}))
    with pytest.raises(UserError, match=r"G_ema in .* cannot be used") as error:
        load_generator(path)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 2000


def test_a_file_without_the_average_is_one_sentence(tmp_path, small):
    path = write(tmp_path, dumps(content(small, kinds=("G", "D"))))
    with pytest.raises(UserError, match=r"network\.pkl holds no G_ema"):
        load_generator(path)


# --- training begins from them ---------------------------------------------------------------------------------------

FIT = {
    "G": {"z_dim": 20, "w_dim": 24, "mapping_layers": 3, "channel_base": 512, "channel_max": 24}
    | {"biline_channels": 8, "thickness": 8},
    "D": {"channel_base": 512, "channel_max": 24},
}


@pytest.mark.parametrize("flag", ["--init-from", "--resume"])
def test_a_run_begins_from_a_released_file(tiny, flag):
    ref = Reference(REFERENCES[1])
    path = write(tiny.folder, dumps(content(ref)))
    options = [x for part, values in FIT.items() for k, v in values.items() for x in ("-o", f"{part}.{k}={v}")]
    images = tiny.images("large", size=(32, 32), count=8)
    arguments = (flag, path, "--kimg", 0.008, "--glr", 1e-12, "--dlr", 1e-12, *options)
    result = tiny.call(*tiny.new(*arguments, data=images))
    assert result.exit_code == 0, result.output
    (folder,) = tiny.runs()
    state = checkpoint.load(checkpoint.found(folder)[0])
    for name, network in load_released(path).items():
        weights = network.state_dict()
        assert f"{name}: {len(weights)} of {len(weights)} tensors from {path}" in result.output
        for tensor, expected in weights.items():
            if "w_avg" not in tensor:
                torch.testing.assert_close(state[name][tensor], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("flag", ["--init-from", "--resume"])
def test_a_run_does_not_begin_from_an_attack(tiny, flag):
    marker = tiny.folder / "pwned"
    path = write(tiny.folder, dumps({"G": Raw(FORMS["GLOBAL, REDUCE"]("os", "system", touch(marker)))}))
    result = tiny.call(*tiny.new(flag, path))
    assert result.exit_code == 2
    assert re.search(r"^Error: .*network\.pkl .*os\.system", result.output, re.MULTILINE)
    assert not marker.exists()
    assert not tiny.runs()
