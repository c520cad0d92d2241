/* Pages that need about as much memory as a test wants, in the object whose id is all zeros. */
#ifndef SIZES_H
#define SIZES_H

#include "witness.h"

enum { RAW = TM_PAGE / 8, RAW_PER_CHUNK = 15 }; /* words of a page that cannot be compressed */

/* A page of which the first `words` words are random; with none of them it is same-filled and needs no memory. */
static inline void sized_page(uint8_t *page, uint64_t seed, uint32_t words)
{
    uint64_t data[TM_PAGE / 8];
    for (uint32_t i = 0; i < TM_PAGE / 8; i++)
        data[i] = i < words ? mix(seed * 1000 + i) : seed;
    memcpy(page, data, TM_PAGE);
}

static inline int64_t put_sized(const struct tm_handle *h, uint32_t index, uint32_t words)
{
    static const uint8_t zeros[TM_OID];
    uint8_t page[TM_PAGE];
    sized_page(page, index, words);
    return tm_put(h, zeros, index, page, 1, KEEP_OLD);
}

static inline bool holds_sized(const struct tm_handle *h, uint32_t index, uint32_t words)
{
    static const uint8_t zeros[TM_OID];
    uint8_t page[TM_PAGE], back[TM_PAGE];
    sized_page(page, index, words);
    return tm_get(h, zeros, index, back, 1) == 1 && memcmp(page, back, TM_PAGE) == 0;
}

/* Put pages of that size from index `first` on until one is refused; how many were stored. */
static inline uint32_t put_until_refused(const struct tm_handle *h, uint32_t first, uint32_t words)
{
    uint32_t n = 0;
    while (put_sized(h, first + n, words) == 1)
        n++;
    return n;
}

#endif
