/* Emptying chunks: eviction of ephemeral pages (S3-FIFO with chunks as the unit), and moving persistent ones together.
 *
 * Each account has two queues of chunks, oldest first. New pages go to chunks of the PROBATION queue. Draining its
 * oldest chunk moves the pages that were hit meanwhile to MAIN and evicts the others, leaving the time of eviction
 * in the empty slot (the ghost): a page that is put again while its ghost is fresh goes to MAIN at once. Draining
 * MAIN's oldest chunk puts hit pages back at its end with one hit less; those that it evicts leave no ghost. After a
 * drain the whole chunk is free, for whatever size class needs it, so memory never stays caught in the wrong class.
 *
 * Where this differs from S3-FIFO as published: one hit earns MAIN, not two, but hits of pages that are still in the
 * youngest third of PROBATION do not count (slot.c). A page that is read twice at once, because two requests meet in
 * it or a reader comes back for the rest, has not proved that it will be wanted again; one that is read again after
 * some time has. Such a page begins in MAIN without credit, as one with a ghost does.
 *
 * Moving frees nothing by itself. Somebody who waits for memory therefore drains HARD after eight drains that
 * did not help: then hit pages go too, and every drain frees its chunk.
 *
 * Persistent pages are never evicted, but their size classes may share out the memory badly: a class whose pages were
 * flushed holds chunks that are half empty. When nothing else is left, `compact` moves the pages of such a chunk into
 * the holes of others, so that a put is refused only when there really is no memory. */
#include "tm.h"

#include <string.h>

bool ghost_is_fresh(struct tm_segment *seg, uint32_t pool, uint64_t word)
{
    uint64_t then = word & SLOT_VALUE;
    if (!then)
        return false;
    if (is_originals(pool)) /* not a ghost: a twin may name the slot, so it must stay and not be another's */
        return original_is_evicted(seg, pool, word) && !MUTANT(34);
    if (seg->pools[pool].persistent) /* not a ghost: a page whose flush a handoff has not passed on yet */
        return phase_of(seg, pool / TM_CLIENT_POOLS) != PHASE_NONE;
    uint64_t now = atomic_load_explicit(&seg->clients[account_of(pool)].evict_clock, memory_order_relaxed);
    /* As many ghosts as pages: S3-FIFO's ghost queue has the size of the main one. */
    int64_t pages = atomic_load_explicit(&seg->pools[pool].pages, memory_order_relaxed);
    return now - then < (uint64_t)(pages > 64 ? pages : 64);
}

static uint32_t length_of(struct tm_segment *seg, uint32_t account, unsigned queue)
{
    return atomic_load_explicit(&seg->clients[account].queues[queue].length, memory_order_relaxed);
}

/* A queue of few chunks that were divided among many size classes would be drained before its chunks are half full.
 * So there are at most a third as many classes as chunks, as long as no block is a quarter larger than it must be. */
uint32_t ephemeral_bin(struct tm_segment *seg, uint32_t account, unsigned queue, uint32_t length)
{
    uint32_t cls = size_class(length), best = cls, chunks = length_of(seg, account, queue);
    for (uint32_t step = 1; cls < TM_NCLASSES - 1 && TM_NCLASSES / step > chunks / 3; step *= 2) {
        uint32_t top = cls | (2 * step - 1); /* of the group that shares a bin */
        if (top >= TM_NCLASSES - 1)
            top = TM_NCLASSES - 2; /* the last class is that of raw pages, which are told by it */
        if (tm_strides[top] * 4u > tm_strides[cls] * 5u)
            break;
        best = top;
    }
    return bin_ephemeral(account, queue, best);
}

static bool is_sound(const struct tm_block *b, uint64_t header, uint64_t number)
{
    return header_slot(header) == number && block_length(header) <= TM_PAGE
           && b->checksum == block_checksum(b, header, atomic_load(&b->stamp));
}

