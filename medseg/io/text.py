"""Text from files, made fit to be shown."""


def one_line(value: object) -> str:
    r"""Return text on one line, without control characters: what a file holds must not steer a terminal or a log.

    Example:
        >>> one_line("CT\x1b[31m  \n head ")
        'CT [31m head'
    """
    text = str(value)
    if not text.isprintable():
        text = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(text.split())
