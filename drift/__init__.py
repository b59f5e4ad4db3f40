"""A thin trainer for packed, variable-length, multi-turn sequences, on the public ops of `drift_kernels`."""
