// A product of quantized rows and a quantized weight on the tensor cores of Hopper cards, in float8 with one scale for
// each row of either, bfloat16 out. With ACTIVATION, the first half of the output features gates the second, and only
// the gated half is written.
//
// A thread block works on one tile of the output after the other. A producer, one thread of the last warpgroup (128
// threads), has TMA bring tiles of both factors into shared memory; the other two warpgroups, the consumers, multiply
// them, each 64 rows by 256 features, and leave the result there, so that they can go on at once. With ACTIVATION three
// warps beside the producer, the writers, gate it for TMA to write.
//
// `product.py` puts in front the sizes of a tile (ROWS, FEATURES, TERMS, PART), STAGES, ACTIVATION, the instruction
// wgmma as a function, and `shared.cu`.

constexpr int X_BYTES = ROWS * TERMS, W_BYTES = FEATURES * TERMS, STAGE = X_BYTES + W_BYTES;
// Terms of one instruction. Those beyond full blocks come by steps: one that is not full reads no more than it needs.
constexpr int STEP = 32, REST = (ROWS + FEATURES) * STEP;
constexpr int OUTPUTS = ACTIVATION ? FEATURES / 2 : FEATURES;  // columns of the output that a tile makes
constexpr int CONSUMERS = ROWS / 64;
#if ACTIVATION
constexpr int WRITERS = 96;
#endif
// Results of a consumer lie in parts of PART features.
constexpr int PART_BYTES = 64 * PART * 2, RESULT_BYTES = FEATURES / PART * PART_BYTES;
static_assert(CONSUMERS == 2 && TERMS == 128 && PART == 64 && OUTPUTS % PART == 0, "named barriers, swizzles, parts");

__device__ __forceinline__ void store_tile(const TensorMap* map, u32 from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
               ::"l"(map), "r"(from), "r"(column), "r"(0), "r"(row), "r"(0) : "memory");
}

