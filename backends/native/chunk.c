/* Chunks: where the segment's memory is. FREE (a hole in the file), RET (backed, unused), USED (by a bin), BUSY
 * (being populated or punched by one thread, whose index stands in `prev`).
 *
 * A hole is populated before its first use: touching a hole of a full tmpfs is SIGBUS, populating it is an error
 * that becomes a refused put. A RET chunk is punched only after a grace period: a reader that still copies from
 * it would otherwise allocate its pages again. The chunk lock guards states and lists; no system call is made
 * under it. */
#include "tm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

enum { RESERVE = 8 };  /* chunks that only the relocation of hot ephemeral pages may take */
enum { TRIES = 200 };  /* evictions that a put waits for before it is refused */
enum { BATCH = 64 };   /* chunks punched per grace period */

void chunks_lock(struct tm_segment *seg)
{
    if (lock_take(&seg->super->chunk_lock))
        repair_chunks(seg);
}

void chunks_unlock(struct tm_segment *seg) { lock_drop(&seg->super->chunk_lock); }

static void push_ret(struct tm_segment *seg, uint32_t c)
{
    seg->chunks[c].next = seg->super->ret_head;
    seg->super->ret_head = c + 1;
    atomic_store(&seg->states[c], CHUNK_RET);
    seg->super->nret++;
}

static void push_free(struct tm_segment *seg, uint32_t c)
{
    seg->chunks[c].next = seg->super->free_head;
    seg->super->free_head = c + 1;
    atomic_store(&seg->states[c], CHUNK_FREE);
    seg->super->nfree++;
}

static uint32_t pop_ret(struct tm_segment *seg)
{
    uint32_t c = seg->super->ret_head;
    if (c) {
        seg->super->ret_head = seg->chunks[c - 1].next;
        seg->super->nret--;
    }
    return c;
}

static uint32_t pop_free(struct tm_segment *seg)
{
    uint32_t c = seg->super->free_head;
    if (c) {
        seg->super->free_head = seg->chunks[c - 1].next;
        seg->super->nfree--;
    } else if (seg->super->fresh < seg->nchunks) {
        c = ++seg->super->fresh;
    }
    return c;
}

static struct tm_queue *queue_of(struct tm_segment *seg, uint32_t bin)
{
    return &seg->clients[bin_account(bin)].queues[bin_queue(bin)];
}

/* Ages of chunks are told in steps so large that no queue is longer than half of the times that `queued` holds. */
static unsigned age_shift(const struct tm_segment *seg)
{
    unsigned shift = 0;
    while (seg->nchunks >> shift > QUEUE_TIME / 2)
        shift++;
    return shift;
}

static void enqueue_locked(struct tm_segment *seg, uint32_t c)
{
    struct tm_chunk *d = &seg->chunks[c];
    struct tm_queue *q = queue_of(seg, d->bin);
    uint32_t now = atomic_load_explicit(&seg->clients[bin_account(d->bin)].begun, memory_order_relaxed);
    if (bin_queue(d->bin) == QUEUE_PROBATION)
        atomic_store_explicit(&seg->clients[bin_account(d->bin)].begun, ++now, memory_order_relaxed);
    d->queued = (uint16_t)(QUEUED | (now >> age_shift(seg) & QUEUE_TIME));
    d->qnext = 0;
    d->qprev = q->tail;
    if (q->tail)
        seg->chunks[q->tail - 1].qnext = c + 1;
    else
        q->head = c + 1;
    q->tail = c + 1;
    q->length++;
}

static void dequeue_locked(struct tm_segment *seg, uint32_t c)
{
    struct tm_chunk *d = &seg->chunks[c];
    struct tm_queue *q = queue_of(seg, d->bin);
    if (d->qprev)
        seg->chunks[d->qprev - 1].qnext = d->qnext;
    else
        q->head = d->qnext;
    if (d->qnext)
        seg->chunks[d->qnext - 1].qprev = d->qprev;
    else
        q->tail = d->qprev;
    d->queued = 0;
    q->length--;
}

/* A guess, read without a lock: a chunk that is reused this moment gives a wrong answer, which costs a hit's weight. */
bool block_is_young(struct tm_segment *seg, uint64_t block)
{
    const struct tm_chunk *d = &seg->chunks[chunk_of(seg, block * 16)];
    uint32_t bin = d->bin;
    if (!bin_is_ephemeral(bin) || bin_queue(bin) != QUEUE_PROBATION)
        return false;
    const struct tm_client *who = &seg->clients[bin_account(bin)];
    unsigned shift = age_shift(seg);
    uint32_t now = atomic_load_explicit(&who->begun, memory_order_relaxed) >> shift;
    uint32_t age = (now - d->queued) & QUEUE_TIME;
    uint32_t length = atomic_load_explicit(&who->queues[QUEUE_PROBATION].length, memory_order_relaxed);
    return !age || (age << shift) * 3 < length;
}