/* Copy a sound ephemeral page to the end of `queue` of its account, compressed if it was loose. False: no room, the page
 * changed, or with `smaller` it would not shrink. */
static bool requeue_page(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint64_t word, unsigned queue, bool smaller)
{
    struct tm_segment *seg = ctx->seg;
    const struct tm_block *from = block_at(seg, word & SLOT_VALUE);
    uint64_t number = slot_number(seg, slot), header = atomic_load(&from->word);
    uint32_t old_bin = seg->chunks[chunk_of(seg, (word & SLOT_VALUE) * 16)].bin, length = block_length(header);
    uint32_t form = block_form(header);
    const uint8_t *payload = (const uint8_t *)(from + 1);
    if (!is_sound(from, header, number) || !bin_is_ephemeral(old_bin))
        return false; /* corrupt: evict it */
    bool loose = block_kind(header) == BLOCK_LOOSE && length == TM_PAGE;
    if (loose) {
        uint64_t began = timing_now();
        memcpy(ctx->moved, payload, TM_PAGE); /* what is compressed must not change */
        length = codec_compress(ctx, ctx->moved, ctx->packed);
        form = length < TM_PAGE ? BLOCK_LZ4 : BLOCK_RAW;
        payload = length < TM_PAGE ? ctx->packed : ctx->moved;
        atomic_fetch_add_explicit(&seg->super->squeezing_ns, timing_now() - began, memory_order_relaxed);
    }
    if (smaller && form != BLOCK_LZ4)
        return false;
    uint32_t bin = ephemeral_bin(seg, bin_account(old_bin), queue, length), payer = payer_of(seg, pool) % TM_MAX_CLIENTS;
    if (bin_stride(bin) > bin_stride(old_bin) && !has_cap_for(seg, payer, bin_stride(bin) - bin_stride(old_bin)) && !MUTANT(43))
        bin = bin_ephemeral(bin_account(old_bin), queue, size_class(length)); /* the only one that is as small for certain */
    uint64_t block = block_alloc(ctx, bin, ALLOC_RESERVE);
    if (!block)
        return false;
    block_write(block_at(seg, block), number, form, length, payload);
    KP(50);
    /* In MAIN it begins without credit, or with one hit less. */
    uint64_t bits = word & SLOT_FREQ;
    if (queue == QUEUE_MAIN)
        bits = bin_queue(old_bin) == QUEUE_PROBATION || !bits ? 0 : bits - SLOT_FREQ_ONE;
    if (!slot_replace(ctx, pool, slot, &word, slot_next(word, SLOT_BLOCK, block) | bits)) {
        block_free_new(ctx);
        return false;
    }
    if (loose && form == BLOCK_LZ4) {
        atomic_fetch_add_explicit(&seg->super->squeezed, 1, memory_order_relaxed);
        atomic_fetch_add_explicit(&seg->super->squeezed_bytes, bin_stride(old_bin) - bin_stride(bin),
                                  memory_order_relaxed);
    }
    return true;
}

/* Copy a page as it is out of a chunk that is to be freed, into one of the same bin or into larger holes, as far as its
 * client's cap allows: whoever moves it does so for others. False: no room, or the page changed. */
