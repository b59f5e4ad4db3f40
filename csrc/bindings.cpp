// Python's view of the kernels: the structs of rows.h and cpu/gemm.h with addresses
// as integers. Nothing is computed here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "rows.h"

namespace py = pybind11;
using namespace drift;

namespace {

// An address field: read and written as an integer (a tensor's data_ptr()), 0 for null.
template <class C, class P>
void address(py::class_<C>& c, const char* name, P C::*field) {
  c.def_property(
      name, [field](const C& s) { return reinterpret_cast<uintptr_t>(s.*field); },
      [field](C& s, uintptr_t p) { s.*field = reinterpret_cast<P>(p); });
}

// Where a struct itself lies, for a library that takes it by pointer.
template <class C>
void itself(py::class_<C>& c) {
  c.def_property_readonly("address", [](const C& s) { return reinterpret_cast<uintptr_t>(&s); });
}

void check(const Rows& rows) {
  if (!rows.logits && rows.rows) throw std::invalid_argument("logits is null");
  if (rows.stride < rows.vocab)
    throw std::invalid_argument("stride " + std::to_string(rows.stride) + " is below vocab " +
                                std::to_string(rows.vocab));
}

void check(const Rows& rows, const Buckets& b) {
  if (b.k < 0 || b.k > rows.vocab)
    throw std::invalid_argument("k = " + std::to_string(b.k) + " of vocab " + std::to_string(rows.vocab));
}

void check(const Gemm& g) {
  if (g.m < 0 || g.n < 0 || g.k < 0 || g.threads < 1)
    throw std::invalid_argument("sizes must not be negative, and threads at least 1");
  if (g.m && g.n && !((g.c || (g.rounded && !g.accumulate)) && g.scratch && (g.k == 0 || (g.a && g.b))))
    throw std::invalid_argument("a, b, c or scratch is null");
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  py::class_<Rows> rows(m, "Rows");
  rows.def(py::init<>());
  itself(rows);
  address(rows, "logits", &Rows::logits);
  address(rows, "row_ptr", &Rows::row_ptr);
  address(rows, "targets", &Rows::targets);
  address(rows, "bias", &Rows::bias);
  address(rows, "inv_temperature", &Rows::inv_temperature);
  rows.def_readwrite("rows", &Rows::rows)
      .def_readwrite("vocab", &Rows::vocab)
      .def_readwrite("stride", &Rows::stride);
  rows.def_readwrite("scalar_inv_temperature", &Rows::scalar_inv_temperature);
  rows.def_readwrite("logit_scale", &Rows::logit_scale).def_readwrite("softcap", &Rows::softcap);

  py::class_<Stats> stats(m, "Stats");
  stats.def(py::init<>());
  itself(stats);
  address(stats, "logprobs", &Stats::logprobs);
  address(stats, "top1", &Stats::top1);
  address(stats, "lse", &Stats::lse);
  address(stats, "lse_low", &Stats::lse_low);
  address(stats, "entropy", &Stats::entropy);
  address(stats, "mean_logits", &Stats::mean_logits);
  address(stats, "log_sum_sq", &Stats::log_sum_sq);

  py::class_<Coefs> coefs(m, "Coefs");
  coefs.def(py::init<>());
  itself(coefs);
  address(coefs, "logprobs", &Coefs::logprobs);
  address(coefs, "entropy", &Coefs::entropy);
  address(coefs, "row_entropy", &Coefs::row_entropy);
  address(coefs, "lse", &Coefs::lse);
  address(coefs, "lse_low", &Coefs::lse_low);
  address(coefs, "row_lse", &Coefs::row_lse);

  py::class_<PolicyParams> params(m, "PolicyParams");
  params.def(py::init<>());
#define DRIFT_FIELD(type, name, value) params.def_readwrite(#name, &PolicyParams::name);
  DRIFT_POLICY_PARAMS(DRIFT_FIELD)
#undef DRIFT_FIELD

  py::class_<Policy> policy(m, "Policy");
  policy.def(py::init<>())
      .def_readwrite("params", &Policy::params)
      .def_readwrite("gradient", &Policy::gradient);
  itself(policy);
  address(policy, "advantages", &Policy::advantages);
  address(policy, "old", &Policy::old);
  address(policy, "ref", &Policy::ref);
  address(policy, "weights", &Policy::weights);
  address(policy, "loss", &Policy::loss);
  address(policy, "ratio", &Policy::ratio);
  address(policy, "kl", &Policy::kl);
  address(policy, "clipped", &Policy::clipped);

  m.attr("layout") = layout();
  const auto bytes = [](uintptr_t p) { return reinterpret_cast<uint8_t*>(p); };
  m.def("row_stats", [](const Rows& r, const Stats& s, bool f64) {
    check(r);
    py::gil_scoped_release release;
    f64 ? row_stats<double>(r, s) : row_stats<float>(r, s);
  });
  m.def("grad_logits", [bytes](const Rows& r, const Coefs& c, bool raw, uintptr_t live, bool f64) {
    check(r);
    py::gil_scoped_release release;
    f64 ? grad_logits<double>(r, c, raw, bytes(live)) : grad_logits<float>(r, c, raw, bytes(live));
  });
  m.def("fused_policy", [bytes](const Rows& r, const Stats& s, const Policy& p, uintptr_t live, bool f64) {
    check(r);
    py::gil_scoped_release release;
    f64 ? fused_policy<double>(r, s, p, bytes(live)) : fused_policy<float>(r, s, p, bytes(live));
  });
  py::class_<Teacher> teacher(m, "Teacher");
  teacher.def(py::init<>()).def_readwrite("stride", &Teacher::stride).def_readwrite("alpha", &Teacher::alpha);
  teacher.def_readwrite("gradient", &Teacher::gradient);
  itself(teacher);
  address(teacher, "logits", &Teacher::logits);
  address(teacher, "lse", &Teacher::lse);
  address(teacher, "lse_low", &Teacher::lse_low);
  address(teacher, "weights", &Teacher::weights);
  address(teacher, "divergence", &Teacher::divergence);

  py::class_<Buckets> buckets(m, "Buckets");
  buckets.def(py::init<>()).def_readwrite("k", &Buckets::k);
  itself(buckets);
  address(buckets, "ids", &Buckets::ids);
  address(buckets, "logprobs", &Buckets::logprobs);
  address(buckets, "rest", &Buckets::rest);
  address(buckets, "dlogprobs", &Buckets::dlogprobs);
  address(buckets, "drest", &Buckets::drest);

  const auto indices = [](uintptr_t p) { return reinterpret_cast<const int64_t*>(p); };
  m.def("top_k", [indices](const Rows& r, uintptr_t taught, const Buckets& b, bool f64) {
    check(r);
    check(r, b);
    py::gil_scoped_release release;
    f64 ? top_k<double>(r, indices(taught), b) : top_k<float>(r, indices(taught), b);
  });
  m.def("bucket_logprobs", [indices, bytes](const Rows& r, uintptr_t taught, uintptr_t lse, uintptr_t low,
                                            const Buckets& b, bool f64) {
    check(r);
    check(r, b);
    py::gil_scoped_release release;
    f64 ? bucket_logprobs<double>(r, indices(taught), bytes(lse), bytes(low), b)
        : bucket_logprobs<float>(r, indices(taught), bytes(lse), bytes(low), b);
  });
  m.def("fused_distill", [indices, bytes](const Rows& r, const Coefs& c, uintptr_t taught, const Teacher& t,
                                          uintptr_t live, bool f64) {
    check(r);
    py::gil_scoped_release release;
    f64 ? fused_distill<double>(r, c, indices(taught), t, bytes(live))
        : fused_distill<float>(r, c, indices(taught), t, bytes(live));
  });
  m.def("grad_buckets", [indices, bytes](const Rows& r, const Coefs& c, uintptr_t taught, const Buckets& b,
                                         uintptr_t live, bool f64) {
    check(r);
    check(r, b);
    py::gil_scoped_release release;
    f64 ? grad_buckets<double>(r, c, indices(taught), b, bytes(live))
        : grad_buckets<float>(r, c, indices(taught), b, bytes(live));
  });
  m.def("compact", [bytes](uintptr_t logits, int64_t rows, int64_t row_bytes, int64_t stride_bytes,
                           uintptr_t live, uintptr_t order) {
    py::gil_scoped_release release;
    return compact(reinterpret_cast<void*>(logits), rows, row_bytes, stride_bytes, bytes(live),
                   reinterpret_cast<int64_t*>(order));
  });

  m.def("isas", &row_isas);
  m.def("limit_isa",
        [](const std::optional<std::string>& name) { limit_row_isa(name ? *name : row_isas().back()); });

  py::class_<Gemm> gemm(m, "Gemm");
  gemm.def(py::init<>());
  address(gemm, "a", &Gemm::a);
  address(gemm, "b", &Gemm::b);
  address(gemm, "c", &Gemm::c);
  address(gemm, "scratch", &Gemm::scratch);
  address(gemm, "rounded", &Gemm::rounded);
  gemm.def_readwrite("m", &Gemm::m).def_readwrite("n", &Gemm::n).def_readwrite("k", &Gemm::k);
  gemm.def_readwrite("a_stride", &Gemm::a_stride)
      .def_readwrite("b_stride", &Gemm::b_stride)
      .def_readwrite("c_stride", &Gemm::c_stride);
  gemm.def_readwrite("accumulate", &Gemm::accumulate)
      .def_readwrite("threads", &Gemm::threads)
      .def_readwrite("pairs", &Gemm::pairs)
      .def_readwrite("scale", &Gemm::scale);
  gemm.def_property(
      "type", [](const Gemm& g) { return static_cast<int>(g.type); },
      [](Gemm& g, int t) { g.type = static_cast<Type>(t); });

  m.def("has_gemm", &has_gemm);
  m.def("has_bf16_gemm", &has_bf16_gemm);
  m.def("gemm_scratch_bytes", &gemm_scratch_bytes);
  const auto product = [&m](const char* name, void (*run)(const Gemm&)) {
    m.def(name, [run](const Gemm& g) {
      check(g);
      py::gil_scoped_release release;
      run(g);
    });
  };
  product("gemm_nt", gemm_nt);
  product("gemm_nn", gemm_nn);
  product("gemm_tn", gemm_tn);
}
