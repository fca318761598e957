"""Weights that the authors of CREPS, StyleGAN2, CIPS and INR-GAN released: from their tensor names and layouts to ours.

`config` is the dict of settings that comes with the weights, under the released names: z_dim, c_dim, w_dim,
img_resolution, img_channels, mapping_layers, channel_base, channel_max, architecture, mbstd_group_size; of CREPS
biline_channels, rank (the thickness) and bandwidth; of StyleGAN2 use_noise; of INR-GAN upsampling_mode. The default of
each is the published value. CIPS comes without settings.
"""

import re

import torch
from torch import Tensor, nn

from dnnlib.config import Config, build
from dnnlib.console import UserError
from torch_utils.randomness import make_rng
from training.networks.cips import CIPSConfig
from training.networks.creps import GeneratorConfig
from training.networks.discriminator import Discriminator, DiscriminatorConfig
from training.networks.generator import Generator
from training.networks.inr_gan import INRGANConfig
from training.networks.stylegan2 import StyleGAN2Config

MOST_PROBLEMS = 3  # tensors that a message lists


def generator_from_official(tensors: dict[str, Tensor], config: dict) -> Generator:
    """Return the released generator as our module, in eval mode. The tensors tell its kind.

    `tensors` has the released names without prefix (`mapping.fc0.weight`, `synthesis.b4.input.freqs`, …). Raises
    UserError that lists tensors that are missing, unexpected or have another shape.
    """
    make = next((make for mark, make in _MAKERS.items() if mark in tensors), _creps)
    return make(tensors, config)