static bool relocate(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint64_t word, uint32_t bin)
{
    struct tm_segment *seg = ctx->seg;
    const struct tm_block *from = block_at(seg, word & SLOT_VALUE);
    uint64_t number = slot_number(seg, slot), header = atomic_load(&from->word);
    uint32_t length = block_length(header);
    if (header_slot(header) != number || length + TM_HEADER > bin_stride(bin))
        return false; /* corrupt: leave it for whoever asks */
    bool sound = is_sound(from, header, number);
    if (!sound && bin_is_ephemeral(bin))
        return false;
    uint32_t payer = payer_of(seg, pool) % TM_MAX_CLIENTS;
    uint64_t block = block_alloc(ctx, bin, ALLOC_LISTED);
    for (uint32_t larger = bin + 1; !block && larger < TM_NCLASSES - 1; larger++)
        if (atomic_load_explicit(&seg->bins[larger].room, memory_order_relaxed)
            && has_cap_for(seg, payer, bin_stride(larger) - bin_stride(bin)))
            block = block_alloc(ctx, larger, ALLOC_LISTED);
    if (!block)
        return false;
    uint32_t form = MUTANT(50) ? (uint32_t)block_kind(header) : block_form(header);
    block_write(block_at(seg, block), number, form, length, (const uint8_t *)(from + 1));
    if (!sound)
        block_at(seg, block)->checksum ^= 1; /* and stays corrupt for whoever asks */
    KP(50);
    if (slot_replace(ctx, pool, slot, &word, slot_next(word, SLOT_BLOCK, block) | (word & SLOT_FREQ)))
        return true;
    block_free_new(ctx);
    return false;
}

/* Call `each` for every committed page of chunk `c`, which we own, until it returns false. */
static void each_page(struct tm_ctx *ctx, uint32_t c,
                      bool (*each)(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint64_t word, uint32_t bin, bool hard),
                      bool hard)
{
    struct tm_segment *seg = ctx->seg;
    struct tm_chunk *d = &seg->chunks[c];
    uint32_t stride = bin_stride(d->bin);
    for (uint32_t bit = 0; bit < TM_CHUNK / stride; bit++) {
        if (!bit_is_set(d, bit))
            continue;
        uint64_t block = (seg->data_offset + (uint64_t)c * TM_CHUNK + (uint64_t)bit * stride) / 16;
        uint64_t number = header_slot(atomic_load(&block_at(seg, block)->word));
        int pool = slot_pool(seg, number);
        if (pool < 0)
            continue; /* a header not yet written */
        slot_t *slot = at(seg, number * 8);
        for (uint64_t word = atomic_load(slot); slot_refers(word, block); word = atomic_load(slot))
            if (!each(ctx, (uint32_t)pool, slot, word, d->bin, hard))
                return;
    }
}

/* Evict the page or, unless `hard`, move it away if it earned it, or if it is loose and need not go. Who evicts on
 * nobody's behalf wants the memory at once. */
static bool drain_page(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint64_t word, uint32_t bin, bool hard)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t account = bin_account(bin);
    bool loose = block_kind(atomic_load(&block_at(seg, word & SLOT_VALUE)->word)) == BLOCK_LOOSE;
    if (!hard && slot_freq(word) && requeue_page(ctx, pool, slot, word, QUEUE_MAIN, false))
        return true;
    if (!hard && !slot_freq(word) && loose && ctx->client < TM_MAX_CLIENTS
        && requeue_page(ctx, pool, slot, word, bin_queue(bin), true))
        return true;
    uint64_t block = word & SLOT_VALUE, clock = atomic_fetch_add(&seg->clients[account].evict_clock, 1) + 1;
    uint64_t ghost = bin_queue(bin) == QUEUE_PROBATION ? clock & SLOT_VALUE : 0;
    word = atomic_load(slot);
    if (slot_refers(word, block)
        && slot_replace(ctx, pool, slot, &word, slot_next(word, SLOT_EMPTY, original_trace(seg, pool, ghost)))) {
        count(seg, pool, C_EVICTIONS, 1);
        look_for_empty(seg);
        KP(51);
    }
    return true;
}

static bool move_page(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint64_t word, uint32_t bin, bool hard)
{
    (void)hard;
    if (!relocate(ctx, pool, slot, word, bin)) {
        return atomic_load(slot) != word; /* it changed: look again; else there is no hole for it */
    }
    atomic_fetch_add_explicit(&ctx->seg->super->relocated, 1, memory_order_relaxed);
    return true;
}

/* The same by who has time; a pack that most of its pages have left is taken apart rather than moved. */
static bool gather_page(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint64_t word, uint32_t bin, bool hard)
{
    if (is_packs(pool) && !MUTANT(64)) {
        pack_gather(ctx, pool, slot, word);
        if (atomic_load(slot) != word)
            return true;
    }
    return move_page(ctx, pool, slot, word, bin, hard);
}

