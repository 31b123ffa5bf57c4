// The instructions of sm_90a: barriers in shared memory, TMA, registers moved between warpgroups.
// wgmma.cuh has the matrix products. A test puts an emulation in the place of both files
// (tests/emulated_gpu/sm90/device.cuh). Include ../device.cuh first.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "wgmma.cuh"

// Only the pass for sm_90a gets a kernel with a body.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define CAC_FAST_SM90A
#endif

namespace cac_fast::cuda::sm90 {

using TensorMap = CUtensorMap;

// A barrier of 8 bytes in shared memory. Its phase ends when `arrivals` have come, and with them
// all bytes that were announced.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals)
               : "memory");
}

// Makes initialized barriers known to TMA; a barrier of all threads must follow.
__device__ __forceinline__ void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
      : "memory");
}

// Waits for the end of a phase of this parity: 0 is that of the first phase. Of the phase before
// the first, 1, it has ended already.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The box of features that begins at a channel and a row, to shared memory. The barrier counts its
// bytes.
__device__ __forceinline__ void copy_box(
    uint32_t shared, const TensorMap& map, uint32_t barrier, int channel, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];\n" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(channel), "r"(row)
      : "memory");
}

// The registers of each thread of this warpgroup from here on; all four warps come here.
template <int kRegisters>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// Barriers by number for two warpgroups: one arrives and goes on, the other one waits for it.
__device__ __forceinline__ void numbered_arrive(int number) {
  asm volatile("bar.arrive %0, 256;\n" ::"r"(number) : "memory");
}

__device__ __forceinline__ void numbered_wait(int number) {
  asm volatile("bar.sync %0, 256;\n" ::"r"(number) : "memory");
}

}  // namespace cac_fast::cuda::sm90
