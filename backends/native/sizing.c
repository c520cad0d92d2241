/* The segment's bound, which moves below its ceiling, and memory that goes back when it falls.
 *
 * The ceiling sizes the tables and never changes. The limit bounds what everybody uses; persistent pages that find
 * nothing to evict (and clients below their floors) may pass it as far as `persistent_limit`: a swap device that is
 * refused a page has lost more than the memory is worth, and the manager knows how much there is. Lowering a limit
 * frees nothing by itself; tm_shrink does, ephemeral pages first. No page of a persistent pool is ever dropped, and no
 * promise broken: then the limit stays at what those need (least_limit).
 *
 * The limits are single words, changed under the control lock (floors are) and read without. */
#include "tm.h"

enum { SMALLEST = 64 }; /* chunks: fewer are used up by size classes alone */

static uint32_t chunks_of(const struct tm_segment *seg, uint64_t bytes)
{
    uint64_t chunks = bytes > seg->data_offset ? (bytes - seg->data_offset) / TM_CHUNK : 0;
    uint32_t least = SMALLEST < seg->nchunks ? SMALLEST : seg->nchunks;
    return chunks < least ? least : chunks < seg->nchunks ? (uint32_t)chunks : seg->nchunks;
}

static uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

void tm_size_within(struct tm_ctx *ctx, uint64_t least, uint64_t most)
{
    struct tm_segment *seg = ctx->seg;
    struct tm_lock *lock = control_lock(seg);
    uint32_t high = chunks_of(seg, most), low = chunks_of(seg, least);
    atomic_store(&seg->super->size_least, low < high ? low : high);
    atomic_store(&seg->super->size_most, high);
    lock_drop(lock);
}

uint64_t tm_limit(struct tm_ctx *ctx, uint64_t bytes, uint64_t persistent_bytes)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t limit = chunks_of(seg, bytes), persistent = chunks_of(seg, persistent_bytes);
    struct tm_lock *lock = control_lock(seg);
    chunks_lock(seg);
    uint32_t before = chunk_limit(seg, false), farthest = chunk_limit(seg, true), least = least_limit(seg);
    /* What has no room below a limit does not raise it, either: it waits for the next time. */
    limit = larger(limit, least < before ? least : before);
    persistent = larger(larger(persistent, limit), least < farthest ? least : farthest);
    atomic_store(&seg->super->limit, limit);
    atomic_store(&seg->super->persistent_limit, persistent);
    chunks_unlock(seg);
    lock_drop(lock);
    if (limit < before)
        atomic_fetch_add_explicit(&seg->super->shrinks, 1, memory_order_relaxed);
    return limit_bytes(seg, limit);
}

/* Chunks beyond the limit of those in use and `more`. */
static uint32_t excess(const struct tm_segment *seg, uint32_t more)
{
    uint32_t have = atomic_load_explicit(&seg->super->nused, memory_order_relaxed) + more, limit = chunk_limit(seg, false);
    return have > limit ? have - limit : 0;
}

/* Punch what is free, as far as it exceeds the limit, but for `keep` chunks. False: not now, somebody may still read
 * there. */
static bool trim_excess(struct tm_ctx *ctx, uint32_t keep, uint64_t *returned)
{
    uint32_t ret = atomic_load_explicit(&ctx->seg->super->nret, memory_order_relaxed), over = excess(ctx->seg, ret);
    uint32_t stays = ret > over ? ret - over : 0;
    if (!over || ret <= keep)
        return true;
    uint64_t some = tm_trim(ctx, (uint64_t)larger(stays, keep) * TM_CHUNK);
    *returned += some;
    return some || atomic_load_explicit(&ctx->seg->super->nret, memory_order_relaxed) <= keep;
}

int64_t hole_bytes(const struct tm_segment *seg)
{
    int64_t sum = 0;
    for (uint32_t first = BIN_PERSISTENT; first < BIN_LEAF; first += TM_NCLASSES) {
        if (first == BIN_OBJECT)
            first = BIN_EPHEMERAL;
        if (!atomic_load_explicit(&seg->bins[first].ready, memory_order_relaxed))
            continue; /* nor the other classes */
        for (uint32_t bin = first; bin < first + TM_NCLASSES; bin++)
            sum += (int64_t)atomic_load_explicit(&seg->bins[bin].room, memory_order_relaxed) * bin_stride(bin);
    }
    return sum;
}

uint64_t tm_shrink(struct tm_ctx *ctx, uint64_t keep_bytes, bool hard, uint64_t most_bytes)
{
    enum { STEP = 64 }; /* chunks between two looks: memory goes back while the rest is being evicted */
    uint32_t keep = (uint32_t)(keep_bytes / TM_CHUNK), over;
    uint64_t returned = 0;
    /* What is in use and too much is evicted, what is backed only trimmed: as long as that is refused, evicting more
     * would give nobody anything. */
    while (trim_excess(ctx, keep, &returned) && returned < most_bytes && (over = excess(ctx->seg, 0)))
        if (!tm_evict(ctx, -1, (uint64_t)(over < STEP ? over : STEP) * TM_CHUNK, hard))
            break;
    return returned;
}
