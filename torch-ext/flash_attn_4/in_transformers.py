"""One call for users of transformers, without importing it."""

from __future__ import annotations

from typing import Any

from .flash_attn4_cute.checks import refuse


def use_in_transformers(model: Any, name: str) -> Any:
    """Make this kernel the attention of a loaded transformers model, and make sure that it is.

    `model.set_attn_implementation(name)` alone does something else for gpt-oss and other models
    that list the FlashAttention implementations they accept: after one warning they take the first
    of their list in the place of a name that is not on it. Here the name is put on the model's list
    first; other models of its class are left as they are.

    Args:
        model: a transformers.PreTrainedModel.
        name: the repository this kernel is loaded from, as in attn_implementation=:
            "org/flash-attn-4", "org/flash-attn-4@<revision>", "org/flash-attn-4:fa3".

    Returns:
        model.

    Raises:
        TypeError: model is no model of transformers.
        ValueError: transformers runs another implementation all the same, or cannot load the name.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise refuse(
            TypeError,
            "model",
            type(model).__name__,
            "must be a transformers.PreTrainedModel",
            "Pass what from_pretrained returns",
        )
    parts = [module for module in model.modules() if hasattr(module, "set_attn_implementation")]
    for part in parts:
        listed = getattr(part, "_compatible_flash_implementations", None)
        if listed is not None and name not in listed:
            part._compatible_flash_implementations = [*listed, name]
    model.set_attn_implementation(name, allow_all_kernels=True)
    for part in parts:
        chosen = part.config._attn_implementation
        if chosen != name:
            raise refuse(
                ValueError,
                "name",
                repr(name),
                f"{type(part).__name__} runs {chosen!r} instead",
                "Choose a model that transformers can run with a FlashAttention kernel",
            )
    return model
