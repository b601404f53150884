// The processor's own vector instructions, on x86-64.
#pragma once

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// The intrinsics of GCC up to 12 read `__m512 __Y = __Y` on purpose: thousands of lines of warning.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

// Whether the compiler knows products of bfloat16: those of tiles, and of pairs.
#if defined(__x86_64__) && defined(__linux__) && \
    (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define FAKD_HAS_TILES
#endif
