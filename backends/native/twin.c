/* Twins: equal pages of one client, or of one shared pool, kept once.
 *
 * What several slots share is not a block but a page: the ORIGINAL, which has a slot of its own in a pool of the core's
 * (originals_of), and so a block, a tier, a repair as any page has. A TWIN is a slot that names the original's slot.
 * One slot still owns one block, and nobody counts who refers to an original: as with locations in a tier (demote.c)
 * the slots are the only truth, and an original goes when a look at all of them has found none that names it.
 *
 * The two that must not meet are making a slot a twin and removing originals without any: both hold `twin_lock`, which is
 * robust, only ever tried, and guards no data, so a death there leaves nothing to do. Under it a twin is made only if
 * its original still is as it was when the two pages were compared, byte for byte; and what a look has not found named
 * cannot be named before the lock is dropped. Everything else goes on meanwhile: a twin that is put or flushed
 * becomes something else by its own swap, and leaves an original for the next look.
 *
 * A reader looks at the twin's slot again after it has read the original. If the slot is as it was, it named the
 * original all the time, which therefore stayed. Reading is done inside an operation, so no leaf goes under it.
 *
 * Originals of EPHEMERAL pages are evicted as any page, by the queue that they are in, for which the hits of all their
 * twins count. Their twins are misses from then on, and become empty when somebody meets them. So that none can ever
 * name another page, an original that goes leaves a TRACE in its slot: the value of the empty slot is not 0. Such a slot
 * gets no other original, and its leaf is not given back, until a look at all slots has found none that names it;
 * only that look takes the trace away. The trace is the ghost that the twins get when they become empty.
 *
 * pair.c makes twins. */
#include "tm.h"

#include <sched.h>
#include <string.h>

enum {
    LEAVES = 64 /* of originals, that are looked after in one look at all slots: a bit each for 512 of them */
};
#define TRACE_ONLY SLOT_VALUE /* of an original that left no ghost: a time that never is fresh */

uint32_t originals_of(const struct tm_segment *seg, uint32_t pool)
{
    if (pool >= TM_FIRST_SHARED)
        return pool >= TM_FIRST_SHARED_ORIGINALS ? pool : pool + TM_MAX_SHARED;
    return pool / TM_CLIENT_POOLS * TM_CLIENT_POOLS + TM_USER_POOLS + !seg->pools[pool].persistent;
}

static bool is_evictable(const struct tm_segment *seg, uint32_t pool)
{
    return is_originals(pool) && !seg->pools[pool].persistent;
}

bool original_is_evicted(const struct tm_segment *seg, uint32_t originals, uint64_t word)
{
    return slot_type(word) == SLOT_EMPTY && (word & SLOT_VALUE) && is_evictable(seg, originals);
}

uint64_t original_trace(const struct tm_segment *seg, uint32_t pool, uint64_t ghost)
{
    return ghost || !is_evictable(seg, pool) || MUTANT(35) ? ghost : TRACE_ONLY;
}

slot_t *twin_original(struct tm_segment *seg, uint32_t pool, uint64_t word)
{
    uint64_t number = word & SLOT_VALUE;
    return !is_originals(pool) && slot_pool(seg, number) == (int)originals_of(seg, pool) ? at(seg, number * 8) : NULL;
}

int twin_get(struct tm_ctx *ctx, uint32_t pool, uint64_t word, uint8_t *page)
{
    slot_t *original = twin_original(ctx->seg, pool, word);
    KP(116);
    return original ? slot_get(ctx, originals_of(ctx->seg, pool), original, page, NULL) : TM_CORRUPT;
}

/* Its original was evicted: it goes, too. */
static bool twin_evicted(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint64_t word)
{
    struct tm_segment *seg = ctx->seg;
    slot_t *original = twin_original(seg, pool, word);
    uint64_t trace = original ? atomic_load(original) : 0, ghost = trace & SLOT_VALUE;
    if (!original_is_evicted(seg, originals_of(seg, pool), trace))
        return false;
    if (!slot_replace(ctx, pool, slot, &word, slot_next(word, SLOT_EMPTY, ghost == TRACE_ONLY ? 0 : ghost)))
        return false;
    KP(117);
    count(seg, pool, C_EVICTIONS, 1);
    look_for_empty(seg);
    return true;
}

bool twin_is_gone(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint64_t word)
{
    struct tm_segment *seg = ctx->seg;
    if (twin_evicted(ctx, pool, slot, word))
        return true;
    const slot_t *original = twin_original(seg, pool, word);
    uint64_t named = original ? atomic_load(original) : 0;
    /* Neither a page nor a trace: its pool is dying before ours, or it is damaged. Nobody changes our slot for us. */
    return !slot_stored(named) && !original_is_evicted(seg, originals_of(seg, pool), named);
}

