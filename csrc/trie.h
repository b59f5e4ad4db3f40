// Best-fit-decreasing bin packing, and prefix trees packed by it.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

// Writes the bin of each item to bin_of [count] and returns the number of bins.
int64_t best_fit_decreasing(const int64_t* lengths, int64_t count, int64_t capacity, int64_t* bin_of);

void bind_trie(pybind11::module_& m);
