"""The one table of element types: our names, their sizes, their SafeTensors codes and memoryview formats.

Names are NumPy's (and ml_dtypes' for the narrow floats). SafeTensors has no code for ``complex128``, ``complex32``
and packed ``float4``: those are stored as lanes of a narrower type and come back through ``state.json``.
"""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    """One element type.

    Attributes:
        name: our name, NumPy's spelling.
        bits: size of one element in bits.
        code: the SafeTensors code it is stored as.
        lanes: how many stored elements make one of ours (2 for the complex types without a code of their own).
        format: the memoryview/struct format of one element, or None where Python has none.
    """

    name: str
    bits: int
    code: str
    lanes: int = 1
    format: str | None = None


DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType("bool", 8, "BOOL", 1, "?"),
        DType("uint8", 8, "U8", 1, "B"),
        DType("int8", 8, "I8", 1, "b"),
        DType("uint16", 16, "U16", 1, "H"),
        DType("int16", 16, "I16", 1, "h"),
        DType("uint32", 32, "U32", 1, "I"),
        DType("int32", 32, "I32", 1, "i"),
        DType("uint64", 64, "U64", 1, "Q"),
        DType("int64", 64, "I64", 1, "q"),
        DType("float16", 16, "F16", 1, "e"),
        DType("bfloat16", 16, "BF16"),
        DType("float32", 32, "F32", 1, "f"),
        DType("float64", 64, "F64", 1, "d"),
        DType("float8_e4m3fn", 8, "F8_E4M3"),
        DType("float8_e5m2", 8, "F8_E5M2"),
        DType("float8_e4m3fnuz", 8, "F8_E4M3FNUZ"),
        DType("float8_e5m2fnuz", 8, "F8_E5M2FNUZ"),
        DType("float8_e8m0fnu", 8, "F8_E8M0"),
        DType("float6_e2m3fn", 6, "F6_E2M3"),
        DType("float6_e3m2fn", 6, "F6_E3M2"),
        DType("float4_e2m1fn", 4, "F4"),
        DType("float4_e2m1fn_x2", 8, "U8"),  # torch packs two elements to a byte and counts bytes in the shape
        DType("complex64", 64, "C64"),
        DType("complex128", 128, "F64", 2),
        DType("complex32", 32, "F16", 2),
    )
}

# The first name of a code wins: U8 is uint8, not packed float4.
CODES: dict[str, DType] = {}
for _dtype in DTYPES.values():
    if _dtype.lanes == 1:
        CODES.setdefault(_dtype.code, _dtype)