def _creps(tensors: dict[str, Tensor], config: dict) -> Generator:
    """Make a generator of CREPS.

    The stored coordinates, the head of block 4 and the decoder of block 8 (with architecture "orig", the decoders of
    all blocks) are dropped: the released network never uses them.
    """
    G = _outline(Generator, GeneratorConfig, _CREPS_SETTINGS, config | {"coords": "endpoints"})
    c = G.config
    blocks = [4 << i for i in range(c.num_blocks)]

    names = _mapping(G)
    names |= _parameters("synthesis.b4.input.affine", "synthesis.lines.input.affine")
    names |= {f"synthesis.b4.input.{x}": f"synthesis.lines.input.{x}" for x in ("freqs", "weight")}
    for i, k in enumerate(blocks):
        block = G.synthesis.lines.blocks[i]
        for j in range(len(block.layers)):
            theirs = f"synthesis.b{k}.fc{j if i else 1}"
            names |= _modulated(theirs, f"synthesis.lines.blocks.{i}.layers.{j}")
        if block.head is not None:
            names |= _modulated(f"synthesis.b{k}.tores", f"synthesis.lines.blocks.{i}.head")
    decoders = {f"decoder_{k}": f"decoders.{i}" for i, k in enumerate(blocks[2:])} if c.architecture == "skip" else {}
    for theirs, ours in (decoders | {"decoder_last": "decoder_last"}).items():
        for j in range(4):
            names |= _parameters(f"synthesis.{theirs}.{j}", f"synthesis.pixels.{ours}.{j}")
    names |= _parameters("synthesis.decoder_img", "synthesis.pixels.decoder_img")
    for i in range(2):
        for j in range(2):
            names |= _modulated(f"synthesis.block{i}.fc{j}", f"synthesis.pixels.refinement.{i}.layers.{j}")
        names |= _modulated(f"synthesis.block{i}.tores", f"synthesis.pixels.refinement.{i}.head")

    unused = ["synthesis.b4.input.coords", "synthesis.b4.tores.", "synthesis.decoder_8."]
    if c.architecture == "orig":
        unused += [f"synthesis.decoder_{k}." for k in blocks] + [f"synthesis.b{k}.tores." for k in blocks[:-1]]

    channels, thickness = c.widths[0], c.thickness
    released_shapes = {
        "synthesis.b4.input.freqs": (1, channels // 2 * thickness),
        "synthesis.b4.input.weight": (1, channels, 1, 2 * thickness),
    }
    # The released input is [C,1,2D] with rows first on the last axis; ours is [rows or columns, D, C].
    arrange = {
        "synthesis.b4.input.freqs": lambda t: t.reshape(channels // 2, thickness).T,
        "synthesis.b4.input.weight": lambda t: t.reshape(channels, 2, thickness).permute(1, 2, 0),
        "synthesis.b4.input.affine.weight": lambda t: (
            t.reshape(channels, 2, thickness, -1).permute(1, 2, 0, 3).flatten(0, 2)
        ),
        "synthesis.b4.input.affine.bias": lambda t: t.reshape(channels, 2, thickness).permute(1, 2, 0).flatten(),
    }
    return _load(G, tensors, names, tuple(unused), released_shapes, arrange)


def _stylegan2(tensors: dict[str, Tensor], config: dict) -> Generator:
    G = _outline(Generator, StyleGAN2Config, _STYLEGAN2_SETTINGS, config)
    names, shapes = _mapping(G) | {"synthesis.b4.const": "synthesis.const"}, {}
    for i, block in enumerate(G.synthesis.blocks):
        theirs, ours = f"synthesis.b{4 << i}", f"synthesis.blocks.{i}"
        for j in range(len(block.layers)):
            layer = f"{theirs}.conv{j if i else 1}", f"{ours}.layers.{j}"
            names |= _modulated(*layer)
            if G.config.noise:
                names |= {f"{layer[0]}.{x}": f"{layer[1]}.{x}" for x in ("noise_strength", "noise_const")}
        if block.skip is not None:
            names[f"{theirs}.skip.weight"] = f"{ours}.skip.weight"
        if block.head is not None:
            names |= _modulated(f"{theirs}.torgb", f"{ours}.head")
            shapes[f"{theirs}.torgb.weight"] = (*block.head.weight.shape, 1, 1)
    tensors = {n: t for n, t in tensors.items() if G.config.noise or ".noise_" not in n}
    return _load(G, _without_filters(tensors), names, (), shapes)


def _cips(tensors: dict[str, Tensor], config: dict) -> Generator:
    """Make a generator of CIPS, which reads its embedding as in the released evaluation.

    All sizes are those of the tensors. The average style, which the files lack, is the mean of 4,096 fixed styles.
    """
    side = _size(tensors, "emb.input", 2)
    blocks = max(side.bit_length() - 2, 0)
    settings = {
        "img_resolution": side,
        "features": _size(tensors, "emb.input", 1),
        "z_dim": _size(tensors, "style.1.weight", 0),
        "w_dim": _size(tensors, "style.1.weight", 0),
        "mapping_layers": sum(bool(re.fullmatch(r"style\.\d+\.weight", name)) for name in tensors),
        "channel_base": _size(tensors, f"linears.{2 * blocks - 2}.conv.weight", 1) * side,
        "channel_max": _size(tensors, "conv1.conv.weight", 1),
        "embedding_coords": "centers",
    }
    G = _outline(Generator, CIPSConfig, {name: name for name in settings}, settings)
    features = G.config.features
    names = {"w_avg": "mapping.w_avg", "emb.input": "synthesis.input.embedding"}
    names |= _parameters("lff.ffm.conv", "synthesis.input")
    shapes = {"emb.input": (1, features, side, side), "lff.ffm.conv.weight": (features, 2, 1, 1)}
    for i in range(G.config.mapping_layers):
        names |= _parameters(f"style.{i + 1}", f"mapping.layers.{i}")
    layers = {f"linears.{i - 1}" if i else "conv1": f"synthesis.layers.{i}" for i in range(2 * blocks + 1)}
    heads = {f"to_rgbs.{i}": f"synthesis.heads.{i}" for i in range(blocks)}
    for theirs, ours in (layers | heads).items():
        names |= {f"{theirs}.conv.weight": f"{ours}.weight"} | _parameters(
            f"{theirs}.conv.modulation", f"{ours}.affine"
        )
        shapes[f"{theirs}.conv.weight"] = (1, *G.get_parameter(f"{ours}.weight").shape, 1, 1)
    for theirs, ours in layers.items():
        names |= {f"{theirs}.activate.bias": f"{ours}.bias", f"{theirs}.noise.weight": f"{ours}.noise_strength"}
        shapes[f"{theirs}.noise.weight"] = (1,)
    for theirs, ours in heads.items():
        names[f"{theirs}.bias"] = f"{ours}.bias"
        shapes[f"{theirs}.bias"] = (1, G.config.img_channels, 1, 1)
    arrange = {"emb.input": lambda t: t[0].permute(1, 2, 0)}
    G = _load(G, tensors | {"w_avg": torch.zeros(G.config.w_dim)}, names, (), shapes, arrange)
    z = torch.randn(4096, G.config.z_dim, generator=make_rng(0, 0, "w_avg"))
    G.mapping.w_avg.copy_(G.mapping(z)[:, 0].mean(dim=0))
    return G


def _inr_gan(tensors: dict[str, Tensor], config: dict) -> Generator:
    if (mode := config.get("upsampling_mode", "nearest")) != "nearest":
        raise UserError(f"INR-GAN with upsampling_mode={mode} is not supported; give a network of the recipe inr-gan")
    outputs, inputs = (_size(tensors, "synthesis.b4.conv1.weight", axis) for axis in range(2))
    found = {
        "mapping_layers": sum(bool(re.fullmatch(r"mapping\.fc\d+\.weight", name)) for name in tensors),
        "extra_layers": any(".extra_convs." in name for name in tensors),
        "rank": _size(tensors, "synthesis.b4.conv1.affine.bias", 0) // max(outputs + inputs, 1),
    }
    G = _outline(Generator, INRGANConfig, _INR_GAN_SETTINGS, config | found)
    names, shapes, arrange = _mapping(G), {}, {}
    for k, block in G.synthesis.blocks.items():
        layers = ["conv1"] if k == "4" else ["conv0", "conv1", "extra_convs.0"][: len(block.layers)]
        pairs = {f"synthesis.b{k}.torgb": f"synthesis.blocks.{k}.head"}
        pairs |= {f"synthesis.b{k}.{name}": f"synthesis.blocks.{k}.layers.{i}" for i, name in enumerate(layers)}
        for theirs, ours in pairs.items():
            names |= _modulated(theirs, ours)
            shapes[f"{theirs}.weight"] = (*G.get_parameter(f"{ours}.weight").shape, 1, 1)
    for k, features in G.synthesis.inputs.items():
        theirs = "synthesis.b4.input.input.coord_fuser" if k == "4" else f"synthesis.b{k}.coord_fuser"
        names |= {f"{theirs}.{name}": f"synthesis.inputs.{k}.{name}" for name, _ in features.named_buffers()}
        names[f"{theirs}.const_embs"] = f"synthesis.inputs.{k}.embedding"
        shapes[f"{theirs}.const_embs"] = (1, *features.embedding.permute(2, 0, 1).shape)
        arrange[f"{theirs}.const_embs"] = lambda t: t[0].permute(1, 2, 0)
    return _load(G, _without_filters(tensors), names, (), shapes, arrange)


# A tensor that only generators of a kind have -> the function that makes one.
_MAKERS = {
    "synthesis.b4.input.freqs": _creps,
    "synthesis.b4.const": _stylegan2,
    "synthesis.b4.input.input.coord_fuser.const_embs": _inr_gan,
    "emb.input": _cips,
}


def discriminator_from_official(tensors: dict[str, Tensor], config: dict) -> Discriminator:
    """Return the released discriminator as our module, in eval mode. See `generator_from_official`."""
    if "convs.0.0.weight" in tensors:
        return _cips_discriminator(tensors)
    D = _outline(Discriminator, DiscriminatorConfig, _DISCRIMINATOR_SETTINGS, config)
    c = D.config
    names = {}
    for resolution in D.blocks:
        theirs, ours = f"b{resolution}", f"blocks.{resolution}"
        names |= _parameters(f"{theirs}.conv0", f"{ours}.conv0") | _parameters(f"{theirs}.conv1", f"{ours}.conv1")
        names[f"{theirs}.skip.weight"] = f"{ours}.skip.weight"
    names |= _parameters(f"b{c.resolutions[0]}.fromrgb", "from_rgb")
    for layer in ("conv", "fc", "out"):
        names |= _parameters(f"b4.{layer}", f"epilogue.{layer}")
    if c.c_dim:
        names |= _linears("mapping", "mapping", c.mapping_layers, True)
    return _load(D, _without_filters(tensors), names)


def _cips_discriminator(tensors: dict[str, Tensor]) -> Discriminator:
    """Make the discriminator of CIPS, which has no clamps: where a feature is beyond ±256, ours differs."""
    blocks = sum(bool(re.fullmatch(r"convs\.\d+\.skip\.1\.weight", name)) for name in tensors)
    side = 4 << min(blocks, 16)
    settings = {
        "img_resolution": side,
        "img_channels": _size(tensors, "convs.0.0.weight", 1),
        "channel_base": _size(tensors, "convs.0.0.weight", 0) * side,
        "channel_max": _size(tensors, "final_conv.0.weight", 0),
    }
    D = _outline(Discriminator, DiscriminatorConfig, {name: name for name in settings}, settings)
    names = _convolution("convs.0", "from_rgb") | _convolution("final_conv", "epilogue.conv")
    names |= _parameters("final_linear.0", "epilogue.fc") | _parameters("final_linear.1", "epilogue.out")
    for j, resolution in enumerate(D.blocks, 1):
        theirs, ours = f"convs.{j}", f"blocks.{resolution}"
        names |= _convolution(f"{theirs}.conv1", f"{ours}.conv0") | _convolution(f"{theirs}.conv2", f"{ours}.conv1", 1)
        names[f"{theirs}.skip.1.weight"] = f"{ours}.skip.weight"
    return _load(D, _without_filters(tensors), names)


def _without_filters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the resampling filters. Raises UserError for others than torch_utils.ops.resample has built in."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    filters = {name for name in tensors if name.endswith(("resample_filter", ".kernel"))}
    for name in filters:
        tensor = tensors[name]
        if tensor.shape != (4, 4) or not torch.allclose(tensor.float().cpu(), torch.outer(taps, taps)):
            raise UserError(f"{name} is not the filter [1,3,3,1]; this network was not trained by the released code")
    return {name: tensor for name, tensor in tensors.items() if name not in filters}


def _size(tensors: dict[str, Tensor], name: str, axis: int) -> int:
    """Return the length of an axis of a tensor, or 1 where there is none: `_load` then refuses the tensors."""
    shape = tensors[name].shape if name in tensors else ()
    return shape[axis] if axis < len(shape) else 1


_IMAGE_SETTINGS = {name: name for name in ("c_dim", "img_resolution", "img_channels", "channel_base", "channel_max")}
_STYLE_SETTINGS = _IMAGE_SETTINGS | {name: name for name in ("z_dim", "w_dim", "mapping_layers", "architecture")}
_STYLEGAN2_SETTINGS = _STYLE_SETTINGS | {"use_noise": "noise"}
_INR_GAN_SETTINGS = _IMAGE_SETTINGS | {
    name: name for name in ("z_dim", "w_dim", "mapping_layers", "rank", "extra_layers")
}
_CREPS_SETTINGS = _STYLE_SETTINGS | {
    "biline_channels": "biline_channels",
    "bandwidth": "bandwidth",
    "rank": "thickness",
    "coords": "coords",
}
_DISCRIMINATOR_SETTINGS = _IMAGE_SETTINGS | {"mbstd_group_size": "mbstd_group"}


def _outline(kind: type[nn.Module], config_kind: type[Config], names: dict[str, str], config: dict) -> nn.Module:
    """Build the network of these settings without memory for weights: a bad file may specify enormous ones."""
    taken = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    what = f"the settings of the released {kind.__name__.lower()}"
    settings = build(config_kind, taken, what)
    try:
        with torch.device("meta"):
            return kind(settings)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes that do not fit into 64 bits
        raise UserError(f"{what} are not sizes that a network can have: {settings!r}") from error


def _parameters(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.weight": f"{ours}.weight", f"{theirs}.bias": f"{ours}.bias"}


def _convolution(theirs: str, ours: str, first: int = 0) -> dict[str, str]:
    return {f"{theirs}.{first}.weight": f"{ours}.weight", f"{theirs}.{first + 1}.bias": f"{ours}.bias"}


def _mapping(G: Generator) -> dict[str, str]:
    layers = _linears("mapping", "mapping", G.config.mapping_layers, bool(G.config.c_dim))
    return {"mapping.w_avg": "mapping.w_avg"} | layers


def _modulated(theirs: str, ours: str) -> dict[str, str]:
    return _parameters(theirs, ours) | _parameters(f"{theirs}.affine", f"{ours}.affine")


def _linears(theirs: str, ours: str, count: int, embed: bool) -> dict[str, str]:
    names = _parameters(f"{theirs}.embed", f"{ours}.embed") if embed else {}
    for i in range(count):
        names |= _parameters(f"{theirs}.fc{i}", f"{ours}.layers.{i}")
    return names


def _load(module: nn.Module, tensors, names, unused=(), released_shapes=None, arrange=None) -> nn.Module:
    """Copy `tensors` (released names) into `module`. `names`: released name -> ours."""
    released_shapes, arrange = released_shapes or {}, arrange or {}
    state = module.state_dict()
    problems = [f"missing {n}" for n in names if n not in tensors]
    problems += [f"unexpected {n}" for n in tensors if n not in names and not n.startswith(unused)]
    for theirs, ours in names.items():
        if theirs in tensors:
            expected = tuple(released_shapes.get(theirs, state[ours].shape))
            if tuple(tensors[theirs].shape) != expected:
                problems.append(f"{theirs} is {list(tensors[theirs].shape)} instead of {list(expected)}")
    if problems:
        more = len(problems) - MOST_PROBLEMS
        problems = problems[:MOST_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        raise UserError(
            f"the tensors do not fit the released {type(module).__name__.lower()} of this config: "
            + "; ".join(problems)
        )
    arranged = {
        ours: arrange[theirs](tensors[theirs]) if theirs in arrange else tensors[theirs].reshape(state[ours].shape)
        for theirs, ours in names.items()
    }
    copies = {ours: t.to(state[ours].dtype, copy=True).contiguous() for ours, t in arranged.items()}
    module.load_state_dict(copies, assign=True)
    return module.eval().requires_grad_(False)