// Writes what a consumer's results are, or have become; one thread does.
__device__ __forceinline__ void store_results(const TensorMap* map, u32 from, int column, int row) {
#pragma unroll
  for (int part = 0; part < OUTPUTS / PART; ++part) store_tile(map, from + part * PART_BYTES, column + part * PART, row);
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

__device__ __forceinline__ void wait_until_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void wait_until_written() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
__device__ __forceinline__ void show_to_tma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void meet(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Four matrices of 8 x 8 values, of which each thread holds two adjacent ones, to rows of 16 bytes.
__device__ __forceinline__ void store_matrices(u32 to, const u32 (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}

struct Tile { int row, feature; };

// All tiles of rows for a few tiles of features, then for the next: so the rows stay in the L2 cache, and the weight is
// read once.
__device__ __forceinline__ Tile tile_of(int tile, int row_tiles, int feature_tiles) {
  constexpr int TOGETHER = 4;
  const int each = TOGETHER * row_tiles, first = tile / each * TOGETHER, left = tile % each;
  const int width = min(TOGETHER, feature_tiles - first);
  return {left / width, first + left % width};
}

#if ACTIVATION
__device__ __forceinline__ float exponent(float x) {
#if ACTIVATION == 1  // SiLU
  return -1.4426950408889634f * x;
#else  // GELU, as in `gpu.py`
  const float x2 = fminf(x * x, 36.0f);
  return -1.4426950408889634f * x * (1.59501569f + x2 * (0.0740111359f - 0.00070304348f * x2));
#endif
}

// Two adjacent outputs, with one division for both.
__device__ __forceinline__ u32 gated(u32 gates, u32 ups) {
  const float x = __int_as_float(gates << 16), y = __int_as_float(gates & 0xffff0000);
  const float a = 1 + exp2_of(fminf(exponent(x), 60.0f)), b = 1 + exp2_of(fminf(exponent(y), 60.0f));
  const float inverse = __fdividef(1.0f, a * b);
  return two(x * (b * inverse) * __int_as_float(ups << 16), y * (a * inverse) * __int_as_float(ups & 0xffff0000));
}
#endif

extern "C" __global__ void __launch_bounds__(128 * (CONSUMERS + 1), 1)
product(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
        const __grid_constant__ TensorMap x_rest_map, const __grid_constant__ TensorMap w_rest_map,
        const __grid_constant__ TensorMap out_map, const float* __restrict__ x_scale, const float* __restrict__ w_scale,
        int rows, int columns, int terms, int row_tiles, int feature_tiles) {
  extern __shared__ __align__(1024) char memory[];
  const u32 start = shared_address(memory), results = start + STAGES * STAGE;
  float2* const all_scales = reinterpret_cast<float2*>(memory + STAGES * STAGE + CONSUMERS * RESULT_BYTES);
  const u32 barriers = results + CONSUMERS * (RESULT_BYTES + FEATURES * 4);
  const auto full = [&](int stage) { return barriers + 16 * stage; };
  const auto free = [&](int stage) { return barriers + 16 * stage + 8; };
  const auto ready = [&](int consumer) { return full(STAGES + consumer); };
  const auto taken = [&](int consumer) { return free(STAGES + consumer); };
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      init_barrier(full(stage), 1);
      init_barrier(free(stage), 4 * CONSUMERS);
    }
    for (int consumer = 0; consumer < CONSUMERS; ++consumer) {
      init_barrier(ready(consumer), 128);
      init_barrier(taken(consumer), 1);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  const int tiles = row_tiles * feature_tiles;
  const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0), thread = threadIdx.x % 128, lane = thread % 32;
#if ACTIVATION
  const auto write_gated = [&](int writer) {
    u32 phase = 0;
    for (int i = blockIdx.x; i < tiles; i += gridDim.x, phase ^= 1) {
      const Tile tile = tile_of(i, row_tiles, feature_tiles);
#pragma unroll 1
      for (int consumer = 0; consumer < CONSUMERS; ++consumer) {
        char* const gates = memory + STAGES * STAGE + consumer * RESULT_BYTES;
        wait(ready(consumer), phase);
#pragma unroll 2
        for (int at = 16 * writer; at < RESULT_BYTES / 2; at += 16 * WRITERS) {  // in whatever order they lie
          uint4* const gate = reinterpret_cast<uint4*>(gates + at);
          const uint4 x = *gate, y = *reinterpret_cast<const uint4*>(gates + RESULT_BYTES / 2 + at);
          *gate = make_uint4(gated(x.x, y.x), gated(x.y, y.y), gated(x.z, y.z), gated(x.w, y.w));
        }
        show_to_tma();
        meet(3, WRITERS);
        if (writer == 0) {
          store_results(&out_map, results + consumer * RESULT_BYTES, tile.feature * OUTPUTS, tile.row * ROWS + consumer * 64);
          wait_until_read();
          arrive(taken(consumer));
        }
      }
    }
    if (writer == 0) wait_until_written();
  };
#endif
  if (group == CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(ACTIVATION ? 72 : 40));
#if ACTIVATION
    if (thread >= 32) return write_gated(thread - 32);
#endif
    if (thread != 0) return;
    int stage = 0;
    u32 phase = 1;
    for (int i = blockIdx.x; i < tiles; i += gridDim.x) {
      const Tile tile = tile_of(i, row_tiles, feature_tiles);
      const int row = tile.row * ROWS, feature = tile.feature * OUTPUTS;
      const auto load = [&](const TensorMap* x, const TensorMap* w, u32 to, int term, int width) {
        load_tile(to, x, full(stage), term, 0, row, 0);
        load_tile(to + ROWS * width, w, full(stage), term, 0, feature, 0);
        if (ACTIVATION) load_tile(to + (ROWS + FEATURES / 2) * width, w, full(stage), term, 0, feature, 1);
      };
#pragma unroll 1
      for (int term = 0; term < terms; term += TERMS) {
        wait(free(stage), phase);
        const u32 to = start + stage * STAGE;
        if (terms - term >= TERMS) {
          expect_bytes(full(stage), STAGE);
          load(&x_map, &w_map, to, term, TERMS);
        } else {
          const int steps = (terms - term + STEP - 1) / STEP;
          expect_bytes(full(stage), steps * REST);
          for (int i = 0; i < steps; ++i) load(&x_rest_map, &w_rest_map, to + i * REST, term + i * STEP, STEP);
        }
        if (++stage == STAGES) {
          stage = 0;
          phase ^= 1;
        }
      }
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(ACTIVATION ? 216 : 232));
  const int warp = thread / 32;
  float2* const scales = all_scales + group * FEATURES / 2;
  const u32 x_mine = start + group * 64 * TERMS, result = results + group * RESULT_BYTES;
  // Where this lane has 16 bytes of a result put: row lane % 16 of its warp's.
  const u32 row_of_result = result + (warp * 16 + lane % 16) * 2 * PART;
  int stage = 0, before = 0;
  u32 phase = 0, taken_phase = 1;
  float s[FEATURES / 2];
  const auto release = [&](int stage) {
    if (lane == 0) arrive(free(stage));
  };
  const auto multiply_step = [&](int i, bool adds) {
    const u32 at = stage * STAGE + STEP * i;
    multiply(s, matrix<TERMS>(x_mine + at, 16), matrix<TERMS>(start + X_BYTES + at, 16), adds);
  };
  const auto next_stage = [&]() {
    before = stage;
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  };

  for (int at = blockIdx.x; at < tiles; at += gridDim.x) {
    const Tile tile = tile_of(at, row_tiles, feature_tiles);
    // Scales of two adjacent features, for all threads, and of the rows of this one.
    float2 mine = make_float2(0, 0);
    const int up = ACTIVATION ? thread / 64 : 0, column = tile.feature * OUTPUTS + 2 * (thread - 64 * up);
    if (column < columns) mine = __ldg(reinterpret_cast<const float2*>(w_scale + up * columns + column));
    const int first_row = tile.row * ROWS + group * 64, row0 = first_row + warp * 16 + lane / 4, row1 = row0 + 8;
    const float scale0 = row0 < rows ? __ldg(x_scale + row0) : 0, scale1 = row1 < rows ? __ldg(x_scale + row1) : 0;

#pragma unroll 1
    for (int block = 0; block < terms / TERMS; ++block) {
      wait(full(stage), phase);
      hold(s);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < TERMS / STEP; ++i) multiply_step(i, block > 0 || i > 0);
      wgmma_commit();
      wgmma_wait<1>();
      hold(s);
      if (block > 0) release(before);
      next_stage();
    }
    if (const int left = terms % TERMS) {
      wait(full(stage), phase);
      hold(s);
      const u32 x_at = start + stage * STAGE + group * 64 * STEP, w_at = start + stage * STAGE + ROWS * STEP;
#pragma unroll
      for (int steps = 1; steps <= TERMS / STEP; ++steps) {  // a product under a condition would wait for the one before
        if (left > steps * STEP || left <= (steps - 1) * STEP) continue;
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < steps; ++i)
          multiply(s, matrix<STEP>(x_at + i * REST, 16), matrix<STEP>(w_at + i * REST, 16), 1);
        wgmma_commit();
      }
      wgmma_wait<1>();
      hold(s);
      release(before);
      next_stage();
    }
    scales[thread] = mine;
    if (ACTIVATION) {
      wait(taken(group), taken_phase);
      taken_phase ^= 1;
    } else if (thread == 0) {
      wait_until_read();
    }
    meet(group + 1, 128);
    wgmma_wait<0>();
    hold(s);
    release(before);

#pragma unroll
    for (int i = 0; i < FEATURES / 8; i += 2) {
      u32 words[4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float* x = s + 4 * (i + j);
        const float2 factor = scales[4 * (i + j) + lane % 4];
        words[2 * j] = two(x[0] * scale0 * factor.x, x[1] * scale0 * factor.y);
        words[2 * j + 1] = two(x[2] * scale1 * factor.x, x[3] * scale1 * factor.y);
      }
      store_matrices(row_of_result + i / 8 * PART_BYTES + 16 * ((i % 8 + lane / 16) ^ lane % 8), words);
    }
#if ACTIVATION
    arrive(ready(group));
    meet(group + 1, 128);  // the scales are read
#else
    show_to_tma();
    meet(group + 1, 128);
    if (thread == 0) store_results(&out_map, result, tile.feature * OUTPUTS, first_row);
#endif
  }
  if (!ACTIVATION && thread == 0) wait_until_written();
}
