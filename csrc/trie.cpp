// Token sequences as packs of prefix trees, for drift/packing/trees.py.
//
// Sorted sequences and the lengths of the prefixes that neighbours share are a tree already: an inner node is
// a stretch of neighbours that share `depth` tokens. Nodes close from the leaves up; one that does not fit a
// pack is cut at its children, so what is cut is always the branch that shares least.
#include "trie.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;
using Ints = std::vector<int64_t>;
using Array = py::array_t<int64_t, py::array::c_style>;

// Items from the longest to the shortest (equal lengths in their given order), each into the
// fullest bin that still has room. Bins of equal room are alike to the packing; the one filled
// last is taken. O(n log n), no randomness.
int64_t best_fit_decreasing(const int64_t* lengths, int64_t count, int64_t capacity, int64_t* bin_of) {
  Ints order(count);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });

  std::map<int64_t, Ints> open;  // room left -> bins that have it, none of them full
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
  return bins;
}

namespace {

struct Sequences {
  const int64_t* tokens;
  const int64_t* bounds;  // [count + 1]
  int64_t count;

  const int64_t* begin(int64_t i) const { return tokens + bounds[i]; }
  int64_t length(int64_t i) const { return bounds[i + 1] - bounds[i]; }
  int64_t shared(int64_t a, int64_t b) const {
    const int64_t *x = begin(a), *y = begin(b);
    int64_t most = std::min(length(a), length(b)), i = 0;
    while (i < most && x[i] == y[i]) i++;
    return i;
  }
  bool before(int64_t a, int64_t b) const {  // a prefix comes first, equal sequences in their given order
    int64_t i = shared(a, b);
    if (i == length(a) || i == length(b)) return length(a) != length(b) ? length(a) < length(b) : a < b;
    return begin(a)[i] < begin(b)[i];
  }
};

// Sequences that go into one pack together: a linked list through `next`, and the rows of their tree.
struct Piece {
  int64_t head, tail, cost;
};

struct Node {
  int64_t depth;  // tokens that all below it share
  std::vector<Piece> pieces;
};

// The pieces of a node in as few packs as best fit finds; `depth` tokens are paid once a pack.
std::vector<Piece> close(Node& node, int64_t capacity, Ints& next) {
  std::vector<Piece> packs;
  Ints weights, ended, kept;  // ended: sequences that are no longer than the shared prefix
  for (size_t i = 0; i < node.pieces.size(); i++) {
    int64_t weight = node.pieces[i].cost - node.depth;
    (weight ? kept : ended).push_back(static_cast<int64_t>(i));
    if (weight) weights.push_back(weight);
  }
  Ints bin_of(weights.size());
  int64_t bins = best_fit_decreasing(weights.data(), weights.size(), capacity - node.depth, bin_of.data());
  packs.assign(std::max<int64_t>(bins, 1), Piece{-1, -1, node.depth});
  auto add = [&](Piece& pack, const Piece& piece, int64_t weight) {
    if (pack.head < 0) pack.head = piece.head;
    else next[pack.tail] = piece.head;
    pack.tail = piece.tail;
    pack.cost += weight;
  };
  for (size_t i = 0; i < kept.size(); i++) add(packs[bin_of[i]], node.pieces[kept[i]], weights[i]);
  for (int64_t i : ended) add(packs[0], node.pieces[i], 0);
  return packs;
}

// Packs of sequences, each list in sorted order (as places in `order`).
std::vector<Ints> fill(const Sequences& all, const Ints& order, int64_t capacity) {
  const int64_t n = all.count;
  Ints next(n, -1);
  std::vector<Node> open{Node{0, {}}};
  for (int64_t i = 0; i < n; i++) {
    int64_t depth = i + 1 < n ? all.shared(order[i], order[i + 1]) : 0;
    if (depth > open.back().depth) open.push_back(Node{depth, {}});
    open.back().pieces.push_back(Piece{i, i, all.length(order[i])});
    while (open.back().depth > depth) {
      std::vector<Piece> packs = close(open.back(), capacity, next);
      open.pop_back();
      if (open.back().depth < depth) open.push_back(Node{depth, {}});
      auto& pieces = open.back().pieces;
      pieces.insert(pieces.end(), packs.begin(), packs.end());
    }
  }
  std::vector<Ints> packs;
  if (n == 0) return packs;
  for (const Piece& piece : close(open.back(), capacity, next)) {
    packs.emplace_back();
    for (int64_t i = piece.head; i >= 0; i = i == piece.tail ? -1 : next[i]) packs.back().push_back(i);
    std::sort(packs.back().begin(), packs.back().end());
  }
  return packs;
}

struct Layout {
  Ints members, member_bounds{0};                  // sequences, pack by pack
  Ints rows;                                       // of every token of every sequence, its row in its pack
  Ints source, row_bounds{0};                      // of every row, the token that it holds
  // of every segment its first row, and the segment that it goes on from
  Ints starts, parents, segment_bounds{0};
};

// Lays a pack's tree down depth first: a sequence adds the tokens that it
// does not share with the one before it.
void lay(const Sequences& all, const Ints& order, const Ints& pack, Layout& out) {
  const int64_t first_row = out.row_bounds.back();
  Ints parent_row;
  std::vector<char> cut;  // rows that a segment begins at
  int64_t last = -1;
  for (int64_t place : pack) {
    const int64_t sequence = order[place], length = all.length(sequence);
    const int64_t shared = last < 0 ? 0 : all.shared(last, sequence), base = parent_row.size();
    int64_t* rows = out.rows.data() + all.bounds[sequence];
    const int64_t* before = last < 0 ? nullptr : out.rows.data() + all.bounds[last];
    if (shared) std::memcpy(rows, before, shared * sizeof(int64_t));
    if (shared < length) {
      const int64_t parent = shared ? before[shared - 1] : -1;
      if (last >= 0 && shared < all.length(last)) cut[before[shared]] = 1;
      for (int64_t i = shared; i < length; i++) {
        rows[i] = base + i - shared;
        parent_row.push_back(rows[i] - 1);
        cut.push_back(0);
        out.source.push_back(all.bounds[sequence] + i);
      }
      parent_row[base] = parent;
      cut[base] = base == 0 || parent != base - 1;
    }
    out.members.push_back(sequence);
    last = sequence;
  }
  Ints segment_of(parent_row.size());
  int64_t segments = 0;
  for (size_t row = 0; row < parent_row.size(); row++) {
    if (cut[row]) {
      out.starts.push_back(row);
      out.parents.push_back(parent_row[row] < 0 ? -1 : segment_of[parent_row[row]]);
      segments++;
    }
    segment_of[row] = segments - 1;
  }
  out.member_bounds.push_back(out.members.size());
  out.row_bounds.push_back(first_row + parent_row.size());
  out.segment_bounds.push_back(out.starts.size());
}

Array as_array(const Ints& values) {
  Array out(static_cast<py::ssize_t>(values.size()));
  if (!values.empty()) std::memcpy(out.mutable_data(), values.data(), values.size() * sizeof(int64_t));
  return out;
}

py::dict trees(const Array& tokens, const Array& bounds, int64_t capacity) {
  if (tokens.ndim() != 1 || bounds.ndim() != 1 || bounds.shape(0) < 1) {
    throw std::invalid_argument("tokens must be [N] and bounds [S + 1]");
  }
  Sequences all{tokens.data(), bounds.data(), bounds.shape(0) - 1};
  if (all.bounds[0] != 0 || all.bounds[all.count] != tokens.shape(0)) {
    throw std::invalid_argument("bounds must go from 0 to the number of tokens");
  }
  for (int64_t i = 0; i < all.count; i++) {
    if (all.length(i) < 1 || all.length(i) > capacity) {
      throw std::invalid_argument("sequence " + std::to_string(i) + " has " + std::to_string(all.length(i)) +
                                  " tokens; it must have 1 to capacity, " + std::to_string(capacity));
    }
  }
  Layout out;
  {
    py::gil_scoped_release release;
    Ints order(all.count);
    std::iota(order.begin(), order.end(), int64_t{0});
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return all.before(a, b); });
    out.rows.resize(tokens.shape(0));
    for (const Ints& pack : fill(all, order, capacity)) lay(all, order, pack, out);
  }
  py::dict made;
  made["members"] = as_array(out.members);
  made["member_bounds"] = as_array(out.member_bounds);
  made["rows"] = as_array(out.rows);
  made["source"] = as_array(out.source);
  made["row_bounds"] = as_array(out.row_bounds);
  made["starts"] = as_array(out.starts);
  made["parents"] = as_array(out.parents);
  made["segment_bounds"] = as_array(out.segment_bounds);
  return made;
}

}  // namespace

void bind_trie(py::module_& m) {
  m.def("trees", &trees, py::arg("tokens").noconvert(), py::arg("bounds").noconvert(), py::arg("capacity"));
}
