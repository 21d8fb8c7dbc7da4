// Kernels with one bug each, on a line marked `// bug NAME`, and correct ones that look suspicious.
// 64 threads a threadgroup; x is an input of 64 floats, y an output of 64.
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

#define BUFFERS device const float *x [[buffer(0)]], device float *y [[buffer(1)]]
#define IDS                                                                                  \
  uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]],                \
      uint group [[threadgroup_position_in_grid]], uint lane [[thread_index_in_simdgroup]],  \
      uint sg [[simdgroup_index_in_threadgroup]]
#define SYNC threadgroup_barrier(mem_flags::mem_threadgroup)

// Bounds.
kernel void read_past_end(BUFFERS, IDS) {
  y[i] = x[i + 1]; // bug read_past_end
}
kernel void write_past_end(BUFFERS, IDS) {
  y[i + 3] = x[i]; // bug write_past_end
}
kernel void vector_past_end(BUFFERS, IDS) {
  device const float4 *v = (device const float4 *)x;
  y[i] = v[i / 4 + 1].x; // bug vector_past_end
}
kernel void before_start(BUFFERS, IDS) {
  y[i] = x[int(i) - 1]; // bug before_start
}
kernel void far_away(BUFFERS, IDS) {
  y[i] = x[i + (1ul << 40)]; // bug far_away
}
kernel void local_array(BUFFERS, IDS) {
  float a[4];
  for (uint k = 0; k < 4; k++) {
    a[k] = x[i];
  }
  y[i] = a[i / 16 + 1]; // bug local_array
}
kernel void threadgroup_array(BUFFERS, IDS) {
  threadgroup float a[64];
  a[t + 1] = x[i]; // bug threadgroup_array
  SYNC;
  y[i] = a[t];
}
kernel void threadgroup_argument(BUFFERS, threadgroup float *a [[threadgroup(0)]], IDS) {
  a[t] = x[i]; // bug threadgroup_argument
  SYNC;
  y[i] = a[t];
}
kernel void unbound(BUFFERS, device const float *z [[buffer(7)]], IDS) {
  y[i] = x[i] + z[i]; // bug unbound
}
kernel void misaligned(BUFFERS, IDS) {
  device const float4 *v = (device const float4 *)(x + 1);
  y[i] = dot(v[i / 8], float4(1)); // bug misaligned
}

// Permissions and contents.
kernel void write_to_input(BUFFERS, IDS) {
  ((device float *)x)[i] = 1; // bug write_to_input
  y[i] = 0;
}
kernel void unwritten_output(BUFFERS, IDS) {
  y[i] += x[i]; // bug unwritten_output
}
kernel void unwritten_threadgroup(BUFFERS, IDS) {
  threadgroup float a[64];
  if (t < 63) {
    a[t] = x[i];
  }
  SYNC;
  y[i] = a[63 - t]; // bug unwritten_threadgroup
}
kernel void unwritten_local(BUFFERS, IDS) {
  float sum;
  for (uint k = 0; k <= i % 4; k++) {
    sum += x[k];
  }
  y[i] = sum;
}
kernel void inactive_lane(BUFFERS, IDS) {
  if (i >= 50) {
    y[i] = 0;
    return;
  }
  y[i] = simd_shuffle_xor(x[i], 16);
}

// Races.
kernel void no_barrier(BUFFERS, IDS) {
  threadgroup float a[64];
  a[t] = 0;
  SYNC;
  a[t] = x[i];     // bug no_barrier
  y[i] = a[t ^ 1]; // bug no_barrier
}
kernel void no_barrier_before_reuse(BUFFERS, IDS) {
  threadgroup float a[64];
  a[t] = x[i];
  SYNC;
  float v = a[t ^ 33]; // bug no_barrier_before_reuse
  a[t] = v + 1;        // bug no_barrier_before_reuse
  SYNC;
  y[i] = a[t];
}
kernel void both_write(BUFFERS, IDS) {
  threadgroup float a[64];
  a[t / 2] = x[i]; // bug both_write
  SYNC;
  y[i] = a[t / 2];
}
kernel void simdgroup_barrier_is_not_enough(BUFFERS, IDS) {
  threadgroup float a[64];
  a[t] = 0;
  SYNC;
  a[t] = x[i]; // bug simdgroup_barrier_is_not_enough
  simdgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = a[t ^ 32]; // bug simdgroup_barrier_is_not_enough
}
kernel void wrong_flags(BUFFERS, IDS) {
  threadgroup float a[64];
  a[t] = x[i];
  threadgroup_barrier(mem_flags::mem_device);
  y[i] = a[t ^ 1]; // bug wrong_flags
}
kernel void hint_is_no_barrier(BUFFERS, IDS) {
  threadgroup float a[64];
  a[t] = x[i];
  simdgroup_barrier(mem_flags::mem_none);
  y[i] = a[t ^ 1]; // bug hint_is_no_barrier
}
kernel void device_memory_out_of_order(BUFFERS, IDS) {
  y[i] = x[i];
  SYNC;
  float v = y[i ^ 1]; // bug device_memory_out_of_order
  threadgroup_barrier(mem_flags::mem_device);
  y[i] = v;
}
kernel void between_threadgroups(BUFFERS, IDS) {
  if (t == 0) {
    y[0] = x[group]; // bug between_threadgroups
  }
}
kernel void beside_an_atomic(BUFFERS, device atomic_uint *n [[buffer(2)]], IDS) {
  atomic_fetch_add_explicit(n, 1u, memory_order_relaxed); // bug beside_an_atomic
  y[i] = *(device uint *)n;                               // bug beside_an_atomic
}

