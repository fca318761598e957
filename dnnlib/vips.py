"""Import libvips, which encodes images larger than memory and draws SVGs."""

from dnnlib.console import UserError


def import_vips():
    """Import pyvips. Raises UserError if it, or the library behind it, is missing."""
    try:
        import pyvips
    except (ImportError, OSError) as error:
        raise UserError(
            f"writing images and drawing SVGs need pyvips ({error}); install it with: pip install pyvips pyvips-binary"
        ) from error
    pyvips.cache_set_max(0)  # nothing is computed twice here, and a cache would hold pixels and files
    return pyvips
