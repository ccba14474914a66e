"""Files of sound that were cut off: libsndfile reads what is left of some of them without a word."""

import os
from typing import BinaryIO

from ._ref import Media

STREAMED = 0x7FFF_F000  # sizes from here on are what a program writes that does not know the size
PAD = 1  # byte that some programs count and do not write
PAGE = 2**16  # bytes, more than a page of Ogg has


def check_whole(media: Media, file: BinaryIO) -> None:
    """Compare what the header of WAV, AIFF, AU, CAF and Ogg says with the bytes that are there.

    Raises:
        ValueError: bytes are missing.
    """
    have = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(12)
    walk = {b"OggS": _ogg, b"caff": _caf}.get(start[:4])
    said = walk(file, have) if walk else _said(start)
    if have + PAD < said < STREAMED:
        raise ValueError(
            f"{media.shown}: a truncated sound: {have:,} of {said:,} bytes; fetch the file again, or take the row out"
        )


def _said(start: bytes) -> int:
    """Bytes of the whole file, 0 where its header does not say."""
    if start[:4] == b"RIFF" and start[8:] == b"WAVE":
        return int.from_bytes(start[4:8], "little") + 8
    if start[:4] == b"FORM" and start[8:] in (b"AIFF", b"AIFC"):
        return int.from_bytes(start[4:8], "big") + 8
    if start[:4] == b".snd":
        return int.from_bytes(start[4:8], "big") + int.from_bytes(start[8:], "big")
    return 0


def _ogg(file: BinaryIO, have: int) -> int:
    """Bytes up to the end of the last page that has begun (RFC 3533, section 6)."""
    base = max(0, have - PAGE)
    file.seek(base)
    tail = file.read()
    at = tail.rfind(b"OggS")
    head = tail[at : at + 27]
    if at < 0:
        return 0
    if len(head) < 27:
        return base + at + 27 + PAD + 1
    table = tail[at + 27 : at + 27 + head[26]]
    return base + at + 27 + head[26] + sum(table) + (PAD + 1) * (len(table) < head[26])


def _caf(file: BinaryIO, have: int) -> int:
    """Bytes up to the end of the last chunk that has begun; the size of sound may be -1, for up to the end."""
    at = 8
    while at + 12 <= have:
        file.seek(at + 4)
        size = int.from_bytes(file.read(8), "big", signed=True)
        if size < 0:
            return 0
        at += 12 + size
    return at
