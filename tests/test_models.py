"""The included networks are small, have cards, and give images that differ, and that agree between scales."""

import pytest
import torch
import torch.nn.functional as F

from docs.card import LIMIT
from rendering import Shot, render
from training.snapshot import MODELS, load_generator, network_names


@pytest.mark.parametrize("name", network_names())
def test_an_included_network_renders_at_any_size(name):
    G = load_generator(name)
    torch.manual_seed(0)
    c = torch.eye(G.config.c_dim)[:4] if G.config.c_dim else None
    ws = G.mapping(torch.randn(4, G.config.z_dim), c, truncation_psi=0.7)
    small = render(G, ws).clamp(-1, 1)
    height, width = G.config.img_shape
    large = render(G, ws, Shot((2 * height, 2 * width))).clamp(-1, 1)
    assert small.std(dim=0).mean() > 0.1  # four seeds, four images
    error = (F.avg_pool2d(large, 2) - small).square().mean()
    assert 10 * torch.log10(4 / error) > 25  # PSNR in dB
    assert (MODELS / f"{name}.safetensors").stat().st_size <= LIMIT
    card = (MODELS / f"{name}.md").read_text(encoding="utf-8")
    assert all(f"## {title}\n" in card for title in ("Data", "Licence", "Weaknesses"))
    assert (MODELS.parent / "docs" / "images" / f"{name}.png").is_file()
