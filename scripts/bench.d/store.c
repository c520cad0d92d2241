/* CPU time of store calls beside the bare codec, on real pages, in one run.
 *
 *   store SEGMENT PAGES NPAGES OPS        fill a fresh segment, then measure; prints one JSON object
 *   store SEGMENT PAGES NPAGES OPS join   the same on a segment that exists: the second process
 *
 * The bare codec works on the same random pages, from a source and to a destination as cold as the store's. */
#include "tm.h"

#include <lz4.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const uint8_t *pages;
static uint32_t npages;
static uint64_t state = 88172645463325252u;

static uint64_t rnd(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

static double cpu(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return (double)ts.tv_sec * 1e9 + (double)ts.tv_nsec;
}

static const uint8_t *page(uint64_t i) { return pages + (i * 2654435761u % npages) * TM_PAGE; }

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The median of the rounds, ns an operation: the machine is shared. */
enum { ROUNDS = 7 };
static double median(double *rounds)
{
    qsort(rounds, ROUNDS, sizeof *rounds, compare);
    return rounds[ROUNDS / 2];
}

int main(int argc, char **argv)
{
    if (argc < 5)
        return 2;
    FILE *file = fopen(argv[2], "rb");
    struct stat st;
    if (!file || fstat(fileno(file), &st))
        return 2;
    npages = (uint32_t)(st.st_size / TM_PAGE);
    uint8_t *buffer = malloc((size_t)npages * TM_PAGE);
    if (!buffer || fread(buffer, TM_PAGE, npages, file) != npages)
        return 2;
    pages = buffer;
    uint32_t n = (uint32_t)strtoul(argv[3], NULL, 10), ops = (uint32_t)strtoul(argv[4], NULL, 10) / ROUNDS;
    bool join = argc > 5;
    state += (uint64_t)getpid() * 7919;

    /* Bare codec: compressed copies in the order of the pages, read at random. */
    uint32_t cold = n < 100000 ? n : 100000;
    uint8_t *arena = malloc((size_t)cold * 4200), *out = malloc(4200);
    uint32_t *at = malloc(cold * sizeof *at), *length = malloc(cold * sizeof *length), end = 0;
    static uint64_t lz4_state[2100];
    for (uint32_t i = 0; i < cold; i++) {
        at[i] = end / 16 * 16 + 16;
        int c = LZ4_compress_fast_extState(lz4_state, (const char *)page(i), (char *)arena + at[i], TM_PAGE, TM_PAGE - 64, 1);
        length[i] = c > 0 ? (uint32_t)c : TM_PAGE;
        if (c <= 0)
            memcpy(arena + at[i], page(i), TM_PAGE);
        end = at[i] + length[i];
    }

    struct tm_segment *seg;
    if (join ? tm_attach(argv[1], &seg) : tm_create(argv[1], (uint64_t)n * 3300 + (64u << 20), &seg))
        return 3;
    struct tm_ctx *ctx = ctx_get(seg);
    uint32_t id, serial, pool, pool_serial;
    client_open(ctx, "bench", true, &id, &serial);
    pool = id * TM_CLIENT_POOLS;
    pool_serial = atomic_load(&seg->pools[pool].serial);
    if (!join)
        pool_new(ctx, id, serial, &(struct pool_wish){.persistent = true, .exclusive = false, .id = -1}, &pool, &pool_serial);
    struct tm_handle h = {seg, pool, pool_serial};
    uint8_t oid[TM_OID] = {0};
    double fill = 0, refill = 0;
    if (!join) {
        tm_populate(ctx, UINT64_MAX / 2); /* as the manager does: faults are not the store's time */
        double start = cpu();
        for (uint32_t i = 0; i < n; i++)
            if (tm_put(&h, oid, i, page(i), 1, KEEP_OLD) != 1) {
                fprintf(stderr, "refused at %u\n", i);
                return 4;
            }
        fill = (cpu() - start) / n;
        tm_flush(&h, oid, 0, n);
        start = cpu();
        for (uint32_t i = 0; i < n; i++)
            tm_put(&h, oid, i, page(i), 1, KEEP_OLD);
        refill = (cpu() - start) / n;
    }

    double bare_put[ROUNDS], bare_get[ROUNDS], put[ROUNDS], get[ROUNDS];
    uint8_t *dst = malloc(TM_PAGE * 64);
    for (int r = 0; r < ROUNDS; r++) {
        double start = cpu();
        for (uint32_t i = 0; i < ops; i++)
            LZ4_compress_fast_extState(lz4_state, (const char *)page(rnd()), (char *)out, TM_PAGE, TM_PAGE - 64, 1);
        bare_put[r] = (cpu() - start) / ops;
        start = cpu();
        for (uint32_t i = 0; i < ops; i++)
            if (tm_put(&h, oid, (uint32_t)(rnd() % n), page(rnd()), 1, KEEP_OLD) != 1)
                return 5;
        put[r] = (cpu() - start) / ops;
        start = cpu();
        for (uint32_t i = 0; i < ops; i++) {
            uint32_t k = (uint32_t)(rnd() % cold);
            if (length[k] == TM_PAGE)
                memcpy(dst, arena + at[k], TM_PAGE);
            else
                LZ4_decompress_safe((const char *)arena + at[k], (char *)dst, (int)length[k], TM_PAGE);
        }
        bare_get[r] = (cpu() - start) / ops;
        start = cpu();
        for (uint32_t i = 0; i < ops; i++)
            if (tm_get(&h, oid, (uint32_t)(rnd() % n), dst, 1) != 1)
                return 6;
        get[r] = (cpu() - start) / ops;
    }
    double bp = median(bare_put), bg = median(bare_get), p = median(put), g = median(get);
    printf("{\"pages\": %u, \"fill_put_ns\": %.0f, \"refill_put_ns\": %.0f, \"bare_compress_ns\": %.0f, \"put_ns\": %.0f, \"put_over_ns\": %.0f, "
           "\"bare_decompress_ns\": %.0f, \"get_ns\": %.0f, \"get_over_ns\": %.0f}\n",
           n, fill, refill, bp, p, p - bp, bg, g, g - bg);
    tm_close(seg);
    return 0;
}
