// Best-fit-decreasing bin packing, for drift/packing.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

// Items from the longest to the shortest (equal lengths in their given order), each into the fullest bin that still has
// room. Bins of equal room are alike to the packing; the one filled last is taken. O(n log n), no randomness.
static void best_fit_decreasing(const int64_t* lengths, int64_t count, int64_t capacity, int64_t* bin_of) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });

  std::map<int64_t, std::vector<int64_t>> open;  // room left -> bins that have it, none of them full
  int64_t bins = 0;
  for (int64_t item : order) {
    int64_t length = lengths[item], bin, room;
    auto best = open.lower_bound(length);
    if (best == open.end()) {
      bin = bins++;
      room = capacity - length;
    } else {
      bin = best->second.back();
      room = best->first - length;
      best->second.pop_back();
      if (best->second.empty()) open.erase(best);
    }
    if (room > 0) open[room].push_back(bin);
    bin_of[item] = bin;
  }
}

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
}