/* Own chunk `c` of `bin` (intent drain stands), empty it with `each`, and release it (true) or list it again. */
static bool empty_chunk(struct tm_ctx *ctx, uint32_t c, uint32_t bin,
                        bool (*each)(struct tm_ctx *ctx, uint32_t pool, slot_t *slot, uint64_t word, uint32_t bin,
                                     bool hard),
                        bool hard)
{
    bool released = false;
    KP(52);
    if (chunk_own(ctx, c, bin)) {
        each_page(ctx, c, each, hard);
        KP(53);
        released = chunk_settle(ctx, c);
    }
    if (atomic_load(&ctx->rec->drain)) /* blocks in it are still being written, or there was no room for all */
        chunk_requeue(ctx, c);
    return released;
}

bool evict_chunk(struct tm_ctx *ctx, int client, bool hard)
{
    struct tm_segment *seg = ctx->seg;
    int account = client < 0 ? victim(seg, (int)ctx->payer) : fullest_account(seg, (uint32_t)client);
    if (account < 0)
        return false;
    uint32_t who = (uint32_t)account;
    uint32_t probation = length_of(seg, who, QUEUE_PROBATION), main_length = length_of(seg, who, QUEUE_MAIN);
    /* S3-FIFO: probation has a tenth of the memory. Of its chunks, the one that is being filled counts half. */
    bool much = (uint64_t)probation * 10 > (uint64_t)probation + main_length + 5;
    unsigned queue = probation && (much || !main_length) ? QUEUE_PROBATION : QUEUE_MAIN;
    uint32_t bin = 0, c = queue_pop(ctx, who, queue, &bin);
    if (!c)
        return probation + main_length > 0; /* others drain the last ones this moment */
    atomic_fetch_add_explicit(&seg->super->drains, 1, memory_order_relaxed);
    empty_chunk(ctx, c - 1, bin, drain_page, hard);
    return true;
}

/* The emptiest of the first listed chunks of a bin of persistent blocks whose pages fit into its others. */
static uint32_t sparse_chunk(struct tm_segment *seg, uint32_t *from)
{
    uint32_t best = 0, most = 0;
    uint32_t larger = 0; /* holes of larger classes, but for raw pages, which are told by the size of their blocks */
    for (uint32_t bin = BIN_PERSISTENT + TM_NCLASSES; bin-- > BIN_PERSISTENT;) {
        uint32_t units = TM_CHUNK / bin_stride(bin), own = atomic_load(&seg->bins[bin].room), looked = 0;
        uint32_t room = own + larger;
        larger += bin < TM_NCLASSES - 1 ? own : 0;
        if (room < units)
            continue; /* with one chunk's units less there would not be room for its pages */
        struct tm_bin *b = bin_lock(seg, bin);
        for (uint32_t c = b->partial; c && looked < 64; c = seg->chunks[c - 1].next, looked++) {
            uint32_t gain = seg->chunks[c - 1].nfree * bin_stride(bin); /* the more holes, the less to move */
            if (room >= units && gain > most) {
                most = gain;
                best = c;
                *from = bin;
            }
        }
        lock_drop(&b->lock);
    }
    return best;
}

bool compact(struct tm_ctx *ctx)
{
    struct tm_segment *seg = ctx->seg;
    uint32_t bin = 0, c = sparse_chunk(seg, &bin);
    if (!c || atomic_load(&ctx->rec->drain))
        return false;
    uint64_t began = timing_now(); /* here, so that who finds nothing to move reads no clock */
    atomic_store(&ctx->rec->drain, c);
    bool freed = empty_chunk(ctx, c - 1, bin, move_page, false);
    atomic_fetch_add_explicit(&seg->super->compacted, freed, memory_order_relaxed);
    atomic_fetch_add_explicit(&seg->super->compacting_ns, timing_now() - began, memory_order_relaxed);
    return freed;
}