static void count_index_locked(struct tm_segment *seg, uint32_t bin, uint32_t n)
{
    if (bin >= BIN_LEAF && (bin - BIN_LEAF) / 3 < TM_FIRST_SHARED)
        seg->clients[(bin - BIN_LEAF) / 3 / TM_CLIENT_POOLS].index_chunks += n;
}

/* Give chunk `c`, in no list now, to `bin`; we own it and have noted the intent. */
static void use_locked(struct tm_ctx *ctx, uint32_t c, uint32_t bin)
{
    struct tm_segment *seg = ctx->seg;
    struct tm_chunk *d = &seg->chunks[c];
    d->bin = (uint16_t)bin;
    d->flags = CF_OWNED;
    d->prev = ctx->index;
    d->nfree = (uint16_t)(TM_CHUNK / bin_stride(bin));
    memset(d->bitmap, 0, sizeof d->bitmap);
    if (bin_is_ephemeral(bin))
        enqueue_locked(seg, c);
    count_index_locked(seg, bin, 1);
    KP(10);
    atomic_store(&seg->states[c], CHUNK_USED);
}

static void busy_locked(struct tm_ctx *ctx, uint32_t c)
{
    ctx->seg->chunks[c].prev = ctx->index;
    atomic_store(&ctx->seg->states[c], CHUNK_BUSY);
}

static bool populate(struct tm_segment *seg, uint32_t c)
{
    uint64_t offset = seg->data_offset + (uint64_t)c * TM_CHUNK;
    int rc;
    /* First the pages, then the mapping of them: together a fifth less CPU than the mapping alone. A signal ends it on older
     * kernels, and a mount's event loop is called by signals (`reader_sentry`): that is no lack of memory. */
    do
        rc = fallocate(seg->fd, 0, (off_t)offset, TM_CHUNK);
    while (rc && errno == EINTR);
    if (rc && errno != EOPNOTSUPP)
        return false;
    return madvise(at(seg, offset), TM_CHUNK, MADV_POPULATE_WRITE) == 0 || errno == EINVAL; /* before Linux 5.14 */
}

static void punch_run(struct tm_segment *seg, uint32_t c, uint32_t n)
{
    /* Not MADV_REMOVE: that is refused on a locked mapping. */
    (void)fallocate(seg->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                    (off_t)(seg->data_offset + (uint64_t)c * TM_CHUNK), (off_t)n * TM_CHUNK);
}

static void punch(struct tm_segment *seg, uint32_t c) { punch_run(seg, c, 1); }

static int by_number(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* Neighbours in one call: what was filled together is mostly evicted together. */
static void punch_all(struct tm_segment *seg, uint32_t *batch, uint32_t n)
{
    qsort(batch, n, sizeof *batch, by_number);
    for (uint32_t i = 0, run; i < n; i += run) {
        for (run = 1; i + run < n && batch[i + run] == batch[i] + run; run++)
            continue;
        punch_run(seg, batch[i], run);
    }
}

static uint32_t available_locked(const struct tm_segment *seg, uint32_t limit)
{
    uint32_t used = atomic_load_explicit(&seg->super->nused, memory_order_relaxed);
    return limit > used ? limit - used : 0;
}

uint32_t chunks_kept(const struct tm_segment *seg)
{
    return seg->nchunks / 16 < RESERVE ? seg->nchunks / 16 : RESERVE;
}

/* Populate a FREE chunk and leave it in state BUSY, ours. 1-based; 0 if there is none or no memory. Called and
 * returns with the chunk lock held, which is dropped in between. */
static uint32_t back_one(struct tm_ctx *ctx)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t c = pop_free(seg);
    if (!c)
        return 0;
    busy_locked(ctx, c - 1);
    seg->super->nused++;
    chunks_unlock(seg);
    KP(11);
    bool backed = populate(seg, c - 1);
    if (!backed)
        punch(seg, c - 1);
    chunks_lock(seg);
    if (backed)
        return c;
    push_free(seg, c - 1);
    seg->super->nused--;
    return 0;
}

uint32_t chunks_available(struct tm_segment *seg, uint32_t limit)
{
    uint32_t free = available_locked(seg, limit), keep = chunks_kept(seg);
    return free > keep ? free - keep : 0;
}

