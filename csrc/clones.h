// One build serves every machine: the loader picks the clone for the CPU at hand. Where the
// compiler has no clones (or needs none, as on Arm) the plain loop is vectorized for the target.
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && \
    ((defined(__clang__) && __clang_major__ >= 17) || (!defined(__clang__) && __GNUC__ >= 12))
#define CAC_FAST_CLONES \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CAC_FAST_CLONES
#endif
