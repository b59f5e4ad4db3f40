"""One thread for every test: tensors here are tiny, and waiting threads slow a busy machine down a hundredfold.

Tests that are about threads set their own; those that start a process say how many it gets.
"""

import torch

torch.set_num_threads(1)
