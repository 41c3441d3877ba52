// What lets a library that a new toolchain compiled load on an old Linux: it is included before every source of a wheel.
//
// Functions of glibc are bound to their oldest versions, not to those that this machine has.
#pragma once

#if defined(__x86_64__)
#define OLDEST_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define OLDEST_GLIBC "GLIBC_2.17"
#endif
#define OLDEST(name) __asm__(".symver " #name ", " #name "@" OLDEST_GLIBC)

OLDEST(pthread_mutex_trylock);
OLDEST(exp);
OLDEST(exp2);
OLDEST(log);
OLDEST(log2);
OLDEST(pow);
OLDEST(expf);
OLDEST(exp2f);
OLDEST(logf);
OLDEST(log2f);
OLDEST(powf);
