/* What the crash and interleaving tests share: self-describing pages, and memory outside the segment. */
#ifndef WITNESS_H
#define WITNESS_H

#include "tm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static inline uint64_t mix(uint64_t x)
{
    x += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

static inline uint64_t next_random(uint64_t *state) { return mix((*state)++); }

/* Page `version` of `key`: compressible to a size that depends on both, sometimes same-filled or raw. */
static inline void page_make(uint8_t *page, uint64_t key, uint64_t version)
{
    uint64_t seed = mix(key * 1000003 + version), kind = seed % 16;
    uint64_t words[TM_PAGE / 8];
    size_t random_words = kind == 1 ? 512 : 8 + (seed >> 8) % 400;
    for (size_t i = 0; i < TM_PAGE / 8; i++)
        words[i] = kind == 0 ? (key << 16 | (version & 0xffff)) & 0x7ffffffff : i < random_words ? mix(seed + i) : seed;
    if (kind != 0) {
        words[0] = key;
        words[1] = version;
    }
    memcpy(page, words, TM_PAGE);
}

static inline bool page_is(const uint8_t *page, uint64_t key, uint64_t version)
{
    uint8_t want[TM_PAGE];
    page_make(want, key, version);
    return memcmp(page, want, TM_PAGE) == 0;
}

static inline void *shared_memory(size_t size)
{
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
        perror("mmap");
        exit(2);
    }
    return p;
}

static inline void oid_make(uint8_t oid[TM_OID], uint64_t n)
{
    memset(oid, 0, TM_OID);
    memcpy(oid, &n, sizeof n);
}

#endif