uint64_t block_spare(struct tm_ctx *ctx, uint32_t bin)
{
    uint64_t block = block_alloc(ctx, bin, ALLOC_SPARE);
    return block || !compact(ctx) ? block : block_alloc(ctx, bin, ALLOC_SPARE);
}

/* Would moving the pages of chunk `c` into holes of its bin gain a chunk, and is it worth it? A guess. */
static bool worth_emptying(struct tm_segment *seg, uint32_t c, unsigned holes)
{
    const struct tm_chunk *d = &seg->chunks[c];
    uint32_t bin = d->bin;
    if (atomic_load_explicit(&seg->states[c], memory_order_relaxed) != CHUNK_USED || !bin_is_block(bin)
        || !(d->flags & CF_LISTED))
        return false;
    uint32_t units = TM_CHUNK / bin_stride(bin);
    return d->nfree * 16u >= units * holes && atomic_load_explicit(&seg->bins[bin].room, memory_order_relaxed) >= units;
}

/* Move the pages of all chunks of which at least `holes` sixteenths are free together, for at most `most_ns`; the
 * bytes of the chunks that came free. The next call goes on where this one ends. Not for when memory is needed this
 * moment: see tm_evict and compact. */
uint64_t tm_compact(struct tm_ctx *ctx, unsigned holes, uint64_t most_ns)
{
    enum { SOME = 1024 }; /* chunks that are looked at in a tenth of a millisecond */
    struct tm_segment *seg = ctx->seg;
    uint64_t freed = 0, began = timing_now(), until = began + most_ns;
    ctx->client = ctx->payer = TM_MAX_CLIENTS; /* on nobody's behalf */
    for (uint32_t looked = 0; looked < seg->nchunks; looked++) {
        uint32_t c = atomic_load_explicit(&seg->compact_from, memory_order_relaxed) % seg->nchunks;
        bool worth = worth_emptying(seg, c, holes);
        if ((worth || looked % SOME == 0) && timing_now() > until)
            break;
        atomic_store_explicit(&seg->compact_from, c + 1, memory_order_relaxed);
        if (!worth)
            continue;
        op_begin(ctx);
        atomic_store(&ctx->rec->drain, c + 1);
        freed += empty_chunk(ctx, c, seg->chunks[c].bin, gather_page, false);
        op_end(ctx);
    }
    atomic_fetch_add_explicit(&seg->super->compacted, freed, memory_order_relaxed);
    atomic_fetch_add_explicit(&seg->super->compacting_ns, timing_now() - began, memory_order_relaxed);
    return freed * TM_CHUNK;
}

/* Evict until that much memory is free, of `client` or (-1) of whose turn it is; the bytes that came free. Drains that only
 * move pages end after a few, as in chunk_take, and so do those of chunks that others are at. */
uint64_t tm_evict(struct tm_ctx *ctx, int client, uint64_t bytes, bool hard)
{
    enum { VAIN = 8 * SOFT };
    struct tm_segment *seg = ctx->seg;
    uint64_t before = atomic_load(&seg->super->nused), freed = 0;
    bool some = true;
    if (client >= 0)
        before = client_chunks(seg, (uint32_t)client);
    ctx->client = ctx->payer = TM_MAX_CLIENTS; /* on nobody's behalf */
    for (unsigned vain = 0; some && freed < bytes && vain < VAIN; vain++) {
        hard = hard || vain >= SOFT;
        op_begin(ctx);
        some = evict_chunk(ctx, client, hard);
        op_end(ctx);
        uint64_t now = client >= 0 ? client_chunks(seg, (uint32_t)client) : atomic_load(&seg->super->nused);
        if (now + freed / TM_CHUNK < before) {
            freed = (before - now) * TM_CHUNK;
            vain = 0;
        }
    }
    return freed;
}