/* How many chunks must stay free for others when `ctx` takes one. */
static uint32_t kept_for_others(struct tm_ctx *ctx, enum alloc how)
{
    if (how == ALLOC_SPARE) /* more comes back, and what was promised is found by compaction meanwhile */
        return chunks_kept(ctx->seg) / 2;
    return how == ALLOC_RESERVE ? 0 : chunks_kept(ctx->seg) + promised_chunks(ctx->seg, ctx->payer);
}

/* How many chunks may be in use when `ctx` takes one. What moves hot pages frees as much in a moment: it may pass the
 * limit by a chunk of each size class. Beyond the limit, where nothing can be evicted, goes who must not be refused. */
static uint32_t limit_for(struct tm_ctx *ctx, enum alloc how, bool beyond)
{
    return how == ALLOC_RESERVE ? ctx->seg->nchunks : chunk_limit(ctx->seg, beyond);
}

static bool must_have(struct tm_ctx *ctx)
{
    return ctx->seg->pools[ctx->pool].persistent || below_floor(ctx->seg, ctx->payer);
}

static bool may_pass_limit(struct tm_ctx *ctx)
{
    return chunk_limit(ctx->seg, true) > chunk_limit(ctx->seg, false) && must_have(ctx);
}

static void note_drains(struct tm_segment *seg, unsigned n)
{
    if (n > atomic_load_explicit(&seg->super->drains_most, memory_order_relaxed))
        atomic_store_explicit(&seg->super->drains_most, n, memory_order_relaxed);
}

static uint32_t chunks_in_use(const struct tm_segment *seg)
{
    return atomic_load_explicit(&seg->super->nused, memory_order_relaxed);
}

uint32_t chunk_take(struct tm_ctx *ctx, uint32_t bin, enum alloc how)
{
    struct tm_segment *seg = ctx->seg;
    bool beyond = false, instead = false; /* of what it freed */
    for (unsigned tries = 0; tries < TRIES; tries++) {
        uint32_t c = 0;
        chunks_lock(seg);
        uint32_t limit = instead ? seg->nchunks : limit_for(ctx, how, beyond);
        if (available_locked(seg, limit) > kept_for_others(ctx, how)) {
            if ((c = pop_ret(seg))) {
                seg->super->nused++;
                busy_locked(ctx, c - 1);
            } else {
                c = back_one(ctx);
            }
            if (c) {
                atomic_store(&ctx->rec->chunk, c);
                KP(12);
                use_locked(ctx, c - 1, bin);
            }
        }
        chunks_unlock(seg);
        if (tries)
            note_drains(seg, tries);
        if (c)
            return c;
        if (how != ALLOC_NORMAL)
            return 0;
        uint32_t before = chunks_in_use(seg);
        bool far = before > chunk_limit(seg, false);
        bool some = evict_chunk(ctx, -1, tries >= SOFT);
        /* The limit has fallen by more than a put can make room for, and the rest is tm_shrink's: who must not be refused
         * takes what it has freed itself, and others give up in time. */
        if (far && !must_have(ctx) && tries >= 2 * SOFT)
            break;
        instead = instead || (far && must_have(ctx) && some && (tries >= SOFT || chunks_in_use(seg) < before));
        /* Also if there is only something to evict that cannot be, because somebody is stopped at it. */
        if ((!some || tries >= 2 * SOFT) && !compact(ctx) && !some) {
            if (beyond || !may_pass_limit(ctx))
                break;
            beyond = true;
        }
        beyond = beyond || (tries >= 4 * SOFT && may_pass_limit(ctx));
    }
    return 0;
}

void chunk_release(struct tm_ctx *ctx, uint32_t c)
{
    struct tm_segment *seg = ctx->seg;
    KP(13);
    chunks_lock(seg);
    if (seg->chunks[c].queued)
        dequeue_locked(seg, c);
    count_index_locked(seg, seg->chunks[c].bin, UINT32_MAX);
    KP(14);
    push_ret(seg, c);
    seg->super->nused--;
    KP(15);
    if (atomic_load(&ctx->rec->chunk) == c + 1)
        atomic_store(&ctx->rec->chunk, 0);
    if (atomic_load(&ctx->rec->drain) == c + 1)
        atomic_store(&ctx->rec->drain, 0);
    chunks_unlock(seg);
}

uint32_t queue_pop(struct tm_ctx *ctx, uint32_t account, unsigned queue, uint32_t *bin)
{
    struct tm_segment *seg = ctx->seg;
    chunks_lock(seg);
    uint32_t c = seg->clients[account].queues[queue].head;
    if (c) {
        atomic_store(&ctx->rec->drain, c);
        KP(16);
        *bin = seg->chunks[c - 1].bin;
        dequeue_locked(seg, c - 1);
    }
    chunks_unlock(seg);
    return c;
}

