/* Eviction of ephemeral pages: S3-FIFO with chunks as the unit.
 *
 * Each client has two queues of chunks, oldest first. New pages go to chunks of the PROBATION queue. Draining its
 * oldest chunk moves the pages that were hit meanwhile to MAIN and evicts the others, leaving the time of eviction
 * in the empty slot (the ghost): a page that is put again while its ghost is fresh goes to MAIN at once. Draining
 * MAIN's oldest chunk puts hit pages back at its end with one hit less. After a drain the whole chunk is free,
 * for whatever size class needs it, so memory never stays caught in the wrong class.
 *
 * Moving frees nothing by itself. Somebody who waits for memory therefore drains HARD after eight drains that
 * did not help: then hit pages go too, and every drain frees its chunk. */
#include "tm.h"

#include <string.h>

bool ghost_is_fresh(struct tm_segment *seg, uint32_t pool, uint64_t word)
{
    uint64_t then = word & SLOT_VALUE;
    if (!then)
        return false;
    uint64_t now = atomic_load_explicit(&seg->clients[pool / TM_CLIENT_POOLS].evict_clock, memory_order_relaxed);
    /* As many ghosts as pages: S3-FIFO's ghost queue has the size of the main one. */
    int64_t pages = atomic_load_explicit(&seg->pools[pool].pages, memory_order_relaxed);
    return now - then < (uint64_t)(pages > 64 ? pages : 64);
}

/* Copy a page that earned it to a chunk of the main queue. False: no room, or the page changed. */
static bool relocate(struct tm_ctx *ctx, uint32_t client, uint32_t pool, slot_t *slot, uint64_t word, uint32_t cls)
{
    struct tm_segment *seg = ctx->seg;
    const struct tm_block *from = block_at(seg, word & SLOT_VALUE);
    uint64_t number = off(seg, slot) / 8, header = atomic_load(&from->word);
    uint32_t stamp = atomic_load(&from->stamp), length = block_length(header);
    if (header_slot(header) != number || size_class(length) != cls
        || from->checksum != block_checksum(from, header, stamp))
        return false; /* corrupt: evict it */
    uint64_t block = block_alloc(ctx, bin_ephemeral(client, QUEUE_MAIN, cls), -1, true);
    if (!block)
        return false;
    block_write(block_at(seg, block), number, length, (const uint8_t *)(from + 1));
    KP(50);
    uint64_t next = slot_next(word, SLOT_BLOCK, block) | ((word & SLOT_FREQ) - SLOT_FREQ_ONE);
    if (slot_replace(ctx, pool, slot, &word, next))
        return true;
    block_free_new(ctx);
    return false;
}

/* Empty chunk `c`, which we own: every committed page is evicted or, unless `hard`, moved away if it earned it. */
static void drain(struct tm_ctx *ctx, uint32_t c, uint32_t client, bool hard)
{
    struct tm_segment *seg = ctx->seg;
    struct tm_chunk *d = &seg->chunks[c];
    uint32_t stride = bin_stride(d->bin), cls = (d->bin - BIN_EPHEMERAL) % TM_NCLASSES;
    for (uint32_t bit = 0; bit < TM_CHUNK / stride; bit++) {
        if (!bit_is_set(d, bit))
            continue;
        uint64_t block = (seg->data_offset + (uint64_t)c * TM_CHUNK + (uint64_t)bit * stride) / 16;
        uint64_t number = header_slot(atomic_load(&block_at(seg, block)->word));
        int pool = slot_pool(seg, number);
        if (pool < 0)
            continue; /* a header not yet written */
        slot_t *slot = at(seg, number * 8);
        for (uint64_t word = atomic_load(slot); slot_refers(word, block); word = atomic_load(slot)) {
            if (!hard && slot_freq(word) && relocate(ctx, client, (uint32_t)pool, slot, word, cls))
                break;
            uint64_t clock = atomic_fetch_add(&seg->clients[client].evict_clock, 1) + 1;
            word = atomic_load(slot);
            if (slot_refers(word, block)
                && slot_replace(ctx, (uint32_t)pool, slot, &word, slot_next(word, SLOT_EMPTY, clock & SLOT_VALUE))) {
                count(seg, (uint32_t)pool, C_EVICTIONS, 1);
                KP(51);
                break;
            }
        }
    }
}

static uint32_t length_of(struct tm_segment *seg, uint32_t client, unsigned queue)
{
    return atomic_load_explicit(&seg->clients[client].queues[queue].length, memory_order_relaxed);
}

static int most_ephemeral(struct tm_segment *seg)
{
    int best = -1;
    uint32_t most = 0;
    for (uint32_t i = 0; i < TM_MAX_CLIENTS; i++) {
        uint32_t chunks = length_of(seg, i, QUEUE_PROBATION) + length_of(seg, i, QUEUE_MAIN);
        if (chunks > most) {
            most = chunks;
            best = (int)i;
        }
    }
    return best;
}

bool evict_chunk(struct tm_ctx *ctx, int client, bool hard)
{
    struct tm_segment *seg = ctx->seg;
    if (client < 0)
        client = most_ephemeral(seg);
    if (client < 0)
        return false;
    uint32_t who = (uint32_t)client;
    uint32_t probation = length_of(seg, who, QUEUE_PROBATION), main_length = length_of(seg, who, QUEUE_MAIN);
    /* S3-FIFO: probation has a tenth of the memory. */
    unsigned queue = probation && (probation * 10 > probation + main_length || !main_length) ? QUEUE_PROBATION
                                                                                            : QUEUE_MAIN;
    uint32_t c = queue_pop(ctx, who, queue);
    if (!c)
        return probation + main_length > 0; /* others drain the last ones this moment */
    KP(52);
    if (chunk_own(ctx, c - 1)) {
        drain(ctx, c - 1, who, hard);
        KP(53);
        chunk_settle(ctx, c - 1);
    }
    if (atomic_load(&ctx->rec->drain)) /* blocks in it are still being written */
        chunk_requeue(ctx, c - 1);
    return true;
}

uint64_t tm_evict(struct tm_ctx *ctx, uint64_t bytes)
{
    struct tm_segment *seg = ctx->seg;
    uint64_t before = atomic_load(&seg->super->nused), freed = 0;
    for (uint64_t tries = 0; freed < bytes && tries < 4 * before + 16; tries++) {
        op_begin(ctx);
        bool some = evict_chunk(ctx, -1, tries >= 2 * before);
        op_end(ctx);
        uint64_t now = atomic_load(&seg->super->nused);
        freed = now < before ? (before - now) * TM_CHUNK : 0;
        if (!some)
            break;
    }
    return freed;
}