bool twins_lock_within(struct tm_segment *seg, unsigned *patience)
{
    for (; !twins_lock(seg); --*patience) {
        if (!patience || !*patience)
            return false;
        sched_yield();
    }
    return true;
}

bool twins_lock(struct tm_segment *seg) { return lock_try_life(&seg->super->twin_lock) != LIFE_TAKEN; }
void twins_unlock(struct tm_segment *seg) { lock_drop(&seg->super->twin_lock); }

/* ---- Originals that no slot names ------------------------------------------------------------------------- */

struct leaves { /* some of a pool of originals, in ascending order */
    uint32_t originals, n;
    uint64_t first[LEAVES], end[LEAVES]; /* slot numbers */
};

/* Call `each` for every allocated leaf of pools first..last-1 from chunk `*c` and unit `*bit` on, until it returns false;
 * where to go on, nchunks at the end. Inside an operation. */
static void each_leaf(struct tm_segment *seg, uint32_t first, uint32_t last, uint32_t *c, uint32_t *bit, void *arg,
                      bool (*each)(struct tm_segment *seg, void *arg, uint64_t from, uint64_t end))
{
    for (; *c < seg->nchunks; ++*c, *bit = 0) {
        const struct tm_chunk *d = &seg->chunks[*c];
        uint32_t bin = d->bin;
        if (atomic_load(&seg->states[*c]) != CHUNK_USED || bin < BIN_LEAF + first * 3 || bin >= BIN_LEAF + last * 3)
            continue;
        uint32_t stride = bin_stride(bin);
        for (; *bit < TM_CHUNK / stride; ++*bit) {
            uint64_t from = (seg->data_offset + (uint64_t)*c * TM_CHUNK + (uint64_t)*bit * stride) / 8;
            if (bit_is_set(d, *bit) && !each(seg, arg, from, from + stride / 8))
                return;
        }
    }
}

/* Is the leaf still one of `pool`? Found by its chunk it may have been given back meanwhile, but not one that held a page
 * or a trace when we looked: that has to go first, and then whoever frees the leaf waits for us. So a word that was read
 * before this says yes is the pool's, and still there if it can be swapped: leaves begin empty. */
static bool is_leaf_of(struct tm_segment *seg, uint32_t pool, uint64_t from, uint64_t end)
{
    uint32_t c = chunk_of(seg, from * 8), stride = (uint32_t)(end - from) * 8;
    if (slot_pool(seg, from) != (int)pool || bin_stride(seg->chunks[c].bin) != stride)
        return false;
    uint64_t within = from * 8 - seg->data_offset - (uint64_t)c * TM_CHUNK;
    return within % stride == 0 && bit_is_set(&seg->chunks[c], (uint32_t)within / stride);
}

/* Is a slot of originals not free for another one? */
static bool is_taken(struct tm_segment *seg, uint32_t originals, uint64_t word)
{
    return slot_stored(word) || original_is_evicted(seg, originals, word);
}

static bool gather(struct tm_segment *seg, void *arg, uint64_t from, uint64_t end)
{
    struct leaves *l = arg;
    if (l->n == LEAVES)
        return false;
    for (uint64_t i = from; i < end; i++)
        if (is_taken(seg, l->originals, atomic_load_explicit((slot_t *)at(seg, i * 8), memory_order_acquire))) {
            l->first[l->n] = from;
            l->end[l->n++] = end;
            break;
        }
    return true;
}

struct named {
    struct tm_ctx *ctx;
    const struct leaves *leaves;
    uint8_t *bits; /* of a page: 512 for each leaf */
};

static bool note_named(struct tm_segment *seg, void *arg, uint64_t from, uint64_t end)
{
    const struct named *n = arg;
    const struct leaves *l = n->leaves;
    for (uint64_t i = from; i < end; i++) {
        slot_t *slot = at(seg, i * 8);
        uint64_t word = atomic_load_explicit(slot, memory_order_acquire), named = word & SLOT_VALUE;
        if (slot_type(word) != SLOT_TWIN)
            continue;
        int pool = is_evictable(seg, l->originals) ? slot_pool(seg, i) : -1;
        if (pool >= 0 && is_leaf_of(seg, (uint32_t)pool, from, end) && twin_evicted(n->ctx, (uint32_t)pool, slot, word))
            continue;
        uint32_t low = 0, high = l->n; /* the last leaf that begins at it or before */
        while (high - low > 1)
            *(l->first[(low + high) / 2] <= named ? &low : &high) = (low + high) / 2;
        if (named >= l->first[low] && named < l->end[low]) {
            uint64_t bit = low * 512 + (named - l->first[low]);
            n->bits[bit / 8] |= (uint8_t)(1u << bit % 8);
        }
    }
    return true;
}

