"""The card a call runs on, and which variant of the kernels it takes."""

import functools
from dataclasses import dataclass

import torch

from . import packaged

# Compute capability -> variant: the tile configurations made for a card.
VARIANTS: dict[tuple[int, int], str] = {
    (9, 0): "sm90a",
    (10, 0): "sm100a",
    (10, 3): "sm103a",
    (12, 0): "sm120a",
    (12, 1): "sm121a",
}
# The kernels that a variant is compiled from.
FAMILIES = {
    "sm90a": "sm120",
    "sm100a": "sm100",
    "sm103a": "sm100",
    "sm120a": "sm120",
    "sm121a": "sm120",
}
# For cards of a family that have no row of their own, by the major revision. A family is a major
# revision: code for it runs where the minor one is the same or higher (CuTe DSL 4.8.1,
# cutlass/base_dsl/enums.py, Arch.can_run_binary_built_for; it lists 10.0, 10.3 and 10.7, 12.0 and
# 12.1). But what was called 10.1 is Thor, whose family is 11.x (there: sm_101f = sm_110f). ptxas
# 13.5 says the same: it takes a target of sm_100f for sm_103 and sm_107, and for sm_110 refuses it.
FAMILY_VARIANTS = {10: "sm100a", 12: "sm120a"}
OTHER_FAMILIES = {(10, 1): "it is 11.0 (Thor) by its first name, which is no member of 10.x"}
# What machine code of a variant is compiled for, by the kernels' family. Code for a family of cards
# ("f") runs on all of them, and is the code for one card ("a") but for two bytes of its header.
TARGETS = {
    ("sm90a", "sm120"): "sm90a",
    ("sm100a", "sm100"): "sm100f",
    ("sm100a", "sm120"): "sm100f",
    ("sm103a", "sm100"): "sm103f",
    ("sm103a", "sm120"): "sm100f",
    ("sm120a", "sm120"): "sm120f",
    ("sm121a", "sm120"): "sm120f",
}
INSTRUCTIONS = {"sm120": "mma.sync", "sm100": "tcgen05"}  # of each family's kernels
SUPPORTED = (
    "9.0 (H100, H200), 10.0 (B200), 10.3 (B300), 12.0 (RTX 50, RTX PRO Blackwell) or 12.1 (GB10), "
    "or a later 10.x or 12.x"
)


@dataclass(frozen=True, slots=True)
class Card:
    """One CUDA device as the planner sees it."""

    name: str
    capability: tuple[int, int]
    num_sms: int

    @property
    def variant(self) -> str | None:
        """Name of the variant that runs here, or None.

        A card that is newer than those of its family gets the family's: machine code for 10.x and
        12.x runs on every later minor revision, that for 9.0 only there.
        """
        if self.capability in OTHER_FAMILIES:
            return None
        major, _ = self.capability
        return VARIANTS.get(self.capability) or FAMILY_VARIANTS.get(major)

    def __str__(self) -> str:
        """Its capability and name, and what is to be known of them."""
        major, minor = self.capability
        more = OTHER_FAMILIES.get(self.capability)
        return f"{major}.{minor} ({self.name}{'' if more is None else '; ' + more})"


@functools.cache
def card(device: torch.device) -> Card:
    """Describe a CUDA device; asked once per device."""
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return Card(properties.name, capability, properties.multi_processor_count)


def supported_card(device: torch.device) -> Card:
    """The card `device`, which some variant of the kernels runs on.

    Raises:
        NotImplementedError: no variant is built for its compute capability.
    """
    found = card(device)
    if found.variant is None:
        raise NotImplementedError(
            f"device={device} is not supported: flash-attn-4 needs compute capability {SUPPORTED}, "
            f"found {found}. Use a supported card, or pass CPU tensors to run the cpu variant"
        )
    return found


def describe(device: torch.device) -> str:
    """One line: which variant runs on `device`, and why."""
    if device.type == "cpu":
        return "variant cpu: PyTorch operations, because the tensors live on the CPU"
    found = card(device)
    if found.variant is None:
        return f"no variant: found capability {found}, supported are {SUPPORTED}"
    major, minor = found.capability
    parts = [(target, family) for (v, family), target in TARGETS.items() if v == found.variant]
    instructions = INSTRUCTIONS[FAMILIES[found.variant]]
    own = "" if found.capability in VARIANTS else f", of the family of {found.variant}"
    return (
        f"variant {found.variant}: {instructions} kernels, because {found.name} "
        f"has compute capability {major}.{minor}{own} ({found.num_sms} SMs); "
        f"{packaged.describe(parts)}"
    )