void chunk_requeue(struct tm_ctx *ctx, uint32_t c)
{
    struct tm_segment *seg = ctx->seg;
    chunks_lock(seg);
    if (atomic_load(&seg->states[c]) == CHUNK_USED && bin_is_ephemeral(seg->chunks[c].bin) && !seg->chunks[c].queued)
        enqueue_locked(seg, c);
    atomic_store(&ctx->rec->drain, 0);
    chunks_unlock(seg);
}

uint64_t tm_populate(struct tm_ctx *ctx, uint64_t bytes)
{
    struct tm_segment *seg = ctx->seg;
    uint64_t added = 0, most = (uint64_t)seg->nchunks * TM_CHUNK;
    atomic_store(&seg->super->keep, (uint32_t)((bytes < most ? bytes : most) / TM_CHUNK));
    for (bool more = true; more;) {
        chunks_lock(seg);
        more = (uint64_t)seg->super->nret * TM_CHUNK < bytes
               && seg->super->nused + seg->super->nret < chunk_limit(seg, true);
        uint32_t c = more ? back_one(ctx) : 0;
        if (c) {
            push_ret(seg, c - 1);
            seg->super->nused--;
            added += TM_CHUNK;
        }
        more = c != 0;
        chunks_unlock(seg);
    }
    return added;
}

uint64_t tm_trim(struct tm_ctx *ctx, uint64_t keep_bytes)
{
    struct tm_segment *seg = ctx->seg;
    uint64_t returned = 0;
    atomic_fetch_add_explicit(&seg->super->trims, 1, memory_order_relaxed);
    for (;;) {
        uint32_t batch[BATCH], n = 0;
        chunks_lock(seg);
        while (n < BATCH && (uint64_t)seg->super->nret * TM_CHUNK > keep_bytes) {
            batch[n] = pop_ret(seg) - 1;
            busy_locked(ctx, batch[n++]);
            seg->super->nused++;
        }
        chunks_unlock(seg);
        KP(17);
        /* Whoever is stopped inside an operation may still read: then keep the memory, never punch anyway. */
        bool safe = n && grace(ctx, 200);
        if (safe)
            punch_all(seg, batch, n);
        KP(18);
        chunks_lock(seg);
        for (uint32_t i = 0; i < n; i++) {
            if (safe)
                push_free(seg, batch[i]);
            else
                push_ret(seg, batch[i]);
            seg->super->nused--;
        }
        chunks_unlock(seg);
        returned += safe ? (uint64_t)n * TM_CHUNK : 0;
        atomic_fetch_add_explicit(&seg->super->trimmed_bytes, safe ? (uint64_t)n * TM_CHUNK : 0, memory_order_relaxed);
        if (n < BATCH || !safe)
            return returned;
    }
}

void chunk_maintain(struct tm_ctx *ctx)
{
    /* Far more than the reserve that was asked for: the manager is not running, or not keeping up. */
    uint64_t keep = atomic_load_explicit(&ctx->seg->super->keep, memory_order_relaxed);
    uint64_t high = keep + 128 + atomic_load_explicit(&ctx->seg->super->nused, memory_order_relaxed) / 8;
    if (atomic_load_explicit(&ctx->seg->super->nret, memory_order_relaxed) > high)
        tm_trim(ctx, (keep + (high - keep) / 2) * TM_CHUNK);
}

bool chunk_free_busy(struct tm_ctx *ctx, uint32_t owner)
{
    struct tm_segment *seg = ctx->seg;
    for (uint32_t c = 0; c < seg->nchunks; c++) {
        uint8_t *hit = memchr((uint8_t *)seg->states + c, CHUNK_BUSY, seg->nchunks - c);
        if (!hit)
            break;
        c = (uint32_t)(hit - (uint8_t *)seg->states);
        KP(39);
        chunks_lock(seg); /* else it may be in use by now, and what looked like its owner a link of its list */
        bool his = (atomic_load(&seg->states[c]) == CHUNK_BUSY || MUTANT(29)) && seg->chunks[c].prev == owner;
        chunks_unlock(seg);
        if (!his)
            continue;
        /* Perhaps backed, perhaps not: after the punch it certainly is a hole. It was in no list, and a thread
         * that read in it before it became RET is waited for as in tm_trim. */
        if (!grace(ctx, 200))
            return false;
        punch(seg, c);
        chunks_lock(seg);
        if (atomic_load(&seg->states[c]) == CHUNK_BUSY && seg->chunks[c].prev == owner) {
            push_free(seg, c);
            seg->super->nused--;
        }
        chunks_unlock(seg);
    }
    return true;
}
