"""BitsFusion, open and reproducible: 1.99-bit weights for the Stable Diffusion UNet."""

from importlib import import_module

_HOMES = {
    "estimate": "bf_lib.sensitivity",
    "list_layers": "bf_lib.layers",
    "load_pipeline": "bf_lib.models",
    "published_recipe": "bf_lib.layers",
    "run_job": "bf_lib.jobs",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """Imports what is asked for: torch and diffusers take seconds, and not all need them."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
