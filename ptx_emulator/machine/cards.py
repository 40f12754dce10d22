"""The cards that the emulator can be, as far as a launch depends on them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """Limits of one architecture; `smem_per_cta` is what a kernel may opt in to."""

    arch: str
    major: int
    minor: int
    num_sms: int
    smem_per_cta: int
    threads_per_sm: int


CARDS = {
    card.arch: card
    for card in (
        Card("sm_90a", 9, 0, 132, 232448, 2048),
        Card("sm_100a", 10, 0, 148, 232448, 2048),
        Card("sm_103a", 10, 3, 148, 232448, 2048),
        Card("sm_120a", 12, 0, 188, 101376, 1536),
        Card("sm_121a", 12, 1, 48, 101376, 1536),
    )
}


def card_of(arch: str) -> Card:
    """The card named `sm_100a`, or `sm100a`."""
    name = arch if "_" in arch else arch.replace("sm", "sm_")
    if name not in CARDS:
        raise ValueError(f"arch={arch!r} is not emulated: use one of {', '.join(CARDS)}")
    return CARDS[name]