/* Of pool `originals`, of some leaves from chunk `*c` and unit `*bit` on: remove those that no slot names and the traces that
 * none names, and before that the twins of those that were evicted. The number that was removed. Inside an operation,
 * with the lock held. */
static uint32_t sweep(struct tm_ctx *ctx, uint32_t originals, uint32_t *c, uint32_t *bit)
{
    struct tm_segment *seg = ctx->seg;
    bool shared = originals >= TM_FIRST_SHARED;
    uint32_t first = shared ? originals - TM_MAX_SHARED : originals / TM_CLIENT_POOLS * TM_CLIENT_POOLS;
    uint32_t last = shared ? first + 1 : first + TM_USER_POOLS, freed = 0;
    struct leaves l = {.originals = originals};
    struct named named = {ctx, &l, ctx->moved};
    each_leaf(seg, originals, originals + 1, c, bit, &l, gather);
    if (!l.n)
        return 0;
    memset(ctx->moved, 0, TM_PAGE);
    uint32_t from_c = 0, from_bit = 0;
    each_leaf(seg, first, last, &from_c, &from_bit, &named, note_named);
    KP(114);
    for (uint32_t i = 0; i < l.n; i++)
        for (uint64_t at_slot = l.first[i]; at_slot < l.end[i]; at_slot++) {
            uint64_t n = i * 512 + (at_slot - l.first[i]);
            slot_t *slot = at(seg, at_slot * 8);
            uint64_t word = atomic_load(slot);
            if ((named.bits[n / 8] >> n % 8 & 1) || !is_leaf_of(seg, originals, l.first[i], l.end[i]))
                continue;
            if (slot_stored(word)) {
                freed += (uint32_t)slot_flush(ctx, originals, slot, SLOT_EMPTY);
                word = atomic_load(slot); /* evicted or flushed, it has left its trace */
                KP(115);
            }
            if (original_is_evicted(seg, originals, word))
                atomic_compare_exchange_strong(slot, &word, slot_next(word, SLOT_EMPTY, 0));
        }
    if (freed)
        look_for_empty(seg);
    return freed;
}

static bool has_originals(struct tm_segment *seg, uint32_t pool)
{
    const struct tm_pool *p = &seg->pools[pool];
    return is_originals(pool) && !is_packs(pool) && atomic_load(&p->state) == LIVE && atomic_load(&p->objects) > 0;
}

void twins_sweep(struct tm_ctx *ctx)
{
    struct tm_segment *seg = ctx->seg;
    if (!twins_lock(seg))
        return;
    atomic_fetch_and(&seg->super->orphans, ~ORPHAN_ORIGINALS);
    for (uint32_t pool = 0; pool < TM_MAX_POOLS; pool++)
        for (uint32_t c = has_originals(seg, pool) ? 0 : seg->nchunks, bit = 0; c < seg->nchunks;) {
            op_begin(ctx);
            sweep(ctx, pool, &c, &bit);
            op_end(ctx);
        }
    twins_unlock(seg);
}

static bool originals_rescue(struct tm_ctx *ctx)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t freed = 0;
    unsigned patience = TWINS_PATIENCE;
    if (!(atomic_load_explicit(&seg->super->orphans, memory_order_relaxed) & ORPHAN_ORIGINALS) || MUTANT(22)
        || !twins_lock_within(seg, &patience))
        return false;
    atomic_fetch_and(&seg->super->orphans, ~ORPHAN_ORIGINALS);
    for (uint32_t pool = 0; pool < TM_FIRST_SHARED && !freed; pool++) { /* ephemeral ones are evicted before */
        bool any = seg->pools[pool].persistent && has_originals(seg, pool);
        for (uint32_t c = any ? 0 : seg->nchunks, bit = 0; c < seg->nchunks && !freed;)
            freed += sweep(ctx, pool, &c, &bit);
    }
    if (freed) /* there may be more where we stopped */
        note_orphans(seg, ORPHAN_ORIGINALS);
    twins_unlock(seg);
    return freed;
}

bool twin_rescue(struct tm_ctx *ctx)
{
    bool freed = originals_rescue(ctx);
    return packs_rescue(ctx) || freed;
}
