"""Our blocks in transformers' models: attention over flattened rows, the gated MLP, norms, the loss without logits.

Modules keep their place, names and weights; only the `forward` of the instances of this one model is another, and each
falls back to its class's own where ours does not apply (generation with a cache, trained weights, several adapters). No
list of families decides: what a block is made of makes it a candidate, and equal numbers let it in.

    kinds        attention, recurrent, mlp, norm: which modules they recognise, and their forwards
    attention    the whole block of Llama and its kin; for all others our function in transformers' attention interface
    head         the model's forward over rows, and the loss
    proof        what is taken, decided on a small model of the same class and config
"""

from nybble.models.blocks.attention import over_rows
from nybble.models.blocks.head import NextTokenOutput, body_of, has_fused_head, use_token_rows, use_whole_head
from nybble.models.blocks.swap import SwapReport, blocks_of, implementation_of, swap_blocks
from nybble.models.small import choice_for

__all__ = [
    "NextTokenOutput",
    "SwapReport",
    "blocks_of",
    "body_of",
    "choice_for",
    "has_fused_head",
    "implementation_of",
    "over_rows",
    "swap_blocks",
    "use_token_rows",
    "use_whole_head",
]
