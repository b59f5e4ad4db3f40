// The host's side of a kernel: its launch with or without clusters, and the device and errors around it.
#pragma once
#include <map>
#include <mutex>
#include <utility>

#include "../rows.h"
#include "device.h"

#define DRIFT_EXPORT extern "C" __attribute__((visibility("default")))

namespace drift {

enum OutType : int { FP32 = 0, BF16 = 1, FP16 = 2 };

struct Launch {
  int threads, cluster, on_chip;
  bool valid() const {
    return threads >= WARP && threads <= MAX_THREADS && threads % WARP == 0 && cluster >= 1 &&
           cluster <= MAX_CLUSTER && (cluster & (cluster - 1)) == 0;
  }
};

// Whether a launch can take these rows.
inline bool takes(const Rows& r, const Launch& how) {
  const bool sizes = r.rows >= 0 && r.vocab > 0 && r.vocab <= INT32_MAX && r.stride >= r.vocab &&
                     r.rows * how.cluster <= INT32_MAX;
  return sizes && how.valid() && (r.rows == 0 || r.logits);
}

// Prepares a kernel on the current device for `shared` bytes of dynamic shared memory, and says which PTX it
// was compiled from. The driver is asked once for each kernel and device, and again only for more shared
// memory than before. A kernel that keeps a row on chip gets all of the multiprocessor's L1 as shared memory,
// so that as many blocks fit as `cuda.choose` counts on.
inline cudaError_t prepare(const void* kernel, size_t shared, int* ptx) {
  struct Known { int ptx; size_t shared; };
  static std::mutex lock;
  static std::map<std::pair<const void*, int>, Known> all;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard<std::mutex> held(lock);
  auto at = all.find({kernel, device});
  if (at == all.end()) {
    cudaFuncAttributes compiled;
    if (const cudaError_t error = cudaFuncGetAttributes(&compiled, kernel)) return error;
    at = all.emplace(std::make_pair(kernel, device), Known{compiled.ptxVersion, 0}).first;
  }
  *ptx = at->second.ptx;
  if (shared <= at->second.shared) return cudaSuccess;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (!error) error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
  if (!error) at->second.shared = shared;
  return error;
}

// kernel(job) by one block a row, or one cluster, with `shared` bytes of dynamic shared memory.
template <class Job>
cudaError_t start(void (*kernel)(Job), const Job& job, int64_t rows, const Launch& how, size_t shared,
                  cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = how.cluster, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.gridDim = dim3(static_cast<unsigned>(rows * how.cluster));
  config.blockDim = dim3(how.threads);
  config.stream = stream;
  int ptx = 0;
  if (const cudaError_t error = prepare(reinterpret_cast<const void*>(kernel), shared, &ptx)) return error;
  if (how.cluster > 1) {
    if (ptx < 90) return cudaErrorInvalidClusterSize;  // this code would take each block for a whole cluster
    config.attrs = &cluster, config.numAttrs = 1;
  }
  config.dynamicSmemBytes = shared;
  return cudaLaunchKernelEx(&config, kernel, job);
}

// run() on `device`, and the device that was current back afterwards.
template <class F>
int on_device(int device, F run) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (!error && before != device) error = cudaSetDevice(device);
  if (error) return error;
  error = run();
  if (error) cudaGetLastError();  // it is reported here; nobody else shall find it
  if (before == device) return error;
  const cudaError_t back = cudaSetDevice(before);
  return error ? error : back;
}

}  // namespace drift
