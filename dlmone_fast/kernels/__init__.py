"""Fused operations, a folder each.

`op.py` checks the arguments and declares the operation, `dispatch` chooses a backend, and
`torch.py`, `native.py` (C++), `triton.py` or `cuda.py` computes; `reference.py` is the definition.

A leaf of the package: nothing here knows about models, data or training. Importing this
package imports neither torch nor triton; the operations' own modules import torch.
"""
