// Bindings of drift/packing.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "trie.h"

namespace py = pybind11;

static py::array_t<int64_t> py_best_fit_decreasing(const py::array_t<int64_t, py::array::c_style>& lengths,
                                                   int64_t capacity) {
  if (lengths.ndim() != 1) throw std::invalid_argument("lengths should have one dimension");
  const int64_t* data = lengths.data();
  const int64_t count = lengths.shape(0);
  for (int64_t i = 0; i < count; i++) {
    if (data[i] < 1 || data[i] > capacity) {
      throw std::invalid_argument("lengths[" + std::to_string(i) + "] is " + std::to_string(data[i]) +
                                  "; it should be from 1 to capacity, " + std::to_string(capacity));
    }
  }
  py::array_t<int64_t> bins(count);
  int64_t* out = bins.mutable_data();
  {
    py::gil_scoped_release release;
    best_fit_decreasing(data, count, capacity, out);
  }
  return bins;
}

PYBIND11_MODULE(_packing, m) {
  m.def("best_fit_decreasing", &py_best_fit_decreasing, py::arg("lengths").noconvert(), py::arg("capacity"));
  bind_trie(m);
}
