"""Fused operations: each checks its arguments, asks `dispatch` for a backend and runs it.

A leaf of the package: nothing here knows about models, data or training. Importing this
package imports neither torch nor triton; the operations' own modules import torch.
"""
