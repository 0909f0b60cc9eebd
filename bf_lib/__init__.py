"""BitsFusion, open and reproducible: 1.99-bit weights for the Stable Diffusion UNet."""

from importlib import import_module

from bf_lib.registration import register

_HOMES = {
    "CheckpointError": "bf_lib.checkpoint",
    "BitsFusionConfig": "bf_lib.packed_config",
    "Recipe": "bf_lib.recipe",
    "cache_time_features_": "bf_lib.timecache",
    "estimate": "bf_lib.sensitivity",
    "list_layers": "bf_lib.layers",
    "load_packed": "bf_lib.packed_unets",
    "load_pipeline": "bf_lib.models",
    "published_recipe": "bf_lib.recipe",
    "pack_": "bf_lib.packed_unets",
    "pack_student": "bf_lib.packed_unets",
    "quantize": "bf_lib.student",
    "run_job": "bf_lib.jobs",
    "save_packed": "bf_lib.packed_unets",
    "set_residency": "bf_lib.packed_layers",
    "size_report": "bf_lib.sizes",
}
__all__ = list(_HOMES)

register()


def __getattr__(name: str) -> object:
    """Imports what is asked for: torch and diffusers take seconds, and not all need them."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
