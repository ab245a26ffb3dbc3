"""What the name of a channel says of its values."""

import re


def has_word(channel: str, *words: str) -> bool:
    """Whether a channel's name has one of some words.

    Example:
        >>> has_word("low-dose CT", "CT"), has_word("perfect", "CT")
        (True, False)
    """
    return not set(re.split(r"[^A-Z0-9]+", channel.upper())).isdisjoint(words)


def is_ct(channel: str) -> bool:
    """Whether a channel's name says that it is CT."""
    return has_word(channel, "CT") and not is_pet(channel)


def is_pet(channel: str) -> bool:
    """Whether a channel's name says that it is PET."""
    return has_word(channel, "PET", "PT", "SUV", "SUVBW")
