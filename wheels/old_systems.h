// What lets a library that a new toolchain compiled load on an old Linux: it is included before every source of a wheel.
//
// A symbol of glibc is bound to its oldest version, not to the one that this machine has.
#pragma once

#if defined(__x86_64__)
#define OLDEST_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define OLDEST_GLIBC "GLIBC_2.17"
#endif
__asm__(".symver pthread_mutex_trylock, pthread_mutex_trylock@" OLDEST_GLIBC);
