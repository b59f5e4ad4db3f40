// The part of cuda_runtime.h that the kernels and their launches use, on simt.h.
#pragma once
#include <cmath>

#include "simt.h"

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

inline void __syncthreads(int line = __builtin_LINE()) { simt::wait(simt::AT_BLOCK, line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) { simt::ballot(mask, true, line); }
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int d, int line = __builtin_LINE()) { return simt::exchange(mask, v, SIMT_NOW.lane ^ d, line); }
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned d, int line = __builtin_LINE()) { return simt::exchange(mask, v, SIMT_NOW.lane + d, line); }
template <class T>
T __shfl_sync(unsigned mask, T v, int from, int line = __builtin_LINE()) { return simt::exchange(mask, v, from & 31, line); }
inline unsigned __ballot_sync(unsigned mask, int p, int line = __builtin_LINE()) { return simt::ballot(mask, p, line); }
inline int __any_sync(unsigned mask, int p, int line = __builtin_LINE()) { return simt::ballot(mask, p, line) != 0; }
inline int __all_sync(unsigned mask, int p, int line = __builtin_LINE()) { return simt::ballot(mask, !p, line) == 0; }
template <class T>
void __stwb(T* p, T v) { *p = v; }
inline float __fmul_rn(float a, float b) {  // never a part of a fused multiply-add
  float product = a * b;
  asm("" : "+x"(product));
  return product;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// ---- host

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
  cudaErrorInvalidClusterSize = 912,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore, cudaLaunchAttributeClusterDimension };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97, cudaDevAttrClusterLaunch = 120 };
typedef void* cudaStream_t;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct { struct { unsigned x, y, z; } clusterDim; } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
struct cudaFuncAttributes { int ptxVersion; };

inline const char* cudaGetErrorName(cudaError_t e) {
  switch (e) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorInvalidClusterSize: return "cudaErrorInvalidClusterSize";
  }
  return "cudaErrorUnknown";
}
inline const char* cudaGetErrorString(cudaError_t e) { return simt::machine.error.empty() ? cudaGetErrorName(e) : simt::machine.error.c_str(); }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* n) { return *n = simt::machine.devices, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* d) { return *d = simt::machine.device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int d) {
  if (d < 0 || d >= simt::machine.devices) return cudaErrorInvalidDevice;
  return simt::machine.device = d, cudaSuccess;
}
// A device's shared memory is a KiB less than that of the one before it, so that no two are taken for each other.
inline cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int device) {
  return *v = a == cudaDevAttrClusterLaunch ? simt::machine.clusters : simt::machine.shared_limit - 1024 * device, cudaSuccess;
}
template <class F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, F) { return simt::machine.asked++, a->ptxVersion = simt::machine.clusters ? 90 : 80, cudaSuccess; }
template <class F>
cudaError_t cudaFuncSetAttribute(F kernel, cudaFuncAttribute attribute, int value) {
  simt::machine.asked++;
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return value == 100 ? cudaSuccess : cudaErrorInvalidValue;
  if (value > simt::machine.shared_limit) return cudaErrorInvalidValue;
  return simt::machine.dynamic_limit[{reinterpret_cast<const void*>(kernel), simt::machine.device}] = value, cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(P...), A&&... arguments) {
  const unsigned cluster = c->numAttrs ? c->attrs->val.clusterDim.x : 1;
  simt::machine.launched_on = simt::machine.device, simt::machine.launched_in = c->stream;
  const auto set = simt::machine.dynamic_limit.find({reinterpret_cast<const void*>(kernel), simt::machine.device});
  const size_t limit = set == simt::machine.dynamic_limit.end() ? 48 << 10 : set->second;
  if (!c->gridDim.x || !c->blockDim.x || c->blockDim.x > 1024 || c->dynamicSmemBytes > limit) return cudaErrorInvalidConfiguration;
  if (cluster > 8 || c->gridDim.x % cluster) return cudaErrorInvalidClusterSize;
  simt::launch(c->gridDim, c->blockDim, cluster, c->dynamicSmemBytes, [=] { kernel(arguments...); });
  return simt::machine.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

// Of the last launch: its device and stream; then the device that is current, and how often a kernel's attributes were read or
// set.
extern "C" __attribute__((used, visibility("default"))) inline void simt_last(int64_t* found) {
  const simt::Machine& m = simt::machine;
  found[0] = m.launched_on, found[1] = reinterpret_cast<int64_t>(m.launched_in), found[2] = m.device, found[3] = m.asked;
}

// What a test sets: the order of warps and lanes, and what the device has.
extern "C" __attribute__((used, visibility("default"))) inline void simt_set(int order, int shared_limit, int clusters) {
  simt::machine.order = order, simt::machine.shared_limit = shared_limit, simt::machine.clusters = clusters;
}
