#pragma once

// One portable build, the widest vectors of the machine at run time: glibc resolves the clone when it loads the
// library. Contraction is off for all of them, so they give the same bits.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define LRQ_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LRQ_CLONES
#endif
