"""Find or download published weights; never execute them, and name them after their contents."""

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dnnlib.console import UserError, brief
from dnnlib.files import RemoteFile, sha256

State = dict[str, Tensor]


class PublishedNetwork:
    """A network on `device`, in eval mode and without gradients, with the tensors of a file written by torch.save.

    A result is only as good as the weights behind it. So a network is named `published` only with the published
    weights; with others it is named `kind`-custom- and 8 digits of the file's SHA-256.

    module    build(the tensors by their names)
    digest    SHA-256 of the file, hexadecimal
    standard  whether the file is the published one
    name      of the network with these weights
    """

    def __init__(
        self,
        path: str | os.PathLike,
        source: RemoteFile,
        kind: str,
        published: str,
        build: Callable[[State], nn.Module],
        device: str | torch.device,
    ):
        """Read the file and execute nothing. Raises UserError unless it holds the tensors of this network."""
        try:
            self.digest = sha256(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or not all(
                type(name) is str and isinstance(t, Tensor) for name, t in state.items()
            ):
                raise ValueError("it is not a dictionary of tensors")
        # Broken bytes make zipfile, torch and its unpickler raise a dozen kinds of exception; all mean the same.
        except Exception as error:
            raise UserError(f"{path} holds no weights ({brief(error)}); replace it with {source.url}") from error
        try:
            module = build(state).eval().requires_grad_(False)
        except (KeyError, IndexError, ValueError, RuntimeError) as error:  # the last is load_state_dict's
            raise UserError(f"{path} holds other tensors than {kind} has; replace it with {source.url}") from error
        self.device = torch.device(device)
        self.module = module.to(self.device)
        self.standard = source.digest is not None and self.digest.startswith(source.digest)
        self.name = published if self.standard else f"{kind}-custom-{self.digest[:8]}"
