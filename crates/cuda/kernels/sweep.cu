// Reading memory from one end to the other: its speed is the ceiling of every kernel that reads once.

/// XORs `count` groups of 16 bytes. The result is written only where it is one number of 2^32, so that reading cannot be
/// left out and writing costs nothing.
extern "C" __global__ void sweep(const uint4* data, i64 count, u32* out) {
    u32 mixed = 0;
    i64 stride = (i64)gridDim.x * blockDim.x;
    i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    for (; at + 3 * stride < count; at += 4 * stride) {
        uint4 x[4];
        for (int i = 0; i < 4; i++) x[i] = data[at + i * stride];
        for (int i = 0; i < 4; i++) mixed ^= x[i].x ^ x[i].y ^ x[i].z ^ x[i].w;
    }
    for (; at < count; at += stride) {
        uint4 x = data[at];
        mixed ^= x.x ^ x.y ^ x.z ^ x.w;
    }
    if (mixed == 0x9e3779b9u) *out = mixed;
}
EXPORT(sweep)
