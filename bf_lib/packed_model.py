"""What a packed UNet does otherwise than a plain one: saving, counting, taking up a LoRA."""

__all__ = ["PackedModel", "dequantized_", "packed_class"]

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path

from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import create_repo
from torch import nn

from bf_lib.checkpoint import config_digest
from bf_lib.checkpoint_files import replaced_at_once, shapes_of
from bf_lib.packed_layers import ADVICE, packed_layers, unpack_layer_
from bf_lib.timecache import cached_time_features

UNCHANGED = "unchanged"


class PackedModel:
    """What a packed UNet does otherwise than a plain one; mixed into its class."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        compress: str | None = UNCHANGED,
        **kwargs: object,
    ) -> None:
        """Saves as diffusers does, but all at once: see `checkpoint_files.replaced_at_once`.

        Arguments:
            save_directory: The folder.
            is_main_process, save_function, safe_serialization, variant, max_shard_size: As in
                diffusers.
            push_to_hub: Whether to upload it as well, when it is saved.
            compress: "zstd" or None; by default as the model was loaded or packed.
            kwargs: Those of `push_to_hub`.
        """
        if getattr(self, "peft_config", None):
            raise ValueError(
                "the model has adapters: save them with `save_lora_adapter`, and delete them with "
                "`delete_adapters` before the packed weights are saved"
            )
        quantizer, known = self.hf_quantizer, cached_time_features(self)
        header, config = quantizer.header, json.loads(self.to_json_string())
        quantizer.header = replace(
            header,
            config=config_digest(config),
            timesteps=None if known is None else len(known.timesteps),
            compress=header.compress if compress == UNCHANGED else compress,
        )
        quantizer.names = set(shapes_of(config, quantizer.header).state_dict())
        try:
            with replaced_at_once(save_directory) as place:
                super().save_pretrained(
                    str(place),
                    is_main_process=is_main_process,
                    save_function=save_function,
                    safe_serialization=safe_serialization,
                    variant=variant,
                    max_shard_size=max_shard_size,
                )
        finally:
            quantizer.header = header
        if push_to_hub:
            _upload(self, Path(save_directory), **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple:
        """Makes copies and pickles find the class, which no module has by its name."""
        _, _, *rest = super().__reduce_ex__(protocol)
        return (_blank, (type(self).__bases__[1],), *rest)

    def fuse_lora(self, *args: object, **kwargs: object) -> None:
        """Refuses: a sum of weights and a LoRA has no place on a grid of a few levels."""
        raise NotImplementedError(f"packed weights cannot take up a LoRA: {ADVICE}")

    def num_parameters(
        self, only_trainable: bool = False, exclude_embeddings: bool = False
    ) -> int:
        """Returns the number of parameters; each packed weight counts as one."""
        packed = sum(prod(layer.shape) for layer in packed_layers(self).values())
        others = super().num_parameters(only_trainable, exclude_embeddings)
        return others + (0 if only_trainable else packed)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Returns the bytes of all tensors that the model holds.

        Decoded weights that are kept are among them, and the place where the others are decoded
        one after the other, which is as large as the largest once the model has run.
        """
        layers = packed_layers(self).values()
        kept = (layer.__dict__.get("kept") for layer in layers)
        held = super().get_memory_footprint(return_buffers)
        held += sum(weight.nbytes for weight in kept if weight is not None)
        return held + sum({id(layer.room): layer.room.nbytes for layer in layers}.values())

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Names what DistributedDataParallel need not send around at each step: all loaded it."""
        return [name for name, value in self.named_buffers() if not value.is_floating_point()]


@cache
def packed_class(kind: type) -> type:
    """Returns the class of packed models of a class, which goes by the same name."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (PackedModel, kind), names | {"__doc__": kind.__doc__})


def _blank(kind: type) -> nn.Module:
    """Returns a packed model of a class, for its state to be filled in."""
    packed = packed_class(kind)
    return packed.__new__(packed)


def dequantized_(model: nn.Module) -> nn.Module:
    """Makes a packed model an ordinary one, in place, with the weights that it computes with."""
    for layer in packed_layers(model).values():
        unpack_layer_(layer)
    model.__class__ = type(model).__bases__[1]
    said = {n: v for n, v in model.config.items() if n != "quantization_config"}
    model._internal_dict = FrozenDict(said)
    if cached_time_features(model) is not None:
        model.save_pretrained = _incomplete
    return model


def _upload(
    model: ModelMixin,
    folder: Path,
    repo_id: str | None = None,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> None:
    """Uploads a folder that was saved, as diffusers does after its own saving."""
    made = create_repo(repo_id or folder.name, exist_ok=True, private=private, token=token)
    card = load_or_create_model_card(made.repo_id, token=token)
    populate_model_card(card).save(folder / "README.md")
    options = {"token": token, "commit_message": commit_message, "create_pr": create_pr}
    model._upload_folder(str(folder), made.repo_id, **options)


def _incomplete(*args: object, **kwargs: object) -> None:
    """Refuses: what diffusers would load again has time layers of random weights."""
    raise ValueError(
        "this UNet has cached time features in place of its time layers, which only packed "
        "checkpoints can hold: save it before `dequantize()`"
    )
