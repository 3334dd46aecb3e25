"""Training that does no work it can spare, with the losses and gradients of stock training.

Four parts, each a context manager over any training loop, each exact to rounding, alone and together:

- `cut`: nothing below the lowest trained block takes part in backward or is recomputed;
- `prefix`: the hidden states that enter that block are computed once a record and kept;
- `labels`: final norm, head and loss run on labelled positions only;
- `packing`: padding goes through no block.
"""
