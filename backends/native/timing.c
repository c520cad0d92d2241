/* How long operations take, sampled: every 64th of a thread is measured, and counted for the segment and for the
 * client that asked. And maxima that are looked at now and then. All of it is plain counters, so a death in between
 * leaves them off by one sample, and nothing to repair. */
#include "tm.h"

#include <time.h>

enum { EVERY = 64 };

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec ts;
    clock_gettime(clock, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

uint64_t timing_now(void) { return clock_ns(CLOCK_MONOTONIC); }

uint64_t timing_cpu(void) { return clock_ns(CLOCK_THREAD_CPUTIME_ID); }

void timing_begin(struct tm_ctx *ctx) { ctx->began_ns = ctx->ticks % EVERY ? 0 : timing_now(); }

/* The bucket of a duration: one count leading zeros, no loop and no table. */
static unsigned bucket_of(uint64_t ns)
{
    unsigned bits = ns > 1 ? 64u - (unsigned)__builtin_clzll(ns - 1) : 0; /* least with ns <= 2^bits */
    unsigned bucket = bits > TM_BUCKET_FIRST ? bits - TM_BUCKET_FIRST : 0;
    return bucket < TM_BUCKETS ? bucket : TM_BUCKETS - 1;
}

static void add(struct tm_timing *t, uint64_t ns)
{
    uint64_t before = atomic_fetch_add_explicit(&t->samples, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&t->total_ns, ns, memory_order_relaxed);
    atomic_fetch_add_explicit(&t->buckets[bucket_of(ns)], 1, memory_order_relaxed);
    if (!before || ns < atomic_load_explicit(&t->least_ns, memory_order_relaxed))
        atomic_store_explicit(&t->least_ns, ns, memory_order_relaxed);
    if (ns > atomic_load_explicit(&t->most_ns, memory_order_relaxed))
        atomic_store_explicit(&t->most_ns, ns, memory_order_relaxed);
}

void timing_add(struct tm_segment *seg, unsigned kind, uint64_t ns) { add(&seg->super->timing[kind], ns); }

void timing_end(struct tm_ctx *ctx, unsigned kind, uint64_t n)
{
    if (!ctx->began_ns)
        return;
    uint64_t ns = timing_now() - ctx->began_ns;
    ctx->began_ns = 0;
    if (n)
        timing_add(ctx->seg, kind, ns / n);
    if (n && kind < T_CLIENT_KINDS)
        add(&ctx->seg->times[ctx->client].timing[kind], ns / n);
    atomic_fetch_add_explicit(&ctx->seg->clients[ctx->client].busy_ns, ns * EVERY, memory_order_relaxed);
}

/* Whoever ends an operation of the client before may still add its sample. */
void timing_forget(struct tm_segment *seg, uint32_t client)
{
    for (unsigned kind = 0; kind < T_CLIENT_KINDS; kind++) {
        struct tm_timing *t = &seg->times[client].timing[kind];
        atomic_store_explicit(&t->samples, 0, memory_order_relaxed);
        atomic_store_explicit(&t->total_ns, 0, memory_order_relaxed);
        atomic_store_explicit(&t->least_ns, 0, memory_order_relaxed);
        atomic_store_explicit(&t->most_ns, 0, memory_order_relaxed);
        for (unsigned bucket = 0; bucket < TM_BUCKETS; bucket++)
            atomic_store_explicit(&t->buckets[bucket], 0, memory_order_relaxed);
    }
}

static void raise_to(_Atomic uint64_t *most, uint64_t now)
{
    if (now > atomic_load_explicit(most, memory_order_relaxed))
        atomic_store_explicit(most, now, memory_order_relaxed);
}

void most_update(struct tm_segment *seg)
{
    struct tm_super *s = seg->super;
    int64_t sums[4] = {0};
    for (uint32_t p = 0; p < TM_MAX_POOLS; p++) {
        const struct tm_pool *pool = &seg->pools[p];
        if (!atomic_load_explicit(&pool->state, memory_order_relaxed) || is_originals(p))
            continue;
        sums[MOST_PAGES] += pool->pages;
        sums[MOST_EPHEMERAL] += pool->persistent ? 0 : pool->pages;
        sums[MOST_OBJECTS] += pool->objects;
        sums[MOST_NODES] += pool->nodes;
    }
    for (unsigned i = 0; i < 4; i++)
        raise_to(&s->most[i], sums[i] > 0 ? (uint64_t)sums[i] : 0);
    raise_to(&s->most[MOST_CHUNKS], atomic_load_explicit(&s->nused, memory_order_relaxed));
    for (uint32_t p = TM_FIRST_SHARED; p < TM_FIRST_SHARED_ORIGINALS; p++) { /* their pages count for their owners as well */
        if (atomic_load_explicit(&seg->pools[p].state, memory_order_relaxed) != LIVE)
            continue;
        uint32_t owner = payer_of(seg, p);
        int64_t now = client_ephemeral(seg, owner);
        if (now > atomic_load_explicit(&seg->clients[owner].ephemeral_most, memory_order_relaxed))
            atomic_store_explicit(&seg->clients[owner].ephemeral_most, now, memory_order_relaxed);
    }
}
