// Attention on the tensor cores of Hopper cards (compute capability 9.0), in bfloat16, float16 or float8.
//
// After FlashAttention-3 (https://arxiv.org/abs/2407.08608): threads of the first warpgroup (128 threads), the producer,
// have the tensor memory accelerator (TMA) bring queries, keys and values into shared memory; the other GROUPS
// warpgroups, the consumers, multiply them, each for 64 queries. While a consumer computes the exponentials of one block
// of keys, the tensor cores multiply those of the next. A thread block works on one tile of queries after the other, so
// that the first keys of the next tile arrive before the last one is written.
//
// `attention.py` puts in front HEAD, the constants of its `Tiling`, FLOAT8, FLOAT16, functions around the instruction
// wgmma, and `shared.cu`. In shared memory a tile is cut into chunks of QK_CHUNK or V_CHUNK bytes of each row, one chunk
// behind the other; a chunk is as wide as its swizzle.

constexpr int ELEMENT = FLOAT8 ? 1 : 2;
constexpr int QUERIES = 64 * GROUPS;
constexpr int QK_CHUNKS = (HEAD * ELEMENT + QK_CHUNK - 1) / QK_CHUNK;
constexpr int Q_BYTES = QUERIES * QK_CHUNK * QK_CHUNKS;
constexpr int K_BYTES = KEYS * QK_CHUNK * QK_CHUNKS;
constexpr int V_BYTES = HEAD * KEYS * ELEMENT;
constexpr int V_CHUNKS = (FLOAT8 ? KEYS : HEAD * ELEMENT) / V_CHUNK;
// In float8, values have eight more dimensions of ones, so that the product with the probabilities has their sums, too.
constexpr int OUTPUTS = HEAD + (FLOAT8 ? 8 : 0);
constexpr int V_CHUNK_BYTES = (FLOAT8 ? OUTPUTS : KEYS) * V_CHUNK;
constexpr int V_STAGE = V_CHUNKS * V_CHUNK_BYTES;
// The tensor cores add products of float8 with about 14 bits and cut off the rest: a sum over thousands of keys comes
// out several percent too small. So each EVERY blocks it is added to one in float32, in shared memory; and the sums of
// the probabilities, which lose as much, are computed in the same way. Twice as often would cost 2 to 3 % of the time.
constexpr int EVERY = FLOAT8 ? 1536 / KEYS : 0;
constexpr int KEPT_BYTES = FLOAT8 ? 128 * GROUPS * OUTPUTS / 2 * 4 : 0;
constexpr int STEP = 32 / ELEMENT;  // keys that one instruction sums over
constexpr int STEPS = KEYS / STEP;
constexpr int A_REGISTERS = 4 * STEPS;
static_assert(HEAD % 32 == 0 && KEYS % STEP == 0 && 32 * STAGES + 16 * Q_PARTS <= 1024,
              "rows of the output, terms of a sum, barriers");
static_assert(QUERIES <= 256 && KEYS <= 256, "rows that TMA reads at once");
static_assert(Q_BYTES % 1024 == 0 && K_BYTES % 1024 == 0, "a swizzle repeats after eight rows of at most 128 bytes");
// Probabilities, at most 1, are multiplied by 2 ** OFFSET, so that float8 has a range for them below its 448.
constexpr float OFFSET = FLOAT8 ? 8 : 0;
#define MINUS_INFINITY __int_as_float(0xff800000)

