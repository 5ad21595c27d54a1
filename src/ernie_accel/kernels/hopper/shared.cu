// What the kernels for Hopper cards share: barriers, copies by TMA, the parts of a product by wgmma.
//
// Before it stand FLOAT8 and FLOAT16: the type of two adjacent values (`two`); bfloat16 if both are 0.

typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap { u64 opaque[16]; };

__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void init_barrier(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void expect_bytes(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}\n" ::"r"(barrier), "r"(phase) : "memory");
}

__device__ __forceinline__ void load_tile(u32 to, const TensorMap* map, u32 barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(to), "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Keeps the compiler from moving registers across an instruction that reads or writes them later.
template <int N> __device__ __forceinline__ void hold(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N> __device__ __forceinline__ void hold(u32 (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// A matrix in shared memory as wgmma reads it: groups of eight rows lie 8 * CHUNK bytes apart, chunks `apart` bytes.
template <int CHUNK> __device__ __forceinline__ u64 matrix(u32 address, u32 apart) {
  constexpr u64 SWIZZLE = CHUNK == 128 ? 1 : CHUNK == 64 ? 2 : 3;
  return (u64)((address & 0x3ffff) >> 4) | (u64)((apart & 0x3ffff) >> 4) << 16 | (u64)((8 * CHUNK) >> 4) << 32 |
         SWIZZLE << 62;
}

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ u32 two(float low, float high) {
  u32 y;
#if FLOAT8
  unsigned short half;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(half) : "f"(high), "f"(low));
  y = half;
#elif FLOAT16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#endif
  return y;
}

// Four words of each of four adjacent lanes, transposed.
__device__ __forceinline__ void transpose(u32 (&w)[4], int lane) {
#pragma unroll
  for (int far = 1; far <= 2; far *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & far) continue;
      const bool odd = lane & far;
      const u32 got = __shfl_xor_sync(0xffffffff, odd ? w[i] : w[i | far], far);
      if (odd) w[i] = got; else w[i | far] = got;
    }
  }
}
