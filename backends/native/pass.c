/* What passes in the background that look at the slots of all leaves have in common (pair.c, packing.c): one of a kind at a time in
 * a process, what it remembers in that process's memory, the way from leaf to leaf as long as there is time, what is warm,
 * and slots for what it makes in pools of the core's own. */
#include "tm.h"

enum { FREE_TRIES = 64 }; /* slots that are looked at for a free one */

void *pass_begin(struct tm_segment *seg, struct tm_pass *p, void *(*make)(const struct tm_segment *seg))
{
    uint32_t unused = 0;
    if (!atomic_compare_exchange_strong(&p->busy, &unused, 1))
        return NULL;
    if (p->memory || (p->memory = make(seg)))
        return p->memory;
    pass_end(p); /* from here on another thread may make it */
    return NULL;
}

void pass_end(struct tm_pass *p) { atomic_store(&p->busy, 0); }

/* Visit the leaves of one chunk from slot `place` on; where to go on. `*over`: until_ns of our CPU time. */
static uint64_t walk_chunk(struct tm_ctx *ctx, const struct tm_walk *w, void *memory, uint64_t place, uint64_t until_ns,
                           bool warm, bool *over)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t c = (uint32_t)(place / TM_PLACES), bin = seg->chunks[c].bin;
    uint64_t begin = (uint64_t)c * TM_PLACES, end = begin + TM_PLACES;
    if (atomic_load(&seg->states[c]) != CHUNK_USED || bin < BIN_LEAF)
        return end;
    uint32_t pool = (bin - BIN_LEAF) / 3, slots = bin_stride(bin) / 8;
    while (place < end && !*over && w->may(seg, pool)) {
        uint32_t within = (uint32_t)(place - begin), i = within % slots / w->step * w->step, first = within / slots * slots;
        uint64_t from = (seg->data_offset + (uint64_t)c * TM_CHUNK) / 8 + first;
        place = begin + first + slots;
        if (!bit_is_set(&seg->chunks[c], first / slots))
            continue;
        op_begin(ctx);
        ctx->client = ctx->payer = payer_of(seg, pool);
        ctx->pool = w->makes_in(seg, pool);
        for (; i < slots && w->may(seg, pool) && leaf_pool(seg, from) == (int)pool; i += w->step)
            if (w->visit(ctx, memory, pool, from + i, warm) && timing_cpu() >= until_ns) {
                place = begin + first + i + w->step;
                break;
            }
        op_end(ctx);
        *over = timing_cpu() >= until_ns;
    }
    return *over ? place : end;
}

uint64_t pass_walk(struct tm_ctx *ctx, const struct tm_walk *w, void *memory, uint64_t place, uint64_t until_ns, bool warm)
{
    bool over = false;
    while (!over && place / TM_PLACES < ctx->seg->nchunks)
        place = walk_chunk(ctx, w, memory, place, until_ns, warm, &over);
    return place / TM_PLACES < ctx->seg->nchunks ? place : 0;
}

bool block_is_warm(struct tm_segment *seg, uint64_t block)
{
    uint64_t within = block * 16 - seg->data_offset, bit = UINT64_C(1) << (within % TM_CHUNK / 1024);
    const struct tm_touched *touched = &seg->touched[within / TM_CHUNK];
    return ((atomic_load_explicit(&touched->now, memory_order_relaxed)
             | atomic_load_explicit(&touched->before, memory_order_relaxed)) & bit) != 0;
}

slot_t *free_slot(struct tm_ctx *ctx, uint32_t pool, uint32_t *hand, uint64_t *word)
{
    static const uint64_t oid[3];
    struct tm_segment *seg = ctx->seg;
    struct cursor cur = {0};
    for (unsigned tries = 0; tries < FREE_TRIES; tries++, ++*hand) {
        if (*hand > 2 * atomic_load(&seg->pools[pool].pages) + 2 * FREE_TRIES)
            *hand = 0;
        if (cursor_create(ctx, pool, oid, *hand, &cur) != TM_OK)
            return NULL;
        slot_t *slot = &cur.slots[*hand - cur.first];
        *word = atomic_load(slot);
        if (slot_type(*word) == SLOT_EMPTY && !original_is_evicted(seg, pool, *word) && slot_number(seg, slot) <= SLOT_VALUE)
            return slot;
    }
    return NULL;
}