// Warpgroups take turns by named barriers (ping-pong scheduling); 0 is that of __syncthreads.
__device__ __forceinline__ void turn_wait(int id) { asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory"); }
__device__ __forceinline__ void turn_give(int id) { asm volatile("bar.arrive %0, 256;" ::"r"(id) : "memory"); }

// Of a product of 64 rows, a thread holds in x[4 i] to x[4 i + 3] the columns 8 i + 2 (lane % 4) and the next of its row
// lane / 4, then those of row lane / 4 + 8. As operand it holds as many adjacent ones of each row as 32 bits do. In
// float8 they are made adjacent by the order of the values: see `attention.py`.
__device__ __forceinline__ void to_operand(u32 (&a)[A_REGISTERS], const float (&x)[KEYS / 2]) {
#pragma unroll
  for (int i = 0; i < STEPS; ++i) {
#if FLOAT8
    const float* s = x + 16 * i;
    a[4 * i] = two(s[0], s[1]) | two(s[4], s[5]) << 16;
    a[4 * i + 1] = two(s[2], s[3]) | two(s[6], s[7]) << 16;
    a[4 * i + 2] = two(s[8], s[9]) | two(s[12], s[13]) << 16;
    a[4 * i + 3] = two(s[10], s[11]) | two(s[14], s[15]) << 16;
#else
    const float* s = x + 8 * i;
    a[4 * i] = two(s[0], s[1]);
    a[4 * i + 1] = two(s[2], s[3]);
    a[4 * i + 2] = two(s[4], s[5]);
    a[4 * i + 3] = two(s[6], s[7]);
#endif
  }
}

// The running softmax of the two rows of a thread.
struct Softmax {
  float max0, max1, sum0, sum1;

  // Turns scores into probabilities, up to the factor of their rows. Returns whether earlier sums of any row of the warp
  // have to be multiplied by its factor.
  __device__ __forceinline__ bool update(float (&s)[KEYS / 2], float scale, float& factor0, float& factor1) {
    float a0 = s[0], a1 = s[2], b0 = s[1], b1 = s[3];
#pragma unroll
    for (int i = 1; i < KEYS / 8; ++i) {
      a0 = fmaxf(a0, s[4 * i]);
      b0 = fmaxf(b0, s[4 * i + 1]);
      a1 = fmaxf(a1, s[4 * i + 2]);
      b1 = fmaxf(b1, s[4 * i + 3]);
    }
    a0 = fmaxf(a0, b0);
    a1 = fmaxf(a1, b1);
    a0 = fmaxf(a0, __shfl_xor_sync(0xffffffff, a0, 1));
    a1 = fmaxf(a1, __shfl_xor_sync(0xffffffff, a1, 1));
    a0 = fmaxf(a0, __shfl_xor_sync(0xffffffff, a0, 2));
    a1 = fmaxf(a1, __shfl_xor_sync(0xffffffff, a1, 2));
    const bool grows = __any_sync(0xffffffff, a0 > max0 || a1 > max1);
    a0 = fmaxf(a0, max0);
    a1 = fmaxf(a1, max1);
    // Scores of minus infinity alone have no largest one to subtract: they count nothing by themselves.
    const float from0 = a0 == MINUS_INFINITY ? 0 : a0, from1 = a1 == MINUS_INFINITY ? 0 : a1;
    factor0 = exp2_of((max0 - from0) * scale);
    factor1 = exp2_of((max1 - from1) * scale);
    max0 = a0;
    max1 = a1;
    const float less0 = from0 * scale - OFFSET, less1 = from1 * scale - OFFSET;
    float c0 = 0, c1 = 0, d0 = 0, d1 = 0;  // in four parts: no sum waits for the one before
#pragma unroll
    for (int i = 0; i < KEYS / 8; ++i) {
      s[4 * i] = exp2_of(s[4 * i] * scale - less0);
      s[4 * i + 1] = exp2_of(s[4 * i + 1] * scale - less0);
      s[4 * i + 2] = exp2_of(s[4 * i + 2] * scale - less1);
      s[4 * i + 3] = exp2_of(s[4 * i + 3] * scale - less1);
      if (FLOAT8) continue;
      c0 += s[4 * i];
      d0 += s[4 * i + 1];
      c1 += s[4 * i + 2];
      d1 += s[4 * i + 3];
    }
    sum0 = sum0 * factor0 + (c0 + d0);
    sum1 = sum1 * factor1 + (c1 + d1);
    return grows;
  }
};

// Writes the row of an output that four lanes hold, 32 columns at once: each lane eight that are adjacent.
__device__ __forceinline__ void store_row(void* to, const float (&o)[OUTPUTS / 2], int second, float factor, int lane) {
#pragma unroll
  for (int i = 0; i < HEAD / 8; i += 4) {
    u32 w[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) w[j] = two(o[4 * (i + j) + second] * factor, o[4 * (i + j) + second + 1] * factor);
    transpose(w, lane);
    if (to == nullptr) continue;
    char* at = static_cast<char*>(to) + (8 * i + 8 * (lane % 4)) * ELEMENT;
#if FLOAT8
    *reinterpret_cast<uint2*>(at) = make_uint2(w[0] | w[1] << 16, w[2] | w[3] << 16);
#else
    *reinterpret_cast<uint4*>(at) = make_uint4(w[0], w[1], w[2], w[3]);
#endif
  }
}

// Where a tile begins, and how many keys count there. There is at least one: without any, consumers would wait for ever.
struct Tile { int first, head, batch, length, blocks; };

__device__ __forceinline__ Tile tile_of(int tile, const int* lengths, int tokens, int heads, int tiles_of_queries) {
  const int batch = tile / tiles_of_queries / heads;
  const int length = lengths == nullptr ? tokens : min(tokens, max(1, lengths[batch]));
  return {tile % tiles_of_queries * QUERIES, tile / tiles_of_queries % heads, batch, length, (length + KEYS - 1) / KEYS};
}

extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
attention(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
          const __grid_constant__ TensorMap v_map, char* __restrict__ out, const int* __restrict__ lengths, int tokens,
          int heads, int shared_by, int tiles_of_queries, int tiles, int pitch, float scale, float out_scale) {
  extern __shared__ __align__(1024) char memory[];
  const u32 q_at = shared_address(memory), k_at = q_at + Q_BYTES, v_at = k_at + STAGES * K_BYTES;
  float4* const kept = reinterpret_cast<float4*>(memory + Q_BYTES + STAGES * (K_BYTES + V_STAGE));
  const u32 barriers = v_at + STAGES * V_STAGE + KEPT_BYTES;
  const auto k_full = [&](int stage) { return barriers + 32 * stage; };
  const auto k_free = [&](int stage) { return barriers + 32 * stage + 8; };
  const auto v_full = [&](int stage) { return barriers + 32 * stage + 16; };
  const auto v_free = [&](int stage) { return barriers + 32 * stage + 24; };
  const auto q_full = [&](int part) { return barriers + 32 * STAGES + 16 * part; };
  const auto q_free = [&](int part) { return barriers + 32 * STAGES + 16 * part + 8; };
  if (threadIdx.x == 0) {
    for (int part = 0; part < Q_PARTS; ++part) {
      init_barrier(q_full(part), 1);
      init_barrier(q_free(part), 4 * GROUPS / Q_PARTS);
    }
    for (int stage = 0; stage < STAGES; ++stage) {
      init_barrier(k_full(stage), 1);
      init_barrier(v_full(stage), 1);
      init_barrier(k_free(stage), 4 * GROUPS);
      init_barrier(v_free(stage), 4 * GROUPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
#if FLOAT8
  // The ones, once: no load writes over them, and a swizzle does not change them.
  constexpr int WORDS = 8 * V_CHUNK / 4;
  for (int i = threadIdx.x; i < STAGES * V_CHUNKS * WORDS; i += blockDim.x) {
    char* const chunk = memory + Q_BYTES + STAGES * K_BYTES + i / WORDS * V_CHUNK_BYTES;
    reinterpret_cast<u32*>(chunk + HEAD * V_CHUNK)[i % WORDS] = 0x38383838;
  }
#endif
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();

  // The shuffle tells the compiler that this is the same for a warp, so that the barriers of its part of the queries take
  // uniform registers. With one part they do anyway.
  const int warp_of_block = Q_PARTS == 1 ? threadIdx.x / 32 : __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  const int group = warp_of_block / 4;
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(GROUPS == 2 ? 24 : 32));
    if (threadIdx.x % 32 != 0) return;
    const auto load_queries = [&](const Tile& tile, int part, u32 phase) {
      wait(q_free(part), phase);
      expect_bytes(q_full(part), Q_BYTES / Q_PARTS);
      const int row = QUERIES / Q_PARTS * part;
#pragma unroll
      for (int c = 0; c < QK_CHUNKS; ++c)
        load_tile(q_at + (c * QUERIES + row) * QK_CHUNK, &q_map, q_full(part), c * (QK_CHUNK / ELEMENT), tile.head,
                  tile.first + row, tile.batch);
    };
    if (warp_of_block > 0) {
      u32 phase = 1;
      if (Q_PARTS > 1 && warp_of_block <= Q_PARTS)
#pragma unroll 1
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, phase ^= 1)
          load_queries(tile_of(tile, lengths, tokens, heads, tiles_of_queries), warp_of_block - 1, phase);
      return;
    }
    int stage = 0;
    u32 phase = 0, q_phase = 1;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const Tile now = tile_of(tile, lengths, tokens, heads, tiles_of_queries);
      const int kv_head = now.head / shared_by;
      for (int block = now.blocks - 1; block >= 0; --block) {
        wait(k_free(stage), phase ^ 1);
        expect_bytes(k_full(stage), K_BYTES);
#pragma unroll
        for (int c = 0; c < QK_CHUNKS; ++c)
          load_tile(k_at + stage * K_BYTES + c * KEYS * QK_CHUNK, &k_map, k_full(stage), c * (QK_CHUNK / ELEMENT), kv_head,
                    block * KEYS, now.batch);
        if (Q_PARTS == 1 && block == now.blocks - 1) {
          load_queries(now, 0, q_phase);
          q_phase ^= 1;
        }
        wait(v_free(stage), phase ^ 1);
        expect_bytes(v_full(stage), V_BYTES);
#pragma unroll
        for (int c = 0; c < V_CHUNKS; ++c) {
#if FLOAT8
          load_tile(v_at + stage * V_STAGE + c * V_CHUNK_BYTES, &v_map, v_full(stage), block * KEYS + c * V_CHUNK, 0,
                    kv_head, now.batch);
#else
          load_tile(v_at + stage * V_STAGE + c * V_CHUNK_BYTES, &v_map, v_full(stage), c * (V_CHUNK / ELEMENT), kv_head,
                    block * KEYS, now.batch);
#endif
        }
        if (++stage == STAGES) {
          stage = 0;
          phase ^= 1;
        }
      }
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(GROUPS == 2 ? 240 : 160));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, next = group % GROUPS + 1;
  if (TAKES_TURNS && group == GROUPS) turn_give(1);
  const u32 q_mine = q_at + (group - 1) * 64 * QK_CHUNK;
  int k_stage = 0, v_stage = 0;
  u32 k_phase = 0, v_phase = 0, q_phase = 0;
  float s[KEYS / 2], o[OUTPUTS / 2];
  u32 p[A_REGISTERS];

  const auto scores = [&]() {
    hold(s);
    wgmma_fence();
#pragma unroll
    for (int byte = 0; byte < HEAD * ELEMENT; byte += 32) {
      const int chunk = byte / QK_CHUNK, rest = byte % QK_CHUNK;
      multiply_scores(s, matrix<QK_CHUNK>(q_mine + chunk * QUERIES * QK_CHUNK + rest, 16),
                      matrix<QK_CHUNK>(k_at + k_stage * K_BYTES + chunk * KEYS * QK_CHUNK + rest, 16), byte > 0);
    }
    wgmma_commit();
  };
  const auto add_values = [&]() {
    hold(o);
    hold(p);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const u32 at = v_at + v_stage * V_STAGE;
#if FLOAT8
      const u64 values = matrix<V_CHUNK>(at + i * STEP / V_CHUNK * V_CHUNK_BYTES + i * STEP % V_CHUNK, 16);
#else
      const u64 values = matrix<V_CHUNK>(at + i * STEP * V_CHUNK, V_CHUNK_BYTES);
#endif
      multiply_values(o, p + 4 * i, values);
    }
    wgmma_commit();
  };
  const auto k_done = [&]() {
    if (lane == 0) arrive(k_free(k_stage));
    if (++k_stage == STAGES) {
      k_stage = 0;
      k_phase ^= 1;
    }
  };
  const auto v_done = [&]() {
    if (lane == 0) arrive(v_free(v_stage));
    if (++v_stage == STAGES) {
      v_stage = 0;
      v_phase ^= 1;
    }
  };

#if FLOAT8
  float kept_factor0 = 1, kept_factor1 = 1;
  // Adds what is kept, if there is anything, to the output; puts the sum in its place and starts anew, or leaves it.
  const auto keep = [&](bool there, bool starts_anew) {
#pragma unroll
    for (int i = 0; i < OUTPUTS / 8; ++i) {
      float4* const at = kept + i * 128 * GROUPS + (threadIdx.x - 128);
      if (there) {
        const float4 before = *at;
        o[4 * i] += before.x * kept_factor0;
        o[4 * i + 1] += before.y * kept_factor0;
        o[4 * i + 2] += before.z * kept_factor1;
        o[4 * i + 3] += before.w * kept_factor1;
      }
      if (starts_anew) {
        *at = make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]);
        o[4 * i] = o[4 * i + 1] = o[4 * i + 2] = o[4 * i + 3] = 0;
      }
    }
    kept_factor0 = kept_factor1 = 1;
  };
