// Loops that run as fast as one core can: multiply-add from registers, and reading memory.
//
// Each loop keeps enough independent sums in registers to hide the latency of its instruction. `benchmarks.roofs` runs
// one copy on every core. Compile with -ffp-contract=fast, so that a * b + c is one instruction.

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kSums = 24;
#elif defined(__AVX__)
constexpr int kBytes = 32, kSums = 12;
#elif defined(__aarch64__)
constexpr int kBytes = 16, kSums = 24;
#else
constexpr int kBytes = 16, kSums = 12;
#endif
constexpr int kLanes = kBytes / 4;
typedef float Vector __attribute__((vector_size(kBytes)));

volatile float sink;

}  // namespace

// Each function takes a number of rounds, and returns the FLOPs done; 0 where the instruction is missing.

extern "C" double float32_fma(int64_t rounds) {
    volatile float given = 0.5f;  // unknown to the compiler
    const Vector factor = Vector{} + given;
    Vector sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = factor + static_cast<float>(i);
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
        for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * factor + factor;
    }
    for (int i = 1; i < kSums; ++i) sums[0] += sums[i];
    sink = sums[0][0];
    return 2.0 * kLanes * kSums * static_cast<double>(rounds);
}

extern "C" double bfloat16_avx512(int64_t rounds) {
#if defined(__AVX512BF16__)
    volatile float given = 0.5f;
    const __m512bh factor = _mm512_cvtne2ps_pbh(_mm512_set1_ps(given), _mm512_set1_ps(given));
    __m512 sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_ps(given);
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
        for (int i = 0; i < kSums; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], factor, factor);
    }
    for (int i = 1; i < kSums; ++i) sums[0] = _mm512_add_ps(sums[0], sums[i]);
    sink = sums[0][0];
    return 4.0 * 16 * kSums * static_cast<double>(rounds);
#else
    (void)rounds;
    return 0;
#endif
}

extern "C" double bfloat16_amx(int64_t rounds) {
#if defined(__AMX_BF16__) && defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return 0;
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes_per_row[16] = {};
        uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) config.bytes_per_row[tile] = 64, config.rows[tile] = 16;
    alignas(64) unsigned char zeros[1024] = {};
    // GCC 12 takes _tile_loadconfig to read 8 bytes, and drops the other stores.
    asm volatile("" ::"r"(&config), "r"(zeros) : "memory");
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_loadd(6, zeros, 64);
    _tile_loadd(7, zeros, 64);
    for (int64_t round = 0; round < rounds; ++round) {
        _tile_dpbf16ps(0, 6, 7);
        _tile_dpbf16ps(1, 6, 7);
        _tile_dpbf16ps(2, 6, 7);
        _tile_dpbf16ps(3, 6, 7);
        _tile_dpbf16ps(4, 6, 7);
        _tile_dpbf16ps(5, 6, 7);
    }
    _tile_release();
    return 2.0 * 16 * 16 * 32 * 6 * static_cast<double>(rounds);
#else
    (void)rounds;
    return 0;
#endif
}

// Reads `bytes` from `data` as `streams` runs side by side. A run must be a multiple of 512 bytes.
extern "C" void read_memory(const unsigned char* data, int64_t bytes, int64_t streams) {
    constexpr int kReads = 8;
    const int64_t run = bytes / streams;
    Vector sums[kReads] = {};
    for (int64_t offset = 0; offset < run; offset += kReads * kBytes) {
        for (int64_t stream = 0; stream < streams; ++stream) {
            const unsigned char* from = data + stream * run + offset;
#pragma GCC unroll 8
            for (int i = 0; i < kReads; ++i) {
                Vector read;
                std::memcpy(&read, from + i * kBytes, kBytes);
                sums[i] += read;
            }
        }
    }
    for (int i = 1; i < kReads; ++i) sums[0] += sums[i];
    sink = sums[0][0];
}
