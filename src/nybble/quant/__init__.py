"""The 4-bit format: value tables, packed weights, encode and decode in plain torch, bitsandbytes' file layout."""

from nybble.quant.blockwise import decode, decode_absmax, encode
from nybble.quant.bnb_layout import SUFFIXES, from_bnb, stored_shape, to_bnb
from nybble.quant.codebooks import BLOCK_SIZES, QUANT_TYPES, codebook, dynamic_codebook
from nybble.quant.feedback import CalibrationSteps, Factors, encode_calibrated, factorise
from nybble.quant.packed import NESTED_BLOCK_SIZE, PackedWeight
from nybble.quant.repair import low_rank
from nybble.quant.search import encode_searched

__all__ = [
    "BLOCK_SIZES",
    "NESTED_BLOCK_SIZE",
    "QUANT_TYPES",
    "SUFFIXES",
    "CalibrationSteps",
    "Factors",
    "PackedWeight",
    "codebook",
    "decode",
    "decode_absmax",
    "dynamic_codebook",
    "encode",
    "encode_calibrated",
    "encode_searched",
    "factorise",
    "from_bnb",
    "low_rank",
    "stored_shape",
    "to_bnb",
]