#endif

  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const auto [first, head, batch, length, blocks] = tile_of(tile, lengths, tokens, heads, tiles_of_queries);
    Softmax softmax{MINUS_INFINITY, MINUS_INFINITY, 0, 0};
    float factor0, factor1;

    wait(q_full(Q_PARTS == 1 ? 0 : group - 1), q_phase);
    q_phase ^= 1;
    wait(k_full(k_stage), k_phase);
    scores();
#pragma unroll
    for (int i = 0; i < OUTPUTS / 2; ++i) o[i] = 0;
    wgmma_wait<0>();
    hold(s);
    k_done();
    // Of all blocks only the last has keys that are not real. It comes first.
    const int left = length - (blocks - 1) * KEYS - 2 * (lane % 4);
    if (left < KEYS)
#pragma unroll
      for (int i = 0; i < KEYS / 8; ++i) {
        if (8 * i >= left) s[4 * i] = s[4 * i + 2] = MINUS_INFINITY;
        if (8 * i + 1 >= left) s[4 * i + 1] = s[4 * i + 3] = MINUS_INFINITY;
      }
    softmax.update(s, scale, factor0, factor1);
    to_operand(p, s);

#pragma unroll 1
    for (int block = blocks - 2; block >= 0; --block) {
      wait(k_full(k_stage), k_phase);
      if (TAKES_TURNS) turn_wait(group);
      scores();
      wait(v_full(v_stage), v_phase);
      add_values();
      wgmma_wait<1>();
      hold(s);
      if (TAKES_TURNS) turn_give(next);
      k_done();
      const bool rescale = softmax.update(s, scale, factor0, factor1);
      wgmma_wait<0>();
      hold(o);
      hold(p);
      v_done();
      if (rescale)
#pragma unroll
        for (int i = 0; i < OUTPUTS / 8; ++i) {
          o[4 * i] *= factor0;
          o[4 * i + 1] *= factor0;
          o[4 * i + 2] *= factor1;
          o[4 * i + 3] *= factor1;
        }
#if FLOAT8
      kept_factor0 *= factor0;
      kept_factor1 *= factor1;
      if ((blocks - 1 - block) % EVERY == 0) keep(blocks - 1 - block > EVERY, true);
#endif
      to_operand(p, s);
    }
    if (lane == 0) arrive(q_free(Q_PARTS == 1 ? 0 : group - 1));
    wait(v_full(v_stage), v_phase);
    add_values();
    float sum0 = softmax.sum0, sum1 = softmax.sum1;
    sum0 += __shfl_xor_sync(0xffffffff, sum0, 1);
    sum1 += __shfl_xor_sync(0xffffffff, sum1, 1);
    sum0 += __shfl_xor_sync(0xffffffff, sum0, 2);
    sum1 += __shfl_xor_sync(0xffffffff, sum1, 2);
    wgmma_wait<0>();
    hold(o);
    v_done();
#if FLOAT8
    if (blocks > EVERY) keep(true, false);
    sum0 = o[OUTPUTS / 2 - 4];
    sum1 = o[OUTPUTS / 2 - 2];
#endif

    const int token = first + (group - 1) * 64 + warp * 16 + lane / 4;
    char* row = out + ((long long)(batch * tokens + token) * pitch + head * HEAD) * ELEMENT;
    store_row(token < tokens ? row : nullptr, o, 0, out_scale / sum0, lane);
    store_row(token + 8 < tokens ? row + 8ll * pitch * ELEMENT : nullptr, o, 2, out_scale / sum1, lane);
  }
}