// Divergence.
kernel void barrier_in_branch(BUFFERS, IDS) {
  if (t < 40) {
    SYNC; // bug barrier_in_branch
  }
  y[i] = x[i];
}
kernel void two_barriers(BUFFERS, IDS) {
  if (t < 32) {
    SYNC;
    y[i] = x[i];
  } else {
    SYNC; // bug two_barriers
    y[i] = 2 * x[i];
  }
}
kernel void return_before_barrier(BUFFERS, IDS) {
  if (i >= 50) {
    return;
  }
  SYNC; // bug return_before_barrier
  y[i] = x[i];
}
kernel void two_simdgroup_functions(BUFFERS, IDS) {
  float v = x[i];
  if (i % 2) {
    v = simd_sum(v); // bug two_simdgroup_functions
  } else {
    v = simd_max(v);
  }
  y[i] = v;
}
kernel void part_of_a_simdgroup(BUFFERS, IDS) {
  float v = x[i];
  if (lane < 20) {
    v = simd_sum(v); // bug part_of_a_simdgroup
  }
  SYNC;
  y[i] = v;
}
kernel void half_a_matrix(BUFFERS, IDS) {
  simdgroup_float8x8 m(1.0f);
  if (lane < 16) {
    return;
  }
  simdgroup_multiply(m, m, m); // bug half_a_matrix
  y[i] = m.thread_elements()[0];
}

// Limits.
kernel void too_much_threadgroup_memory(BUFFERS, IDS) {
  threadgroup float a[8192];
  threadgroup half b[64]; // bug too_much_threadgroup_memory
  a[t] = x[i];
  b[t] = 0;
  y[i] = a[t] + float(b[t]);
}
kernel void too_much_private_memory(BUFFERS, IDS) {
  float a[20000];
  for (uint k = 0; k < 20000; k++) {
    a[k] = x[(i + k) % 64]; // bug too_much_private_memory
  }
  y[i] = a[uint(x[i]) * 100];
}
kernel void division_by_zero(BUFFERS, IDS) {
  y[i] = float(i / uint(x[0])); // bug division_by_zero
}

// Correct, and close to wrong.
kernel void reduction(BUFFERS, IDS) {
  threadgroup float part[2];
  float sum = simd_sum(x[i]);
  if (lane == 0) {
    part[sg] = sum;
  }
  SYNC;
  y[i] = part[0] + part[1];
}
kernel void within_a_simdgroup(BUFFERS, IDS) {
  threadgroup float a[64];
  a[t] = x[i];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = a[t ^ 1];
}
kernel void same_value(BUFFERS, IDS) {
  threadgroup float a[1];
  a[0] = x[0];
  SYNC;
  y[t / 2] = a[0];
  y[32 + t / 2] = a[0];
}
kernel void tiles(BUFFERS, IDS) {
  threadgroup float a[2][64];
  float sum = 0;
  a[0][t] = x[i];
  for (uint k = 0; k < 4; k++) {
    SYNC;
    a[(k + 1) % 2][t] = x[i] * float(k + 2);
    sum += a[k % 2][63 - t];
  }
  y[i] = sum;
}
kernel void through_device_memory(BUFFERS, IDS) {
  y[i] = x[i];
  threadgroup_barrier(mem_flags::mem_device);
  float v = y[i ^ 1];
  threadgroup_barrier(mem_flags::mem_device);
  y[i] = v;
}
kernel void histogram(device const float *x [[buffer(0)]], device atomic_uint *y [[buffer(1)]], IDS) {
  threadgroup atomic_uint bins[4];
  if (t < 4) {
    atomic_store_explicit(&bins[t], 0u, memory_order_relaxed);
  }
  SYNC;
  atomic_fetch_add_explicit(&bins[uint(x[i]) % 4], 1u, memory_order_relaxed);
  SYNC;
  if (t < 4) {
    atomic_fetch_add_explicit(&y[t], atomic_load_explicit(&bins[t], memory_order_relaxed),
        memory_order_relaxed);
  }
}
kernel void return_without_barrier(BUFFERS, IDS) {
  y[i] = 0;
  if (i >= 50) {
    return;
  }
  y[i] = simd_sum(1.0f);
}
kernel void zeroed(BUFFERS, IDS) {
  threadgroup float a[64] = {0};
  a[t] = x[i];
  y[i] = a[t];
}
